"""Scores against torchaudio, search against plain loops and sums over all alignments, files against their formats."""
import json
import math
import random
import shutil
import sys
from dataclasses import replace

import pytest
import soundfile
import tokenizers
import torch
import torchaudio
import transformers

import data
import decode
import losses
import model
import search
from conftest import DEMO
from decode import Errors, Word, word_errors
from model import Config, Student

TINY = Config(dim=32, layers=1, kernel=7, channels=8, vocab_size=6, predictor_dim=24, joiner_dim=20)


def counts(errors):
    return errors.substitutions, errors.deletions, errors.insertions, errors.words


@pytest.mark.parametrize("seed", range(5))
def test_total_is_the_edit_distance(seed):
    draw = random.Random(seed)
    for _ in range(40):
        ref, hyp = ([draw.choice("ABCD") for _ in range(draw.randrange(12))] for _ in range(2))
        errors = word_errors(" ".join(ref), " ".join(hyp))
        assert errors.total == torchaudio.functional.edit_distance(ref, hyp) and errors.words == len(ref)
        assert len(ref) - errors.deletions == len(hyp) - errors.insertions          # what is not lost is there
        assert [r for r, _ in errors.alignment if r != "*"] == ref and [
            h for _, h in errors.alignment if h != "*"
        ] == hyp


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
    assert str(Errors(2650, 575, 401, 52576)) == "%WER 6.90 [ 3626 / 52576, 401 ins, 575 del, 2650 sub ]"
    assert counts(word_errors("A B", "A") + word_errors("C", "D E")) == (1, 1, 1, 3)
    assert str(Errors()) == "%WER 0.00 [ 0 / 0, 0 ins, 0 del, 0 sub ]"


def greedy_plainly(student, hidden, max_symbols):
    """One utterance, (T, d): ask the whole predictor again about everything said so far."""
    said = []
    for frame in hidden:
        for _ in range(max_symbols):
            predicted = student.predict(torch.tensor([said], dtype=torch.long))[:, -1:]
            label = student.joiner(frame[None, None], predicted).argmax().item()
            if label == 0:
                break
            said.append(label)
    return said


def opinionated(kind="lstm", blank=0.0, **changes):
    torch.manual_seed(1)
    student = Student(replace(TINY, predictor=kind, **changes)).eval()
    for module in (student.joiner, student.predictor):
        for p in module.parameters():
            p.data.mul_(4)  # opinions strong enough to change from frame to frame
    student.joiner.out.bias.data[0] += blank
    return student


def labels_of(results):
    return [[token.label for token in best.tokens] for best, *_ in results]


def feed(one, hidden, lengths, sizes=None):
    """All at once, or piece by piece."""
    start = 0
    for size in sizes or [hidden.shape[1]]:
        one.advance(hidden[:, start:start + size], (lengths - start).clamp(0, size))
        start += size
    return one.results()


@pytest.mark.parametrize("max_symbols", [1, 3])
@pytest.mark.parametrize("kind, blank", [("stateless", -2), ("lstm", 3)])          # blank wins now and then
def test_greedy_transducer_against_a_plain_loop(kind, blank, max_symbols):
    student = opinionated(kind, blank)
    hidden, lengths = 2 * torch.randn(5, 20, 32), torch.tensor([20, 1, 13, 7, 19])
    found = feed(search.GreedyTransducer(student, 5, max_symbols), hidden, lengths)
    with torch.no_grad():
        assert labels_of(found) == [greedy_plainly(student, h[:n], max_symbols) for h, n in zip(hidden, lengths)]
    said = sum(len(best.tokens) for [best] in found)
    assert 0 < said < max_symbols * lengths.sum() and len({x for row in labels_of(found) for x in row}) > 2
    pieces = feed(search.GreedyTransducer(student, 5, max_symbols), hidden, lengths, [3, 1, 9, 7])
    for [piecewise], [best] in zip(pieces, found):
        assert [token[:2] for token in piecewise.tokens] == [token[:2] for token in best.tokens]
        assert piecewise.score == pytest.approx(best.score, abs=1e-4)
    for [best], n in zip(found, lengths.tolist()):
        frames = [token.frame for token in best.tokens]
        assert frames == sorted(frames) and all(0 <= f < n for f in frames)
        assert all(0 < token.probability <= 1 for token in best.tokens)


def test_greedy_transducer_that_hears_nothing():
    student = Student(TINY).eval()
    student.joiner.out.bias.data[0] = 1e3
    for one in (search.GreedyTransducer(student, 3), search.BeamTransducer(student, 3, 4)):
        found = feed(one, torch.randn(3, 4, 32), torch.tensor([4, 2, 1]))
        assert labels_of(found) == [[], [], []] and all(best.score == 0 for best, *_ in found)


def test_greedy_ctc_against_a_plain_loop():
    torch.manual_seed(0)
    student = Student(TINY).eval()
    hidden, lengths = torch.randn(5, 40, 32), torch.tensor([40, 1, 13, 7, 19])
    expected = []
    for h, n in zip(student.ctc(hidden).tolist(), lengths):
        row, before = [], None
        for frame in h[:n]:
            best = frame.index(max(frame))
            if best != before and best != 0:
                row.append(best)
            before = best
        expected.append(row)
    found = feed(search.GreedyCTC(student, 5), hidden, lengths)
    assert labels_of(found) == expected and sum(map(len, expected)) > 5
    pieces = feed(search.GreedyCTC(student, 5), hidden, lengths, [1, 20, 19])
    assert [best.tokens for [best] in pieces] == [best.tokens for [best] in found]


# ---------------------------------------------------------------------------- beam search

@pytest.mark.parametrize("kind", ["stateless", "lstm"])
def test_a_wide_beam_sums_over_all_alignments(kind):
    """With room for every hypothesis the score is the transducer's exact log-likelihood: all alignments merged."""
    student = opinionated(kind, vocab_size=3)
    hidden = torch.randn(2, 3, 32)
    found = feed(search.BeamTransducer(student, 2, beam=128, max_symbols=2), hidden, torch.tensor([3, 2]))
    for b, (row, T) in enumerate(zip(found, (3, 2))):
        assert len(row) == 2 ** (2 * T + 1) - 1                                # every sequence of up to 2 T labels
        for hypothesis in row:
            targets = torch.tensor([[token.label for token in hypothesis.tokens]], dtype=torch.long)
            if targets.shape[1] > 2:
                continue                                                        # more could not be said in one frame
            logits = student.joiner(hidden[b:b + 1, :T], student.predict(targets))
            loss = losses.transducer_loss(logits, targets, torch.tensor([T]), torch.tensor([targets.shape[1]]))
            assert hypothesis.score == pytest.approx(-loss.item(), abs=1e-3)


def beam_plainly(student, hidden, beam, max_symbols):
    """One utterance, (T, d), with dictionaries: labels -> score."""
    kept = {(): 0.0}
    for frame in hidden:
        now, done = [(score, said) for said, score in kept.items()], []
        for s in range(max_symbols + 1):
            grown = []
            for score, said in now:
                predicted = student.predict(torch.tensor([said], dtype=torch.long))[:, -1:]
                log_probs = student.joiner(frame[None, None], predicted).log_softmax(-1).flatten().tolist()
                done.append((score + log_probs[0], said))
                grown += [(score + p, (*said, label)) for label, p in enumerate(log_probs) if label]
            worst = sorted((score for score, _ in done), reverse=True)[beam - 1] if len(done) >= beam else -math.inf
            now = sorted((x for x in grown if x[0] > worst), reverse=True)[:beam]
        merged = {}
        for score, said in done:
            merged[said] = torch.tensor([merged.get(said, -math.inf), score], dtype=torch.float64).logsumexp(0).item()
        kept = dict(sorted(merged.items(), key=lambda x: -x[1])[:beam])
    return kept


@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize("kind, blank", [("stateless", -2), ("lstm", 3)])
def test_beam_search_against_dictionaries(kind, blank, beam):
    student = opinionated(kind, blank)
    hidden, lengths = 2 * torch.randn(4, 12, 32), torch.tensor([12, 1, 7, 9])
    found = feed(search.BeamTransducer(student, 4, beam, max_symbols=2), hidden, lengths)
    assert sum(map(len, labels_of(found))) > 2
    with torch.no_grad():
        for row, h, n in zip(found, hidden, lengths):
            expected = beam_plainly(student, h[:n], beam, 2)
            assert {tuple(t.label for t in x.tokens): pytest.approx(x.score, abs=1e-3) for x in row} == expected
            ranks = [x.score / (len(x.tokens) + 1) for x in row]
            assert ranks == sorted(ranks, reverse=True)
            for x in row:
                frames = [token.frame for token in x.tokens]
                assert frames == sorted(frames) and all(0 <= f < n for f in frames)
    pieces = feed(search.BeamTransducer(student, 4, beam, max_symbols=2), hidden, lengths, [5, 1, 6])
    assert [[x.tokens for x in row] for row in pieces] == [[x.tokens for x in row] for row in found]


# ---------------------------------------------------------------------------- language models

TOKENIZER = data.train_tokenizer(["BAB A", "AB BA"], 6, 100)                       # letters: blank, unk, A, B, space


def test_fusion_adds_the_language_model_at_the_end_of_each_word():
    student, said = opinionated(vocab_size=TOKENIZER.get_vocab_size()), []

    def lm(queries):
        said.extend(queries)
        return [-1.0 - len(words) - 0.1 * len(word) if word else 0.0 for words, word in queries]
    fusion = search.Fusion(TOKENIZER, lm, 0.5, 2.0)
    hidden, lengths = torch.randn(1, 2, 32), torch.tensor([2])
    plain = feed(search.BeamTransducer(student, 1, 700, max_symbols=2), hidden, lengths)[0]
    fused = feed(search.BeamTransducer(student, 1, 700, max_symbols=2, fusion=fusion), hidden, lengths)[0]
    scores = {tuple(t.label for t in x.tokens): x.score for x in plain}
    assert len(fused) == len(plain) == sum(4 ** n for n in range(5))
    for x in fused:
        words = decode.text_of(decode.words_of(TOKENIZER, x.tokens)).split()
        if not any(t.label == 1 for t in x.tokens):
            gain = sum(2.0 - 1.0 - i - 0.1 * len(word) for i, word in enumerate(words))
            assert x.score == pytest.approx(scores[tuple(t.label for t in x.tokens)] + 0.5 * gain, abs=1e-3)
    assert ((), "A") in said and (("A",), "B") in said


def test_ngram_by_hand(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat\nthe cat ran, the dog ran\n")
    lm = search.NGram(tmp_path / "text.txt", order=2)
    vocabulary = ["THE", "CAT", "SAT", "RAN", "DOG"]
    unigram = {w: (c + 5 / 6) / (9 + 5) for w, c in zip(vocabulary, (3, 2, 1, 2, 1))}       # c(w) + t/6, 9 words, t = 5
    p = lambda words, word: math.exp(lm([(words, word)])[0])
    assert p((), "THE") == pytest.approx((2 + unigram["THE"]) / (2 + 1))                    # both lines start with it
    assert p(("A", "THE"), "CAT") == pytest.approx((2 + 2 * unigram["CAT"]) / (3 + 2))
    assert p(("THE",), "EMU") == pytest.approx(2 * (5 / 6 / 14) / (3 + 2))
    for before in ((), ("THE",), ("CAT",), ("EMU",)):
        assert sum(p(before, w) for w in [*vocabulary, "EMU"]) == pytest.approx(1)
    assert lm([((), "")]) == [0.0]


def test_causal_lm_against_the_model_asked_directly(tmp_path):
    torch.manual_seed(0)
    letters = {"<s>": 0, **{c: i for i, c in enumerate(" abcdefghijklmnopqrstuvwxyz", 1)}}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>").save_pretrained(tmp_path)
    config = transformers.GPT2Config(vocab_size=28, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0)
    gpt = transformers.GPT2LMHeadModel(config).eval()
    gpt.save_pretrained(tmp_path)
    lm = search.CausalLM(tmp_path, torch.device("cpu"))
    queries = [((), "THE"), (("THE",), "CAT"), (("THE", "CAT"), ""), (("A", "LONGER", "ROW"), "OF")]
    for (words, word), found in zip(queries, lm(queries)):
        ids = [0] + [letters[c] for c in " ".join([*words, word]).strip().lower()]
        with torch.no_grad():
            log_probs = gpt(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(" ".join(words))
        expected = sum(log_probs[i, ids[i + 1]].item() for i in range(start, len(ids) - 1))
        assert found == pytest.approx(expected, abs=1e-4)
    with pytest.raises(decode.UserError, match="no/such"):
        search.CausalLM("no/such", torch.device("cpu"))


# ---------------------------------------------------------------------------- files in, files out

def tokens(text, start=0, gap=2):
    """Letters of the TOKENIZER's, one each `gap` frames."""
    ids = TOKENIZER.encode(text).ids
    return [search.Token(label, start + gap * i, 1 - 0.1 * i) for i, label in enumerate(ids)]


def test_words_have_the_times_and_the_confidence_of_their_tokens():
    words = decode.words_of(TOKENIZER, tokens("AB A", start=10))                       # _ A B _ A at 10 12 14 16 18
    assert words == [Word("AB", 0.4, 0.6, 0.8), Word("A", 0.64, 0.76, 0.6)]
    assert decode.words_of(TOKENIZER, []) == [] and decode.text_of(words) == "AB A"


def test_formats():
    words = [Word("ONE", 0.4, 0.6, 0.5), Word("TWO", 0.7, 0.8, 1.0), Word("THREE", 3600.5, 3600.54, 0.25)]
    u = data.Utterance("a b.wav", 3700, None, "a b")
    rows = [(u, [(-1.5, words), (-2.5, words[:2])])]
    assert decode.render(".txt", rows) == "a b.wav\tONE TWO THREE\n"
    assert decode.render(".srt", rows) == ("1\n00:00:00,400 --> 00:00:01,400\nONE TWO\n\n"
                                           "2\n01:00:00,500 --> 01:00:01,500\nTHREE\n\n")
    assert decode.render(".vtt", rows).startswith("WEBVTT\n\n1\n00:00:00.400 --> 00:00:01.400\nONE TWO\n\n2\n01:00:00.5")
    assert decode.render(".ctm", rows).splitlines()[::2] == [
        "a_b 1 0.40 0.20 ONE 0.500", "a_b 1 3600.50 0.04 THREE 0.250"]
    row = json.loads(decode.render(".jsonl", rows))
    assert row["text"] == "ONE TWO THREE" and row["words"][1] == dict(word="TWO", start=0.7, end=0.8, confidence=1.0)
    assert row["nbest"][1] == {"score": -2.5, "text": "ONE TWO"}


def test_cues_are_short_and_do_not_overlap():
    draw, words, now = random.Random(0), [], 0.0
    for i in range(300):
        now += draw.choice([0.1, 0.3, 0.5, 2.0])
        words.append(Word("W" * draw.randrange(1, 12), now, now + 0.08, 1.0))
    cues = decode.subtitles(words, ".").strip().split("\n\n")
    seconds = lambda clock: sum(float(x) * 60 ** i for i, x in enumerate(reversed(clock.split(":"))))
    times = [[seconds(x) for x in cue.splitlines()[1].split(" --> ")] for cue in cues]
    assert " ".join(cue.splitlines()[2] for cue in cues) == decode.text_of(words)
    assert all(0 < end - start <= 6.1 for start, end in times) and all(len(cue.splitlines()[2]) <= 92 for cue in cues)
    assert all(a[1] <= b[0] for a, b in zip(times, times[1:]))


@pytest.fixture(scope="module")
def checkpoint(demo_utterances, tmp_path_factory):
    """A student that is not trained, but full of opinions about letters."""
    tokenizer = data.train_tokenizer([u.text for u in demo_utterances], 40, 2)
    student, folder = opinionated(blank=3, vocab_size=tokenizer.get_vocab_size()), tmp_path_factory.mktemp("checkpoint")
    model.save_checkpoint(folder / "best.pt", model=student.state_dict(), config=student.config,
                          tokenizer=tokenizer.to_str())
    return folder


def run(checkpoint, capsys, *arguments):
    code = decode.main([*map(str, arguments), "--checkpoint", str(checkpoint), "--device", "cpu", "--workers", "0"])
    return code, *capsys.readouterr()


def test_files_of_every_kind(checkpoint, tmp_path, capsys):
    """Text for what has text, one line each for the rest; one bad file never ends a run."""
    source = next((DEMO / "corpus/test").rglob("*.opus"))
    audio = data.load_audio(source)
    good = {"mono.wav": (16_000, 1, "PCM_16"), "stereo.flac": (48_000, 2, "PCM_24"), "telephone.wav": (8000, 1, "ULAW"),
            "song.mp3": (44_100, 2, None), "radio.ogg": (22_050, 1, "VORBIS"), "odd.aiff": (11_025, 3, "PCM_S8"),
            "float.wav": (96_000, 1, "DOUBLE")}
    for name, (rate, channels, subtype) in good.items():
        samples = torchaudio.functional.resample(audio, 16_000, rate)[:, None].expand(-1, channels)
        soundfile.write(tmp_path / name, samples.numpy(), rate, subtype=subtype)
    shutil.copy(source, tmp_path / "as_it_was.opus")
    (tmp_path / "letter.wav").write_text("not a sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "nothing.wav", audio[:0].numpy(), 16_000)
    (tmp_path / "truncated.flac").write_bytes((tmp_path / "stereo.flac").read_bytes()[:300])
    bad = ["letter.wav", "empty.wav", "nothing.wav", "truncated.flac"]
    (tmp_path / "cover.jpg").write_bytes(b"no audio, in a folder nobody asks for it")
    code, out, err = run(checkpoint, capsys, tmp_path)
    assert code == 0 and sorted(line.split("\t")[0].split("/")[-1] for line in out.splitlines()) == sorted(
        [*good, "as_it_was.opus"])
    assert all(line.split("\t")[1] for line in out.splitlines())
    for name in bad:
        assert [line for line in err.splitlines() if name in line and "skipped: " in line], (name, err)
        code, out, alone = run(checkpoint, capsys, tmp_path / name)
        assert code == 2 and not out and "Traceback" not in alone and name in alone
    assert run(checkpoint, capsys, *(tmp_path / name for name in [*bad, "mono.wav"]))[0] == 0


def test_outputs(checkpoint, tmp_path, capsys):
    files = sorted((DEMO / "corpus/test").rglob("*.opus"))[:2]
    assert run(checkpoint, capsys, *files)[0] == 0
    for kind in ("txt", "jsonl", "ctm"):
        assert run(checkpoint, capsys, *files, "--beam", "3", "--output", tmp_path / f"x.{kind}")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    plain = [line.split("\t")[1] for line in (tmp_path / "x.txt").read_text().splitlines()]
    assert [row["text"] for row in rows] == plain
    assert all(1 <= len(row["nbest"]) <= 3 and row["nbest"][0]["text"] == row["text"] for row in rows)
    again = data.load_utterances(tmp_path / "x.jsonl")                                 # a manifest of pseudo-labels
    assert [(u.path, u.text) for u in again] == [(row["audio_filepath"], row["text"]) for row in rows]
    ctm = [line.split() for line in (tmp_path / "x.ctm").read_text().splitlines()]
    assert [word for *_, word, _ in ctm] == " ".join(row["text"] for row in rows).split()
    for kind in ("srt", "vtt"):
        assert run(checkpoint, capsys, files[0], "--output", tmp_path / f"x.{kind}")[0] == 0
        assert " --> " in (tmp_path / f"x.{kind}").read_text()
    (tmp_path / "words.txt").write_text("ONE TWO\n")
    assert run(checkpoint, capsys, files[0], "--beam", "2", "--lm", tmp_path / "words.txt")[0] == 0


def test_mistakes_are_one_line(checkpoint, tmp_path, capsys):
    files = sorted((DEMO / "corpus/test").rglob("*.opus"))[:2]
    for arguments, word in [
        ([*files, "--output", tmp_path / "x.srt"], ".jsonl"), ([files[0], "--output", "x.doc"], ".ctm"),
        ([files[0], "--beam", "0"], "--beam"), ([files[0], "--beam", "2", "--method", "ctc"], "--beam"),
        ([files[0], "--lm", "x.txt"], "--beam 8"), ([files[0], "--beam", "2", "--lm", tmp_path / "none"], "--lm"),
        (["--stream", "x", files[0]], "not both"), (["--output", tmp_path / "x.srt"], ".jsonl"),
        ([files[0], "--output", tmp_path / "none/x.txt"], "none/x.txt"),
    ]:
        code, out, err = run(checkpoint, capsys, *arguments)
        last = err.splitlines()[-1]
        assert code == 2 and not out and ": error: " in last and word in last, err


def test_plot(checkpoint, tmp_path, capsys, monkeypatch):
    file = next((DEMO / "corpus/test").rglob("*.opus"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)                        # as if it were not installed
    code, out, err = run(checkpoint, capsys, file, "--plot", tmp_path / "x.png")
    assert code == 0 and out and "pip install matplotlib" in err and not (tmp_path / "x.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: --plot was NOT tried")
    assert run(checkpoint, capsys, file, "--plot", tmp_path / "x.png")[0] == 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_lattice_posterior_against_the_gradient_of_the_loss():
    """dL/dz_k = softmax_k * posterior of the node - posterior of the arc k: without an arc k, the posterior is left."""
    torch.manual_seed(0)
    logits, targets = 2 * torch.randn(7, 5, 9), torch.tensor([3, 1, 1, 4])
    z = logits[None].clone().requires_grad_()
    losses.transducer_loss(z, targets[None], torch.tensor([7]), torch.tensor([4])).backward()
    expected = (z.grad[0] / logits.softmax(-1))[..., 8]
    torch.testing.assert_close(losses.lattice_posterior(logits, targets), expected, atol=1e-4, rtol=1e-3)
