"""Pseudo-labels: the filter on hand-made and generated texts, the manifest, the demo's models."""

import json
import os
import random

import numpy as np
import pytest
import soundfile
import torch

import data
import decode
import finetune_rnnt
import model
from methods import pseudo_label
from methods.pseudo_label import judge, label_recordings, loops, phone_distance
from tools.recognisers import cut_at_quiet_places, join_segments, load_recogniser
from tools.word_errors import word_errors

CLEAN = "he could not see the end of the road from where he stood"
TEACHER = str(data.DEMO / "teachers/whisper")
VALIDATOR = str(data.DEMO / "teachers/hubert")


# ---------------------------------------- the filter


@pytest.mark.parametrize(
    "teacher, validator, keep, reason",
    [
        (CLEAN, CLEAN, True, "agree"),
        (CLEAN, "He could not see the end of the road, from where he stood!", True, "agree"),
        (CLEAN, CLEAN.replace("road", "rode").replace("stood", "stud"), True, "agree"),
        (CLEAN, "nobody spoke about what had happened in the garden", False, "disagree"),
        (CLEAN, "", False, "disagree"),
        ("thank you " * 20, CLEAN, False, "teacher loops"),
        (CLEAN, "thank you " * 20, True, "validator loops"),
        ("thank you " * 20, "thank you " * 20, False, "teacher loops"),
        ("", CLEAN, False, "empty"),
        ("...", "", False, "empty"),
        ("今天讲 machine learning 的概念", "今天讲 machine learning 的概念", True, "agree"),
        ("今天讲 machine learning 的概念", "他昨天去了 supermarket 买东西", False, "disagree"),
        ("谢谢观看" * 10, "我们今天讲的是基本概念", False, "teacher loops"),
        ("room 101 on floor 7", "room 101 on floor 7", True, "agree"),
        ("room 101", "room one hundred and one", False, "disagree"),
    ],
)
def test_the_filter(teacher, validator, keep, reason):
    verdict = judge(teacher, validator)
    assert verdict["keep"] is keep
    assert reason in verdict["reason"]
    # The paper's equation.
    agreement = min(1 - verdict["validator_loops"], verdict["per"])
    assert verdict["distance"] == max(verdict["teacher_loops"], agreement)


def test_phone_distance_is_an_edit_distance_of_letters():
    assert phone_distance("a b c", "abc") == 0
    assert phone_distance("ABCD", "abxd") == 0.25
    assert phone_distance("ab", "abcd") == 0.5
    assert phone_distance("", "abc") == 1
    assert phone_distance("", "") == 0


# ---------------------------------------- loops

# 150 different words of made-up human text, and Chinese characters of which none occurs twice.
WORDS = [
    first + second
    for first in "ba de fi go lu ma ne pi ro su".split()
    for second in "ck den fer ging kel lo mer nt per rth sel ten ver wn x".split()
]
CHARACTERS = "今天我们学习机器的基本概念首先看一下这张图表示什么然后讨论如何训练模型并且评估结果"


@pytest.mark.parametrize(
    "alphabet, space, sizes",
    [(WORDS, " ", (2, 8)), (CHARACTERS, "", (3, 8))],
    ids=["words", "Chinese"],
)
def test_every_phrase_three_times_in_a_row_is_found(alphabet, space, sizes):
    generator = random.Random(0)
    for _ in range(300):
        size = generator.randint(*sizes)
        times = generator.randint(3, 10)
        text = generator.sample(list(alphabet), min(70, len(alphabet)))
        phrase = generator.sample(list(alphabet), size)
        place = generator.choice([0, len(text) // 2, len(text)])
        looped = text[:place] + phrase * times + text[place:]
        assert loops(space.join(looped)), looped
        # Whisper's loops at the end of a text break off in the middle.
        broken_off = text + phrase * times + phrase[: size // 2]
        assert loops(space.join(broken_off)), broken_off
        assert not loops(space.join(text + phrase * 2))


@pytest.mark.parametrize("repeated, space", [("ba", " "), ("never", " "), ("对", ""), ("非常", "")])
def test_one_word_is_a_loop_from_six_times_in_a_row(repeated, space):
    """Human: "no no no", "very very very good"; five in a row is the most that read books have."""
    for times in range(2, 12):
        words = WORDS[:40] + [space.join([repeated] * times)] + WORDS[40:80]
        assert loops(" ".join(words)) is (times >= 6)


def test_loops_inside_words_and_loops_with_changes():
    assert loops(f"{CLEAN} HAHAHAHAHAHAHAHA {CLEAN}")
    lines = [f"and the number {number}" for number in "one two six ten five nine".split()]
    assert loops(" ".join(lines))
    assert not loops("1000000 people have 200 000 000 coins")
    assert not loops("") and not loops("ab") and not loops("no no no")


def test_human_repetitions_are_no_loops():
    spread = list(WORDS[:75])
    for place in range(0, 72, 12):
        spread.insert(place, "that")
    assert not loops(" ".join(spread))
    lecture = (
        "So the transformer is what we look at today. A transformer has attention, and attention "
        "in a transformer means that each position of the transformer reads all others. Before "
        "the transformer people used recurrent networks. What does a transformer cost? The cost "
        "of a transformer grows with the square of the length, and that, that is why a long "
        "transformer is slow. It was very very very good, no no no, I mean it."
    )
    assert lecture.lower().count("transformer") == 8
    assert not loops(lecture)
    assert not loops(
        "这个模型的模型参数和那个模型不同，模型越大，模型越慢，所以模型要小，非常非常非常小。"
    )


def test_false_alarms_on_read_books(loud_lab):
    """Of windows of 75 words, about 30 s of a chapter, at most one in 200 may be called a loop."""
    chapters = {}
    path = loud_lab / "LibriSpeech/train-clean-100.transcripts.txt"
    for line in path.read_text(encoding="utf-8").splitlines():
        id, _, text = line.partition(" ")
        chapters.setdefault(id.rpartition("-")[0], []).extend(text.split())
    windows = []
    for words in list(chapters.values())[::5]:
        for start in range(0, len(words) - 74, 75):
            windows.append(" ".join(words[start : start + 75]))
    false_alarms = sum(loops(window) for window in windows)
    assert len(windows) > 2000
    assert false_alarms / len(windows) < 0.005


# ---------------------------------------- pieces


def test_segments_are_joined_up_to_30_seconds():
    segments = [
        (0.0, 12.0, " a"),
        (12.0, 25.0, " b"),
        (25.5, 31.0, " c"),
        (40.0, 75.0, " d"),
        (75.0, 80.0, " e"),
    ]
    pieces = [(0.0, 25.0, "a b"), (25.5, 31.0, "c"), (40.0, 75.0, "d"), (75.0, 80.0, "e")]
    assert join_segments(segments) == pieces
    assert join_segments([]) == []


def test_a_recording_is_cut_where_it_is_quiet():
    torch.manual_seed(0)
    waveform = 0.3 * torch.randn(100 * 16_000)
    pauses = (7.0, 24.0, 50.0, 71.5)
    for second in pauses:
        waveform[int(second * 16_000) : int((second + 0.5) * 16_000)] *= 0.01
    pieces = cut_at_quiet_places(waveform)
    assert pieces[0][0] == 0 and pieces[-1][1] == 100
    for before, after in zip(pieces, pieces[1:]):
        assert before[1] == after[0]
    assert all(end - start <= 30 for start, end in pieces)
    for _, end in pieces[:3]:
        assert any(pause <= end <= pause + 0.5 for pause in pauses)
    assert cut_at_quiet_places(waveform[:1000]) == [(0.0, 1000 / 16_000)]


# ---------------------------------------- the manifest


class Canned:
    """A recogniser whose texts are fixed. It is interrupted at a recording, counted from 1."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.calls = 0

    def segments(self, waveform):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return [(0.0, 1.0, CLEAN), (1.0, len(waveform) / 16_000, "la " * 30)]

    def transcribe(self, waveforms):
        return [CLEAN] * len(waveforms)


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for i in range(3):
        noise = 0.1 * np.random.default_rng(i).standard_normal(40_000)
        soundfile.write(folder / f"{i}.wav", noise, 16_000)
    return data.load_sources([folder])


def rows_of(out):
    return [json.loads(line) for line in (out / "pieces.jsonl").read_text().splitlines()]


def test_rows_point_into_the_recordings(recordings, tmp_path):
    rows, problems = label_recordings(recordings, Canned(), Canned(), tmp_path, weight=0.5)
    assert rows == rows_of(tmp_path) and not problems
    assert [row["keep"] for row in rows] == [True, False] * 3
    line = pseudo_label.summary(rows, problems=["3.wav: broken"])
    assert line.startswith("kept 3 of 6 pieces") and "the teacher loops 3; 1 files" in line

    # data.py reads the kept ones: the first second of each recording, and no other file is written.
    kept = data.load_utterances(tmp_path / "pieces.jsonl", transcribed=True)
    assert len(kept) == 3 and len({u.id for u in kept}) == 3
    for u, recording in zip(kept, recordings):
        assert (u.text, u.seconds, u.offset, u.weight) == (CLEAN, 1.0, 0.0, 0.5)
        waveform = data.load_audio(u.path, u.offset, u.seconds)
        assert torch.equal(waveform, data.load_audio(recording.path)[:16_000])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieces.jsonl", "recordings"]


def test_segments_of_files_are_recordings_too(recordings, tmp_path):
    manifest = tmp_path / "segments.jsonl"
    row = {"audio_filepath": recordings[0].path, "offset": 0.5, "duration": 2.0}
    manifest.write_text(json.dumps(row) + "\n")
    segments = data.load_sources([manifest])
    rows, _ = label_recordings(segments, Canned(), Canned(), tmp_path)
    assert [(row["offset"], row["duration"]) for row in rows] == [(0.5, 1.0), (1.5, 1.0)]
    assert len({row["recording"] for row in rows}) == 1


def test_an_interrupted_run_goes_on_and_loses_nothing(recordings, tmp_path):
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    settings = {"teacher": "a", "alpha": 0.4}
    for out in (whole, cut):
        assert pseudo_label.open_manifest(out, settings) == []
    label_recordings(recordings, Canned(), Canned(), whole)
    with pytest.raises(KeyboardInterrupt):
        label_recordings(recordings, Canned(stop_at=2), Canned(), cut)

    # Half a recording and half a row are what a killed process may leave.
    manifest = cut / "pieces.jsonl"
    first, second = manifest.read_text().splitlines(keepends=True)
    half_a_recording = first.replace("0.wav", "1.wav")
    manifest.write_text(half_a_recording + first + second + second[:20])
    rows = pseudo_label.open_manifest(cut, settings)
    assert len(rows) == 2
    teacher = Canned()
    label_recordings(recordings, teacher, Canned(), cut, rows=rows)
    assert teacher.calls == 2
    assert rows_of(cut) == rows_of(whole)

    # The same files by other names are done; one more is not.
    os.link(recordings[0].path, str(tmp_path / "recordings/00.wav"))
    relative = data.load_sources([os.path.relpath(tmp_path / "recordings")])
    teacher = Canned()
    label_recordings(relative, teacher, Canned(), cut, rows=rows_of(cut))
    assert teacher.calls == 1 and len(rows_of(cut)) == 8

    with pytest.raises(ValueError, match="--alpha 0.4, now 0.2"):
        pseudo_label.open_manifest(cut, {"teacher": "a", "alpha": 0.2})
    (cut / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="choose another folder"):
        pseudo_label.open_manifest(cut, settings)


# ---------------------------------------- real models


def test_the_demo_s_teachers(tmp_path, monkeypatch, capsys):
    """A Whisper with another tokenizer labels, a HuBERT with CTC validates, a file is broken."""
    some = data.load_utterances(data.DEMO / "corpus/dev", transcribed=True)[:6]
    broken = tmp_path / "broken.wav"
    broken.write_text("not audio")
    monkeypatch.chdir(data.DEMO.parent)
    paths = [os.path.relpath(u.path) for u in some]
    out = tmp_path / "out"
    command = [*paths, "--teacher", TEACHER, "--validator", VALIDATOR, "--out", str(out)]
    assert pseudo_label.main([str(broken), *command]) == 0
    output = capsys.readouterr()
    assert "1 files could not be used" in output.out and "broken.wav" in output.err
    next_line = output.out.splitlines()[-1]
    assert next_line == (
        f"next: python finetune_rnnt.py --data TRANSCRIBED {out}/pieces.jsonl "
        f"--dev TRANSCRIBED_DEV --out exp/k2d"
    )

    rows = rows_of(out)
    reference = " ".join(u.text for u in some)
    for name, limit in (("text", 30), ("validator", 50)):
        assert word_errors(reference, " ".join(row[name] for row in rows)).rate < limit

    # Together as one by one, and a long recording in pieces of the window of 8 s.
    waveforms = [data.load_audio(u.path) for u in some]
    cpu = torch.device("cpu")
    together = load_recogniser(VALIDATOR, cpu).transcribe(waveforms)
    assert together == [row["validator"] for row in rows]
    waveform = torch.cat(waveforms)
    pieces = load_recogniser(TEACHER, cpu).segments(waveform)
    assert all(end - start <= 8 for start, end, _ in pieces)
    assert pieces[-1][1] == len(waveform) / 16_000

    # Again: nothing is left to do. Of other recordings the next command names a placeholder.
    assert pseudo_label.main([str(broken), *command]) == 0
    assert "6 recordings are done" in capsys.readouterr().out
    assert rows_of(out) == rows
    assert pseudo_label.main([*command, "--weight", "1"]) == 2
    assert "--weight 0.8, now 1.0" in capsys.readouterr().err


def test_one_beam_is_the_greedy_search_of_the_model():
    """A validator's texts are those of the model's own `generate`, called by hand."""
    # One that five beams transcribe in another way.
    utterance = data.load_utterances(data.DEMO / "corpus/dev", transcribed=True)[6]
    waveform = data.load_audio(utterance.path)
    cpu = torch.device("cpu")
    greedy = load_recogniser(TEACHER, cpu, beams=1)
    inputs = greedy.pipe.feature_extractor(
        waveform.numpy(), sampling_rate=16_000, return_tensors="pt"
    )
    [ids] = greedy.pipe.model.generate(inputs.input_features, num_beams=1)
    expected = greedy.pipe.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert greedy.transcribe([waveform]) == [expected]
    assert load_recogniser(TEACHER, cpu).transcribe([waveform]) != [expected]


def test_a_model_that_cannot_transcribe_is_one_line(teacher_folders, tmp_path, capsys):
    command = [str(data.DEMO / "corpus/dev"), "--validator", "x", "--out", str(tmp_path / "out")]
    for teacher in (teacher_folders["hubert"], "no/such-model"):
        assert pseudo_label.main([*command, "--teacher", teacher]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("pseudo_label.py: error: ") and teacher in error


def test_a_real_teacher(loud_lab, tmp_path):
    """Moonshine labels utterances of a reader, joined to one recording of more than 30 s."""
    folder = loud_lab / "LibriSpeech/dev-clean-part/2035"
    some = data.load_utterances(folder, transcribed=True)[:6]
    waveform = torch.cat([data.load_audio(u.path) for u in some])
    path = tmp_path / "long.flac"
    soundfile.write(path, waveform.numpy(), 16_000)
    teacher = load_recogniser(str(loud_lab / "teachers/moonshine-tiny"), torch.device("cpu"))
    rows, _ = label_recordings(data.load_sources([path]), teacher, Canned(), tmp_path)
    assert len(rows) > 1
    assert all(row["duration"] <= 30 for row in rows)
    text = " ".join(row["text"] for row in rows)
    assert word_errors(" ".join(u.text for u in some), text).rate < 15


def test_a_checkpoint_of_ours_is_a_recogniser(tmp_path):
    """A student with random weights: a batch of several lengths has the texts of one by one."""
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([CLEAN] * 100, 40)
    config = model.Config(
        dim=16,
        layers=1,
        channels=4,
        vocab_size=tokenizer.get_vocab_size(),
        predictor_dim=8,
        joiner_dim=8,
    )
    student = model.Student(config)
    model.save_checkpoint(
        tmp_path / "best.pt",
        config=config,
        model=student.state_dict(),
        tokenizer=tokenizer.to_str(),
    )
    recogniser = load_recogniser(str(tmp_path), torch.device("cpu"))
    waveforms = [0.1 * torch.randn(length) for length in (40_000, 16_000, 70_000)]
    texts = recogniser.transcribe(waveforms)
    assert any(texts)
    assert texts == [recogniser.transcribe([waveform])[0] for waveform in waveforms]
    segments = recogniser.segments(torch.cat([*waveforms] * 5))
    assert len(segments) >= 2
    assert segments[-1][1] == 5 * 126_000 / 16_000


def test_two_languages_in_one_sentence(tmp_path, capsys):
    """Pseudo-labels in Mandarin and English: tokenizer, two updates of stage 2, error rate."""
    texts = [
        "我们 用 deep learning 做 语音 识别",
        "这个 model 很 小",
        "请 打开 computer",
        "今天 有趣",
    ]
    some = data.load_utterances(data.DEMO / "corpus/dev")[:4]
    rows = []
    for u, text in zip(some, texts):
        rows.append({"audio_filepath": u.path, "text": text, "weight": 0.8, "keep": True})
    manifest = tmp_path / "mixed.jsonl"
    pseudo_label.write_rows(rows, manifest, "w")
    pseudo_label.write_rows(rows[3:], tmp_path / "dev.jsonl", "w")
    tokenizer = data.train_tokenizer(texts, 256)
    for text in texts:
        tokens = tokenizer.encode(data.normalise(text)).ids
        assert tokenizer.decode(tokens).strip() == data.normalise(text)

    out = str(tmp_path / "run")
    command = ["--data", str(manifest), "--dev", str(tmp_path / "dev.jsonl"), "--init", "none"]
    command += ["--steps", "2", "--device", "cpu", "--out", out]
    assert finetune_rnnt.main(command) == 0
    assert decode.main(["--checkpoint", out, "--data", str(manifest), "--device", "cpu"]) == 0
    assert "/ 23, " in capsys.readouterr().out  # words and characters of the four texts
    assert word_errors("这个 model 很小", "这 model 很小").rate == 20  # of 这 个 MODEL 很 小
