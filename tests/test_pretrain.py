"""Stage 1 beside the teachers themselves (test_teachers.py): clocks, standardisation, combinations, losses."""
import types
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import losses
import model
import pretrain_kd
from conftest import DEMO
from pretrain_kd import Clock, Teacher, align


def noise(*seconds):
    return [0.1 * torch.randn(int(16_000 * s), generator=torch.Generator().manual_seed(int(100 * s))) for s in seconds]


# ---------------------------------------------------------------------------- clocks

@pytest.mark.parametrize("hop, offset", [(320, -80), (640, 0), (384, -511), (1280, 1120), (2560, 2160), (160, 160)])
def test_a_teacher_that_tells_the_time_lines_up_with_the_student(hop, offset):
    """Frame i of this teacher says on which sample it is centred. Target t must say the student's, 640 t + 320."""
    samples, clock = 12 * 16_000, Clock(hop, offset, 3)
    frames = (samples + offset) // hop
    told = (torch.arange(frames) * hop + (hop - offset) / 2)[:, None].repeat(1, 3)
    target = align(told, samples, clock)
    assert target.shape == (300, 3 * clock.stack)
    error = target.view(300, clock.stack, 3).mean((1, 2)) - (640 * torch.arange(300) + 320)
    # side by side as they are: off by what the frames' middles are off; in between: not at all, until the last is held
    assert error[3:-5].abs().max() <= (0.1 if 640 % hop else 161) and error[-1].abs() <= 1.5 * hop


def test_where_a_students_frame_is_centred():
    """An impulse in each feature frame in turn: output t hears frames whose middle is 4t + 2: 40 t + 20 ms."""
    torch.manual_seed(0)
    subsampling, silence = model.Subsampling(model.Config(channels=8)).eval(), torch.zeros(1, 48, 80)
    with torch.no_grad():
        response = torch.zeros(48, 12)
        for f in range(48):
            impulse = silence.clone()
            impulse[0, f] = 10
            response[f] = (
                (subsampling(impulse, torch.tensor([48]))[0] - subsampling(silence, torch.tensor([48]))[0])[0]
                .square()
                .sum(-1)
            )
    for t in range(1, 11):
        heard = response[:, t].nonzero()[:, 0]
        assert (heard.min() + heard.max()).item() / 2 == 4 * t + 2
        mean = (response[:, t] * torch.arange(48)).sum() / response[:, t].sum()
        assert abs(mean - (4 * t + 2)) < 1  # random weights: within 10 ms of the middle


# ---------------------------------------------------------------------------- standardisation

def test_standardise_gives_mean_0_and_variance_1(teacher_folders):
    teacher, batches = Teacher(teacher_folders["hubert"]), [noise(1.0, 2.0), noise(1.5, 0.8)]
    raw, _ = teacher.embed(batches[0])
    for _ in range(2):  # twice: it must not standardise what is standardised
        teacher.standardise(batches)
    frames = torch.cat([e[:n] for batch in batches for e, n in zip(*teacher(batch))])
    torch.testing.assert_close(frames.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.var(0, correction=0), torch.ones(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(teacher(batches[0])[0] * teacher.std + teacher.mean, raw, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not (DEMO / "teachers").exists(), reason="demo/teachers is not there")
@pytest.mark.parametrize("name", ["hubert", "whisper"])
def test_the_demos_teachers(name, demo_utterances):
    import data
    teacher = Teacher(str(DEMO / "teachers" / name))
    waves = [data.load_audio(u.path) for u in demo_utterances[:2]]
    embeddings, lengths = teacher(waves)
    assert teacher.clocks[0].rate == 50 and torch.isfinite(embeddings).all()
    assert all(abs(n - len(w) / 640) <= 1 for n, w in zip(lengths, waves))
    speech = embeddings[0, :lengths[0]]
    assert (speech[1:] - speech[:-1]).norm() > 0.1 * speech.norm()  # it says different things at different times


# ---------------------------------------------------------------------------- combinations

class FakeTeacher:
    """Says level + utterance everywhere; of each layer 4 wide."""

    def __init__(self, *levels):
        self.levels, self.widths = levels, [4] * len(levels)

    def __call__(self, waves):
        said = torch.tensor(self.levels, dtype=torch.float).repeat_interleave(4)
        said = said + torch.arange(len(waves))[:, None, None]
        return said.expand(len(waves), 10, -1), torch.tensor([len(w) // 640 for w in waves])


def test_combine():
    batch = types.SimpleNamespace(waveforms=[torch.zeros(6400), torch.zeros(3200)])
    teachers, weights = [FakeTeacher(1), FakeTeacher(5, 9)], [2.0, 1.0, 1.0]
    heads = pretrain_kd.teacher_targets(teachers, batch)
    assert [(tuple(e.shape), e[0, 0, 0].item(), e[1, 9, 3].item()) for e in heads] == [
        ((2, 10, 4), 1, 2), ((2, 10, 4), 5, 6), ((2, 10, 4), 9, 10)]
    [average] = pretrain_kd.teacher_targets(teachers, batch, "average", weights)
    assert average.shape == (2, 10, 4) and (average[0] == 4).all() and (average[1] == 5).all()
    torch.manual_seed(0)
    drawn = Counter()
    for _ in range(400):
        [random] = pretrain_kd.teacher_targets(teachers, batch, "random", weights)
        who = tuple(int(random[b, 0, 0]) - b for b in range(2))
        assert all((random[b] == who[b] + b).all() for b in range(2))
        drawn[who] += 1
    assert len(drawn) == 9  # each utterance draws for itself, by weight
    assert sum(n for who, n in drawn.items() if who[0] == 1) == pytest.approx(200, abs=40)


def test_distances_by_hand():
    p, e = torch.randn(2, 5, 6), torch.randn(2, 6, 6)
    lengths, rows = torch.tensor([5, 3]), [(b, t) for b, n in ((0, 5), (1, 3)) for t in range(n)]
    cosine = [1 - (p[b, t] @ e[b, t] / p[b, t].norm() / e[b, t].norm()).item() for b, t in rows]
    l1, l2 = ([(p[b, t] - e[b, t]).norm(k).item() ** k / 6 for b, t in rows] for k in (1, 2))
    for kind, by_hand in {"l1": l1, "l2": l2, "cosine": cosine, "l1+cosine": [*l1, *cosine]}.items():
        loss, frames = losses.distillation_loss(p, e, lengths, kind)
        assert frames == 8 and loss.item() == pytest.approx(sum(by_hand), rel=1e-4), kind
    with pytest.raises(ValueError, match="at most 2"):
        losses.distillation_loss(p, torch.randn(2, 8, 6), lengths)


def test_stage1_loss_by_hand():
    torch.manual_seed(0)
    student = model.Student(model.Config(dim=16, layers=1, kernel=3, channels=4, head_dims=(4, 6))).eval()
    batch = types.SimpleNamespace(features=torch.randn(2, 40, 80), feature_lengths=torch.tensor([40, 22]))
    targets = [torch.randn(2, 10, 4), torch.randn(2, 10, 6)]
    with torch.no_grad():
        total, frames, parts = pretrain_kd.stage1_loss(student, batch, targets, [1.0, 0.25], ["l1", "l2"])
        hidden, _ = student.encoder(batch.features, batch.feature_lengths)
        by_hand = [
            sum(distance(head(hidden[b, t]), target[b, t]).item() for b, n in ((0, 10), (1, 5)) for t in range(n))
            for head, target, distance in zip(student.heads, targets, (F.l1_loss, F.mse_loss))
        ]
    assert frames == 15 and [p.item() for p in parts] == pytest.approx([x / 15 for x in by_hand], rel=1e-4)
    assert total.item() == pytest.approx(by_hand[0] + 0.25 * by_hand[1], rel=1e-4)
