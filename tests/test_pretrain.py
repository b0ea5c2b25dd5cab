"""Teachers: clocks, layers, batches, standardisation, combinations."""
import math

import pytest
import torch
import torch.nn.functional as F
import transformers

import model
import pretrain_kd
from conftest import DEMO
from pretrain_kd import Teacher, align
from run import UserError

FAMILIES = ["hubert", "wav2vec2", "whisper", "moonshine"]


def noise(*seconds):
    return [0.1 * torch.randn(int(16_000 * s), generator=torch.Generator().manual_seed(int(100 * s))) for s in seconds]


# ---------------------------------------------------------------------------- clocks

@pytest.mark.parametrize("rate", [50, 25, 16_000 / 384, 12.5, 100])
def test_a_teacher_that_tells_the_time_lines_up_with_the_student(rate):
    """Frame i of this teacher says when it is, (i + 1/2) / rate. Target t must say the student's time, 40 t + 20 ms."""
    seconds = 12
    clock = ((torch.arange(round(seconds * rate)) + 0.5) / rate)[:, None].repeat(1, 3)
    stack = max(1, round(rate / 25))
    target = align(clock, rate, stack)
    assert target.shape[1] == 3 * stack and abs(len(target) - seconds * 25) <= 1
    told = target.view(len(target), stack, 3).mean((1, 2))
    student = 0.040 * torch.arange(len(target)) + 0.020
    assert (told - student)[:-1].abs().max() < 0.0201  # (half a pair at the end is filled up)
    assert (told - student)[2:-2].abs().max() < 0.005                                # away from the ends far better


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


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_and_student_agree_on_the_number_of_frames(teacher_folders, family):
    teacher = Teacher(teacher_folders[family])
    for samples in (1600, 16_000, 16_001, 40_320, 63_999, 64_000, 64_001, 150_000):
        _, [frames] = teacher([torch.zeros(samples)])
        student = math.ceil((samples // 160 + 1) / 2) // 2
        assert abs(frames - student) <= 2, samples


# ---------------------------------------------------------------------------- teachers


@pytest.mark.parametrize(
    "family, rate, dim, batched",
    [
        ("hubert", 50, 32, True),
        ("wav2vec2", 50, 32, False),
        ("whisper", 50, 32, True),
        ("moonshine", 16_000 / 384, 32, None),
    ],
)
def test_what_is_measured_of_a_teacher(teacher_folders, family, rate, dim, batched):
    teacher = Teacher(teacher_folders[family])
    assert teacher.rate == pytest.approx(rate, abs=0.01) and teacher.dim == dim
    assert batched is None or teacher.batched == batched
    assert family in str(teacher) and not any(p.requires_grad for p in teacher.encoder.parameters())


@pytest.mark.parametrize("layer", ["last", "1", "0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_equal_the_model_called_by_hand(teacher_folders, family, layer):
    folder, [wave] = teacher_folders[family], noise(2.0)
    teacher = Teacher(f"{folder}:{layer}")
    found, [n] = teacher([wave])
    extractor, whole = (
        transformers.AutoFeatureExtractor.from_pretrained(folder),
        transformers.AutoModel.from_pretrained(folder).eval(),
    )
    inputs = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        out = (whole.get_encoder() if family in ("whisper", "moonshine") else whole)(
            **inputs, output_hidden_states=True
        )
    by_hand = (out.last_hidden_state if layer == "last" else out.hidden_states[int(layer)])[0]
    if family == "whisper":
        by_hand = by_hand[:100]                                                      # 2 s of the window of 4 s
    if family == "moonshine":  # 6 frames for 5, linearly, centre on centre
        at = ((torch.arange(math.floor(len(by_hand) * 1.2)) + 0.5) / 1.2 - 0.5).clamp(0, len(by_hand) - 1)
        low = at.floor().long()
        by_hand = by_hand[low] + (at - low)[:, None] * (by_hand[(low + 1).clamp(max=len(by_hand) - 1)] - by_hand[low])
    if len(by_hand) % 2:
        by_hand = torch.cat([by_hand, by_hand[-1:]])
    expected = torch.stack([torch.cat([by_hand[2 * t], by_hand[2 * t + 1]]) for t in range(len(by_hand) // 2)])
    assert n == len(expected)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_does_not_depend_on_the_batch(teacher_folders, family):
    teacher, waves = Teacher(teacher_folders[family]), noise(0.7, 2.0, 1.3, 5.5)
    together, lengths = teacher(waves)
    padded, again = teacher(
        torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor([len(w) for w in waves])
    )
    torch.testing.assert_close(padded, together)
    assert torch.equal(again, lengths)
    for row, n, wave in zip(together, lengths, waves):
        alone, [m] = teacher([wave])
        assert n == m
        assert (row[:n] - alone[0]).norm() < 2e-3 * alone.norm()


def test_audio_longer_than_the_window_of_whisper(teacher_folders):
    teacher, [wave] = Teacher(teacher_folders["whisper"]), noise(9.5)
    whole, [n] = teacher([wave])
    assert n == 238                                                                  # 9.5 s at 25 Hz, rounded up
    for k, start in enumerate((0, 64_000, 128_000)):  # every window of 4 s as if it stood alone
        piece, [m] = teacher([wave[start:start + 64_000]])
        torch.testing.assert_close(whole[0, 100 * k:100 * k + m], piece[0])


def test_standardise_gives_mean_0_and_variance_1(teacher_folders):
    teacher, batches = Teacher(teacher_folders["hubert"]), [noise(1.0, 2.0), noise(1.5, 0.8)]
    raw, _ = teacher(batches[0])
    for _ in range(2):  # twice: it must not standardise what is standardised
        teacher.standardise(batches)
    frames = torch.cat([e[:n] for batch in batches for e, n in zip(*teacher(batch))])
    torch.testing.assert_close(frames.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.var(0, correction=0), torch.ones(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(teacher(batches[0])[0] * teacher.std + teacher.mean, raw, atol=1e-4, rtol=1e-4)


def test_wrong_teachers_are_one_line(teacher_folders, tmp_path):
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    )
    bert.save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    hubert = teacher_folders["hubert"]
    for name, word in (
        (f"{hubert}:3", "layer"),
        (f"{hubert}:x", "layer"),
        (f"{hubert}:-1", "layer"),
        (str(tmp_path / "none"), "none"),
        (str(tmp_path / "empty"), "empty"),
        (str(tmp_path / "bert"), "bert"),
        ("no-such-owner/no-such-model", "no-such-model"),
    ):
        with pytest.raises(UserError, match=word) as error:
            Teacher(name)
        assert "\n" not in str(error.value), name


@pytest.mark.skipif(not (DEMO / "teachers").exists(), reason="demo/teachers is not there")
@pytest.mark.parametrize("name", ["hubert", "whisper"])
def test_the_demos_teachers(name, demo_utterances):
    import data
    teacher = Teacher(str(DEMO / "teachers" / name))
    waves = [data.load_audio(u.path) for u in demo_utterances[:2]]
    embeddings, lengths = teacher(waves)
    assert teacher.rate == pytest.approx(50, abs=0.01) and torch.isfinite(embeddings).all()
    assert all(abs(n - len(w) / 640) <= 1 for n, w in zip(lengths, waves))
    speech = embeddings[0, :lengths[0]]
    assert (speech[1:] - speech[:-1]).norm() > 0.1 * speech.norm()  # it says different things at different times


# ---------------------------------------------------------------------------- combinations

class FakeTeacher:
    """Says `level` everywhere, and one frame more or less than others."""

    def __init__(self, level, extra=0):
        self.level, self.extra = level, extra

    def __call__(self, waves):
        lengths = torch.tensor([len(w) // 640 + self.extra for w in waves])
        return (
            torch.full((len(waves), int(lengths.max()), 4), float(self.level))
            + torch.arange(len(waves))[:, None, None],
            lengths,
        )


def test_combine():
    waves, teachers = [torch.zeros(6400), torch.zeros(3200)], [FakeTeacher(1), FakeTeacher(5, extra=1)]
    heads = pretrain_kd.teacher_targets(teachers, waves, "heads")
    assert [(e.shape, e[0, 0, 0].item(), n.tolist()) for e, n in heads] == [
        ((2, 10, 4), 1, [10, 5]),
        ((2, 11, 4), 5, [11, 6]),
    ]
    [(average, lengths)] = pretrain_kd.teacher_targets(teachers, waves, "average")
    assert (
        average.shape == (2, 10, 4)
        and (average[0] == 3).all()
        and (average[1] == 4).all()
        and lengths.tolist() == [10, 5]
    )
    torch.manual_seed(0)
    drawn = set()
    for _ in range(30):
        [(random, lengths)] = pretrain_kd.teacher_targets(teachers, waves, "random")
        who = tuple(random[b, 0, 0].item() for b in range(2))
        assert lengths.tolist() == [10 + (who[0] == 5), 5 + (who[1] == 5)] and all(
            (random[b, : lengths[b]] == who[b]).all() for b in range(2)
        )
        drawn.add(who)
    assert drawn == {(1, 1), (1, 5), (5, 1), (5, 5)}                                 # each utterance draws for itself


def test_stage1_loss_by_hand():
    torch.manual_seed(0)
    student = model.Student(model.Config(dim=16, layers=1, kernel=3, channels=4, head_dims=(4, 6))).eval()

    class batch:
        features, feature_lengths = torch.randn(2, 40, 80), torch.tensor([40, 22])
    targets = [(torch.randn(2, 10, 4), torch.tensor([10, 5])), (torch.randn(2, 10, 6), torch.tensor([10, 5]))]
    with torch.no_grad():
        total, frames, parts = pretrain_kd.stage1_loss(student, batch, targets, [1.0, 0.25])
        hidden, _ = student.encoder(batch.features, batch.feature_lengths)
        by_hand = [
            sum(F.l1_loss(head(hidden[b, t]), target[b, t]).item() for b, n in ((0, 10), (1, 5)) for t in range(n))
            for head, (target, _) in zip(student.heads, targets)
        ]
    assert frames == 15 and [p.item() for p in parts] == pytest.approx([x / 15 for x in by_hand], rel=1e-4)
    assert total.item() == pytest.approx(by_hand[0] + 0.25 * by_hand[1], rel=1e-4)
