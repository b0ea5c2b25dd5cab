"""The student and what it is saved in: Conformer encoder, heads, predictor, joiner, CTC head, checkpoints.

Axes: B batch, F feature frames (100 Hz), T encoder frames (25 Hz), U labels, V vocabulary with blank 0, d encoder
width, D teacher width.

    features (B, F, 80) --encoder--> hidden (B, T, d) --heads[k]--> teacher k's embedding (B, T, D_k)        stage 1
                                            |--ctc--> (B, T, V)
                                            '--joiner( . , predictor(labels))--> (B, T, U+1, V)              stage 2
"""
import os
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from losses import BLANK, transducer_loss, valid_mask  # noqa: F401 - model.transducer_loss is a public name
from run import UserError


@dataclass(frozen=True)
class Config:
    """Plain values that rebuild a Student; stored in every checkpoint."""
    dim: int = 144                  # d, encoder width
    layers: int = 4
    heads: int = 4
    kernel: int = 31                # depthwise convolution, encoder frames
    chunk: int = 0                  # encoder frames that a streaming student hears at once; 0: the whole utterance
    left: int = 64                  # encoder frames before its chunk that attention sees
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
    conditioned: tuple = ()         # blocks, 1 the first, that hear what they would write
    simple_joiner: bool = False     # only for training with the pruned loss
    seconds: float = 12.0           # of a typical utterance in training; longer recordings are heard in such pieces

    @property
    def listening(self):
        """How it hears, in words."""
        return {0: "hears whole utterances",
                RANDOM: f"hears whole utterances or streams, {self.left} frames of left context"}.get(
            self.chunk, f"streams in chunks of {self.chunk} frames ({40 * self.chunk} ms), {self.left} of left context")


PRESETS = {  # parameters with a vocabulary of 256
    "nano": Config(),                                                                                    # 3.0 M
    "small": Config(layers=16, channels=144, predictor_dim=320, joiner_dim=320),                        # 9.5 M
    "medium": Config(dim=256, layers=16, channels=256, predictor_dim=640, joiner_dim=640),              # 31 M
    "large": Config(dim=512, layers=17, heads=8, channels=512, predictor_dim=640, joiner_dim=640),      # 115 M
}


RANDOM = -1                                      # Config.chunk of a student trained to stream and to hear the whole
RANDOM_CHUNKS = 0, 0, 0, 0, 4, 8, 16, 32         # one is drawn for each batch, half of them whole (as arXiv 2012.05481)


def chunk_size(text):
    """What --chunk takes: encoder frames of 40 ms, or "random"."""
    if text != "random" and int(text) < 0:
        raise ValueError(text)
    return RANDOM if text == "random" else int(text)


# ---------------------------------------------------------------------------- Conformer (arXiv 2005.08100)

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

    def forward(self, x, mask, past=None):
        """x (B, T, d), mask (B, 1, 1 or T, T) bool, True where a query may look at a key -> (B, T, d), keys and values.

        past: keys and values (2, B, H, L, c) of L frames before x, all of which may be looked at. They carry no
        positions: those are counted from the first key here, which is as good because only differences matter.
        """
        B, T, d = x.shape
        qkv = self.qkv(self.norm(x)).view(B, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, kv = qkv[0], qkv[1:] if past is None else torch.cat([past, qkv[1:]], dim=3)
        k, v = kv
        positions = torch.arange(k.shape[2], device=x.device)
        x = F.scaled_dot_product_attention(rotary(q, positions[-T:]), rotary(k, positions), v, mask)
        return self.out(x.transpose(1, 2).reshape(B, T, d)), kv


class Convolution(nn.Module):
    """Pointwise + GLU, depthwise, LayerNorm (not BatchNorm: its statistics would mix utterances and padding),
    pointwise. Causal in a student that streams."""

    def __init__(self, config):
        super().__init__()
        self.causal = config.chunk != 0
        self.norm = nn.LayerNorm(config.dim)
        self.expand = nn.Linear(config.dim, 2 * config.dim)
        self.depthwise = nn.Conv1d(config.dim, config.dim, config.kernel, groups=config.dim,
                                   padding=0 if self.causal else config.kernel // 2)
        self.depthwise_norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x, valid, past=None):
        """x (B, T, d), valid (B, T) bool, past (B, d, kernel - 1): what the depthwise convolution heard before x, zeros
        at the start -> (B, T, d), the next past."""
        # zeros behind the end, as at the edge of a lone utterance
        x = (F.glu(self.expand(self.norm(x))) * valid[..., None]).transpose(1, 2)
        if self.causal:
            before = self.depthwise.kernel_size[0] - 1
            x = F.pad(x, (before, 0)) if past is None else torch.cat([past, x], dim=2)
            past = x[:, :, x.shape[2] - before:]
        x = self.depthwise(x).transpose(1, 2)
        return self.out(F.silu(self.depthwise_norm(x))), past


def feed_forward(config):
    return nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, config.expansion * config.dim), nn.SiLU(),
                         nn.Dropout(config.dropout), nn.Linear(config.expansion * config.dim, config.dim))


class Condition(nn.Module):
    """x + Linear(softmax(CTC(x))): what a layer would write becomes what the next one hears (self-conditioned CTC,
    arXiv 2104.02724). [ours] a CTC head of its own instead of the last layer's; nothing is fed back at first, so an
    encoder of stage 1 starts as it was."""

    def __init__(self, config):
        super().__init__()
        self.ctc, self.back = nn.Linear(config.dim, config.vocab_size), nn.Linear(config.vocab_size, config.dim)
        nn.init.zeros_(self.back.weight)
        nn.init.zeros_(self.back.bias)

    def forward(self, x):
        """(B, T, d) -> (B, T, d)"""
        return x + self.back(self.ctc(x).softmax(-1))


class Block(nn.Module):
    def __init__(self, config, conditioned=False):
        super().__init__()
        self.feed_forward1, self.feed_forward2 = feed_forward(config), feed_forward(config)
        self.attention, self.convolution = Attention(config), Convolution(config)
        self.norm, self.dropout = nn.LayerNorm(config.dim), nn.Dropout(config.dropout)
        self.condition = Condition(config) if conditioned else nn.Identity()

    def forward(self, x, mask, valid, past=(None, None)):
        """past: what attention and convolution remember of the frames before x -> (B, T, d), the same of all so far."""
        x = x + 0.5 * self.dropout(self.feed_forward1(x))
        y, keys = self.attention(x, mask, past[0])
        x = x + self.dropout(y)
        y, heard = self.convolution(x, valid, past[1])
        x = x + self.dropout(y)
        x = x + 0.5 * self.dropout(self.feed_forward2(x))
        return self.condition(self.norm(x)), (keys, heard)


class Encoder(nn.Module):
    """features (B, F, 80), lengths (B,) -> hidden (B, T, d), lengths (B,). An utterance's output does not depend on its
    batch.

    chunk: frames heard at once, instead of config.chunk. The attention of a chunk sees the whole chunk and config.left
    frames before it, the convolutions look back only: `stream` gives the same output chunk by chunk.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.subsampling, self.dropout = Subsampling(config), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, k in config.conditioned) for k in range(1, config.layers + 1))

    def forward(self, features, lengths, chunk=None):
        x, lengths = self.subsampling(features, lengths)
        valid = valid_mask(lengths, x.shape[1])
        mask = valid[:, None, None, :]
        chunk = self.config.chunk if chunk is None else chunk
        if chunk == RANDOM:  # torch's own generator, which every training step seeds: a resumed run draws the same
            chunk = RANDOM_CHUNKS[torch.randint(len(RANDOM_CHUNKS), ()).item()] if self.training else 0
        if chunk:
            t = torch.arange(x.shape[1], device=x.device)
            start = (t // chunk * chunk)[:, None]
            mask = mask & (start - self.config.left <= t) & (t < start + chunk) | (t == t[:, None])  # padding: itself
        x = self.dropout(x)
        for block in self.blocks:
            x, _ = block(x, mask, valid)
        return x, lengths

    def stream(self, x, past=None):
        """One more chunk of subsampled features (B, C, d) -> hidden (B, C, d), the past of the next chunk. What is kept
        is as long as config.left and config.kernel say, however long the audio."""
        valid, kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), []
        for block, before in zip(self.blocks, past or [(None, None)] * len(self.blocks)):
            x, (keys, heard) = block(x, None, valid, before)
            kept.append((keys[:, :, :, max(0, keys.shape[3] - self.config.left):], heard))
        return x, kept


# ---------------------------------------------------------------------------- transducer parts (arXiv 1211.3711)

class StatelessPredictor(nn.Module):
    """Sees the last two labels only (arXiv 2109.07513, "reduced" predictor): little to overfit, and its state is one
    label."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.predictor_dim)
        self.mix = nn.Conv1d(config.predictor_dim, config.predictor_dim, 2, groups=config.predictor_dim)

    def forward(self, labels, state=None):
        """labels (B, U), state (B, 1) the label before them -> (B, U, P), state. A sequence starts with blank. The
        first axis of a state is the batch, so a search picks rows by an index."""
        labels = torch.cat([torch.full_like(labels[:, :1], BLANK) if state is None else state, labels], dim=1)
        return F.relu(self.mix(self.embedding(labels).transpose(1, 2)).transpose(1, 2)), labels[:, -1:]


class LSTMPredictor(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.predictor_dim)
        self.lstm = nn.LSTM(config.predictor_dim, config.predictor_dim, batch_first=True)

    def forward(self, labels, state=None):
        """labels (B, U), U = 1 with a state (B, 2, P) of the LSTM -> (B, U, P), state. One more label goes through the
        bare cell: for a single step the kernel of the whole LSTM is several times slower."""
        x = self.embedding(labels)
        if state is None:
            x, (h, c) = self.lstm(x)
            h, c = h[0], c[0]
        else:
            h, c = torch.lstm_cell(x[:, 0], state.unbind(1), *self.lstm.all_weights[0])
            x = h[:, None]
        return x, torch.stack([h, c], dim=1)


class Joiner(nn.Module):
    """Linear(tanh(Linear(h) + Linear(g)))"""

    def __init__(self, config):
        super().__init__()
        self.encoder = nn.Linear(config.dim, config.joiner_dim)
        self.predictor = nn.Linear(config.predictor_dim, config.joiner_dim)
        self.out = nn.Linear(config.joiner_dim, config.vocab_size)

    def forward(self, hidden, predicted):
        """hidden (B, T, d), predicted (B, U+1, P) -> logits (B, T, U+1, V)"""
        return self.join(self.encoder(hidden)[:, :, None], self.predictor(predicted)[:, None])

    def join(self, encoded, predicted):
        """The same from projected inputs of any shapes that broadcast, (..., J) -> (..., V)"""
        return self.out((encoded + predicted).tanh_())


class SimpleJoiner(nn.Module):
    """Two linear maps whose sum is a joiner: it shows the pruned loss where to look (arXiv 2206.13236), no more."""

    def __init__(self, config):
        super().__init__()
        self.encoder = nn.Linear(config.dim, config.vocab_size)
        self.predictor = nn.Linear(config.predictor_dim, config.vocab_size)

    def forward(self, hidden, predicted):
        """hidden (B, T, d), predicted (B, U+1, P) -> (B, T, V), (B, U+1, V)"""
        return self.encoder(hidden), self.predictor(predicted)


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
            if config.simple_joiner:
                self.simple_joiner = SimpleJoiner(config)
            self.ctc = nn.Linear(config.dim, config.vocab_size)

    def predict(self, targets):
        """targets (B, U) -> predictor outputs (B, U+1, P): one before the first label, one after each."""
        return F.dropout(self.predictor(F.pad(targets, (1, 0), value=BLANK))[0], self.config.predictor_dropout,
                         self.training)

    @property
    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())


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
        # torch.load looks at no checksum, and where a bit turns a member into a folder, it leaves random numbers
        archive = zipfile.ZipFile(path)
        if archive.testzip() or any((m.compress_size, m.external_attr) != (m.file_size, 0) for m in archive.infolist()):
            raise ValueError("a wrong checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or "format" not in checkpoint:
            raise TypeError("not a dict of ours")
    except Exception as error:  # a damaged file may lead the readers anywhere
        raise UserError(f"{path} is not a checkpoint of ours or is damaged ({type(error).__name__}); delete it or "
                        f"give another")
    return checkpoint | {"path": str(path)}


def exported(weights):
    """Without the decoder that only training needs (bert.py)."""
    return {name: x for name, x in weights.items() if not name.startswith("auxiliary.")}


def load_student(checkpoint, **changes):
    """The Student that a checkpoint describes, with its weights; `changes` replace fields of its config (new parts stay
    untrained)."""
    try:
        known = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in checkpoint["config"].items()})
        student = Student(replace(known, **changes))
        weights = exported(checkpoint["model"])
        if changes:
            weights = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
            new = {k: v for k, v in student.encoder.state_dict().items() if ".condition." in k}
            student.encoder.load_state_dict(new | weights)
        else:
            student.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{checkpoint.get('path', 'the checkpoint')} does not hold the student that it describes "
                        f"({' '.join(str(error).split())[:150]}); give another, or the program that wrote it")
    return student
