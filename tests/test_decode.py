"""Scores against torchaudio, searches against plain loops and sums over all alignments, files
against their formats."""

import importlib.util
import json
import math
import random
import shutil
import tracemalloc
from dataclasses import replace

import pytest
import soundfile
import torch
import torchaudio
from tokenizers import Tokenizer, models, pre_tokenizers

import data
import decode
import model
from decode import DEMO, Errors, GreedyCTC, GreedyTransducer, Word, text_of, word_errors, words_of
from model import Config, Student, Token
from tools.alignment_plot import draw_alignment
from tools.beam_search import BeamTransducer, Fusion, NGram
from tools.subtitles import FORMATS, subtitles

TINY = Config(dim=32, layers=1, kernel=7, channels=8, vocab_size=6, predictor_dim=24, joiner_dim=20)


# ---------------------------------------- word errors


def counts(errors):
    return errors.substitutions, errors.deletions, errors.insertions, errors.words


@pytest.mark.parametrize("seed", range(5))
def test_total_is_the_edit_distance(seed):
    draw = random.Random(seed)
    for _ in range(40):
        reference = draw.choices("ABCD", k=draw.randrange(12))
        hypothesis = draw.choices("ABCD", k=draw.randrange(12))
        errors = word_errors(" ".join(reference), " ".join(hypothesis))
        assert errors.total == torchaudio.functional.edit_distance(reference, hypothesis)
        assert errors.words == len(reference)
        # The alignment holds every word of both, in order, and its errors are those counted.
        assert [r for r, _ in errors.alignment if r != "*"] == reference
        assert [h for _, h in errors.alignment if h != "*"] == hypothesis
        assert sum(r != h for r, h in errors.alignment) == errors.total
        assert len(reference) - errors.deletions == len(hypothesis) - errors.insertions


@pytest.mark.parametrize(
    "reference, hypothesis, expected",
    [
        ("THE CAT SAT", "THE CAT SAT", (0, 0, 0, 3)),
        ("THE CAT SAT", "THE BAT SAT", (1, 0, 0, 3)),
        ("THE CAT SAT", "THE SAT", (0, 1, 0, 3)),
        ("THE CAT SAT", "THE BIG CAT SAT", (0, 0, 1, 3)),
        ("A B C D E F", "X B D E F G", (1, 1, 1, 6)),
        ("", "", (0, 0, 0, 0)),
        ("", "A B", (0, 0, 2, 0)),
        ("A B", "", (0, 2, 0, 2)),
        ("don't, stop!", "DON\u2019T STOP", (0, 0, 0, 2)),
        ("打开wifi吧", "打开 WIFI 把", (1, 0, 0, 4)),
        ("你好 world", "你 WORLD", (0, 1, 0, 3)),
    ],
)
def test_kinds_of_errors(reference, hypothesis, expected):
    assert counts(word_errors(reference, hypothesis)) == expected


def test_score_line():
    line = "%WER 6.90 [ 3626 / 52576, 401 ins, 575 del, 2650 sub ]"
    assert str(Errors(2650, 575, 401, 52576)) == line
    assert counts(word_errors("A B", "A") + word_errors("C", "D E")) == (1, 1, 1, 3)
    assert str(Errors()) == "%WER 0.00 [ 0 / 0, 0 ins, 0 del, 0 sub ]"


def test_ten_thousand_words_in_little_memory():
    """Every word is another one, so errors are known: what is not in both has to be mended."""
    reference = [f"W{i}" for i in range(10_000)]
    hypothesis = list(reference)
    hypothesis[5::10] = ["X"] * 1000
    del hypothesis[0::10]
    tracemalloc.start()
    errors = word_errors(" ".join(reference), " ".join(hypothesis))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counts(errors) == (1000, 1000, 0, 10_000)
    assert peak < 100e6


# ---------------------------------------- greedy search


def confident_student(blank=0.0, **changes):
    """Not trained, but its best label changes from frame to frame."""
    torch.manual_seed(1)
    student = Student(replace(TINY, **changes)).eval()
    for module in (student.joiner, student.predictor):
        for parameter in module.parameters():
            parameter.data.mul_(4)
    student.joiner.out.bias.data[0] += blank
    return student


def labels_of(results):
    return [[token.label for token in best.tokens] for best, *_ in results]


def feed(search, hidden, lengths, sizes=None):
    """All at once, or piece by piece -> results"""
    start = 0
    for size in sizes or [hidden.shape[1]]:
        search.advance(hidden[:, start : start + size], (lengths - start).clamp(0, size))
        start += size
    return search.results()


def greedy_plainly(student, hidden, max_symbols):
    """One utterance, (T, d): the whole predictor reads all labels so far, again and again."""
    labels = []
    for frame in hidden:
        for _ in range(max_symbols):
            predicted = student.predict(torch.tensor([labels], dtype=torch.long))[:, -1:]
            label = student.joiner(frame[None, None], predicted).argmax().item()
            if label == 0:
                break
            labels.append(label)
    return labels


@pytest.mark.parametrize("max_symbols", [1, 3])
@pytest.mark.parametrize("blank", [0, 3])
def test_greedy_transducer_against_a_plain_loop(blank, max_symbols):
    student = confident_student(blank)
    hidden = 2 * torch.randn(5, 20, 32)
    lengths = torch.tensor([20, 1, 13, 7, 19])
    found = feed(GreedyTransducer(student, 5, max_symbols), hidden, lengths)
    with torch.no_grad():
        expected = [greedy_plainly(student, h[:n], max_symbols) for h, n in zip(hidden, lengths)]
    assert labels_of(found) == expected
    assert 0 < sum(map(len, expected)) < max_symbols * lengths.sum()
    assert len(set(sum(expected, []))) > 1
    for [best], n in zip(found, lengths.tolist()):
        frames = [token.frame for token in best.tokens]
        assert frames == sorted(frames) and all(0 <= frame < n for frame in frames)
        assert all(0 < token.probability <= 1 for token in best.tokens)

    pieces = feed(GreedyTransducer(student, 5, max_symbols), hidden, lengths, [3, 1, 9, 7])
    for [piecewise], [best] in zip(pieces, found):
        assert [token[:2] for token in piecewise.tokens] == [token[:2] for token in best.tokens]
        assert piecewise.score == pytest.approx(best.score, abs=1e-4)


def test_only_blank():
    student = Student(TINY).eval()
    student.joiner.out.bias.data[0] = 1e3
    for search in (GreedyTransducer(student, 3), BeamTransducer(student, 3, beam=4)):
        found = feed(search, torch.randn(3, 4, 32), torch.tensor([4, 2, 1]))
        assert labels_of(found) == [[], [], []]
        assert all(best.score == 0 for best, *_ in found)


def test_greedy_ctc_against_a_plain_loop():
    torch.manual_seed(0)
    student = Student(TINY).eval()
    hidden = torch.randn(5, 40, 32)
    lengths = torch.tensor([40, 1, 13, 7, 19])
    expected = []
    for frames, length in zip(student.ctc(hidden).tolist(), lengths):
        row = []
        previous = None
        for frame in frames[:length]:
            best = frame.index(max(frame))
            if best != previous and best != 0:
                row.append(best)
            previous = best
        expected.append(row)
    found = feed(GreedyCTC(student, 5), hidden, lengths)
    assert labels_of(found) == expected
    assert sum(map(len, expected)) > 5
    pieces = feed(GreedyCTC(student, 5), hidden, lengths, [1, 20, 19])
    assert [best.tokens for [best] in pieces] == [best.tokens for [best] in found]


# ---------------------------------------- beam search


def test_a_wide_beam_sums_over_all_alignments():
    """With room for every hypothesis a score is the transducer's exact log-likelihood."""
    student = confident_student(vocab_size=3)
    hidden = torch.randn(2, 3, 32)
    search = BeamTransducer(student, 2, beam=128, max_symbols=2)
    found = feed(search, hidden, torch.tensor([3, 2]))
    for b, T in enumerate((3, 2)):
        assert len(found[b]) == 2 ** (2 * T + 1) - 1  # every sequence of up to 2 T labels
        for hypothesis in found[b]:
            # Longer ones have alignments with more labels in a frame than the search allows.
            if len(hypothesis.tokens) > 2:
                continue
            targets = torch.tensor([[t.label for t in hypothesis.tokens]], dtype=torch.long)
            logits = student.joiner(hidden[b : b + 1, :T], student.predict(targets))
            lengths = torch.tensor([T]), torch.tensor([targets.shape[1]])
            loss = model.transducer_loss(logits, targets, *lengths)
            assert hypothesis.score == pytest.approx(-loss.item(), abs=1e-3)


def beam_plainly(student, hidden, beam, max_symbols):
    """One utterance, (T, d), with dictionaries -> {labels: score}"""
    kept = {(): 0.0}
    for frame in hidden:
        now = [(score, labels) for labels, score in kept.items()]
        done = []
        for _ in range(max_symbols + 1):
            grown = []
            for score, labels in now:
                predicted = student.predict(torch.tensor([labels], dtype=torch.long))[:, -1:]
                logits = student.joiner(frame[None, None], predicted)
                blank, *others = logits.log_softmax(-1).flatten().tolist()
                done.append((score + blank, labels))
                for label, log_prob in enumerate(others, 1):
                    grown.append((score + log_prob, (*labels, label)))
            worst = -math.inf
            if len(done) >= beam:
                worst = sorted(done, reverse=True)[beam - 1][0]
            now = sorted([one for one in grown if one[0] > worst], reverse=True)[:beam]
        merged = {}
        for score, labels in done:
            both = torch.tensor([merged.get(labels, -math.inf), score], dtype=torch.float64)
            merged[labels] = both.logsumexp(0).item()
        kept = dict(sorted(merged.items(), key=lambda item: -item[1])[:beam])
    return kept


@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize("blank", [0, 3])
def test_beam_search_against_dictionaries(blank, beam):
    student = confident_student(blank)
    hidden = 2 * torch.randn(4, 12, 32)
    lengths = torch.tensor([12, 1, 7, 9])
    found = feed(BeamTransducer(student, 4, beam, max_symbols=2), hidden, lengths)
    assert sum(map(len, labels_of(found))) > 2
    for ranked, h, n in zip(found, hidden, lengths):
        with torch.no_grad():
            expected = beam_plainly(student, h[:n], beam, 2)
        scores = {}
        for hypothesis in ranked:
            scores[tuple(t.label for t in hypothesis.tokens)] = hypothesis.score
            frames = [token.frame for token in hypothesis.tokens]
            assert frames == sorted(frames) and all(0 <= frame < n for frame in frames)
        assert scores == pytest.approx(expected, abs=1e-3)
        ranks = [hypothesis.score / (len(hypothesis.tokens) + 1) for hypothesis in ranked]
        assert ranks == sorted(ranks, reverse=True)
    pieces = feed(BeamTransducer(student, 4, beam, max_symbols=2), hidden, lengths, [5, 1, 6])
    for piecewise, ranked in zip(pieces, found):
        assert [one.tokens for one in piecewise] == [one.tokens for one in ranked]


# ---------------------------------------- language model


def letter_tokenizer(letters):
    """blank, unknown, the start of a word, a token for each letter"""
    vocabulary = {"<blank>": 0, "<unk>": 1, "\u2581": 2}
    for letter in letters:
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


TOKENIZER = letter_tokenizer("AB")


def test_fusion_adds_the_language_model_at_the_end_of_each_word():
    student = confident_student(vocab_size=TOKENIZER.get_vocab_size())
    asked = set()

    def lm(words, word):
        asked.add((words, word))
        return -1.0 - len(words) - 0.1 * len(word)

    fusion = Fusion(TOKENIZER, lm, weight=0.5, bonus=2.0)
    hidden = torch.randn(1, 2, 32)
    lengths = torch.tensor([2])
    # Without limits of the beam, each hypothesis of one search is in the other.
    [plain] = feed(BeamTransducer(student, 1, 700, max_symbols=2), hidden, lengths)
    [fused] = feed(BeamTransducer(student, 1, 700, max_symbols=2, fusion=fusion), hidden, lengths)
    assert len(fused) == len(plain) == sum(4**n for n in range(5))
    scores = {}
    for hypothesis in plain:
        scores[tuple(t.label for t in hypothesis.tokens)] = hypothesis.score
    for hypothesis in fused:
        labels = tuple(t.label for t in hypothesis.tokens)
        if 1 in labels:
            continue  # An unknown letter is not in the text.
        gain = 0.0
        for i, word in enumerate(text_of(words_of(TOKENIZER, hypothesis.tokens)).split()):
            gain += 0.5 * (2.0 - 1.0 - i - 0.1 * len(word))
        assert hypothesis.score == pytest.approx(scores[labels] + gain, abs=1e-3)
    assert {((), "A"), (("A",), "B")} <= asked


def test_ngram_by_hand(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat\nthe cat ran, the dog ran\n")
    lm = NGram(tmp_path / "text.txt", order=2)

    def p(words, word):
        return math.exp(lm(words, word))

    # c(w) + t / 6 of 9 words, t = 5 different ones
    frequencies = {"THE": 3, "CAT": 2, "SAT": 1, "RAN": 2, "DOG": 1}
    unigram = {word: (n + 5 / 6) / (9 + 5) for word, n in frequencies.items()}
    assert p((), "THE") == pytest.approx((2 + unigram["THE"]) / (2 + 1))  # both lines begin so
    assert p(("A", "THE"), "CAT") == pytest.approx((2 + 2 * unigram["CAT"]) / (3 + 2))
    assert p(("THE",), "EMU") == pytest.approx(2 * (5 / 6 / 14) / (3 + 2))
    for before in ((), ("THE",), ("CAT",), ("EMU",)):
        assert sum(p(before, word) for word in [*frequencies, "EMU"]) == pytest.approx(1)


# ---------------------------------------- words and files


def tokens(tokenizer, text, start=0, gap=2):
    """A token each `gap` frames, less and less probable"""
    found = []
    for i, label in enumerate(tokenizer.encode(text).ids):
        found.append(Token(label, start + gap * i, 1 - 0.1 * i))
    return found


def test_words_have_the_times_and_the_confidence_of_their_tokens():
    words = words_of(TOKENIZER, tokens(TOKENIZER, "AB A", start=10))  # _AB _A at 10 12 14 16 18
    assert words == [Word("AB", 0.4, 0.6, 0.8), Word("A", 0.64, 0.76, 0.6)]
    assert text_of(words) == "AB A"
    assert words_of(TOKENIZER, []) == []


def cues_of(text):
    """Body of an .srt or .vtt file -> list of (start, end, text), in seconds"""
    cues = []
    for block in text.strip().split("\n\n"):
        _, times, *lines = block.split("\n")
        seconds = []
        for clock in times.replace(",", ".").split(" --> "):
            hours, minutes, rest = clock.split(":")
            seconds.append(3600 * int(hours) + 60 * int(minutes) + float(rest))
        cues.append((*seconds, "\n".join(lines)))
    return cues


def test_chinese_without_spaces_is_many_words_and_cues():
    text = "打开wifi吧再" * 15
    tokenizer = letter_tokenizer("打开吧再wifi")
    words = words_of(tokenizer, tokens(tokenizer, text, gap=10))
    assert [word.word for word in words] == ["打", "开", "wifi", "吧", "再"] * 15
    assert text_of(words) == text
    cues = cues_of(subtitles(words, "."))
    assert max(end - start for start, end, _ in cues) <= 6.01
    assert len(cues) > 8 and "".join(line for *_, line in cues) == text


def test_formats():
    words = [
        Word("ONE", 0.4, 0.6, 0.5),
        Word("TWO", 0.7, 0.8, 1.0),
        Word("THREE", 3600.5, 3600.54, 0.25),
    ]
    first = data.Utterance("b.wav", 3700, None, "b 1")
    second = data.Utterance("a.wav", 9.0, None, "a", offset=4.0)
    one = [(first, [(-1.5, words), (-2.5, words[:2])])]
    both = [*one, (second, [(-1.0, words[:1])])]
    assert FORMATS[".txt"](both) == "b.wav\tONE TWO THREE\na.wav\tONE\n"
    srt = "1\n00:00:00,400 --> 00:00:01,400\nONE TWO\n\n2\n01:00:00,500 --> 01:00:01,500\nTHREE\n"
    assert FORMATS[".srt"](one) == srt
    assert FORMATS[".vtt"](one) == "WEBVTT\n\n" + srt.replace(",", ".")
    assert FORMATS[".ctm"](both).splitlines() == [  # sorted by file, then time
        "a 1 0.40 0.20 ONE 0.500",
        "b_1 1 0.40 0.20 ONE 0.500",
        "b_1 1 0.70 0.10 TWO 1.000",
        "b_1 1 3600.50 0.04 THREE 0.250",
    ]
    row, segment = map(json.loads, FORMATS[".jsonl"](both).splitlines())
    assert row["text"] == "ONE TWO THREE"
    assert row["words"][1] == {"word": "TWO", "start": 0.7, "end": 0.8, "confidence": 1.0}
    assert row["nbest"][1] == {"score": -2.5, "text": "ONE TWO"}
    assert (segment["offset"], segment["duration"]) == (4.0, 9.0) and "offset" not in row


@pytest.mark.parametrize("gaps", [(0.1, 0.3, 0.5, 2.0), (0.0, 0.0, 0.0, 0.04)])
def test_cues_are_short_and_do_not_overlap(gaps):
    """Words may be emitted in the frame in which the word before ended, or in one frame."""
    draw = random.Random(0)
    words = []
    now = 0.0
    for _ in range(300):
        now += draw.choice(gaps)
        words.append(Word("W" * draw.randrange(1, 12), now, now + 0.08, 1.0))
    cues = cues_of(subtitles(words, "."))
    assert " ".join(line for *_, line in cues) == text_of(words)
    assert all(0 < end - start <= 6.1 for start, end, _ in cues)
    assert all(before[1] <= after[0] for before, after in zip(cues, cues[1:]))
    if gaps[0]:
        assert all(len(line) <= 92 for *_, line in cues)


# ---------------------------------------- python decode.py


@pytest.fixture(scope="module")
def checkpoint(demo_utterances, tmp_path_factory):
    """A run whose student is not trained, but has many letters for everything."""
    tokenizer = data.train_tokenizer([u.text for u in demo_utterances], 40)
    student = confident_student(blank=3, vocab_size=tokenizer.get_vocab_size())
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_checkpoint(
        folder / "best.pt",
        model=student.state_dict(),
        config=student.config,
        tokenizer=tokenizer.to_str(),
    )
    return folder


@pytest.fixture(scope="module")
def clips():
    return sorted((DEMO / "corpus/test").rglob("*.opus"))[:2]


def run(checkpoint, capsys, *arguments):
    """-> exit code, stdout, stderr"""
    machine = ["--device", "cpu", "--workers", "0"]
    code = decode.main([*map(str, arguments), "--checkpoint", str(checkpoint), *machine])
    return code, *capsys.readouterr()


def manifest(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_of_every_kind(checkpoint, clips, tmp_path, capsys):
    """Text for what has sound, one line each for the rest; one bad file never ends a run."""
    audio = data.load_audio(clips[0])
    kinds = {
        "mono.wav": (16_000, 1, "PCM_16"),
        "stereo.flac": (48_000, 2, "PCM_24"),
        "telephone.wav": (8000, 1, "ULAW"),
        "song.mp3": (44_100, 2, None),
        "radio.ogg": (22_050, 1, "VORBIS"),
        "odd.aiff": (11_025, 3, "PCM_S8"),
        "float.wav": (96_000, 1, "DOUBLE"),
    }
    for name, (rate, channels, subtype) in kinds.items():
        samples = torchaudio.functional.resample(audio, 16_000, rate)[:, None]
        samples = samples.expand(-1, channels).numpy()
        soundfile.write(tmp_path / name, samples, rate, subtype=subtype)
    shutil.copy(clips[0], tmp_path / "as_it_was.opus")
    (tmp_path / "letter.wav").write_text("not a sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "nothing.wav", audio[:0].numpy(), 16_000)
    beginning = (tmp_path / "stereo.flac").read_bytes()[:300]
    (tmp_path / "truncated.flac").write_bytes(beginning)
    (tmp_path / "cover.jpg").write_bytes(b"no audio, in a folder where nobody looks for it")

    code, out, err = run(checkpoint, capsys, tmp_path)
    assert code == 0
    rows = [line.split("\t") for line in out.splitlines()]
    names = sorted(path.split("/")[-1] for path, _ in rows)
    assert names == sorted([*kinds, "as_it_was.opus"])
    assert all(text for _, text in rows)
    bad = ["letter.wav", "empty.wav", "nothing.wav", "truncated.flac"]
    for name in bad:
        assert [line for line in err.splitlines() if name in line and "skipped: " in line], name
        code, out, alone = run(checkpoint, capsys, tmp_path / name)
        assert code == 2 and not out and "Traceback" not in alone and name in alone
    mixture = [tmp_path / name for name in [*bad, "missing.wav", "mono.wav"]]
    code, out, err = run(checkpoint, capsys, *mixture)
    assert code == 0 and len(out.splitlines()) == 1
    assert "1 utterance, 5 could not be used" in err


def test_a_missing_file_is_not_cured_by_a_download(checkpoint, capsys):
    code, _, err = run(checkpoint, capsys, "missing.wav")
    assert code == 2 and "missing.wav" in err and "check its name" in err
    assert "download" not in err


def test_outputs(checkpoint, clips, tmp_path, capsys):
    for kind in ("txt", "jsonl", "ctm"):
        output = tmp_path / f"x.{kind}"
        assert run(checkpoint, capsys, *clips, "--beam", 3, "--output", output)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows]
    lines = (tmp_path / "x.txt").read_text().splitlines()
    assert [line.split("\t")[1] for line in lines] == texts
    for row in rows:
        assert 1 <= len(row["nbest"]) <= 3 and row["nbest"][0]["text"] == row["text"]
    again = data.load_utterances(tmp_path / "x.jsonl")  # a manifest of pseudo-labels
    paths = [row["audio_filepath"] for row in rows]
    assert [(u.path, u.text) for u in again] == list(zip(paths, texts))
    ctm = [line.split() for line in (tmp_path / "x.ctm").read_text().splitlines()]
    assert [word for *_, word, _ in ctm] == " ".join(texts).split()
    for kind in ("srt", "vtt"):
        output = tmp_path / f"x.{kind}"
        assert run(checkpoint, capsys, clips[0], "--output", output)[0] == 0
        assert " --> " in output.read_text()
    (tmp_path / "words.txt").write_text("ONE TWO\n")
    lm = ["--beam", 2, "--lm", tmp_path / "words.txt"]
    assert run(checkpoint, capsys, clips[0], *lm)[0] == 0


def test_scores(checkpoint, clips, tmp_path, capsys):
    """A file of scores for each test set; an empty reference counts, a missing one does not."""
    paths = [str(clip) for clip in clips]
    ids = ["first", "second"]
    texts = ["ONE TWO THREE", ""]
    rows = []
    for path, id, text in zip(paths, ids, texts):
        rows.append({"audio_filepath": path, "id": id, "text": text})
    missing = {"audio_filepath": str(next((DEMO / "corpus/dev").rglob("*.opus")))}
    (tmp_path / "other").mkdir()
    other = manifest(tmp_path / "other/test.jsonl", rows[:1])
    code, out, err = run(checkpoint, capsys, "--data", other)
    assert code == 0 and "1 utterance" in out and "1 utterances" not in out
    assert "RTF" in out and "normalised: NFKC" in out and all(len(x) < 140 for x in out.split("\n"))
    kept = (checkpoint / "scores-other-test.jsonl").read_bytes()

    (tmp_path / "mine").mkdir()
    mine = manifest(tmp_path / "mine/test.jsonl", [*rows, missing])
    code, out, err = run(checkpoint, capsys, "--data", mine)
    assert code == 0 and "no transcript" in err and "2 utterances, 1 could not be used" in out
    assert (checkpoint / "scores-other-test.jsonl").read_bytes() == kept
    scores = (checkpoint / "scores-mine-test.jsonl").read_text().splitlines()
    first, second = map(json.loads, scores)
    assert (second["reference"], second["words"]) == ("", 0)
    words = data.normalise(second["hypothesis"]).split()
    assert second["insertions"] == len(words) > 0
    total = sum(
        row[kind]
        for row in (first, second)
        for kind in ("substitutions", "deletions", "insertions")
    )
    assert f"[ {total} / 3, " in out.splitlines()[0]
    words = data.normalise(first["hypothesis"]).split()
    assert [h for _, h in first["alignment"] if h != "*"] == words
    bar = err.replace("\r", "\n")
    assert "/" in bar and " s [" in bar and "." not in bar.split("decoding: ")[1].split(" s [")[0]


def test_texts_are_on_disk_before_they_are_scored(checkpoint, clips, tmp_path, capsys, monkeypatch):
    def fail(reference, hypothesis):
        raise MemoryError("no memory is left")

    monkeypatch.setattr(decode, "word_errors", fail)
    row = {"audio_filepath": str(clips[0]), "text": "ONE"}
    source = manifest(tmp_path / "source.jsonl", [row])
    output = tmp_path / "scores.jsonl"
    assert run(checkpoint, capsys, "--data", source, "--output", output)[0] == 2
    [row] = map(json.loads, output.read_text().splitlines())
    assert row["reference"] == "ONE" and row["hypothesis"]


def test_mistakes_are_one_line(checkpoint, clips, tmp_path, capsys):
    for arguments, cure in [
        ([*clips, "--output", tmp_path / "x.srt"], ".jsonl"),
        ([clips[0], "--output", "x.doc"], ".ctm"),
        ([clips[0], "--beam", "0"], "--beam"),
        ([clips[0], "--beam", "2", "--method", "ctc"], "--beam"),
        ([clips[0], "--lm", __file__], "--beam 8"),
        ([clips[0], "--beam", "2", "--lm", tmp_path / "typo.txt"], "give a text file"),
        (["--stream", "x", clips[0]], "not both"),
        (["--stream", "x", "--output", "x.txt"], "> FILE"),
        (["--output", tmp_path / "x.srt"], ".jsonl"),
        ([clips[0], "--output", tmp_path / "none/x.txt"], "none/x.txt"),
        (["--data", tmp_path, "--output", tmp_path / "none/x.jsonl"], "none/x.jsonl"),
        (["--data", "missing-clean"], "download"),
        ([clips[0], "--chunk", "-1"], "--chunk"),
        ([clips[0], "--batch-seconds", "0"], "--batch-seconds"),
    ]:
        code, out, err = run(checkpoint, capsys, *arguments)
        last = err.splitlines()[-1]
        assert code == 2 and not out and ": error: " in last and cure in last, err
        assert "decoding" not in err
    assert not list(tmp_path.iterdir())


# ---------------------------------------- --plot


def test_plot(checkpoint, clips, tmp_path, capsys, monkeypatch):
    picture = tmp_path / "x.png"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as if not installed
    code, out, err = run(checkpoint, capsys, clips[0], "--plot", picture)
    assert code == 2 and not out and "pip install matplotlib" in err
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="no matplotlib: --plot was NOT tried")
    code, out, err = run(checkpoint, capsys, clips[0], "--plot", tmp_path / "x.words")
    assert code == 2 and not out and ".png" in err and "decoding" not in err
    assert run(checkpoint, capsys, clips[0], "--plot", picture)[0] == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("seconds", [4.0, 90.0])
def test_tokens_in_a_plot_do_not_collide(seconds, tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib: --plot was NOT tried")
    soundfile.write(tmp_path / "x.wav", 0.1 * torch.randn(int(16_000 * seconds)).numpy(), 16_000)
    tokenizer = letter_tokenizer(["A", "LONGER", "I", "MORNING"])
    student = confident_student(vocab_size=tokenizer.get_vocab_size(), seconds=10.0)
    frames = range(0, int(25 * seconds), 3)
    found = [Token(2 + frame % 5, frame, 0.5) for frame in frames]
    utterance = data.Utterance(str(tmp_path / "x.wav"), seconds)
    figure = draw_alignment(student, tokenizer, utterance, found, chunk=0)
    assert figure.get_size_inches()[0] <= 22
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len([frame for frame in frames if frame < 30 * 25])
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_node_posteriors_against_the_gradient_of_the_loss():
    """dL/dz_k = softmax_k * posterior of the node - posterior of the arc k; most k have no arc."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(7, 5, 9)
    targets = torch.tensor([3, 1, 1, 4])
    z = logits[None].clone().requires_grad_()
    model.transducer_loss(z, targets[None], torch.tensor([7]), torch.tensor([4])).backward()
    expected = (z.grad[0] / logits.softmax(-1))[..., 8]
    found = model.node_posteriors(logits, targets)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
