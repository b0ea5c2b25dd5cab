"""Pseudo-labels: the filter by hand-made cases, the cutting, the manifest, and real models where the lab is."""
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch

import data
import decode
import finetune_rnnt
import pseudo_label
from conftest import DEMO
from pseudo_label import join, judge, loops, phone_distance, quiet_cuts

CLEAN = "he could not see the end of the road from where he stood"


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
        ("", CLEAN, False, "nothing"),
        ("...", "", False, "nothing"),
        ("今天讲 machine learning 的概念", "今天讲 machine learning 的概念", True, "agree"),
        ("今天讲 machine learning 的概念", "他昨天去了 supermarket 买东西", False, "disagree"),
        ("谢谢观看" * 10, "我们今天讲的是基本概念", False, "teacher loops"),
        ("room 101 on floor 7", "room 101 on floor 7", True, "agree"),
        ("room 101", "room one hundred and one", False, "disagree"),
    ],
)
def test_the_filter(teacher, validator, keep, reason):
    verdict = judge(teacher, validator)
    assert verdict["keep"] is keep and reason in verdict["reason"]
    h_y, h_v, per = verdict["teacher_loops"], verdict["validator_loops"], verdict["per"]
    assert verdict["distance"] == max(h_y, min(1 - h_v, per))                                  # the paper's equation


def test_loops_counts_ngrams():
    assert not loops("abcdef" * 5) and loops("abcdef" * 6) and not loops("abcdef" * 6, c=6)
    assert not loops("") and not loops("ab") and loops("ab" * 9, n=2, c=8)


def test_phone_distance_is_an_edit_distance_of_letters():
    assert phone_distance("a b c", "abc") == 0 and phone_distance("ABCD", "abxd") == 0.25
    assert phone_distance("", "abc") == 1 and phone_distance("", "") == 0 and phone_distance("ab", "abcd") == 0.5


def test_segments_are_joined_up_to_30_seconds():
    segments = [(0.0, 12.0, " a"), (12.0, 25.0, " b"), (25.5, 31.0, " c"), (40.0, 75.0, " d"), (75.0, 80.0, " e")]
    assert join(segments) == [(0.0, 25.0, "a b"), (25.5, 31.0, "c"), (40.0, 75.0, "d"), (75.0, 80.0, "e")]
    assert join([]) == []


def test_a_recording_is_cut_where_it_is_quiet():
    torch.manual_seed(0)
    waveform, pauses = 0.3 * torch.randn(100 * 16_000), (7.0, 24.0, 50.0, 71.5)
    for second in pauses:
        waveform[int(second * 16_000):int((second + 0.5) * 16_000)] *= 0.01
    cuts = quiet_cuts(waveform)
    assert cuts[0][0] == 0 and cuts[-1][1] == 100 and all(a[1] == b[0] for a, b in zip(cuts, cuts[1:]))
    assert all(end - start <= 30 for start, end in cuts)
    assert [any(p <= end <= p + 0.5 for p in pauses) for _, end in cuts[:3]] == [True] * 3
    assert quiet_cuts(waveform[:1000]) == [(0.0, 1000 / 16_000)]


class Canned:
    """A recogniser that says a fixed text for each piece, and fails on the recording it is told to."""
    stop_at = None

    def __init__(self, name, device, language):
        self.name, self.calls = name, 0

    def pieces(self, waveform):
        self.calls += 1
        if Canned.stop_at == self.calls:
            raise KeyboardInterrupt
        return [(0.0, 1.0, CLEAN), (1.0, len(waveform) / 16_000, "la " * 30)]

    def texts(self, waveforms):
        return [CLEAN] * len(waveforms)


def test_an_interrupted_run_goes_on_and_loses_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pseudo_label, "Recogniser", Canned)
    (tmp_path / "in").mkdir()
    for i in range(3):
        soundfile.write(tmp_path / f"in/{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(40_000), 16_000)
    (tmp_path / "in/3.wav").write_text("not audio")
    command = [str(tmp_path / "in"), "--teacher", "a", "--validator", "b"]
    assert pseudo_label.main([*command, "--out", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr()
    assert "kept 3 of 6 pieces" in said.out and "the teacher loops 3" in said.out and "1 files" in said.out
    assert "3.wav" in said.err
    monkeypatch.setattr(Canned, "stop_at", 2)
    assert pseudo_label.main([*command, "--out", str(tmp_path / "cut")]) == 130
    manifest = tmp_path / "cut/pieces.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    half_a_recording = lines[0].replace("0.wav", "1.wav")
    manifest.write_text(half_a_recording + lines[0] + lines[1] + lines[1][:20])
    monkeypatch.setattr(Canned, "stop_at", None)
    assert pseudo_label.main([*command, "--out", str(tmp_path / "cut")]) == 0
    rows = lambda name: sorted((tmp_path / name / "pieces.jsonl").read_text().splitlines())
    assert rows("cut") == rows("whole")
    assert "1 recordings are done" in capsys.readouterr().out
    command[0] = os.path.relpath(tmp_path / "in")                                              # the same recordings
    soundfile.write(tmp_path / "in/00.wav", np.full(40_000, 0.5), 16_000)     # it comes before the others, and last
    assert pseudo_label.main([*command, "--out", str(tmp_path / "cut")]) == 0
    for row in map(json.loads, rows("cut")):
        of = soundfile.read(row["source"], start=round(16_000 * row["start"]), frames=round(16_000 * row["duration"]))
        assert np.allclose(soundfile.read(tmp_path / "cut" / row["audio_filepath"])[0], of[0], atol=1e-4), row
    assert pseudo_label.main([*command, "--out", str(tmp_path / "cut"), "--alpha", "0.2"]) == 2
    kept = data.load_utterances(tmp_path / "whole/pieces.jsonl", transcribed=True)
    assert len(kept) == 3 and all(u.text == CLEAN and u.seconds == 1.0 for u in kept)


def test_a_model_that_cannot_transcribe_is_one_line(teacher_folders, tmp_path, capsys):
    command = [str(DEMO / "corpus/dev"), "--validator", "x", "--out", str(tmp_path / "out"), "--teacher"]
    for teacher in (teacher_folders["hubert"], "no/such-model"):
        assert pseudo_label.main([*command, teacher]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("pseudo_label.py: error: ") and teacher in error


def test_the_demo_s_teachers(tmp_path):
    """A Whisper with a tokenizer of its own writes, a HuBERT with CTC checks."""
    some = data.load_utterances(DEMO / "corpus/dev", transcribed=True)[:6]
    teacher, validator = (str(DEMO / f"teachers/{name}") for name in ("whisper", "hubert"))
    assert pseudo_label.main([*(u.path for u in some), "--teacher", teacher, "--validator", validator,
                              "--out", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/pieces.jsonl").read_text().splitlines()]
    heard, agreed = ([row[name] for row in rows] for name in ("text", "validator"))
    for texts, limit in ((heard, 30), (agreed, 50)):
        assert decode.word_errors(" ".join(u.text for u in some), " ".join(texts)).rate < limit
    waveforms = [data.load_audio(u.path) for u in some]
    assert pseudo_label.Recogniser(validator, torch.device("cpu")).texts(waveforms) == agreed  # together as one by one
    waveform = torch.cat(waveforms)                                                            # its window has 8 s
    pieces = pseudo_label.Recogniser(teacher, torch.device("cpu")).pieces(waveform)
    assert all(end - start <= 8 for start, end, _ in pieces) and pieces[-1][1] == len(waveform) / 16_000


def test_real_teacher_and_validator(loud_lab, tmp_path):
    """Moonshine labels two minutes of a reader joined to one recording; a validator that only loops lets all pass."""
    folder = loud_lab / "LibriSpeech/dev-clean-part"
    some = [u for u in data.load_utterances(folder, transcribed=True) if "2035" in u.path][:8]
    soundfile.write(tmp_path / "long.flac", torch.cat([data.load_audio(u.path) for u in some]).numpy(), 16_000)
    moonshine = str(loud_lab / "teachers/moonshine-tiny")
    assert pseudo_label.main([str(tmp_path / "long.flac"), "--teacher", moonshine, "--validator", moonshine,
                              "--out", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/pieces.jsonl").read_text().splitlines()]
    assert all(row["keep"] and row["distance"] == 0 and row["duration"] <= 30 for row in rows)
    heard = " ".join(row["text"] for row in rows)
    assert decode.word_errors(" ".join(u.text for u in some), heard).rate < 15


def test_two_languages_in_one_sentence(tmp_path, capsys):
    """Mandarin and English from a speech synthesiser: manifest, tokenizer, a few updates, and the mixed error rate."""
    if not shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed: code-switched audio was NOT tried")
    texts = ["我们 用 deep learning 做 语音 识别", "这个 model 很 小", "请 打开 computer", "今天 的 lecture 很 有趣"]
    rows = []
    for i, text in enumerate(texts):
        subprocess.run(["espeak-ng", "-v", "cmn", "-w", str(tmp_path / f"{i}.wav"), text], check=True)
        rows.append({"audio_filepath": f"{i}.wav", "text": text.replace(" ", "") if i == 1 else text, "keep": True})
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    tokenizer = data.train_tokenizer(texts, 256, 1)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(data.normalise(text)).ids).strip() == data.normalise(text)
    assert decode.word_errors("这个 model 很小", "这 model 很小").rate == 20                    # 个 of 这 个 MODEL 很 小
    out = ["--out", str(tmp_path / "run")]
    assert finetune_rnnt.main(["--pseudo", str(tmp_path / "mixed.jsonl"), "--dev", str(tmp_path / "0.wav"), *out]) == 2
    assert finetune_rnnt.main(["--pseudo", str(tmp_path / "mixed.jsonl"), "--init", "none", "--steps", "2",
                               "--min-frequency", "1", "--device", "cpu", *out]) == 0
    assert decode.main(["--checkpoint", out[1], "--data", str(tmp_path / "mixed.jsonl")]) == 0
    assert "%WER" in capsys.readouterr().out
