"""The student, its losses and its checkpoints against things written independently of them."""
import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torchaudio

import losses
import model
from model import Config, Student, transducer_loss
from run import UserError

TINY = Config(dim=32, layers=2, kernel=7, channels=8, vocab_size=11, predictor_dim=24, joiner_dim=20, head_dims=(6, 10))


# ---------------------------------------------------------------------------- encoder

@pytest.mark.parametrize("padding", [0.0, 1e3])
def test_an_utterance_does_not_depend_on_its_batch(padding):
    torch.manual_seed(0)
    encoder = Student(TINY).eval().encoder
    lengths = torch.tensor([7, 40, 41, 42, 43, 97, 128, 150])                       # odd ones, and every residue mod 4
    features = torch.full((len(lengths), 151, 80), padding) * torch.randn(len(lengths), 151, 80)
    for row, n in zip(features, lengths):
        row[:n] = torch.randn(n, 80)
    together, frames = encoder(features, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone, [count] = encoder(features[i:i + 1, :n], lengths[i:i + 1])
        assert count == frames[i] == alone.shape[1] == math.ceil(n / 2) // 2
        torch.testing.assert_close(together[i, :count], alone[0], atol=1e-5, rtol=0)


def test_an_utterance_depends_on_all_of_itself():
    """The counterpart: no frame of an utterance is masked away."""
    torch.manual_seed(0)
    features = torch.randn(1, 41, 80, requires_grad=True)
    Student(TINY).eval().encoder(features, torch.tensor([41]))[0].square().sum().backward()
    assert (features.grad[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("size, million", [("nano", 3.0), ("small", 9.5), ("medium", 30.5), ("large", 115)])
def test_size_of_presets(size, million):
    with torch.device("meta"):
        student = Student(replace(model.PRESETS[size], vocab_size=256))
    assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(million, rel=0.03)


@pytest.mark.parametrize("kind", ["stateless", "lstm"])
def test_predictor_label_by_label_equals_all_at_once(kind):
    torch.manual_seed(0)
    student = Student(replace(TINY, predictor=kind)).eval()
    targets = torch.randint(1, 11, (3, 6))
    whole = student.predict(targets)
    out, state = student.predictor(torch.zeros(3, 1, dtype=torch.long))
    torch.testing.assert_close(out[:, 0], whole[:, 0])
    for u in range(6):
        out, new = student.predictor(targets[:, u:u + 1], state)
        torch.testing.assert_close(out[:, 0], whole[:, u + 1])
        # rows 0 and 2 take the new state, row 1 keeps the old: the next output shows it
        mixed = torch.stack([new[0], state[1], new[2]])
        label = torch.full((3, 1), 4)
        after_mixed, after_new, after_old = (student.predictor(label, s)[0] for s in (mixed, new, state))
        torch.testing.assert_close(after_mixed, torch.stack([after_new[0], after_old[1], after_new[2]]))
        state = new


# ---------------------------------------------------------------------------- transducer loss

def all_paths(logits, targets, blank):
    """-log of the sum over every way to interleave T - 1 blanks with U labels; the last blank ends it. (T, U+1, V)"""
    T, U = logits.shape[0], len(targets)
    log_probs, scores = logits.double().log_softmax(-1), []
    for labels_at in itertools.combinations(range(T - 1 + U), U):
        t, u, score = 0, 0, 0.0
        for step in range(T - 1 + U):
            if step in labels_at:
                score, u = score + log_probs[t, u, targets[u]], u + 1
            else:
                score, t = score + log_probs[t, u, blank], t + 1
        scores.append(score + log_probs[t, u, blank])
    return -torch.stack(scores).logsumexp(0)


def plain_loss(logits, targets, T, U, blank):
    """The recursion of Graves 2012, node by node in float64; its gradient comes from autograd."""
    log_probs, alpha = logits.double().log_softmax(-1), {(0, 0): logits.new_zeros((), dtype=torch.float64)}
    for t in range(T):
        for u in range(U + 1):
            ways = []
            if t:
                ways.append(alpha[t - 1, u] + log_probs[t - 1, u, blank])
            if u:
                ways.append(alpha[t, u - 1] + log_probs[t, u - 1, targets[u - 1]])
            if ways:
                alpha[t, u] = torch.stack(ways).logsumexp(0)
    return -alpha[T - 1, U] - log_probs[T - 1, U, blank]


def labels(shape, V, blank, generator):
    x = torch.randint(V - 1, shape, generator=generator)
    return x + (x >= blank)


@pytest.mark.parametrize("T, U", [(1, 0), (1, 3), (2, 4), (4, 0), (4, 3), (5, 2)])
def test_loss_is_the_sum_over_all_paths(T, U):
    generator = torch.Generator().manual_seed(T * 10 + U)
    logits, targets = 3 * torch.randn(1, T, U + 1, 5, generator=generator), labels((1, U), 5, 2, generator)
    loss = transducer_loss(logits, targets, torch.tensor([T]), torch.tensor([U]), blank=2)
    assert loss.item() == pytest.approx(all_paths(logits[0], targets[0], 2).item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_loss_and_gradient_against_the_recursion(seed):
    """Random shapes, lengths and blank; U = 0, T = 1 and T < U among them; int32 and int64; logits that are a view."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.randint(low, high, (), generator=generator).item()
    B, T, U, V = draw(1, 5), draw(1, 9), draw(0, 8), draw(2, 9)
    blank, integer = draw(0, V), [torch.int32, torch.int64][seed % 2]
    logits = (2 * torch.randn(V, U + 1, B, T, generator=generator)).permute(2, 3, 1, 0).requires_grad_()
    targets = labels((U, B), V, blank, generator).to(integer).T
    T_b, U_b = torch.randint(1, T + 1, (B,), generator=generator), torch.randint(0, U + 1, (B,), generator=generator)
    upstream = torch.rand(B, generator=generator)
    loss = transducer_loss(logits, targets, T_b.to(integer), U_b.to(integer), blank, reduction="none")
    [gradient] = torch.autograd.grad(loss, logits, upstream)
    expected = torch.stack(
        [plain_loss(logits[b], targets[b].long(), T_b[b].item(), U_b[b].item(), blank) for b in range(B)]
    )
    [expected_gradient] = torch.autograd.grad(expected, logits, upstream.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_against_torchaudio(reduction):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 30, 13, 20, generator=generator, requires_grad=True)
    targets, T, U = (
        labels((4, 12), 20, 0, generator).int(),
        torch.tensor([30, 1, 17, 9]).int(),
        torch.tensor([12, 3, 0, 11]).int(),
    )
    ours = transducer_loss(logits, targets, T, U, blank=0, reduction=reduction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torchaudio.functional.rnnt_loss(logits, targets, T, U, blank=0, reduction=reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (ours, theirs)), rtol=1e-3, atol=1e-5)


def test_loss_gradcheck():
    """The softmax is float32 by design: a step of 1e-2 is large enough to be seen through its rounding."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = lambda x: transducer_loss(
        x,
        labels((2, 2), 4, 0, torch.Generator().manual_seed(3)),
        torch.tensor([3, 2]),
        torch.tensor([2, 1]),
        reduction="none",
    ).double()
    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-2, atol=1e-3, rtol=1e-2)


def test_loss_of_long_and_of_certain_lattices_stays_exact():
    """1,000 frames; and logits of +-80, where a naive cumulative sum would underflow."""
    generator = torch.Generator().manual_seed(4)
    for scale, T in ((1, 1000), (80, 60)):
        logits = (scale * torch.randn(1, T, 4, 5, generator=generator)).requires_grad_()
        targets, lengths = labels((1, 3), 5, 0, generator), (torch.tensor([T]), torch.tensor([3]))
        ours, plain = transducer_loss(logits, targets, *lengths), plain_loss(logits[0], targets[0], T, 3, 0)
        assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(ours, logits)[0], torch.autograd.grad(plain, logits)[0], rtol=1e-2, atol=1e-3
        )


def test_padding_gets_zero_gradient_even_if_it_is_nan():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 6, 5, 7, generator=generator)
    T, U, targets = torch.tensor([6, 2, 4]), torch.tensor([1, 4, 0]), labels((3, 4), 7, 0, generator)
    padding = (torch.arange(6)[None, :, None] >= T[:, None, None]) | (torch.arange(5)[None, None] > U[:, None, None])
    logits[padding] = math.nan
    targets[0, 1:], targets[2] = -1, 99  # labels behind the end do not matter either
    logits.requires_grad_()
    transducer_loss(logits, targets, T, U).backward()
    assert (
        (logits.grad[padding] == 0).all() and torch.isfinite(logits.grad).all() and (logits.grad[~padding] != 0).any()
    )


@pytest.mark.parametrize(
    "name, change",
    [
        ("logits", dict(logits=torch.zeros(2, 3, 4))),
        ("targets", dict(targets=torch.ones(2, 2, dtype=torch.long))),
        ("logit_lengths", dict(logit_lengths=torch.tensor([4, 1]))),
        ("logit_lengths", dict(logit_lengths=torch.tensor([0, 1]))),
        ("logit_lengths", dict(logit_lengths=torch.tensor([1]))),
        ("target_lengths", dict(target_lengths=torch.tensor([4, 1]))),
        ("target_lengths", dict(target_lengths=torch.tensor([-1, 1]))),
        ("blank", dict(blank=5)),
        ("reduction", dict(reduction="average")),
        ("targets", dict(targets=torch.tensor([[1, 0, 1], [1, 1, 1]]))),
        ("targets", dict(targets=torch.full((2, 3), 5))),
    ],
)
def test_loss_names_the_argument_that_does_not_fit(name, change):
    good = dict(
        logits=torch.zeros(2, 3, 4, 5),
        targets=torch.ones(2, 3, dtype=torch.long),
        logit_lengths=torch.tensor([3, 2]),
        target_lengths=torch.tensor([3, 2]),
    )
    transducer_loss(**good)
    with pytest.raises(ValueError, match=name):
        transducer_loss(**(good | change))


# ---------------------------------------------------------------------------- distillation loss

@pytest.mark.parametrize("teacher_frames", [5, 7, 9])
def test_distillation_loss_frame_by_frame(teacher_frames):
    torch.manual_seed(0)
    prediction, target, lengths = torch.randn(3, 7, 4), torch.randn(3, teacher_frames, 4), [7, 2, 5]
    loss, count = losses.distillation_loss(prediction, target, torch.tensor(lengths))
    pairs = [(b, t) for b in range(3) for t in range(min(lengths[b], 7, teacher_frames))]
    assert count == len(pairs)
    assert loss.item() == pytest.approx(
        sum(sum(abs(prediction[b, t, d].item() - target[b, t, d].item()) for d in range(4)) / 4 for b, t in pairs),
        rel=1e-5,
    )


def test_distillation_loss_refuses_clocks_that_drift_apart():
    with pytest.raises(ValueError, match="differ by at most 2"):
        losses.distillation_loss(torch.zeros(1, 10, 4), torch.zeros(1, 7, 4), torch.tensor([7]))


# ---------------------------------------------------------------------------- checkpoints

def save(path, student):
    model.save_checkpoint(path, model=student.state_dict(), config=student.config, note="x", numbers=[1, 2.5, None])


def test_checkpoint_round_trip(tmp_path):
    torch.manual_seed(0)
    student = Student(replace(TINY, predictor="lstm"))
    save(tmp_path / "best.pt", student)
    plain = torch.load(tmp_path / "best.pt", weights_only=True)
    assert plain["note"] == "x" and plain["numbers"] == [1, 2.5, None]
    again = model.load_student(model.load_checkpoint(tmp_path))                     # a directory means its best.pt
    assert again.config == student.config
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "best.pt"]


def test_load_student_with_changes_keeps_the_encoder_only(tmp_path):
    first = Student(TINY)
    changed = model.load_student(
        {"config": vars(first.config), "model": first.state_dict()}, vocab_size=17, head_dims=()
    )
    assert changed.joiner.out.out_features == 17 and not len(changed.heads)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.encoder.state_dict().values(), changed.encoder.state_dict().values(), strict=True)
    )


def test_damaged_and_foreign_checkpoints_are_one_line(tmp_path):
    save(tmp_path / "good.pt", Student(TINY))
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "few.pt").write_bytes(whole[:10])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint\n")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name in ("truncated.pt", "few.pt", "empty.pt", "text.pt", "foreign.pt", "tensor.pt", "missing.pt"):
        with pytest.raises(UserError, match=name) as error:
            model.load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "was_here"), "w")
    torch.save({"format": 1, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError):
        model.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "was_here").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path / "last.pt", Student(TINY))
    before = (tmp_path / "last.pt").read_bytes()

    def full_disk(entries, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path / "last.pt", Student(TINY))
    assert (tmp_path / "last.pt").read_bytes() == before and list(tmp_path.iterdir()) == [tmp_path / "last.pt"]
    with pytest.raises(UserError, match="missing"):
        save(tmp_path / "missing" / "last.pt", Student(TINY))
