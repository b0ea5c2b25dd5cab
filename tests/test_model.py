"""The student and its checkpoints against things written independently of them."""
import math
from dataclasses import replace

import pytest
import torch

import model
from model import Config, Student
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
