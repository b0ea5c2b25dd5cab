"""Transducers that teach: the one-best path, its loss and the essence, node by node."""

import pytest
import torch
import torch.nn.functional as F

import decode
from data import TranscribedBatch, Utterance, log_mel
from methods.essence_kd import distil_path, essence, one_best_path, path_distillation_loss
from model import Config, Student
from test_losses import case, gradients


def plain_path(ensemble, b, T, U, temperature):
    """One utterance, node by node, from whole lattices: [(t, u, q)]"""
    lattices = []
    for joiner, hidden, predicted in ensemble:
        lattices.append((joiner(hidden, predicted)[b] / temperature).softmax(-1))
    lattice = torch.stack(lattices).mean(0)
    t = 0
    u = 0
    path = []
    while t < T:
        q = lattice[t, u]
        path.append((t, u, q))
        if q.argmax() == 0 or u == U:
            t += 1
        else:
            u += 1
    return path


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_one_best_path_and_its_loss_node_by_node(seed, temperature):
    """One to three teachers; shifts of 0 to 2 frames."""
    shift = seed % 3
    ensemble = []
    for member in range(1 + seed % 3):
        joiner, hidden, predicted, _ = case(10 * seed + member)
        ensemble.append((joiner, hidden, predicted))
    *student, (targets, T, U) = case(99)
    found = one_best_path(ensemble, targets, T, U, temperature)
    loss = path_distillation_loss(*student, found, T, temperature, shift)
    joiner, hidden, predicted = student
    log_p = (joiner(hidden, predicted) / temperature).log_softmax(-1)
    expected = 0.0
    for b in range(3):
        path = plain_path(ensemble, b, T[b], U[b], temperature)
        exists = found.exists[b]
        nodes = torch.tensor([(t, u) for t, u, _ in path])
        assert torch.equal(torch.stack([found.t[b], found.u[b]], dim=1)[exists], nodes)
        torch.testing.assert_close(found.q[b][exists], torch.stack([q for _, _, q in path]))
        for t, u, q in path:
            if t + shift < T[b]:
                expected -= temperature**2 * (q * log_p[b, t + shift, u]).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(gradients(loss, *student), gradients(expected, *student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    """The cross entropy is then the teacher's entropy, its least value, with gradient zero."""
    *student, (targets, T, U) = case(5)
    path = one_best_path([student], targets, T, U)
    q = path.q.detach()
    path = path._replace(q=q)
    loss = path_distillation_loss(*student, path, T)
    entropy = -(q * q.log()).sum(-1)
    assert loss.item() == pytest.approx(entropy[path.exists].sum().item(), rel=1e-5)
    for gradient in gradients(loss, *student):
        assert gradient.abs().max() < 1e-5


def test_essence_keeps_the_likeliest_soft_labels():
    torch.manual_seed(0)
    q = torch.rand(4, 7, 9).softmax(-1)
    torch.testing.assert_close(essence(q, 9), q)
    torch.testing.assert_close(essence(q, 100), q)
    torch.testing.assert_close(essence(q, 1), F.one_hot(q.argmax(-1), 9).float())
    for kept, row in zip(essence(q, 3).flatten(0, 1), q.flatten(0, 1)):
        order = row.argsort(descending=True)
        largest = row[order[:3]]
        torch.testing.assert_close(kept[order[:3]], largest / largest.sum())
        assert (kept[order[3:]] == 0).all()


def test_audio_without_text_gets_what_the_first_teacher_writes():
    torch.manual_seed(1)
    config = Config(dim=16, layers=1, kernel=3, channels=4, vocab_size=7, predictor_dim=8)
    teachers = [Student(config).eval(), Student(config).eval()]
    with torch.no_grad():
        teachers[0].joiner.out.weight *= 5
    waveforms = [torch.randn(12_000), torch.randn(9_000)]
    features = [log_mel(waveform) for waveform in waveforms]
    lengths = torch.tensor([len(x) for x in features])
    batch = TranscribedBatch(
        utterances=[Utterance("a", 0.75, "x"), Utterance("b", 0.56)],
        features=torch.full((2, int(lengths.max()), 80), 7.0),  # as SpecAugment may leave them
        feature_lengths=lengths,
        seconds=1.3,
        failed=[],
        waveforms=waveforms,
        embeddings=[],
        targets=torch.tensor([[3, 4], [0, 0]]),
        target_lengths=torch.tensor([2, 0]),
        weights=torch.ones(2),
    )
    labelled, path = distil_path(teachers, batch, temperature=1.5, top_k=2)
    search = decode.GreedyTransducer(teachers[0])
    with torch.no_grad():
        search.advance(*teachers[0].encoder(features[1][None], lengths[1:]))
    written = [token.label for token in search.results()[0][0].tokens]
    assert written
    assert labelled.target_lengths.tolist() == [2, len(written)]
    assert labelled.targets[0, :2].tolist() == [3, 4]
    assert labelled.targets[1, : len(written)].tolist() == written
    assert batch.target_lengths.tolist() == [2, 0]
    # The path is that of both, of clean features, and has two labels a node.
    with torch.no_grad():
        ensemble = []
        for teacher in teachers:
            hidden, frames = teacher.encoder(features[0][None], lengths[:1])
            ensemble.append((teacher.joiner, hidden, teacher.predict(torch.tensor([[3, 4]]))))
        expected = plain_path(ensemble, 0, frames[0], 2, 1.5)
    found = path.q[0][path.exists[0]]
    torch.testing.assert_close(found, essence(torch.stack([q for _, _, q in expected]), 2))
    assert ((found > 0).sum(-1) == 2).all()
