"""The losses: what the student is taught by. Pure PyTorch, no knowledge of the student; copy this page elsewhere at will.

Axes: B batch, T encoder frames, U labels, V vocabulary with blank 0, D teacher width.
"""
import torch
import torch.nn.functional as F

BLANK = 0


def valid_mask(lengths, size):
    """lengths (B,) -> (B, size) bool, True on frames that exist."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def distillation_loss(prediction, target, lengths):
    """Stage 1: L = sum over valid frames of mean over dims |p - e|   (arXiv 2303.10917; divide by the frame count for
    the mean).

    prediction (B, T, D), target (B, T', D) of a teacher, lengths (B,) valid frames -> (loss, count of frames).
    Two clocks may differ by a frame or two at the end: both are cut to the shorter; more than two is an alignment
    error.
    """
    if abs(prediction.shape[1] - target.shape[1]) > 2:
        raise ValueError(f"student has {prediction.shape[1]} frames, teacher {target.shape[1]}: they must differ by "
                         f"at most 2")
    T = min(prediction.shape[1], target.shape[1])
    lengths = lengths.clamp(max=T)
    error = (prediction[:, :T] - target[:, :T]).abs().mean(dim=-1)                     # (B, T)
    return (error * valid_mask(lengths, T)).sum(), lengths.sum()


def transducer_loss(logits, targets, logit_lengths, target_lengths, blank=BLANK, reduction="mean"):
    """-log P(targets | logits), summed over all alignments (Graves 2012, eq. 16-21), exact, with an exact gradient.

    logits (B, T, U+1, V) float, unnormalised; targets (B, U) int; lengths (B,) int; reduction none | mean | sum, over
    the batch.
    A frame may emit several labels, so U may exceed T. What lies behind an utterance's lengths gets zero gradient, NaN
    included.
    Computed in float32 whatever autocast says, the small lattice in float64 (float32 on MPS, which has no float64).
    Raises ValueError naming the argument for shapes, ranges or lengths that do not fit.
    """
    B, T, U1, V = logits.shape if logits.dim() == 4 else (0, 0, 0, 0)
    limits = {"logit_lengths": (logit_lengths, 1, T), "target_lengths": (target_lengths, 0, U1 - 1)}
    if min(B, T, U1, V) == 0:
        raise ValueError(f"logits must be a non-empty (B, T, U+1, V) tensor, found shape {tuple(logits.shape)}")
    if targets.shape != (B, U1 - 1):
        raise ValueError(f"targets must have shape (B, U) = {(B, U1 - 1)} for logits {tuple(logits.shape)}, found "
                         f"{tuple(targets.shape)}")
    for name, (lengths, low, high) in limits.items():
        if lengths.shape != (B,) or lengths.min() < low or lengths.max() > high:
            raise ValueError(f"{name} must be {B} numbers in [{low}, {high}], found {lengths.tolist()}")
    if not 0 <= blank < V or reduction not in ("none", "mean", "sum"):
        raise ValueError(f"blank must be in [0, {V}) and reduction one of none, mean, sum; found blank={blank}, "
                         f"reduction={reduction!r}")
    inside = targets[valid_mask(target_lengths, U1 - 1)]
    if inside.numel() and (inside.min() < 0 or inside.max() >= V or (inside == blank).any()):
        raise ValueError(f"targets must be labels in [0, {V}) other than blank={blank}, found {inside.min().item()} "
                         f"to {inside.max().item()}")
    with torch.autocast(logits.device.type, enabled=False):
        loss = TransducerLoss.apply(logits, targets.long(), logit_lengths.long(), target_lengths.long(), blank)
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]


class TransducerLoss(torch.autograd.Function):
    """Only two entries of each node's softmax, blank and the next label, are arcs of the lattice. So forward keeps the
    arcs and each node's log-normaliser, (B, T, U+1) each, and backward makes the softmax again straight into the
    gradient: beside `logits` and its gradient nothing of size V lives. One utterance at a time, so padding costs
    nothing and NaN in it does no harm.
    """

    @staticmethod
    def forward(ctx, logits, targets, T, U, blank):
        B, exact = len(logits), torch.float32 if logits.device.type == "mps" else torch.float64
        norm = logits.new_zeros(logits.shape[:3], dtype=torch.float32)
        # log-probabilities of the arcs leaving (t, u)
        blanks, labels = norm.to(exact), norm.to(exact)
        for b, (t, u) in enumerate(zip(T.tolist(), U.tolist())):
            z = logits[b, :t, :u + 1].float()
            norm[b, :t, :u + 1] = z.logsumexp(-1)
            blanks[b, :t, :u + 1] = z[..., blank].to(exact) - norm[b, :t, :u + 1]
            z_label = z[:, :u].gather(-1, targets[b, :u].expand(t, u)[..., None])[..., 0]
            labels[b, :t, :u] = z_label.to(exact) - norm[b, :t, :u]
        # "impossible", yet finite in a cumulative sum
        blanks, labels = blanks.clamp(min=-1e5), labels.clamp(min=-1e5)

        # beta is alpha of the lattice turned by 180 degrees (each utterance within its own T x U+1 corner): one pass
        # does both
        rows, columns = torch.arange(norm.shape[1], device=T.device), torch.arange(norm.shape[2], device=T.device)
        every = torch.arange(B, device=T.device)
        turn = lambda x: x[every[:, None, None], (T[:, None] - 1 - rows).clamp(0)[:, :, None],
                           (U[:, None] - columns).clamp(0)[:, None]]
        # the arcs that enter (t, u), from below and ...
        into_blank = torch.cat([F.pad(blanks, (0, 0, 1, 0))[:, :-1], turn(blanks)])
        # ... from the left, in (2B, T, U+1)
        into_label = torch.cat([F.pad(labels, (1, 0))[:, :, :-1], turn(labels)])
        alpha, beta = lattice_scan(into_blank, into_label).chunk(2)
        beta = turn(beta)
        last = every, T - 1, U
        log_p = alpha[last] + blanks[last]

        # posterior of each arc: exp(alpha before + arc + beta behind - log P); behind the last blank lies the end, with
        # beta 0
        impossible = -1e30 if exact == torch.float64 else -1e9
        after_blank = F.pad(beta, (0, 0, 0, 1), value=impossible)[:, 1:].clone()
        after_blank[every, T - 1] = impossible
        after_blank[last] = 0
        after_label = F.pad(beta, (0, 1), value=impossible)[:, :, 1:]
        valid = valid_mask(T, norm.shape[1])[:, :, None] & valid_mask(U + 1, norm.shape[2])[:, None]
        via_blank = (alpha + blanks + after_blank - log_p[:, None, None]).exp().where(valid, 0)
        has_label = valid & valid_mask(U, norm.shape[2])[:, None]
        via_label = (alpha + labels + after_label - log_p[:, None, None]).exp().where(has_label, 0)
        ctx.save_for_backward(logits, targets, T, U, norm, via_blank.float(), via_label.float())
        ctx.blank = blank
        return -log_p.float()

    @staticmethod
    def backward(ctx, upstream):
        """dL/dz_k = softmax_k * (posterior of the node) - (posterior of the arc that k is)"""
        logits, targets, T, U, norm, via_blank, via_label = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for b, (t, u) in enumerate(zip(T.tolist(), U.tolist())):
            g = (logits[b, :t, :u + 1].float() - norm[b, :t, :u + 1, None]).exp_()
            g *= (via_blank + via_label)[b, :t, :u + 1, None]
            g[..., ctx.blank] -= via_blank[b, :t, :u + 1]
            g[:, :u].scatter_add_(-1, targets[b, :u].expand(t, u)[..., None], -via_label[b, :t, :u, None])
            gradient[b, :t, :u + 1] = g * upstream[b]
        return gradient, None, None, None, None


def lattice_scan(into_blank, into_label):
    """x[t, u] = logaddexp(x[t-1, u] + into_blank[t, u], x[t, u-1] + into_label[t, u]), started by into_blank[0, 0]; all
    (B, T, U+1).

    Along t this is a cumulative log-sum-exp of what enters from the left, once the running sum of the blanks is taken
    off:
    U+1 steps over whole (B, T) columns instead of T x U single ones.
    """
    climbed = into_blank.cumsum(1)
    columns = [climbed[:, :, 0]]
    for u in range(1, into_blank.shape[2]):
        c = climbed[:, :, u]
        columns.append(c + torch.logcumsumexp(columns[-1] + into_label[:, :, u] - c, dim=1))
    return torch.stack(columns, dim=2)


def lattice_posterior(logits, targets):
    """logits (T, U+1, V), targets (U,), U > 0 -> (T, U+1) float64: the probability that an alignment of the targets
    passes node (t, u), which is how much log P answers to the arcs that leave the node: a gradient."""
    log_probs = logits.detach().cpu().double().log_softmax(-1)
    blank = log_probs[..., BLANK].clone().requires_grad_()
    label = log_probs[:, :-1].gather(2, targets.expand(len(logits), -1)[..., None])[..., 0].requires_grad_()
    alpha = lattice_scan(F.pad(blank, (0, 0, 1, 0))[None, :-1], F.pad(label, (1, 0))[None])
    via_blank, via_label = torch.autograd.grad(alpha[0, -1, -1] + blank[-1, -1], (blank, label))
    return via_blank + F.pad(via_label, (0, 1))
