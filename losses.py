"""The losses: what the student is taught by. Needs nothing but torch and knows no student; copy this page elsewhere.

A transducer (Graves 2012, arXiv 1211.3711) reads T frames and writes U labels. At node (t, u), frame t after u labels,
it emits blank and goes to (t+1, u) or the next label and goes to (t, u+1). These two arcs are two entries of the node's
log-softmax over V; nothing else of the (B, T, U+1, V) tensor matters. With everything in logs,

    alpha(t, u) = logaddexp(alpha(t-1, u) + blank(t-1, u), alpha(t, u-1) + label(t, u-1))                      eq. 16
    beta (t, u) = logaddexp(beta (t+1, u) + blank(t,   u), beta (t, u+1) + label(t,   u))                      eq. 18
    L = -log P(y | x) = -alpha(T, U),    -dL/dblank(t, u) = exp(alpha(t, u) + blank(t, u) + beta(t+1, u) + L)  eq. 20

the last being the arc's posterior (label alike). So each loss here is: read the arcs, walk the `Lattice`, and in
backward spread the posteriors over the logits. They differ in where the logits come from:

    transducer_loss              from a (B, T, U+1, V) tensor
    transducer_loss_from_joiner  from the joiner's inputs, made in blocks and made again in backward: the same numbers
    pruned_transducer_loss       from the joiner's inputs, in a window of a few labels a frame (arXiv 2206.13236)

Axes: B batch, T encoder frames, U labels, V vocabulary with blank 0, D teacher width.
"""
import contextlib

import torch
import torch.nn.functional as F

BLANK = 0


def valid_mask(lengths, size):
    """lengths (B,) -> (B, size) bool, True on frames that exist."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


# ---------------------------------------------------------------------------- stage 1: embeddings

DISTANCES = {                                                                          # (B, T, D), (B, T, D) -> (B, T)
    "l1": lambda p, e: (p - e).abs().mean(-1),
    "l2": lambda p, e: (p - e).square().mean(-1),
    "cosine": lambda p, e: 1 - F.cosine_similarity(p, e, dim=-1),
    "l1+cosine": lambda p, e: DISTANCES["l1"](p, e) + DISTANCES["cosine"](p, e),
}


def distillation_loss(prediction, target, lengths, kind="l1"):
    """Stage 1: sum over valid frames of mean over dims |p - e| (arXiv 2303.10917), or of another of DISTANCES; divide
    by the frame count for the mean.

    prediction (B, T, D), target (B, T', D) of a teacher, lengths (B,) valid frames -> loss.
    Two clocks may differ by a frame or two at the end: both are cut to the shorter; more than two is an alignment
    error.
    """
    if abs(prediction.shape[1] - target.shape[1]) > 2:
        raise ValueError(f"student has {prediction.shape[1]} frames, teacher {target.shape[1]}: they must differ by "
                         f"at most 2")
    T = min(prediction.shape[1], target.shape[1])
    lengths = lengths.clamp(max=T)
    error = DISTANCES[kind](prediction[:, :T], target[:, :T])                          # (B, T)
    return (error * valid_mask(lengths, T)).sum()


# ---------------------------------------------------------------------------- stage 2: CTC and three transducer losses

def ctc_loss(logits, targets, lengths, target_lengths):
    """Graves 2006: logits (B, T, V), targets (B, U) -> (B,); 0 where an utterance is too short for its targets."""
    if logits.device.type == "mps":  # torch has no CTC there
        return ctc_loss(logits.cpu(), targets.cpu(), lengths.cpu(), target_lengths.cpu()).to(logits.device)
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)                         # (T, B, V)
    return F.ctc_loss(log_probs, targets, lengths, target_lengths, reduction="none", zero_infinity=True)


def transducer_loss(logits, targets, logit_lengths, target_lengths, blank=BLANK, reduction="mean"):
    """-log P(targets | logits), summed over all alignments, exact, with an exact gradient.

    logits (B, T, U+1, V) float, unnormalised; targets (B, U) int; lengths (B,) int; reduction none | mean | sum, over
    the batch. A frame may emit several labels, so U may exceed T. What lies behind an utterance's lengths gets zero
    gradient, NaN included. The softmax is float32 whatever autocast says, the lattice float64 (on MPS, which has none,
    float32: three digits less). Where the logits leave no path (-inf) the loss is 1e5 or more.
    Raises ValueError naming the argument for shapes, ranges or lengths that do not fit.
    """
    shape = logits.shape if logits.dim() == 4 else (0, 0, 0, 0)
    targets, T, U = check_lattice("logits", shape, targets, logit_lengths, target_lengths, blank, reduction)
    arcs = Arcs.apply(logits, targets[:, None].expand(shape[:3]), T, U + 1, blank)
    return reduced(lattice_loss(*arcs, T, U), reduction)


def transducer_loss_from_joiner(joiner, hidden, predicted, targets, logit_lengths, target_lengths, blank=BLANK,
                                reduction="mean"):
    """transducer_loss(joiner(hidden, predicted), ...), the same value and gradients, without the (B, T, U+1, V) tensor.

    joiner: module, hidden (B, T, d) and predicted (B, U+1, P) -> logits (B, T, U+1, V), each node on its own.
    Backward leaves out nodes that all paths together visit with a probability below 1e-8.
    """
    V = joiner(hidden[:1, :1], predicted[:1, :1]).shape[-1]
    shape = (*hidden.shape[:2], predicted.shape[1], V)
    targets, T, U = check_lattice("joiner", shape, targets, logit_lengths, target_lengths, blank, reduction)
    learned = [p for p in joiner.parameters() if p.requires_grad]
    arcs = JoinerArcs.apply(joiner, V, hidden, predicted, targets, T, U + 1, blank, *learned)
    return reduced(lattice_loss(*arcs, T, U), reduction)


def pruned_transducer_loss(joiner, simple, hidden, predicted, targets, logit_lengths, target_lengths, width=5,
                           blank=BLANK, reduction="mean"):
    """-> (loss over the paths inside a window of `width` labels at each frame, loss of the simple joiner). Both learn.

    As above, and simple: (hidden, predicted) -> (B, T, V), (B, U+1, V), whose sum is the simple joiner's logits: its
    posteriors say where the windows lie (arXiv 2206.13236). The first loss is at least the exact one, and equal to it
    for width > U. A batch in which `width` is too narrow to write all labels gets wider windows, 1 + ceil(U / T).
    """
    shape = (*hidden.shape[:2], predicted.shape[1], joiner(hidden[:1, :1], predicted[:1, :1]).shape[-1])
    targets, T, U = check_lattice("joiner", shape, targets, logit_lengths, target_lengths, blank, reduction)
    hidden = hidden.where(valid_mask(T, shape[1])[..., None], 0)
    predicted = predicted.where(valid_mask(U + 1, shape[2])[..., None], 0)
    arcs = simple_arcs(*simple(hidden, predicted), targets, blank)
    simple_loss = lattice_loss(*arcs, T, U)
    posterior = -sum(torch.autograd.grad(simple_loss.sum(), arcs, retain_graph=True))          # of nodes, (B, T, U+1)
    width = min(shape[2], max(width, 1 + int(((U + T - 1) // T).max())))                       # S
    start = windows(posterior, T, U, width)                                                    # (B, T)

    u = start[..., None] + torch.arange(width, device=start.device)                            # (B, T, S)
    row = torch.arange(shape[0], device=start.device)[:, None, None]
    logits = joiner.join(joiner.encoder(hidden)[:, :, None], joiner.predictor(predicted)[row, u])      # (B, T, S, V)
    blanks, labels = Arcs.apply(logits, targets[row, u], T, torch.full_like(T, width), blank)
    # a path that the next frame's window leaves behind has lost; labels stay inside; the rest of the lattice is empty
    lost = u < torch.cat([start[:, 1:], start[:, -1:]], 1)[..., None]
    blanks = blanks.new_zeros(shape[:3]).scatter(2, u, blanks.masked_fill(lost, IMPOSSIBLE))
    labels = labels.new_full(shape[:3], -torch.inf).scatter(2, u[..., :-1], labels[..., :-1])
    return reduced(lattice_loss(blanks, labels, T, U), reduction), reduced(simple_loss, reduction)


def simple_arcs(hidden, predicted, targets, blank):
    """Arcs (B, T, U+1) of the joiner hidden (B, T, V) + predicted (B, U+1, V), whose normaliser
    log sum_v exp(h_v + g_v) is one matrix product."""
    h, g = hidden.to(wide(hidden)), predicted.to(wide(predicted))
    top_h, top_g = h.amax(-1, keepdim=True), g.amax(-1, keepdim=True)
    with torch.autocast(h.device.type, enabled=False):
        product = (h - top_h).exp() @ (g - top_g).exp().transpose(1, 2)
    norm = product.clamp(min=1e-37).log() + top_h + top_g.transpose(1, 2)                      # (B, T, U+1)
    labels = h.gather(2, targets[:, None].expand(norm.shape)) + g.gather(2, targets[..., None]).transpose(1, 2)
    return h[..., blank, None] + g[:, None, :, blank] - norm, labels - norm


def windows(posterior, T, U, width):
    """Posterior of the nodes (B, T, U+1) -> first label of each frame's window, (B, T): where it holds most; from the
    first label to the last, never back, and at most S - 1 on, so that no label is skipped."""
    sums = F.pad(posterior.cumsum(2), (1, 0))
    sums = sums[..., width:] - sums[..., :-width]                                              # (B, T, U+2-S)
    frames, top = torch.arange(sums.shape[1], device=T.device), (U + 1 - width).clamp(min=0)[:, None]
    furthest = frames * (width - 1)
    start = sums.argmax(2).minimum(top).cummax(1).values.minimum(furthest).where(frames < T[:, None] - 1, top)
    return (start - furthest).flip(1).cummax(1).values.flip(1) + furthest


# ---------------------------------------------------------------------------- their parts: arcs and lattice

IMPOSSIBLE = -1e5                          # as a log-probability; finite, for blanks are summed along the frames


def blocks(T, U1, V, device):
    """The valid corner (t, u) of each utterance in pieces: (b, slice of frames, slice of labels). No padding is read.
    A piece fits a CPU's cache; GPUs want few and large ones."""
    nodes = (2 ** 19 if device.type == "cpu" else 2 ** 25) // V
    for b, (t, u) in enumerate(zip(T.tolist(), U1.tolist())):
        for first in range(0, t, max(1, nodes // u)):
            yield b, slice(first, min(t, first + max(1, nodes // u))), slice(u)


def wide(x):
    """What is summed in: float32 for anything narrower."""
    return torch.promote_types(x.dtype, torch.float32)


def read_arcs(logits, label, blank):
    """logits (t, u, V), label (t, u) -> log-probabilities of blank and of the next label, (t, u) each."""
    log_p = logits.log_softmax(-1, dtype=wide(logits))
    return log_p[..., blank], log_p.gather(-1, label[..., None])[..., 0]


def spread_arcs(logits, label, blank, d_blank, d_label):
    """Backward of read_arcs: d/dlogits = the arcs' gradients at their two entries - softmax * their sum."""
    gradient = logits.softmax(-1, dtype=wide(logits))
    gradient *= -(d_blank + d_label)[..., None]
    gradient[..., blank] += d_blank
    return gradient.scatter_add_(-1, label[..., None], d_label[..., None])


class Arcs(torch.autograd.Function):
    """logits (B, T, U+1, V), label (B, T, U+1) -> blanks, labels (B, T, U+1). The softmax is made block by block, and
    again in backward, straight into the gradient: beside `logits` and that nothing of size V lives."""

    @staticmethod
    def forward(ctx, logits, label, T, U1, blank):
        ctx.save_for_backward(logits, label, T, U1)
        ctx.blank = blank
        blanks = logits.new_zeros(logits.shape[:3], dtype=wide(logits))
        labels = torch.zeros_like(blanks)
        for at in blocks(T, U1, logits.shape[3], logits.device):
            blanks[at], labels[at] = read_arcs(logits[at], label[at], blank)
        return blanks, labels

    @staticmethod
    def backward(ctx, d_blanks, d_labels):
        logits, label, T, U1 = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for at in blocks(T, U1, logits.shape[3], logits.device):
            gradient[at] = spread_arcs(logits[at], label[at], ctx.blank, d_blanks[at], d_labels[at])
        return gradient, None, None, None, None


class JoinerArcs(torch.autograd.Function):
    """The same from the joiner's inputs: it runs block by block, and again in backward, under the same autocast and
    with the same dropout. All that lives long is made before the loops, so that each block finds the last one's memory.
    """

    @staticmethod
    def forward(ctx, joiner, V, hidden, predicted, targets, T, U1, blank, *learned):
        ctx.save_for_backward(hidden, predicted, targets, T, U1, *learned)
        ctx.joiner, ctx.V, ctx.blank = joiner, V, blank
        kind = hidden.device.type
        ctx.autocast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.seed = torch.randint(2 ** 62, ()).item()
        blanks = hidden.new_zeros(*hidden.shape[:2], predicted.shape[1], dtype=wide(hidden))
        labels = torch.zeros_like(blanks)
        with same_conditions(hidden.device, *ctx.autocast, ctx.seed):
            before = random_state(hidden.device)
            for b, t, u in blocks(T, U1, V, hidden.device):
                [logits] = joiner(hidden[b:b + 1, t], predicted[b:b + 1, u])
                blanks[b, t, u], labels[b, t, u] = read_arcs(logits, targets[b, u].expand(logits.shape[:2]), blank)
            ctx.repeatable = torch.equal(random_state(hidden.device), before)  # no dropout in the joiner
        return blanks, labels

    @staticmethod
    def backward(ctx, d_blanks, d_labels):
        hidden, predicted, targets, T, U1, *learned = ctx.saved_tensors
        gradients = [torch.zeros_like(x) for x in (hidden, predicted, *learned)]
        first, last = visited_labels((d_blanks + d_labels).abs())
        with same_conditions(hidden.device, *ctx.autocast, ctx.seed):
            for b, t, u in blocks(T, U1, ctx.V, hidden.device):
                if ctx.repeatable:
                    u = slice(first[b, t].min(), last[b, t].max())
                h, g = (x.detach().requires_grad_() for x in (hidden[b:b + 1, t], predicted[b:b + 1, u]))
                with torch.enable_grad():
                    [logits] = ctx.joiner(h, g)
                label = targets[b, u].expand(logits.shape[:2])
                d_logits = spread_arcs(logits.detach(), label, ctx.blank, d_blanks[b, t, u], d_labels[b, t, u])
                parts = torch.autograd.grad(logits, (h, g, *learned), d_logits.to(logits.dtype))
                for whole, part in zip((gradients[0][b:b + 1, t], gradients[1][b:b + 1, u], *gradients[2:]), parts):
                    whole += part
        return None, None, *gradients[:2], None, None, None, None, *gradients[2:]


def visited_labels(posterior):
    """Posterior of the nodes (B, T, U+1) -> first visited label of each frame and the one behind the last, (B, T) each
    and on the CPU, so that a GPU is asked only once. Node (0, 0), which lies on every path, is the measure."""
    visited = posterior > 1e-8 * posterior[:, :1, :1]
    u = torch.arange(visited.shape[2], device=visited.device)
    return u.where(visited, len(u)).amin(2).cpu(), (u + 1).where(visited, 0).amax(2).cpu()


@contextlib.contextmanager
def same_conditions(device, dtype, enabled, seed):
    """Autocast as it was in forward (uncached: a cache filled without gradients would be used with them), and a random
    stream of its own."""
    with (torch.autocast(device.type, dtype, enabled, cache_enabled=False),
          torch.random.fork_rng([device] if device.type == "cuda" else [])):
        torch.manual_seed(seed)
        yield


def random_state(device):
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def lattice_loss(blanks, labels, T, U):
    """Arcs (B, T, U+1), lengths (B,) -> losses (B,). A frame is added and padding filled so that all utterances end in
    one corner: from (T_b, U_b), free labels along that frame, then free blanks; no other path leads there."""
    frames = torch.arange(blanks.shape[1] + 1, device=T.device)                                # (T+1,)
    u, T, U = torch.arange(blanks.shape[2], device=T.device)[:, None], T[:, None, None], U[:, None, None]
    exact = torch.float32 if blanks.device.type == "mps" else torch.float64
    # (B, U+1, T+1): the cumulative sums run along contiguous memory
    blank, label = (F.pad(x.clamp(min=IMPOSSIBLE).transpose(1, 2).to(exact), (0, 1)) for x in (blanks, labels))
    blank = blank.where((frames < T) & (u <= U), 0)
    label = label.where((frames < T) & (u < U), -torch.inf).masked_fill((frames == T) & (u >= U), 0)
    return Lattice.apply(blank, label).to(blanks.dtype)


class Lattice(torch.autograd.Function):
    """Arcs leaving each node, (B, U+1, T+1) -> -log P of the corner (T, U), and in backward the arcs' posteriors.

    Along t the recursion is a cumulative log-sum-exp: with S(t) = blank(0, u) + ... + blank(t-1, u),
        alpha(t, u) = S(t) + log sum_{k <= t} exp(alpha(k, u-1) + label(k, u-1) - S(k)),
    so U steps over whole columns do the work of T x U. beta is alpha of the lattice turned round: one pass does both.
    """

    @staticmethod
    def forward(ctx, blanks, labels):
        into_blank = torch.cat([F.pad(blanks, (1, 0))[..., :-1], blanks.flip(1, 2)])  # entering arcs, (2B, U+1, T+1)
        into_label = torch.cat([F.pad(labels, (0, 0, 1, 0))[:, :-1], labels.flip(1, 2)])
        x = into_blank.cumsum_(2)                                                              # S, column by column ...
        for u in range(1, x.shape[1]):                                                         # ... to become alpha
            x[:, u] += torch.logcumsumexp(x[:, u - 1] + into_label[:, u] - x[:, u], dim=1)
        alpha, beta = x.chunk(2)
        beta = beta.flip(1, 2)
        log_p = alpha[:, -1:, -1:]
        via_blank = (alpha + blanks).sub_(log_p)[..., :-1].add_(beta[..., 1:]).exp_()          # (B, U+1, T)
        via_label = (alpha + labels).sub_(log_p)[:, :-1].add_(beta[:, 1:]).exp_()              # (B, U, T+1)
        ctx.save_for_backward(via_blank, via_label)
        return -log_p[:, 0, 0]

    @staticmethod
    def backward(ctx, upstream):
        via_blank, via_label = ctx.saved_tensors
        minus = -upstream[:, None, None]
        return F.pad(via_blank * minus, (0, 1)), F.pad(via_label * minus, (0, 0, 0, 1))


def lattice_posterior(logits, targets):
    """logits (T, U+1, V), targets (U,) -> (T, U+1): the probability that an alignment of the targets passes node
    (t, u), which is how much log P answers to the arcs that leave it: a gradient."""
    logits = logits.detach().cpu()
    arcs = read_arcs(logits, F.pad(targets.cpu(), (0, 1)).expand(logits.shape[:2]), BLANK)
    arcs = [x[None].requires_grad_() for x in arcs]
    loss = lattice_loss(*arcs, torch.tensor([len(logits)]), torch.tensor([len(targets)]))
    return -sum(torch.autograd.grad(loss, arcs))[0]


# ---------------------------------------------------------------------------- stage 2: transducers teach a transducer

def one_best_path(ensemble, targets, logit_lengths, target_lengths, temperature=1.0, blank=BLANK):
    """Walk the teachers' lattice along the transcript: (t, u) -> (t+1, u) where blank is their best guess or nothing is
    left to write, else (t, u+1). From arXiv 2110.03334; several teachers speak with their mean (arXiv 1906.10834).

    ensemble: list of (joiner, hidden (B, T, d), predicted (B, U+1, P)); targets (B, U) -> nodes t, u (B, N), which of
    them exist, and the soft labels there, p = mean_m softmax(z_m / temperature), (B, N, V), with N = T + U.
    """
    T, U, row = logit_lengths, target_lengths, torch.arange(len(targets), device=targets.device)
    ensemble = [(joiner.join, joiner.encoder(h), joiner.predictor(g)) for joiner, h, g in ensemble]
    t, u, path = torch.zeros_like(T), torch.zeros_like(U), []
    for _ in range(int((T + U).max())):
        at = t.minimum(T - 1)
        p = sum((join(h[row, at], g[row, u]).float() / temperature).softmax(-1) for join, h, g in ensemble)
        path.append((t, u, t < T, p / len(ensemble)))
        write = (p.argmax(-1) != blank) & (u < U)
        t, u = t + ~write, u + (write & (t < T))
    return [torch.stack(x, 1) for x in zip(*path)]


def essence(p, top_k=None, mass=None):
    """Soft labels (..., V) -> their essence (arXiv 1906.10834; the rule is ours): the top k of them, or the fewest that
    hold `mass` together, the rest 0, made to sum to 1 again."""
    ordered, order = p.sort(dim=-1, descending=True)
    keep = torch.arange(p.shape[-1], device=p.device) < (top_k or p.shape[-1])
    keep = keep & (ordered.cumsum(-1) - ordered < (mass or 2.0))
    q = torch.zeros_like(p).scatter(-1, order, ordered * keep)
    return q / q.sum(-1, keepdim=True)


def path_distillation_loss(joiner, hidden, predicted, nodes, soft_labels, logit_lengths, temperature=1.0, shift=0):
    """L_KD = sum over the path's nodes of - sum_k q_k log softmax(z / temperature)_k, z the student's logits at
    (t + shift, u): a streaming student emits later than its teacher.

    hidden (B, T, d), predicted (B, U+1, P), nodes (t, u, exist) (B, N) each, soft labels q (B, N, V) -> loss
    """
    (t, u, exist), row = nodes, torch.arange(len(hidden), device=hidden.device)[:, None]
    exist = exist & (t + shift < logit_lengths[:, None])
    z = joiner.join(joiner.encoder(hidden)[row, (t + shift).clamp(max=hidden.shape[1] - 1)],
                    joiner.predictor(predicted)[row, u]).float()                               # (B, N, V)
    cross_entropy = -(soft_labels * (z / temperature).log_softmax(-1)).sum(-1)
    return cross_entropy.where(exist, 0).sum()


# ---------------------------------------------------------------------------- small print

def check_lattice(name, shape, targets, logit_lengths, target_lengths, blank, reduction):
    """Raise ValueError naming the argument that does not fit (B, T, U+1, V).
    -> (targets (B, U+1), 0 behind their ends; lengths as int64)"""
    B, T, U1, V = shape
    if min(shape) == 0:
        raise ValueError(f"{name} must give non-empty logits (B, T, U+1, V), found shape {tuple(shape)}")
    if targets.shape != (B, U1 - 1):
        raise ValueError(f"targets must have shape (B, U) = {(B, U1 - 1)} for logits {tuple(shape)}, found "
                         f"{tuple(targets.shape)}")
    limits = {"logit_lengths": (logit_lengths, 1, T), "target_lengths": (target_lengths, 0, U1 - 1)}
    for argument, (lengths, low, high) in limits.items():
        if lengths.shape != (B,) or lengths.min() < low or lengths.max() > high:
            raise ValueError(f"{argument} must be {B} numbers in [{low}, {high}], found {lengths.tolist()}")
    if not 0 <= blank < V or reduction not in ("none", "mean", "sum"):
        raise ValueError(f"blank must be in [0, {V}) and reduction one of none, mean, sum; found blank={blank}, "
                         f"reduction={reduction!r}")
    valid = valid_mask(target_lengths, U1 - 1)
    inside = targets[valid]
    if inside.numel() and (inside.min() < 0 or inside.max() >= V or (inside == blank).any()):
        raise ValueError(f"targets must be labels in [0, {V}) other than blank={blank}, found {inside.min().item()} "
                         f"to {inside.max().item()}")
    return F.pad(targets.long() * valid, (0, 1)), logit_lengths.long(), target_lengths.long()


def reduced(loss, reduction):
    """(B,) -> what `reduction` asks for, over the batch."""
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]
