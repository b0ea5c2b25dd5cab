"""The student and its checkpoints against things written independently of them."""

import math
import resource
from dataclasses import replace

import pytest
import torch

import model
from model import Config, Student, load_checkpoint, load_student, save_checkpoint
from tools.command_line import UserError

TINY = Config(
    dim=32,
    layers=2,
    kernel=7,
    channels=8,
    vocab_size=11,
    predictor_dim=24,
    joiner_dim=20,
    head_dims=(6, 10),
)


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# ---------------------------------------- encoder, predictor


@pytest.mark.parametrize("padding", [0.0, 1e3])
def test_an_utterance_does_not_depend_on_its_batch(padding):
    torch.manual_seed(0)
    encoder = Student(TINY).eval().encoder
    lengths = torch.tensor([3, 7, 40, 41, 42, 43, 97, 128, 150])  # odd ones, every residue mod 4
    features = padding * torch.randn(len(lengths), 151, 80)
    for row, n in zip(features, lengths):
        row[:n] = torch.randn(n, 80)
    together, frames = encoder(features, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone, [count] = encoder(features[i : i + 1, :n], lengths[i : i + 1])
        assert count == frames[i] == alone.shape[1] == math.ceil(n / 2) // 2
        torch.testing.assert_close(together[i, :count], alone[0], atol=1e-5, rtol=0)


def test_an_utterance_depends_on_all_of_itself():
    """The counterpart: no frame of an utterance is masked away."""
    torch.manual_seed(0)
    features = torch.randn(1, 41, 80, requires_grad=True)
    hidden, _ = Student(TINY).eval().encoder(features, torch.tensor([41]))
    hidden.square().sum().backward()
    assert (features.grad[0].abs().sum(-1) > 0).all()


def test_rotary_turns_pairs_of_values_as_complex_numbers():
    x = torch.randn(2, 3, 7, 8)
    positions = torch.arange(5, 12)
    a, b = x.double().split(4, dim=-1)
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    angles = positions[:, None] * frequencies
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], dim=-1).float()
    torch.testing.assert_close(model.rotary(x, positions), expected, rtol=0, atol=1e-5)


def test_size_of_presets():
    for size, millions in {"nano": 2.93, "small": 9.37, "medium": 29.9, "large": 112.8}.items():
        with torch.device("meta"):
            student = Student(replace(model.PRESETS[size], vocab_size=256))
        assert student.parameter_count / 1e6 == pytest.approx(millions, rel=0.005)


def test_predictor_label_by_label_equals_all_at_once():
    torch.manual_seed(0)
    student = Student(TINY).eval()
    targets = torch.randint(1, 11, (3, 6))
    whole = student.predict(targets)
    out, state = student.predictor(torch.zeros(3, 1, dtype=torch.long))
    torch.testing.assert_close(out[:, 0], whole[:, 0])
    for u in range(6):
        out, new = student.predictor(targets[:, u : u + 1], state)
        torch.testing.assert_close(out[:, 0], whole[:, u + 1])
        # Rows 0 and 2 take the new state, row 1 keeps the old: the next output shows it.
        label = torch.full((3, 1), 4)
        after_new, _ = student.predictor(label, new)
        after_old, _ = student.predictor(label, state)
        after_mixed, _ = student.predictor(label, torch.stack([new[0], state[1], new[2]]))
        expected = torch.stack([after_new[0], after_old[1], after_new[2]])
        torch.testing.assert_close(after_mixed, expected)
        state = new


# ---------------------------------------- checkpoints


def save(path, student):
    entries = {"note": "x", "numbers": [1, 2.5, None]}
    save_checkpoint(path, model=student.state_dict(), config=student.config, **entries)


def test_checkpoint_round_trip(tmp_path):
    student = Student(TINY)
    save(tmp_path / "best.pt", student)
    plain = torch.load(tmp_path / "best.pt", weights_only=True)
    assert plain["note"] == "x" and plain["numbers"] == [1, 2.5, None]
    again = load_student(load_checkpoint(tmp_path))  # a directory means its best.pt
    assert again.config == student.config
    assert same_weights(student, again)
    assert list(tmp_path.iterdir()) == [tmp_path / "best.pt"]


def test_load_student_with_changes_keeps_the_encoder_only():
    first = Student(replace(TINY, vocab_size=0))
    checkpoint = {"config": vars(first.config), "model": first.state_dict()}
    changed = load_student(checkpoint, vocab_size=17, head_dims=())
    assert changed.joiner.out.out_features == 17 and not len(changed.heads)
    assert same_weights(first.encoder, changed.encoder)


def test_damaged_and_foreign_checkpoints_are_one_line(tmp_path):
    student = Student(TINY)
    save(tmp_path / "good.pt", student)
    whole = (tmp_path / "good.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(student.ctc.weight.detach().numpy().tobytes())] ^= 4
    damaged = {
        "truncated.pt": whole[: len(whole) // 2],
        "few.pt": whole[:10],
        "empty.pt": b"",
        "text.pt": b"not a checkpoint\n",
        "flipped.pt": bytes(flipped),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    torch.save({"format": 1}, tmp_path / "old.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name in (*damaged, "foreign.pt", "old.pt", "tensor.pt", "missing.pt"):
        with pytest.raises(UserError, match=name) as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    mixed = load_checkpoint(tmp_path / "good.pt")
    mixed["config"]["dim"] = 64
    with pytest.raises(UserError, match="good.pt does not hold the student"):
        load_student(mixed)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "was_here"), "w")

    torch.save({"format": 2, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "was_here").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path / "last.pt", Student(TINY))
    before = (tmp_path / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # as a full disk
    try:
        with pytest.raises(UserError, match="cannot write .*last.pt"):
            save(tmp_path / "last.pt", Student(TINY))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "last.pt"]
    with pytest.raises(UserError, match="missing"):
        save(tmp_path / "missing" / "last.pt", Student(TINY))
