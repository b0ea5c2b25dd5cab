"""The losses against what is independent of them: all paths, a recursion in float64, torchaudio."""

import itertools
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchaudio

from model import (
    Config,
    Joiner,
    ctc_loss,
    l1_loss,
    node_posteriors,
    transducer_loss,
    transducer_loss_from_joiner,
    valid_mask,
)

ROOT = Path(__file__).parent.parent


# ---------------------------------------- references


def plain_loss(logits, targets, T, U, blank=0):
    """Graves 2012 node by node in float64 -> (B,); its gradient comes from autograd."""
    losses = []
    for lattice, y, frames, labels in zip(logits, targets.tolist(), T.tolist(), U.tolist()):
        log_probs = lattice.double().log_softmax(-1)
        blanks = log_probs[..., blank]  # (T, U+1)
        emissions = log_probs[:, range(labels), y[:labels]]  # (T, U)
        alpha = {(0, 0): torch.zeros((), dtype=torch.float64)}
        for t, u in itertools.product(range(frames), range(labels + 1)):
            ways = []
            if t > 0:
                ways.append(alpha[t - 1, u] + blanks[t - 1, u])
            if u > 0:
                ways.append(alpha[t, u - 1] + emissions[t, u - 1])
            if ways:
                alpha[t, u] = torch.stack(ways).logsumexp(0)
        losses.append(-alpha[frames - 1, labels] - blanks[frames - 1, labels])
    return torch.stack(losses)


def all_paths(log_probs, targets, blank, t=0, u=0):
    """-> the log-probability of each way from node (t, u) to behind the last frame and label"""
    if t == len(log_probs):
        return [0.0] if u == len(targets) else []
    steps = [(log_probs[t, u, blank], t + 1, u)]
    if u < len(targets):
        steps.append((log_probs[t, u, targets[u]], t, u + 1))
    scores = []
    for step, *node in steps:
        scores += [step + rest for rest in all_paths(log_probs, targets, blank, *node)]
    return scores


def draw_labels(shape, V, blank=0):
    labels = torch.randint(V - 1, shape)
    return labels + (labels >= blank)


def case(seed, B=3, T=7, U=5, V=6, dtype=torch.float32):
    """-> a joiner, its inputs, (targets, T, U) with lengths of every kind"""
    torch.manual_seed(seed)
    joiner = Joiner(Config(dim=4, vocab_size=V, predictor_dim=3, joiner_dim=8)).to(dtype)
    hidden = (2 * torch.randn(B, T, 4, dtype=dtype)).requires_grad_()
    predicted = (2 * torch.randn(B, U + 1, 3, dtype=dtype)).requires_grad_()
    T_b = torch.randint(1, T + 1, (B,))
    U_b = torch.randint(0, U + 1, (B,))
    T_b[0] = T
    U_b[-1] = U
    return joiner, hidden, predicted, (draw_labels((B, U), V), T_b, U_b)


def gradients(loss, joiner, hidden, predicted, **options):
    learned = [p for p in joiner.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, [hidden, predicted, *learned], **options)


def assert_near(found, expected, relative):
    """Lists of gradients: the norm of each difference is small beside the norm."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= relative * b.norm()


# ---------------------------------------- transducer loss


@pytest.mark.parametrize("T, U", [(1, 0), (1, 3), (2, 4), (4, 0), (4, 3), (5, 2)])
def test_loss_is_the_sum_over_all_paths(T, U):
    torch.manual_seed(10 * T + U)
    logits = 3 * torch.randn(1, T, U + 1, 5)
    targets = draw_labels((1, U), 5, 2)
    loss = transducer_loss(logits, targets, torch.tensor([T]), torch.tensor([U]), blank=2)
    scores = all_paths(logits[0].double().log_softmax(-1), targets[0], blank=2)
    assert loss.item() == pytest.approx(-torch.stack(scores).logsumexp(0).item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_loss_and_gradient_against_the_recursion(seed):
    """Any shapes, lengths, blank; U = 0, T = 1, T < U; int32 and int64; logits that are a view;
    upstream weights of both signs and 0."""
    torch.manual_seed(seed)
    B, T, U, V = [int(torch.randint(*limits, ())) for limits in ((1, 5), (1, 9), (0, 8), (2, 9))]
    blank = int(torch.randint(V, ()))
    integer = [torch.int32, torch.int64][seed % 2]
    logits = (2 * torch.randn(V, U + 1, B, T)).permute(2, 3, 1, 0).requires_grad_()
    targets = draw_labels((U, B), V, blank).to(integer).T
    T_b = torch.randint(1, T + 1, (B,), dtype=integer)
    U_b = torch.randint(0, U + 1, (B,), dtype=integer)
    upstream = torch.randn(B)
    upstream[0] *= seed % 3
    loss = transducer_loss(logits, targets, T_b, U_b, blank, reduction="none")
    expected = plain_loss(logits, targets, T_b, U_b, blank)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(loss, logits, upstream)
    assert_near(found, torch.autograd.grad(expected, logits, upstream.double()), 1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_against_torchaudio(reduction):
    torch.manual_seed(1)
    logits = torch.randn(4, 30, 13, 20, requires_grad=True)
    targets = draw_labels((4, 12), 20).int()
    T = torch.tensor([30, 1, 17, 9]).int()
    U = torch.tensor([12, 3, 0, 11]).int()
    arguments = logits, targets, T, U
    ours = transducer_loss(*arguments, blank=0, reduction=reduction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torchaudio.functional.rnnt_loss(*arguments, blank=0, reduction=reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    [found] = torch.autograd.grad(ours.sum(), logits)
    [expected] = torch.autograd.grad(theirs.sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale, T", [(1, 1000), (80, 60), (1e4, 20), (1e6, 20)])
def test_loss_of_long_and_of_certain_lattices_stays_exact(scale, T):
    torch.manual_seed(4)
    logits = (scale * torch.randn(1, T, 4, 5)).requires_grad_()
    targets = draw_labels((1, 3), 5)
    lengths = torch.tensor([T]), torch.tensor([3])
    ours = transducer_loss(logits, targets, *lengths)
    plain = plain_loss(logits, targets, *lengths)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    assert_near(torch.autograd.grad(ours, logits), torch.autograd.grad(plain, logits), 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 9999.0, -100.0])
def test_padding_does_no_harm_and_gets_no_gradient(bad):
    torch.manual_seed(5)
    logits = torch.randn(3, 6, 5, 7)
    T = torch.tensor([6, 2, 4])
    U = torch.tensor([1, 4, 0])
    targets = draw_labels((3, 4), 7)
    clean = transducer_loss(logits, targets, T, U)
    inside = valid_mask(T, 6)[:, :, None] & valid_mask(U + 1, 5)[:, None]
    logits[~inside] = bad
    targets[0, 1:] = -100
    targets[2] = 9999
    logits.requires_grad_()
    loss = transducer_loss(logits, targets, T, U)
    loss.backward()
    assert loss == clean
    assert (logits.grad[~inside] == 0).all()
    assert logits.grad[inside].isfinite().all() and (logits.grad[inside] != 0).any()


@pytest.mark.parametrize(
    "name, change",
    [
        ("logits", {"logits": torch.zeros(2, 3, 4)}),
        ("targets", {"targets": torch.ones(2, 2, dtype=torch.long)}),
        ("logit_lengths", {"logit_lengths": torch.tensor([4, 1])}),
        ("logit_lengths", {"logit_lengths": torch.tensor([0, 1])}),
        ("logit_lengths", {"logit_lengths": torch.tensor([1])}),
        ("target_lengths", {"target_lengths": torch.tensor([4, 1])}),
        ("target_lengths", {"target_lengths": torch.tensor([-1, 1])}),
        ("blank", {"blank": 5}),
        ("reduction", {"reduction": "average"}),
        ("targets", {"targets": torch.tensor([[1, 0, 1], [1, 1, 1]])}),
        ("targets", {"targets": torch.full((2, 3), 5)}),
    ],
)
def test_loss_names_the_argument_that_does_not_fit(name, change):
    good = {
        "logits": torch.zeros(2, 3, 4, 5),
        "targets": torch.ones(2, 3, dtype=torch.long),
        "logit_lengths": torch.tensor([3, 2]),
        "target_lengths": torch.tensor([3, 2]),
    }
    transducer_loss(**good)
    with pytest.raises(ValueError, match=name):
        transducer_loss(**(good | change))


@pytest.mark.parametrize("whole_node", [False, True])
def test_forbidden_labels_are_walked_around(whole_node):
    """-inf: the label not in frame 0, and no blank after it in frame 1; or a node of -inf alone."""
    logits = torch.zeros(1, 3, 2, 4)
    logits[0, 0, 0, 2] = -1e4  # as good as -inf
    logits[0, 1, 1, 0] = -1e4
    closed = logits.masked_fill(logits < 0, -math.inf)
    if whole_node:
        closed[0, 1, 1] = -math.inf
    closed.requires_grad_()
    logits.requires_grad_()
    rest = torch.tensor([[2]]), torch.tensor([3]), torch.tensor([1])
    loss = transducer_loss(closed, *rest)
    # What is left is blank (of three labels), blank, label, blank (of four each).
    assert loss.item() == pytest.approx(math.log(3 * 4 * 4 * 4), rel=1e-6)
    [found] = torch.autograd.grad(loss, closed)
    [expected] = torch.autograd.grad(plain_loss(logits, *rest), logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shut", [(..., 2), (0, 0, 0)])
def test_no_path_at_all_is_a_large_number(shut):
    logits = torch.zeros(1, 3, 2, 4)
    logits[shut] = -math.inf
    logits.requires_grad_()
    loss = transducer_loss(logits, torch.tensor([[2]]), torch.tensor([3]), torch.tensor([1]))
    assert 1e9 <= loss < math.inf
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_nan_inside_an_utterance_is_seen_in_its_loss_alone():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, 5)
    rest = draw_labels((2, 2), 5), torch.tensor([4, 4]), torch.tensor([2, 2])
    clean = transducer_loss(logits, *rest, reduction="none")
    logits[0, 1, 1, 3] = math.nan
    logits.requires_grad_()
    loss = transducer_loss(logits, *rest, reduction="none")
    loss.sum().backward()
    assert loss[0].isnan() and loss[1] == clean[1]
    assert logits.grad[1].isfinite().all()


def test_bfloat16_logits_are_computed_in_float32():
    torch.manual_seed(9)
    logits = torch.randn(2, 20, 6, 9).bfloat16().requires_grad_()
    rest = draw_labels((2, 5), 9), torch.tensor([20, 20]), torch.tensor([5, 5])
    wide = logits.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        narrow_loss = transducer_loss(logits, *rest)
    wide_loss = transducer_loss(wide, *rest)
    assert narrow_loss.dtype == torch.float32
    assert narrow_loss == wide_loss
    [narrow] = torch.autograd.grad(narrow_loss, logits)
    [full] = torch.autograd.grad(wide_loss, wide)
    torch.testing.assert_close(narrow, full.bfloat16())


# ---------------------------------------- from the joiner


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("T, U, V", [(7, 5, 6), (24, 10, 2000)], ids=["one piece", "many pieces"])
def test_from_joiner_equals_the_loss_of_its_logits_and_the_recursion(seed, T, U, V):
    """With joiner weights that learn and with frozen ones; other weights for each utterance."""
    joiner, hidden, predicted, rest = case(seed, 3, T, U, V, torch.float64)
    joiner.out.requires_grad_(seed % 2 == 0)
    upstream = torch.randn(3, dtype=torch.float64)
    ours = transducer_loss_from_joiner(joiner, hidden, predicted, *rest, reduction="none")
    logits = joiner(hidden, predicted)
    exact = transducer_loss(logits, *rest, reduction="none")
    plain = plain_loss(logits, *rest)
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-6, atol=1e-6)
    found = gradients(ours.double() @ upstream, joiner, hidden, predicted)
    for reference in (exact, plain):
        total = reference.double() @ upstream
        expected = gradients(total, joiner, hidden, predicted, retain_graph=True)
        assert_near(found, expected, 1e-6)


def test_backward_leaves_out_only_what_nobody_visits():
    """A joiner that is sure of its path: few nodes are visited, the gradient is that of all."""
    joiner, hidden, predicted, (targets, T, U) = case(1, B=2, T=40, U=20, dtype=torch.float64)
    with torch.no_grad():
        joiner.out.weight *= 15
    logits = joiner(hidden, predicted)
    visited = node_posteriors(logits[0, :, : U[0] + 1], targets[0, : U[0]]) > 1e-8
    assert visited.double().mean() < 0.5
    plain = plain_loss(logits, targets, T, U).mean()
    expected = gradients(plain, joiner, hidden, predicted, retain_graph=True)
    ours = transducer_loss(logits, targets, T, U)
    assert_near(gradients(ours, joiner, hidden, predicted), expected, 1e-6)
    ours = transducer_loss_from_joiner(joiner, hidden, predicted, targets, T, U)
    assert_near(gradients(ours, joiner, hidden, predicted), expected, 1e-6)


def test_from_joiner_under_autocast():
    """Close to float32; the joiner learns from its other uses under the same autocast, too."""
    joiner, hidden, predicted, rest = case(1)
    exact = transducer_loss_from_joiner(joiner, hidden, predicted, *rest)
    expected = gradients(exact, joiner, hidden, predicted)
    with torch.autocast("cpu", torch.bfloat16):
        ours = transducer_loss_from_joiner(joiner, hidden, predicted, *rest)
        again = joiner(hidden, predicted).sum()
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=5e-3)
    assert_near(gradients(ours, joiner, hidden, predicted), expected, 3e-2)
    assert torch.autograd.grad(again, joiner.out.weight)[0].abs().sum() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_padding_of_the_joiners_inputs_does_no_harm(bad):
    joiner, hidden, predicted, (targets, T, U) = case(2)
    rest = targets, T, U
    clean = transducer_loss_from_joiner(joiner, hidden, predicted, *rest)
    expected = gradients(clean, joiner, hidden, predicted)
    behind = ~valid_mask(T, 7)
    behind_labels = ~valid_mask(U + 1, 6)
    with torch.no_grad():
        hidden[behind] = bad
        predicted[behind_labels] = bad
    loss = transducer_loss_from_joiner(joiner, hidden, predicted, *rest)
    found = gradients(loss, joiner, hidden, predicted)
    assert loss == clean
    assert_near(found, expected, 1e-6)
    assert (found[0][behind] == 0).all() and (found[1][behind_labels] == 0).all()


def test_from_joiner_names_the_argument_that_does_not_fit():
    joiner, hidden, predicted, rest = case(0)
    for change, name in enumerate(["targets", "logit_lengths", "target_lengths"]):
        wrong = list(rest)
        wrong[change] = wrong[change] + 100
        with pytest.raises(ValueError, match=name):
            transducer_loss_from_joiner(joiner, hidden, predicted, *wrong)
    nothing = [x[:0] for x in (hidden, predicted, *rest)]
    with pytest.raises(ValueError, match="empty"):
        transducer_loss_from_joiner(joiner, *nothing)


@pytest.mark.parametrize("from_joiner", [False, True])
def test_backward_twice_no_graph_and_no_second_derivative(from_joiner):
    joiner, hidden, predicted, rest = case(4)

    def loss():
        if from_joiner:
            return transducer_loss_from_joiner(joiner, hidden, predicted, *rest)
        return transducer_loss(joiner(hidden, predicted), *rest)

    once = loss()
    first = gradients(once, joiner, hidden, predicted, retain_graph=True)
    assert_near(gradients(once, joiner, hidden, predicted), first, 0)
    for without_graph in (torch.no_grad(), torch.inference_mode()):
        with without_graph:
            value = loss()
        assert value == once and not value.requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradients(loss(), joiner, hidden, predicted, create_graph=True)


MEMORY = """
import torch
from pathlib import Path
from model import Config, Joiner, transducer_loss_from_joiner

def status(key):
    line = Path("/proc/self/status").read_text().split(f"{key}:")[1]
    return 1024 * int(line.split()[0])

def step(B, T, U1, V=500):
    joiner = Joiner(Config(vocab_size=V))
    inputs = torch.randn(B, T, 144, requires_grad=True), torch.randn(B, U1, 256, requires_grad=True)
    targets = torch.randint(1, V, (B, U1 - 1))
    lengths = torch.full((B,), T), torch.full((B,), U1 - 1)
    transducer_loss_from_joiner(joiner, *inputs, targets, *lengths).backward()

step(2, 9, 5)  # what libraries load once
Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, counts from here
before = status("VmRSS")
step(4, 250, 40)
print((status("VmHWM") - before) / (4 * 250 * 40 * 500 * 4))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux measures the peak")
def test_from_joiner_never_holds_the_logits():
    # With this setting malloc gives back at once what is freed: the peak is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY]
    share = subprocess.check_output(command, cwd=ROOT, env=environment)
    assert 0 < float(share) < 0.25


# ---------------------------------------- CTC and L1


def test_ctc_is_the_sum_over_all_labellings_of_the_frames():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 3, requires_grad=True)
    targets = torch.tensor([[1, 2], [2, 2], [1, 0]])
    lengths = torch.tensor([5, 4, 2])
    target_lengths = torch.tensor([2, 2, 1])
    log_probs = logits.double().log_softmax(-1)
    loss = ctc_loss(logits, targets, lengths, target_lengths)
    for b, (T, U) in enumerate(zip(lengths.tolist(), target_lengths.tolist())):
        ways = []
        for path in itertools.product(range(3), repeat=T):
            labels = [label for label, _ in itertools.groupby(path) if label != 0]
            if labels == targets[b, :U].tolist():
                ways.append(log_probs[b, range(T), path].sum())
        expected = -torch.stack(ways).logsumexp(0)
        assert loss[b].item() == pytest.approx(expected.item(), rel=1e-6)
        found = torch.autograd.grad(loss[b], logits, retain_graph=True)
        assert_near(found, torch.autograd.grad(expected, logits, retain_graph=True), 1e-5)


def test_ctc_of_an_utterance_too_short_for_its_targets_is_zero():
    logits = torch.randn(1, 2, 4, requires_grad=True)
    loss = ctc_loss(logits, torch.tensor([[1, 1]]), torch.tensor([2]), torch.tensor([2]))
    assert loss.tolist() == [0.0]
    assert (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()


def test_l1_loss_frame_by_frame():
    torch.manual_seed(0)
    prediction = torch.randn(3, 7, 4)
    target = torch.randn(3, 7, 4)
    lengths = [7, 2, 5]
    expected = 0.0
    for b in range(3):
        for t in range(lengths[b]):
            for d in range(4):
                expected += abs(prediction[b, t, d] - target[b, t, d]).item() / 4
    loss = l1_loss(prediction, target, torch.tensor(lengths))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_l1_loss_refuses_a_teacher_of_other_frames():
    with pytest.raises(ValueError, match="as many frames"):
        l1_loss(torch.zeros(1, 10, 4), torch.zeros(1, 9, 4), torch.tensor([9]))
