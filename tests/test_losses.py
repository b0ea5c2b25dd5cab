"""The losses against things written independently of them: all paths, a node-by-node recursion, torchaudio."""
import itertools
import math
import warnings

import pytest
import torch
import torchaudio

import losses
from losses import (essence, one_best_path, path_distillation_loss, pruned_transducer_loss, transducer_loss,
                    transducer_loss_from_joiner)
from model import Config, Joiner, SimpleJoiner

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
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


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


def test_impossible_and_forbidden_labels():
    """-inf logits: a path round them is found; where there is none the loss says so in a number that is not small."""
    logits, targets, lengths = torch.zeros(1, 3, 2, 4), torch.tensor([[2]]), (torch.tensor([3]), torch.tensor([1]))
    logits[0, 0, 0, 2] = logits[0, 1, 1, 0] = -math.inf   # the label not in frame 0, and no blank after it in frame 1
    logits.requires_grad_()
    loss = transducer_loss(logits, targets, *lengths)
    assert loss.item() == pytest.approx(math.log(3 * 4 * 4 * 4), rel=1e-6)                 # blank, blank, label, blank
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    assert transducer_loss(logits.detach().index_fill(3, torch.tensor([2]), -math.inf), targets, *lengths) >= 1e5


def test_bfloat16_logits_are_computed_in_float32():
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(2, 20, 6, 9, generator=generator).bfloat16().requires_grad_()
    targets, lengths = labels((2, 5), 9, 0, generator), (torch.tensor([20, 20]), torch.tensor([5, 5]))
    wide = logits.detach().float().requires_grad_()
    narrow_loss, wide_loss = transducer_loss(logits, targets, *lengths), transducer_loss(wide, targets, *lengths)
    assert narrow_loss.dtype == torch.float32 and narrow_loss == wide_loss
    [narrow], [full] = torch.autograd.grad(narrow_loss, logits), torch.autograd.grad(wide_loss, wide)
    torch.testing.assert_close(narrow, full.bfloat16())


# ---------------------------------------------------------------------------- from the joiner, and pruned

def case(seed, B=3, T=7, U=5, V=6, dtype=torch.float64):
    """A joiner, its inputs and a simple joiner, with lengths of every kind. -> (joiner, simple, hidden, predicted,
    (targets, T, U))"""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = Config(dim=4, vocab_size=V, predictor_dim=3, joiner_dim=8)
    joiner, simple = Joiner(config).to(dtype), SimpleJoiner(config).to(dtype)
    hidden = (2 * torch.randn(B, T, 4, generator=generator)).to(dtype).requires_grad_()
    predicted = (2 * torch.randn(B, U + 1, 3, generator=generator)).to(dtype).requires_grad_()
    lengths = torch.randint(1, T + 1, (B,), generator=generator), torch.randint(0, U + 1, (B,), generator=generator)
    lengths[0][0], lengths[1][-1] = T, U
    return joiner, simple, hidden, predicted, (labels((B, U), V, 0, generator), *lengths)


def gradients(loss, joiner, hidden, predicted):
    return torch.autograd.grad(loss, (hidden, predicted, *(p for p in joiner.parameters() if p.requires_grad)))


@pytest.mark.parametrize("seed", range(6))
def test_from_joiner_equals_the_loss_of_its_logits(seed, monkeypatch):
    """In many blocks and in one; with joiner weights that learn and with frozen ones."""
    joiner, _, hidden, predicted, rest = case(seed)
    if seed % 2:
        joiner.out.requires_grad_(False)
    upstream = torch.rand(3, dtype=torch.float64)
    exact = transducer_loss(joiner(hidden, predicted), *rest, reduction="none")
    expected = gradients(exact @ upstream, joiner, hidden, predicted)
    if seed % 3:
        one_at_a_time = losses.blocks
        monkeypatch.setattr(losses, "blocks", lambda T, U1, V, device: one_at_a_time(T, U1, 2 ** 18, device))
    ours = transducer_loss_from_joiner(joiner, hidden, predicted, *rest, reduction="none")
    torch.testing.assert_close(ours, exact)
    for a, b in zip(gradients(ours @ upstream, joiner, hidden, predicted), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_from_joiner_leaves_out_only_what_nobody_visits():
    """A joiner that is sure of its path: most nodes have no posterior; the gradient is that of the whole lattice."""
    joiner, _, _, _, _ = case(0, dtype=torch.float32)
    hidden, predicted = 30 * torch.randn(2, 60, 4), 30 * torch.randn(2, 31, 3)
    hidden.requires_grad_(), predicted.requires_grad_()
    rest = labels((2, 30), 6, 0, None), torch.tensor([60, 41]), torch.tensor([30, 22])
    exact = transducer_loss(joiner(hidden, predicted), *rest)
    for a, b in zip(gradients(transducer_loss_from_joiner(joiner, hidden, predicted, *rest), joiner, hidden, predicted),
                    gradients(exact, joiner, hidden, predicted), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


class DropoutJoiner(Joiner):
    def join(self, encoded, predicted):
        return self.out(torch.nn.functional.dropout((encoded + predicted).tanh(), 0.5))


def test_from_joiner_drops_the_same_in_backward():
    """With dropout in the joiner, the gradient is the slope of the loss at one and the same mask, and the caller's
    random stream goes on as if only one number had been drawn."""
    joiner, _, hidden, predicted, rest = case(3)
    joiner.__class__ = DropoutJoiner
    torch.manual_seed(5)
    transducer_loss_from_joiner(joiner, hidden, predicted, *rest)
    after = torch.rand(())

    def loss(h):
        torch.manual_seed(5)
        return transducer_loss_from_joiner(joiner, h, predicted, *rest)
    assert torch.autograd.gradcheck(loss, (hidden,))
    loss(hidden)
    assert torch.rand(()) == after


def test_from_joiner_under_autocast():
    """Blocks are made again under the autocast of forward, and the joiner learns from its other uses in it too."""
    joiner, _, hidden, predicted, rest = case(1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = joiner(hidden, predicted)
        exact = transducer_loss(logits, *rest)
        expected = gradients(exact, joiner, hidden, predicted)
    with torch.autocast("cpu", torch.bfloat16):
        ours = transducer_loss_from_joiner(joiner, hidden, predicted, *rest)
        again = joiner(hidden, predicted).sum()
    assert ours.item() == pytest.approx(exact.item(), rel=1e-3)
    for a, b in zip(gradients(ours, joiner, hidden, predicted), expected, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()
    assert torch.autograd.grad(again, joiner.out.weight)[0].abs().sum() > 0


def window_loss(logits, targets, T, U, start, width):
    """The node-by-node recursion over the nodes of the windows alone."""
    log_probs, alpha = logits.double().log_softmax(-1), {(0, 0): torch.zeros((), dtype=torch.float64)}
    for t in range(T):
        for u in range(start[t], min(U + 1, start[t] + width)):
            ways = []
            if (t - 1, u) in alpha:
                ways.append(alpha[t - 1, u] + log_probs[t - 1, u, 0])
            if (t, u - 1) in alpha:
                ways.append(alpha[t, u - 1] + log_probs[t, u - 1, targets[u - 1]])
            if ways:
                alpha[t, u] = torch.stack(ways).logsumexp(0)
    return -alpha[T - 1, U] - log_probs[T - 1, U, 0]


@pytest.mark.parametrize("seed", range(6))
def test_pruned_loss_against_the_recursion_in_its_windows(seed, monkeypatch):
    joiner, simple, hidden, predicted, (targets, T, U) = case(seed, T=9)
    seen, place = [], losses.windows
    monkeypatch.setattr(losses, "windows", lambda *args: seen.append((place(*args), args[-1])) or seen[-1][0])
    rest = targets, T, U
    pruned, simple_loss = pruned_transducer_loss(joiner, simple, hidden, predicted, *rest, width=3, reduction="none")
    [(start, width)] = seen
    logits = joiner(hidden, predicted)
    expected = torch.stack([window_loss(logits[b], targets[b], T[b].item(), U[b].item(), start[b].tolist(), width)
                            for b in range(3)])
    torch.testing.assert_close(pruned, expected)
    for a, b in zip(*(gradients(x.sum(), joiner, hidden, predicted) for x in (pruned, expected)), strict=True):
        torch.testing.assert_close(a, b)
    h, g = simple(hidden, predicted)
    torch.testing.assert_close(simple_loss, transducer_loss(h[:, :, None] + g[:, None], *rest, reduction="none"))
    assert (pruned >= transducer_loss(logits, *rest, reduction="none") - 1e-9).all()


def test_pruned_loss_with_wide_windows_is_the_exact_loss():
    joiner, simple, hidden, predicted, rest = case(7)
    pruned, _ = pruned_transducer_loss(joiner, simple, hidden, predicted, *rest, width=6, reduction="none")
    torch.testing.assert_close(pruned, transducer_loss(joiner(hidden, predicted), *rest, reduction="none"))


@pytest.mark.parametrize("seed", range(20))
def test_windows_let_every_label_pass(seed):
    """From the first label to the last, never back, never further than they are wide; U may exceed T."""
    generator = torch.Generator().manual_seed(seed)
    T, U = torch.randint(1, 30, (6,), generator=generator), torch.randint(0, 40, (6,), generator=generator)
    width = max(2, 1 + max(-(-u // t) for t, u in zip(T.tolist(), U.tolist())))
    posterior = torch.rand(6, int(T.max()), int(U.max()) + 1, generator=generator) ** 8
    width = min(width, posterior.shape[2])
    for row, t, u in zip(losses.windows(posterior, T, U, width).tolist(), T.tolist(), U.tolist()):
        row = row[:t]
        assert row[0] == 0 and row[-1] == max(0, u + 1 - width)
        assert all(0 <= b - a <= width - 1 for a, b in zip(row, row[1:]))


def test_windows_lie_where_the_posterior_is():
    posterior = torch.zeros(1, 40, 21)
    path = (torch.arange(40) / 2).long()
    posterior[0, torch.arange(40), path] = 1
    start = losses.windows(posterior, torch.tensor([40]), torch.tensor([20]), 4)[0]
    assert ((start <= path) & (path < start + 4)).all()


def pruned_sum(joiner, simple, *args, **kwargs):
    return sum(pruned_transducer_loss(joiner, simple, *args, width=3, **kwargs))


@pytest.mark.parametrize("loss", ["exact", "from the joiner", "pruned"])
def test_gradcheck(loss):
    joiner, simple, hidden, predicted, rest = case(4)
    ways = {"exact": lambda h, g: transducer_loss(joiner(h, g), *rest),
            "from the joiner": lambda h, g: transducer_loss_from_joiner(joiner, h, g, *rest),
            "pruned": lambda h, g: pruned_sum(joiner, simple, h, g, *rest)}
    assert torch.autograd.gradcheck(ways[loss], (hidden, predicted))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss", ["from the joiner", "pruned"])
def test_bad_padding_of_the_joiners_inputs_does_no_harm(loss, bad):
    joiner, simple, hidden, predicted, (targets, T, U) = case(2)
    ways = {"from the joiner": lambda: transducer_loss_from_joiner(joiner, hidden, predicted, targets, T, U),
            "pruned": lambda: pruned_sum(joiner, simple, hidden, predicted, targets, T, U)}
    clean = ways[loss]()
    expected = gradients(clean, joiner, hidden, predicted)
    behind = ~losses.valid_mask(T, 7), ~losses.valid_mask(U + 1, 6)
    with torch.no_grad():
        hidden[behind[0]], predicted[behind[1]] = bad, bad
    found = ways[loss]()
    assert found == clean
    for a, b in zip(gradients(found, joiner, hidden, predicted), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert (expected[0][behind[0]] == 0).all() and (expected[1][behind[1]] == 0).all()


@pytest.mark.parametrize("name, change", [("targets", 0), ("logit_lengths", 1), ("target_lengths", 2)])
def test_joiner_losses_name_the_argument_that_does_not_fit(name, change):
    joiner, simple, hidden, predicted, rest = case(0)
    rest = [x + 100 * (i == change) for i, x in enumerate(rest)]
    with pytest.raises(ValueError, match=name):
        transducer_loss_from_joiner(joiner, hidden, predicted, *rest)
    with pytest.raises(ValueError, match=name):
        pruned_transducer_loss(joiner, simple, hidden, predicted, *rest)
    with pytest.raises(ValueError, match="non-empty"):
        transducer_loss_from_joiner(joiner, hidden[:0], predicted[:0], *(x[:0] for x in rest))


# ---------------------------------------------------------------------------- transducers that teach

def ensemble_case(seed, members=2):
    cases = [case(10 * seed + m) for m in range(members)]
    targets, T, U = cases[0][-1]
    return [(joiner, hidden, predicted) for joiner, _, hidden, predicted, _ in cases], targets, T, U


def plain_path(ensemble, b, T, U, temperature):
    """One utterance, node by node, from whole lattices: [(t, u, p)]"""
    lattices = [joiner(hidden, predicted)[b] / temperature for joiner, hidden, predicted in ensemble]
    t, u, path = 0, 0, []
    while t < T:
        p = sum(z[t, u].softmax(-1) for z in lattices) / len(lattices)
        path.append((t, u, p))
        t, u = (t + 1, u) if p.argmax() == 0 or u == U else (t, u + 1)
    return path


@pytest.mark.parametrize("seed", range(5))
def test_one_best_path_and_its_loss_node_by_node(seed):
    ensemble, targets, T, U = ensemble_case(seed, members=1 + seed % 3)
    joiner, _, hidden, predicted, _ = case(99)
    t, u, exist, p = one_best_path(ensemble, targets, T, U, temperature=2.0)
    loss = path_distillation_loss(joiner, hidden, predicted, (t, u, exist), p, T, temperature=2.0, shift=seed % 3)
    z, expected = joiner(hidden, predicted), 0.0
    for b in range(3):
        path = plain_path(ensemble, b, T[b], U[b], 2.0)
        assert [(t_, u_) for t_, u_, _ in path] == [*zip(t[b][exist[b]].tolist(), u[b][exist[b]].tolist())]
        torch.testing.assert_close(p[b][exist[b]], torch.stack([q for _, _, q in path]), check_dtype=False)
        for t_, u_, q in path:
            if t_ + seed % 3 < T[b]:
                expected = expected - (q * (z[b, t_ + seed % 3, u_] / 2).log_softmax(-1)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    """The cross entropy is then the teacher's entropy, its least value, with gradient zero."""
    joiner, _, hidden, predicted, (targets, T, U) = case(5)
    t, u, exist, p = one_best_path([(joiner, hidden, predicted)], targets, T, U)
    p = p.detach().double()
    loss = path_distillation_loss(joiner, hidden, predicted, (t, u, exist), p, T)
    assert loss.item() == pytest.approx(-(p * p.log()).sum(-1)[exist].sum().item(), rel=1e-5)
    assert all(g.abs().max() < 1e-5 for g in gradients(loss, joiner, hidden, predicted))


def test_essence_keeps_the_likeliest_soft_labels():
    p = torch.rand(4, 7, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    torch.testing.assert_close(essence(p), p)
    torch.testing.assert_close(essence(p, top_k=9), p)
    torch.testing.assert_close(essence(p, mass=1.0), p)
    torch.testing.assert_close(essence(p, top_k=1), torch.nn.functional.one_hot(p.argmax(-1), 9).float())
    for kept, row in zip(essence(p, mass=0.5).flatten(0, 1), p.flatten(0, 1)):
        chosen, total = [], 0.0
        for k in sorted(range(9), key=lambda k: -row[k]):
            if total < 0.5:
                chosen.append(k)
                total += row[k].item()
        assert set(kept.nonzero()[:, 0].tolist()) == set(chosen)
        torch.testing.assert_close(kept[chosen], row[chosen] / row[chosen].sum())


# ---------------------------------------------------------------------------- distillation loss

@pytest.mark.parametrize("teacher_frames", [5, 7, 9])
def test_distillation_loss_frame_by_frame(teacher_frames):
    torch.manual_seed(0)
    prediction, target, lengths = torch.randn(3, 7, 4), torch.randn(3, teacher_frames, 4), [7, 2, 5]
    loss = losses.distillation_loss(prediction, target, torch.tensor(lengths))
    pairs = [(b, t) for b in range(3) for t in range(min(lengths[b], 7, teacher_frames))]
    assert loss.item() == pytest.approx(
        sum(sum(abs(prediction[b, t, d].item() - target[b, t, d].item()) for d in range(4)) / 4 for b, t in pairs),
        rel=1e-5,
    )


def test_distillation_loss_refuses_clocks_that_drift_apart():
    with pytest.raises(ValueError, match="differ by at most 2"):
        losses.distillation_loss(torch.zeros(1, 10, 4), torch.zeros(1, 7, 4), torch.tensor([7]))
