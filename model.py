"""The student and everything differentiable: Conformer encoder, heads, predictor, joiner, CTC, losses, checkpoints.

Axes: B batch, F feature frames (100 Hz), T encoder frames (25 Hz), U labels, V vocabulary with blank 0, d encoder
width, D teacher width.

    features (B, F, 80) --encoder--> hidden (B, T, d) --heads[k]--> teacher k's embedding (B, T, D_k)        stage 1
                                            |--ctc--> (B, T, V)
                                            '--joiner( . , predictor(labels))--> (B, T, U+1, V)              stage 2
"""
import os
import pickle
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from run import UserError

BLANK = 0


@dataclass(frozen=True)
class Config:
    """Plain values that rebuild a Student; stored in every checkpoint."""
    dim: int = 144                  # d, encoder width
    layers: int = 4
    heads: int = 4
    kernel: int = 31                # depthwise convolution, encoder frames
    expansion: int = 4              # feed-forward width / dim
    channels: int = 64              # of the convolutional subsampling
    dropout: float = 0.1
    feature_dim: int = 80           # log-mel bins
    head_dims: tuple = ()           # D_k of each teacher's projection head; () after stage 1
    vocab_size: int = 0             # V, blank included; 0 in stage 1: no predictor, joiner, CTC head
    predictor: str = "lstm"         # or "stateless"
    predictor_dim: int = 256
    predictor_dropout: float = 0.3  # it sees few texts and must not learn them by heart
    joiner_dim: int = 256


PRESETS = {  # parameters with a vocabulary of 256
    "nano": Config(),                                                                                    # 3.0 M
    "small": Config(layers=16, channels=144, predictor_dim=320, joiner_dim=320),                        # 9.5 M
    "medium": Config(dim=256, layers=16, channels=256, predictor_dim=640, joiner_dim=640),              # 31 M
    "large": Config(dim=512, layers=17, heads=8, channels=512, predictor_dim=640, joiner_dim=640),      # 115 M
}


# ---------------------------------------------------------------------------- Conformer (arXiv 2005.08100)

def valid_mask(lengths, size):
    """lengths (B,) -> (B, size) bool, True on frames that exist."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class Subsampling(nn.Module):
    """Two 3x3 convolutions of stride 2: (B, F, 80) at 100 Hz -> (B, T, d) at 25 Hz, T = ceil(F / 2) // 2.

    The second one pads only on the right, which centres frame t on feature frame 4t + 2, the middle of its 40 ms: the
    same instant on which the teachers' embeddings of frame t are centred.
    """

    def __init__(self, config):
        super().__init__()
        self.conv1 = nn.Conv2d(1, config.channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(config.channels, config.channels, 3, stride=2, padding=(0, 1))
        self.out = nn.Linear(config.channels * (config.feature_dim // 4), config.dim)

    def forward(self, features, lengths):
        # what lies behind an utterance must not leak in
        x = features * valid_mask(lengths, features.shape[1])[..., None]
        x = F.relu(self.conv1(x[:, None]))                                             # (B, C, F/2, 40)
        lengths = (lengths + 1) // 2
        x = x * valid_mask(lengths, x.shape[2])[:, None, :, None]
        x = F.relu(self.conv2(F.pad(x, (0, 0, 0, 1))))                                 # (B, C, T, 20)
        return self.out(x.transpose(1, 2).flatten(2)), lengths // 2


def rotary(x, positions):
    """Rotary positions (arXiv 2104.09864). x (B, H, T, c), positions (T,): relative order enters the attention without
    a table."""
    half = x.shape[-1] // 2
    frequencies = 10000 ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None] * frequencies                                          # (T, c/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x, mask):
        """x (B, T, d), mask (B, 1, 1 or T, T) bool, True where a query may look at a key."""
        B, T, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        positions = torch.arange(T, device=x.device)
        x = F.scaled_dot_product_attention(rotary(q, positions), rotary(k, positions), v, mask)
        return self.out(x.transpose(1, 2).reshape(B, T, d))


class Convolution(nn.Module):
    """Pointwise + GLU, depthwise, LayerNorm (not BatchNorm: its statistics would mix utterances and padding),
    pointwise."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.expand = nn.Linear(config.dim, 2 * config.dim)
        self.depthwise = nn.Conv1d(config.dim, config.dim, config.kernel, padding=config.kernel // 2, groups=config.dim)
        self.depthwise_norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x, valid):
        # zeros behind the end, as at the edge of a lone utterance
        x = F.glu(self.expand(self.norm(x))) * valid[..., None]
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return self.out(F.silu(self.depthwise_norm(x)))


def feed_forward(config):
    return nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, config.expansion * config.dim), nn.SiLU(),
                         nn.Dropout(config.dropout), nn.Linear(config.expansion * config.dim, config.dim))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.feed_forward1, self.feed_forward2 = feed_forward(config), feed_forward(config)
        self.attention, self.convolution = Attention(config), Convolution(config)
        self.norm, self.dropout = nn.LayerNorm(config.dim), nn.Dropout(config.dropout)

    def forward(self, x, mask, valid):
        x = x + 0.5 * self.dropout(self.feed_forward1(x))
        x = x + self.dropout(self.attention(x, mask))
        x = x + self.dropout(self.convolution(x, valid))
        x = x + 0.5 * self.dropout(self.feed_forward2(x))
        return self.norm(x)


class Encoder(nn.Module):
    """features (B, F, 80), lengths (B,) -> hidden (B, T, d), lengths (B,). An utterance's output does not depend on its
    batch."""

    def __init__(self, config):
        super().__init__()
        self.subsampling, self.dropout = Subsampling(config), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, features, lengths):
        x, lengths = self.subsampling(features, lengths)
        valid = valid_mask(lengths, x.shape[1])
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, valid[:, None, None, :], valid)
        return x, lengths


# ---------------------------------------------------------------------------- transducer parts (arXiv 1211.3711)

class StatelessPredictor(nn.Module):
    """Sees the last two labels only (arXiv 2109.07513, "reduced" predictor): little to overfit, and its state is one
    label."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.predictor_dim)
        self.mix = nn.Conv1d(config.predictor_dim, config.predictor_dim, 2, groups=config.predictor_dim)

    def forward(self, labels, state=None):
        """labels (B, U), state (B, 1) the label before them -> (B, U, P), state. A sequence starts with blank."""
        labels = torch.cat([torch.full_like(labels[:, :1], BLANK) if state is None else state, labels], dim=1)
        return F.relu(self.mix(self.embedding(labels).transpose(1, 2)).transpose(1, 2)), labels[:, -1:]

    def select(self, emitted, new, old):
        """States of the rows of a batch: new where emitted (B,) is True, else old."""
        return torch.where(emitted[:, None], new, old)


class LSTMPredictor(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.predictor_dim)
        self.lstm = nn.LSTM(config.predictor_dim, config.predictor_dim, batch_first=True)

    def forward(self, labels, state=None):
        return self.lstm(self.embedding(labels), state)

    def select(self, emitted, new, old):
        return tuple(torch.where(emitted[None, :, None], n, o) for n, o in zip(new, old))


class Joiner(nn.Module):
    """Linear(tanh(Linear(h) + Linear(g)))"""

    def __init__(self, config):
        super().__init__()
        self.encoder = nn.Linear(config.dim, config.joiner_dim)
        self.predictor = nn.Linear(config.predictor_dim, config.joiner_dim)
        self.out = nn.Linear(config.joiner_dim, config.vocab_size)

    def forward(self, hidden, predicted):
        """hidden (B, T, d), predicted (B, U+1, P) -> logits (B, T, U+1, V)"""
        return self.out(torch.tanh(self.encoder(hidden)[:, :, None] + self.predictor(predicted)[:, None]))


class Student(nn.Module):
    """Encoder, one projection head per teacher (stage 1), predictor + joiner + CTC head (stage 2): what the config asks
    for."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.heads = nn.ModuleList(nn.Linear(config.dim, dim) for dim in config.head_dims)
        if config.vocab_size:
            self.predictor = {"stateless": StatelessPredictor, "lstm": LSTMPredictor}[config.predictor](config)
            self.joiner = Joiner(config)
            self.ctc = nn.Linear(config.dim, config.vocab_size)

    def predict(self, targets):
        """targets (B, U) -> predictor outputs (B, U+1, P): one before the first label, one after each."""
        return F.dropout(self.predictor(F.pad(targets, (1, 0), value=BLANK))[0], self.config.predictor_dropout,
                         self.training)

    @property
    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())


# ---------------------------------------------------------------------------- losses

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


# ---------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, **entries):
    """Write plain types, tensors and a Config; a checkpoint that exists is replaced whole or not at all."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": 1} | {k: asdict(v) if isinstance(v, Config) else v for k, v in entries.items()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); what was there before is intact: free some space and run the "
                        f"same command again")


def load_checkpoint(path):
    """-> dict of plain types and tensors on the CPU. A directory means its best model. Never unpickles code."""
    path = Path(path)
    if path.is_dir():
        path = path / "best.pt"
    if not path.exists():
        raise UserError(f"no checkpoint {path}; train one first or give another")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or "format" not in checkpoint:
            raise TypeError("not a dict of ours")
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a checkpoint of ours or is damaged ({type(error).__name__}); delete it or "
                        f"give another")
    return checkpoint


def load_student(checkpoint, **changes):
    """The Student that a checkpoint describes, with its weights; `changes` replace fields of its config (new parts stay
    untrained)."""
    known = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in checkpoint["config"].items()})
    student = Student(replace(known, **changes))
    weights = checkpoint["model"]
    if changes:
        weights = {k: v for k, v in weights.items() if k.startswith("encoder.")}
        student.encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in weights.items()})
    else:
        student.load_state_dict(weights)
    return student
