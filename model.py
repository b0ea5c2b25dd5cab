"""The student and everything differentiable: encoder, heads, transducer, losses, checkpoints.

    features (B, F, 80) --encoder--> hidden (B, T, d) --heads[k]--> (B, T, D_k)          stage 1
                                         |--ctc--> (B, T, V)
                                         '--joiner( . , predictor(labels))--> (B, T, U+1, V)    2

Axes: B batch, F feature frames (100 Hz), T encoder frames (25 Hz), U labels, V vocabulary with
blank 0, d width of the encoder, D width of a target, P width of the predictor, J of the joiner.
"""

import os
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tools.command_line import UserError, count

BLANK = 0  # the label that a transducer and CTC emit where there is nothing to write
RANDOM_CHUNK = -1  # Config.chunk of a student for both: streaming and whole utterances
DRAWN_CHUNKS = (0, 0, 0, 0, 4, 8, 16, 32)  # one is drawn for each batch (as arXiv 2012.05481)


@dataclass(frozen=True)
class Config:
    """Plain values that rebuild a Student. Every checkpoint holds them."""

    dim: int = 144  # d, width of the encoder
    layers: int = 4
    attention_heads: int = 4
    kernel: int = 31  # of the depthwise convolution, encoder frames
    chunk: int = 0  # encoder frames that a streaming student encodes at once; 0: all
    left: int = 64  # encoder frames before its chunk that attention sees
    expansion: int = 4  # width of the feed-forward layers / dim
    channels: int = 64  # of the convolutional subsampling
    dropout: float = 0.1
    feature_dim: int = 80  # log-mel bins
    head_dims: tuple = ()  # D_k of each projection head; () in stage 2
    vocab_size: int = 0  # V with blank; 0 in stage 1: no predictor, joiner, CTC head
    predictor_dim: int = 256
    predictor_dropout: float = 0.3  # the predictor sees few texts and must not learn them by heart
    joiner_dim: int = 256
    seconds: float = 12.0  # of a typical training utterance; much longer audio is encoded in pieces

    def describes_input(self):
        """What the student encodes at once, in words."""
        if self.chunk == 0:
            return "encodes whole utterances"
        if self.chunk == RANDOM_CHUNK:
            return f"encodes whole utterances or streams, {self.left} frames of left context"
        milliseconds = 40 * self.chunk
        return (
            f"streams in chunks of {self.chunk} frames ({milliseconds} ms), {self.left} before it"
        )


PRESETS = {  # parameters with a vocabulary of 256
    "nano": Config(),  # 2.9 M
    "small": Config(layers=16, predictor_dim=320, joiner_dim=320, channels=144),  # 9.4 M
    "medium": Config(dim=256, layers=16, predictor_dim=640, joiner_dim=640, channels=256),  # 30 M
    "large": Config(
        dim=512, layers=17, attention_heads=8, predictor_dim=640, joiner_dim=640, channels=512
    ),  # 113 M
}


def chunk_size(text):
    """argparse type of --chunk: encoder frames of 40 ms, or "random"."""
    if text == "random":
        return RANDOM_CHUNK
    return count(text)


def valid_mask(lengths, size):
    """lengths (B,) -> (B, size) bool, True on frames that exist"""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


# ---------------------------------------- Conformer (arXiv 2005.08100)


def encoder_frames(feature_frames):
    """F -> T, numbers or tensors: as many as have a feature frame in their middle, 4t + 2"""
    return (feature_frames + 1) // 4


class Subsampling(nn.Module):
    """One convolution over patches of 7 frames x 8 bins, stride 4 in time and in frequency.

    100 Hz -> 25 Hz. Frame t sees the feature frames 4t - 1 to 4t + 5 and is centred on 4t + 2, the
    middle of its 40 ms: the instant on which the teachers' embeddings of frame t are centred. Two
    3x3 convolutions of stride 2 see the same frames, at four to nine times the cost. [ours]
    """

    def __init__(self, config):
        super().__init__()
        bands = config.feature_dim // 4
        self.patches = nn.Conv2d(1, config.channels, (7, 8), stride=4, padding=(0, 2))
        self.out = nn.Linear(config.channels * bands, config.dim)

    def forward(self, features, lengths):
        """features (B, F, 80), lengths (B,) -> (B, T, d), lengths (B,)"""
        # What lies behind the end of an utterance must not leak in.
        x = features * valid_mask(lengths, features.shape[1])[..., None]
        x = F.pad(x, (0, 0, 1, 3))
        x = F.relu(self.patches(x[:, None]))  # (B, C, T, 20)
        return self.out(x.transpose(1, 2).flatten(2)), encoder_frames(lengths)


def rotary(x, positions):
    """Rotary positions (arXiv 2104.09864): x (B, H, T, c), positions (T,) -> (B, H, T, c)

    The distance of two frames then enters their attention without a table.
    """
    half = x.shape[-1] // 2
    frequencies = 10000 ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None] * frequencies  # (T, c/2)
    cos = angles.cos().to(x.dtype)
    sin = angles.sin().to(x.dtype)
    a, b = x.split(half, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_heads = config.attention_heads
        self.norm = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x, mask, past=None):
        """x (B, T, d), mask (B, 1, 1 or T, T) bool, True where a query may attend to a key; None:
        to all -> (B, T, d), keys and values (2, B, H, L + T, c)

        past: keys and values (2, B, H, L, c) of L frames before x. They carry no positions: those
        are counted from the first key, which is as good because only differences matter.
        """
        B, T, d = x.shape
        H = self.attention_heads
        qkv = self.qkv(self.norm(x)).view(B, T, 3, H, d // H)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, c)
        query = qkv[0]
        keys_values = qkv[1:]
        if past is not None:
            keys_values = torch.cat([past, keys_values], dim=3)
        keys, values = keys_values
        positions = torch.arange(keys.shape[2], device=x.device)
        query = rotary(query, positions[-T:])
        keys = rotary(keys, positions)
        x = F.scaled_dot_product_attention(query, keys, values, mask)
        return self.out(x.transpose(1, 2).reshape(B, T, d)), keys_values


class Convolution(nn.Module):
    """Pointwise + GLU, depthwise, LayerNorm, pointwise; causal in a student that streams.

    Not BatchNorm: its statistics would mix utterances and padding.
    """

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        kernel = config.kernel
        self.causal = config.chunk != 0
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * dim)
        padding = 0 if self.causal else kernel // 2
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=padding, groups=dim)
        self.depthwise_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, valid, past=None):
        """x (B, T, d), valid (B, T) bool -> (B, T, d), the past of the next frames

        past (B, d, kernel - 1): what the depthwise convolution saw before x, zeros at the start.
        """
        # Zeros behind the end of an utterance, as at the edge of a lone one.
        x = F.glu(self.expand(self.norm(x))) * valid[..., None]
        x = x.transpose(1, 2)
        if self.causal:
            before = self.depthwise.kernel_size[0] - 1
            if past is None:
                x = F.pad(x, (before, 0))
            else:
                x = torch.cat([past, x], dim=2)
            past = x[:, :, x.shape[2] - before :]
        x = self.depthwise(x).transpose(1, 2)
        return self.out(F.silu(self.depthwise_norm(x))), past


def feed_forward(config):
    width = config.expansion * config.dim
    return nn.Sequential(
        nn.LayerNorm(config.dim),
        nn.Linear(config.dim, width),
        nn.SiLU(),
        nn.Dropout(config.dropout),
        nn.Linear(width, config.dim),
    )


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.feed_forward1 = feed_forward(config)
        self.feed_forward2 = feed_forward(config)
        self.attention = Attention(config)
        self.convolution = Convolution(config)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, valid, past=(None, None)):
        """x (B, T, d) -> (B, T, d), the past of the next frames

        past: what attention and convolution keep of the frames before x.
        """
        x = x + 0.5 * self.dropout(self.feed_forward1(x))
        y, keys_values = self.attention(x, mask, past[0])
        x = x + self.dropout(y)
        y, tail = self.convolution(x, valid, past[1])
        x = x + self.dropout(y)
        x = x + 0.5 * self.dropout(self.feed_forward2(x))
        return self.norm(x), (keys_values, tail)


class Encoder(nn.Module):
    """Log-mel features to hidden states. An utterance's output does not depend on its batch.

    An encoder of your own needs `blocks` (a ModuleList, whose matrices Muon trains), `forward` with
    its `chunk`, and `encode_layers`; it turns F frames into encoder_frames(F). Only
    decode.py --stream needs `subsampling` and `stream`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.subsampling = Subsampling(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])

    def forward(self, features, lengths, chunk=None):
        """features (B, F, 80), lengths (B,) -> hidden (B, T, d), lengths (B,)

        chunk: frames encoded at once, instead of config.chunk.
        """
        layers, lengths = self.encode_layers(features, lengths, chunk)
        return layers[-1], lengths

    def encode_layers(self, features, lengths, chunk=None):
        """The same -> list of the outputs (B, T, d) of all blocks, lengths (B,)"""
        x, lengths = self.subsampling(features, lengths)
        valid = valid_mask(lengths, x.shape[1])
        mask = self.attention_mask(valid, chunk)
        x = self.dropout(x)
        layers = []
        for block in self.blocks:
            x, _ = block(x, mask, valid)
            layers.append(x)
        return layers, lengths

    def attention_mask(self, valid, chunk=None):
        """valid (B, T) -> (B, 1, 1 or T, T) bool: a frame attends to all of its utterance, or, in a
        student that streams, to all of its chunk and config.left frames before it."""
        mask = valid[:, None, None, :]
        chunk = self.config.chunk if chunk is None else chunk
        if chunk == RANDOM_CHUNK:
            # torch's own generator, seeded before each batch: a resumed run draws the same.
            chunk = 0
            if self.training:
                chunk = DRAWN_CHUNKS[torch.randint(len(DRAWN_CHUNKS), ()).item()]
        if chunk == 0:
            return mask
        t = torch.arange(valid.shape[1], device=valid.device)
        start = (t // chunk * chunk)[:, None]  # of each query's chunk
        near = (start - self.config.left <= t) & (t < start + chunk)
        itself = t == t[:, None]  # a frame of the padding attends to itself, or softmax gives NaN
        return mask & near | itself

    def stream(self, x, past=None):
        """One more chunk of subsampled features (B, C, d) -> hidden (B, C, d), the past of the next

        Equal to `forward` with that chunk, in a student that streams. What is kept has the length
        that config.left and config.kernel give, however long the audio.
        """
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        past = past or [(None, None)] * len(self.blocks)
        kept = []
        for block, before in zip(self.blocks, past):
            x, (keys_values, tail) = block(x, None, valid, before)
            surplus = max(0, keys_values.shape[3] - self.config.left)
            kept.append((keys_values[:, :, :, surplus:], tail))
        return x, kept


# ---------------------------------------- transducer (arXiv 1211.3711)


class Predictor(nn.Module):
    """An LSTM over the labels written so far."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.predictor_dim)
        self.lstm = nn.LSTM(config.predictor_dim, config.predictor_dim, batch_first=True)

    def forward(self, labels, state=None):
        """labels (B, U) -> (B, U, P), state (B, 2, P); with a state U is 1

        The first axis of a state is the batch, so a search picks rows of it by an index.
        """
        x = self.embedding(labels)
        if state is None:
            x, (h, c) = self.lstm(x)
            return x, torch.stack([h[0], c[0]], dim=1)
        # One more label: the bare cell, because the LSTM's kernel is several times slower for one.
        [x] = x.unbind(1)
        h, c = torch.lstm_cell(x, state.unbind(1), *self.lstm.all_weights[0])
        return h[:, None], torch.stack([h, c], dim=1)


class Joiner(nn.Module):
    """Linear(tanh(Linear(h) + Linear(g)))

    The loss and the searches project once and then use `combine` and `out`, or `join`.
    """

    def __init__(self, config):
        super().__init__()
        self.project_hidden = nn.Linear(config.dim, config.joiner_dim)
        self.project_predicted = nn.Linear(config.predictor_dim, config.joiner_dim)
        self.out = nn.Linear(config.joiner_dim, config.vocab_size)

    def forward(self, hidden, predicted):
        """hidden (B, T, d), predicted (B, U+1, P) -> logits (B, T, U+1, V)"""
        encoded = self.project_hidden(hidden)[:, :, None]
        predicted = self.project_predicted(predicted)[:, None]
        return self.join(encoded, predicted)

    def join(self, encoded, predicted):
        """Projected inputs of any shapes that broadcast, (..., J) -> logits (..., V)"""
        return self.out(self.combine(encoded, predicted))

    @staticmethod
    def combine(encoded, predicted):
        """Projected inputs of any shapes that broadcast, (..., J) -> what `out` reads, (..., J)"""
        return (encoded + predicted).tanh_()


def projection_head(config, target_dim):
    """p_k = Linear_k(h): reads target k off the student. [ours]: one for each target."""
    return nn.Linear(config.dim, target_dim)


class Student(nn.Module):
    """Encoder; projection heads (stage 1); predictor, joiner and CTC head (stage 2).

    The config decides which of these there are.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.heads = nn.ModuleList([projection_head(config, dim) for dim in config.head_dims])
        if config.vocab_size:
            self.predictor = Predictor(config)
            self.joiner = Joiner(config)
            self.ctc = nn.Linear(config.dim, config.vocab_size)

    def predict(self, targets):
        """targets (B, U) -> (B, U+1, P): the predictor before the first label and after each"""
        labels = F.pad(targets, (1, 0), value=BLANK)
        predicted, _ = self.predictor(labels)
        return F.dropout(predicted, self.config.predictor_dropout, self.training)

    @property
    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())


class Token(NamedTuple):
    """A label that a student wrote."""

    label: int
    frame: int  # encoder frame of 40 ms at which it was emitted
    probability: float  # of this label there, given the audio and the labels before


@dataclass
class Hypothesis:
    """What a student may have written of an utterance."""

    tokens: list  # of Token
    score: float = 0.0  # log-probability


# ---------------------------------------- losses


def l1_loss(prediction, target, lengths):
    """Distance to a teacher (arXiv 2303.10917): |p - e|, mean over dimensions, sum over frames

    prediction and target (B, T, D), lengths (B,) valid frames -> scalar; divided by the number of
    frames it is the mean. Raises ValueError for other shapes than that.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"student and teacher must have as many frames and dimensions, found "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    distance = (prediction - target).abs().mean(-1)  # (B, T)
    return distance.where(valid_mask(lengths, prediction.shape[1]), 0).sum()


def ctc_loss(logits, targets, lengths, target_lengths):
    """Graves 2006: logits (B, T, V), targets (B, U), lengths (B,) -> (B,)

    0 where an utterance is too short for its targets.
    """
    if logits.device.type == "mps":  # torch has no CTC there
        arguments = [x.cpu() for x in (logits, targets, lengths, target_lengths)]
        return ctc_loss(*arguments).to(logits.device)
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # (T, B, V)
    return F.ctc_loss(
        log_probs, targets, lengths, target_lengths, reduction="none", zero_infinity=True
    )


# The transducer loss (Graves 2012, arXiv 1211.3711). A transducer reads T frames and writes U
# labels. At node (t, u), frame t after u labels, it emits blank and goes to (t+1, u), or the next
# label and goes to (t, u+1). These two arcs are two entries of the node's log-softmax over V, and
# nothing else of the (B, T, U+1, V) logits matters. With everything in logs,
#
#     alpha(t, u) = logaddexp(alpha(t-1, u) + blank(t-1, u), alpha(t, u-1) + label(t, u-1)) (16)
#     L = -log P(y | x) = -(alpha(T-1, U) + blank(T-1, U))                                  (19)
#
# and by the chain rule dL/dlogits = sum over arcs of dL/darc * darc/dlogits, where -dL/darc is the
# posterior probability that an alignment takes the arc (20). So the loss is made in three
# steps: read all arcs, piece by piece and without a graph; run the lattice, with a graph on the
# arcs alone; read the arcs again, now with a graph, and push each piece's gradient through at
# once. No more than a piece of the logits is in memory at any time.


def transducer_loss(logits, targets, logit_lengths, target_lengths, blank=BLANK, reduction="mean"):
    """-log P(targets | logits), summed over all alignments, with its exact value.

    So is the gradient, but for labels that no alignment of a piece of frames visits with a
    probability above 1e-8: there it is 0.

    logits (B, T, U+1, V) float, unnormalised; targets (B, U) int; lengths (B,) int; reduction none
    | mean | sum, over the batch. A frame may emit several labels, so U may exceed T. What lies
    behind an utterance's lengths gets no gradient and does no harm, NaN included. The softmax is
    float32 whatever autocast says, the lattice float64; log-probabilities below -1e9 count as
    -1e9, so a loss of 1e9 or more means that the logits (-inf) leave no path. Second derivatives
    raise RuntimeError. Raises ValueError naming the argument for shapes, ranges or lengths that do
    not fit.
    """
    if logits.dim() != 4:
        raise ValueError(f"logits must have shape (B, T, U+1, V), found {tuple(logits.shape)}")
    targets, T, U = check_lattice(
        logits.shape, targets, logit_lengths, target_lengths, blank, reduction
    )

    def select(tensors, b, t, u):
        [logits] = tensors
        return [logits[b, t, u]]

    def node_logits(logits):
        return logits

    V = logits.shape[3]
    loss = TransducerLoss.apply(node_logits, select, targets, T, U, V, blank, logits)
    return reduce_batch(loss, reduction)


def transducer_loss_from_joiner(
    joiner, hidden, predicted, targets, logit_lengths, target_lengths, blank=BLANK, reduction="mean"
):
    """transducer_loss(joiner(hidden, predicted), ...), without its (B, T, U+1, V) logits

    joiner: Joiner; hidden (B, T, d); predicted (B, U+1, P). Value and gradients are the same.
    """
    V = joiner.out.out_features
    shape = (*hidden.shape[:2], predicted.shape[1], V)
    targets, T, U = check_lattice(shape, targets, logit_lengths, target_lengths, blank, reduction)

    def select(tensors, b, t, u):
        encoded, predicted, weight, bias = tensors
        return [encoded[b, t], predicted[b, u], weight, bias]

    def node_logits(encoded, predicted, weight, bias):
        return F.linear(joiner.combine(encoded[:, None], predicted[None]), weight, bias)

    # NaN times a gradient of 0 would be NaN in the gradients of the weights.
    hidden = hidden.where(valid_mask(T, shape[1])[..., None], 0)
    predicted = predicted.where(valid_mask(U + 1, shape[2])[..., None], 0)
    projected = [joiner.project_hidden(hidden), joiner.project_predicted(predicted)]
    tensors = [*projected, joiner.out.weight, joiner.out.bias]
    loss = TransducerLoss.apply(node_logits, select, targets, T, U, V, blank, *tensors)
    return reduce_batch(loss, reduction)


class TransducerLoss(torch.autograd.Function):
    """The three steps above: two in forward, the third in backward -> losses (B,)

    select(tensors, b, t, u): the parts of `tensors` that belong to frames t and labels u (slices)
    of utterance b, as views; node_logits(*parts) -> the logits (t, u, V) of these nodes.
    """

    @staticmethod
    def forward(ctx, node_logits, select, targets, T, U, V, blank, *tensors):
        device = targets.device
        ctx.pieces = list(lattice_pieces(T, U, V, device))
        ctx.functions = node_logits, select
        ctx.blank = blank
        ctx.autocast = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)

        # 1. The arcs of all nodes: log-probabilities of blank and of the next label.
        arcs = torch.zeros(len(T), int(T.max()), int(U.max()) + 1, 2, device=device)
        with uncached_autocast(device, *ctx.autocast):
            for b, t, u in ctx.pieces:
                logits = node_logits(*select(tensors, b, t, u))
                arcs[b, t, u] = read_arcs(logits, targets[b, u], blank)

        # 2. The lattice. The gradient of its loss is minus the posterior of each arc.
        if torch.is_inference_mode_enabled():
            return lattice_loss(arcs, T, U)
        with torch.enable_grad():
            arcs.requires_grad_()
            loss = lattice_loss(arcs, T, U)
            [arc_gradients] = torch.autograd.grad(loss.sum(), arcs)
        ctx.save_for_backward(targets, arc_gradients, *tensors)
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # it would be silently wrong
            raise RuntimeError("the transducer loss has no second derivative")
        targets, arc_gradients, *tensors = ctx.saved_tensors
        node_logits, select = ctx.functions
        first, last = visited_labels(-arc_gradients.sum(-1))
        arc_gradients = arc_gradients * upstream[:, None, None, None]
        gradients = [torch.zeros_like(x) for x in tensors]

        # 3. The chain rule, piece by piece, at the nodes that alignments visit.
        for b, t, _ in ctx.pieces:
            u = slice(int(first[b, t].min()), int(last[b, t].max()))
            if u.start >= u.stop:
                continue
            parts = [x.detach().requires_grad_() for x in select(tensors, b, t, u)]
            with torch.enable_grad(), uncached_autocast(targets.device, *ctx.autocast):
                arcs = read_arcs(node_logits(*parts), targets[b, u], ctx.blank)
            piece_gradients = torch.autograd.grad(arcs, parts, arc_gradients[b, t, u])
            for whole, part in zip(select(gradients, b, t, u), piece_gradients):
                whole += part
        return None, None, None, None, None, None, None, *gradients


def read_arcs(logits, labels, blank):
    """logits (t, u, V), the label after each node (u,) -> log-probabilities of arcs (t, u, 2)"""
    blanks = torch.full_like(labels, blank)
    ids = torch.stack([blanks, labels], dim=-1).expand(*logits.shape[:2], 2)
    log_probs = logits.log_softmax(-1, dtype=torch.float32).gather(-1, ids)
    if log_probs.isnan().any():
        # -inf at every label means that no path may pass the node. Its softmax would be NaN.
        closed = logits.gather(-1, ids) == -torch.inf
        finite = logits.clamp(min=torch.finfo(logits.dtype).min)
        log_probs = finite.log_softmax(-1, dtype=torch.float32).gather(-1, ids)
        log_probs = log_probs.masked_fill(closed, -torch.inf)
    return log_probs


def lattice_loss(arcs, T, U):
    """arcs (B, T, U+1, 2), lengths T and U (B,) -> -log P (B,)

    For one u, the recursion along t (16) is a cumulative log-sum-exp: with
    S(t, u) = blank(0, u) + ... + blank(t-1, u),

        alpha(t, u) = S(t, u) + log sum_{k <= t} exp(alpha(k, u-1) + label(k, u-1) - S(k, u)),

    so U steps over whole rows of frames do the work of T x U.
    """
    if arcs.device.type == "mps":  # it has no float64
        return lattice_loss(arcs.cpu(), T.cpu(), U.cpu()).to(arcs.device)
    arcs = arcs.double().clamp(min=-1e9)  # finite, because blanks are summed along the frames
    B, frames, labels, _ = arcs.shape
    inside = valid_mask(T, frames)[:, None] & valid_mask(U + 1, labels)[..., None]  # (B, U+1, T)
    blank, label = arcs.permute(3, 0, 2, 1).where(inside, 0)  # (B, U+1, T) each
    S = blank.cumsum(2) - blank
    # unbind, because the backward of each slice would make a whole tensor of zeros.
    S_of = S.unbind(1)
    label_of = label.unbind(1)
    alpha = [S_of[0]]
    for u in range(1, labels):
        arriving = alpha[u - 1] + label_of[u - 1] - S_of[u]
        alpha.append(S_of[u] + arriving.logcumsumexp(1))
    alpha = torch.stack(alpha, dim=1)
    end = (torch.arange(B, device=T.device), U, T - 1)
    return -(alpha[end] + blank[end]).float()


def lattice_pieces(T, U, V, device):
    """The nodes of each utterance in pieces: (b, slice of frames, slice of labels). No padding is
    read.

    A piece fits the cache of a CPU; a GPU wants few and large ones.
    """
    nodes = (2**19 if device.type == "cpu" else 2**25) // V
    for b, (frames, labels) in enumerate(zip(T.tolist(), U.tolist())):
        step = max(1, nodes // (labels + 1))
        for start in range(0, frames, step):
            yield b, slice(start, min(frames, start + step)), slice(0, labels + 1)


def visited_labels(posterior):
    """posterior of the nodes (B, T, U+1) -> first visited label of each frame, and the one behind
    the last

    (B, T) each, on the CPU, so that a GPU is asked once for all pieces.
    """
    visited = posterior > 1e-8
    u = torch.arange(visited.shape[2], device=visited.device)
    first = u.where(visited, len(u)).amin(2)
    last = (u + 1).where(visited, 0).amax(2)
    return first.cpu(), last.cpu()


def uncached_autocast(device, dtype, enabled):
    """Autocast without its cache: weights cast without a graph would be used with one."""
    return torch.autocast(device.type, dtype, enabled, cache_enabled=False)


def node_posteriors(logits, targets):
    """logits (T, U+1, V), targets (U,) -> (T, U+1): the probability that an alignment visits a
    node"""
    targets = F.pad(targets, (0, 1))
    arcs = read_arcs(logits.detach(), targets, BLANK)[None].requires_grad_()
    T = torch.tensor([logits.shape[0]], device=logits.device)
    U = torch.tensor([logits.shape[1] - 1], device=logits.device)
    with torch.enable_grad():
        [gradients] = torch.autograd.grad(lattice_loss(arcs, T, U).sum(), arcs)
    return -gradients[0].sum(-1)


def check_lattice(shape, targets, logit_lengths, target_lengths, blank, reduction):
    """-> targets (B, U+1) with 0 behind their ends, lengths as int64; or ValueError naming the
    argument"""
    B, T, U1, V = shape
    if min(shape) == 0:
        raise ValueError(f"logits must not be empty, found shape {tuple(shape)}")
    if targets.shape != (B, U1 - 1):
        raise ValueError(
            f"targets must have shape (B, U) = {(B, U1 - 1)} for logits {tuple(shape)}, found "
            f"{tuple(targets.shape)}"
        )
    check_lengths("logit_lengths", logit_lengths, B, 1, T)
    check_lengths("target_lengths", target_lengths, B, 0, U1 - 1)
    if not 0 <= blank < V:
        raise ValueError(f"blank must be in [0, {V}), found {blank}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be none, mean or sum, found {reduction!r}")
    valid = valid_mask(target_lengths, U1 - 1)
    labels = targets[valid]
    if ((labels < 0) | (labels >= V) | (labels == blank)).any():
        raise ValueError(f"targets must be labels in [0, {V}) other than blank {blank}")
    targets = targets.long().where(valid, 0)
    return F.pad(targets, (0, 1)), logit_lengths.long(), target_lengths.long()


def check_lengths(name, lengths, B, least, most):
    if lengths.shape != (B,) or lengths.min() < least or lengths.max() > most:
        raise ValueError(
            f"{name} must be {B} numbers in [{least}, {most}], found {lengths.tolist()}"
        )


def reduce_batch(loss, reduction):
    """(B,) -> what `reduction` asks for"""
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    return loss


# ---------------------------------------- checkpoints

FORMAT = 2  # of the files; other versions of this code may have others


def save_checkpoint(path, **entries):
    """Write plain types, tensors and a Config. A checkpoint that exists is replaced whole or not
    at all."""
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    plain = {"format": FORMAT}
    for name, value in entries.items():
        plain[name] = asdict(value) if isinstance(value, Config) else value
    try:
        with open(temporary, "wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({error}); what was there before is intact: free some space and "
            f"run the same command again"
        )


def load_checkpoint(path):
    """-> dict of plain types and tensors on the CPU; a directory means its best.pt

    Never unpickles code. Raises UserError for a file that is missing, damaged or not ours.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.pt"
    if not path.exists():
        raise UserError(
            f"no checkpoint {path}; train one first (python pretrain_kd.py, then finetune_rnnt.py) "
            f"or give another"
        )
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = dict(checkpoint)
        version = checkpoint["format"]
    except Exception as error:  # a damaged file may lead the readers anywhere
        raise UserError(
            f"{path} is not a checkpoint of ours or is damaged ({type(error).__name__}); delete it "
            f"or give another"
        )
    if version != FORMAT:
        raise UserError(f"{path} was written by another version of this code; train it again")
    checkpoint["path"] = str(path)
    return checkpoint


def check_archive(path):
    """Raise ValueError for a damaged file: torch.load looks at no checksum, and where a flipped bit
    turns a member of the archive into a folder, it leaves random numbers."""
    archive = zipfile.ZipFile(path)
    if archive.testzip():
        raise ValueError("a wrong checksum")
    for member in archive.infolist():
        if member.compress_size != member.file_size or member.external_attr != 0:
            raise ValueError("a damaged entry")


def load_student(checkpoint, **changes):
    """The Student that a checkpoint describes, with its weights

    changes: fields of its config to replace. Parts that the checkpoint has and the new config does
    not (the heads of stage 1) are left out, parts that are new stay untrained.
    """
    try:
        values = {}
        for name, value in checkpoint["config"].items():
            values[name] = tuple(value) if isinstance(value, list) else value
        student = Student(replace(Config(**values), **changes))
        for name, part in student.named_children():
            weights = {}
            for key, value in checkpoint["model"].items():
                if key.startswith(f"{name}."):
                    weights[key.removeprefix(f"{name}.")] = value
            is_new = bool(changes) and name != "encoder" and not weights
            if part.state_dict() and not is_new:
                part.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        path = checkpoint.get("path", "the checkpoint")
        raise UserError(
            f"{path} does not hold the student that it describes "
            f"({' '.join(str(error).split())[:150]}); give another or, if model.py was edited "
            f"since, train it again"
        )
    return student
