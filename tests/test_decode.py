"""Scores against torchaudio, search against plain loops."""
import random
from dataclasses import replace

import pytest
import torch
import torchaudio

import decode
from decode import Errors, word_errors
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


@pytest.mark.parametrize("max_symbols", [1, 3])
@pytest.mark.parametrize("kind", ["stateless", "lstm"])
def test_greedy_transducer_against_a_plain_loop(kind, max_symbols):
    torch.manual_seed(1)
    student = Student(replace(TINY, predictor=kind)).eval()
    for module in (student.joiner, student.predictor):
        for p in module.parameters():
            p.data.mul_(4)  # opinions strong enough to change from frame to frame
    hidden, lengths = 2 * torch.randn(5, 20, 32), torch.tensor([20, 1, 13, 7, 19])
    student.joiner.out.bias.data[0] += {"stateless": -2, "lstm": 3}[kind]  # blank wins now and then
    with torch.no_grad():
        found = decode.greedy_transducer(student, hidden, lengths, max_symbols)
        expected = [greedy_plainly(student, h[:n], max_symbols) for h, n in zip(hidden, lengths)]
    assert found == expected
    said = sum(map(len, found))
    assert (
        0 < said < max_symbols * lengths.sum() and len({x for row in found for x in row}) > 2
    )  # neither silence nor babble


def test_greedy_transducer_that_hears_nothing():
    student = Student(TINY).eval()
    student.joiner.out.bias.data[0] = 1e3
    assert decode.greedy_transducer(student, torch.randn(3, 4, 32), torch.tensor([4, 2, 1])) == [[], [], []]


def test_greedy_ctc_against_a_plain_loop():
    torch.manual_seed(0)
    student = Student(TINY).eval()
    hidden, lengths = torch.randn(5, 40, 32), [40, 1, 13, 7, 19]
    expected = []
    for h, n in zip(student.ctc(hidden).tolist(), lengths):
        row, before = [], None
        for frame in h[:n]:
            best = frame.index(max(frame))
            if best != before and best != 0:
                row.append(best)
            before = best
        expected.append(row)
    assert decode.greedy_ctc(student, hidden, torch.tensor(lengths)) == expected
    assert sum(map(len, expected)) > 5
