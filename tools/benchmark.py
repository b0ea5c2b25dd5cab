"""Yardsticks, side by side in one run: ratios count, not seconds.

OMP_NUM_THREADS=1 python -m tools.benchmark loss      # the transducer loss beside torchaudio's
python -m tools.benchmark train      # the encoder beside torchaudio's Conformer; parts of an update
python -m tools.benchmark teacher    # a step of distillation beside its parts, live and cached
python -m tools.benchmark decode     # encoder and searches as RTF, beside torchaudio's beam search
"""

import functools
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torchaudio

import data
import decode
import finetune_rnnt
import model
import pretrain_kd
from tools import teacher_cache
from tools.beam_search import BeamTransducer
from tools.command_line import Parser, one_line_errors, positive_float, positive_int
from tools.machine import autocast, choose_device, fast_dtype

DEVICE, DTYPE, ABOUT_DEVICE = choose_device()
TEACHERS = [str(data.DEMO / "teachers" / name) for name in ("hubert", "whisper")]


def medians(ways, repeat):
    """{name: function} -> {name: median seconds}. They take turns, so that other load hits all
    alike."""
    times = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if turn > 0:  # the first turn warms up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(some) for name, some in times.items()}


# ---------------------------------------- loss


def loss_ways(B, T, U1, V):
    """Forward and backward of the losses at logits (B, T, U+1, V) -> {name: function}"""
    torch.manual_seed(0)
    config = model.Config(vocab_size=V)
    joiner = model.Joiner(config).to(DEVICE)
    logits = torch.randn(B, T, U1, V, device=DEVICE, requires_grad=True)
    hidden = torch.randn(B, T, config.dim, device=DEVICE, requires_grad=True)
    predicted = torch.randn(B, U1, config.predictor_dim, device=DEVICE, requires_grad=True)
    targets = torch.randint(1, V, (B, U1 - 1), dtype=torch.int32, device=DEVICE)
    logit_lengths = torch.full((B,), T, dtype=torch.int32, device=DEVICE)
    target_lengths = torch.full((B,), U1 - 1, dtype=torch.int32, device=DEVICE)
    lattice = targets, logit_lengths, target_lengths

    def logits_torchaudio():
        loss = torchaudio.functional.rnnt_loss(logits, *lattice, blank=0)
        torch.autograd.grad(loss, logits)

    def logits_ours():
        torch.autograd.grad(model.transducer_loss(logits, *lattice), logits)

    def joiner_torchaudio():
        joined = joiner(hidden, predicted)
        torchaudio.functional.rnnt_loss(joined, *lattice, blank=0).backward()

    def joiner_ours():
        model.transducer_loss_from_joiner(joiner, hidden, predicted, *lattice).backward()

    return {
        "from logits: torchaudio": logits_torchaudio,
        "from logits: ours": logits_ours,
        "from the joiner's inputs: torchaudio": joiner_torchaudio,
        "from the joiner's inputs: ours": joiner_ours,
    }


def status_bytes(key):
    """A figure of this process from /proc (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


def peak_memory(name, shape):
    """Most bytes beyond the inputs while a loss runs; to be called in a fresh process."""
    loss_ways(2, 9, 5, shape[3])[name]()  # what libraries load once
    way = loss_ways(*shape)[name]
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    before = status_bytes("VmRSS")
    way()
    return status_bytes("VmHWM") - before


def benchmark_loss(args):
    print(f"{torch.get_num_threads()} threads; forward and backward; memory beyond the inputs")
    print("| (B, T, U+1, V) | loss | ms | / torchaudio | memory / logits |\n|---|---|---|---|---|")
    for shape in ((8, 100, 21, 128), (8, 250, 40, 500), (8, 400, 80, 500)):
        seconds = medians(loss_ways(*shape), args.repeat or 5)
        for name, own in seconds.items():
            theirs = seconds[f"{name.split(':')[0]}: torchaudio"]
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                memory = fresh.apply(peak_memory, (name, shape)) / (4 * math.prod(shape))
            print(
                f"| {shape} | {name} | {1000 * own:.0f} | {own / theirs:.3f} | {memory:.2f} |",
                flush=True,
            )


# ---------------------------------------- train


class TwoConvolutions(torch.nn.Module):
    """What most Conformers begin with: two 3x3 convolutions of stride 2."""

    def __init__(self, config):
        super().__init__()
        channels = config.channels
        self.conv1 = torch.nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.out = torch.nn.Linear(channels * (config.feature_dim // 4), config.dim)

    def forward(self, features, lengths):
        x = self.conv1(features[:, None]).relu()
        x = self.conv2(x).relu()
        lengths = ((lengths + 1) // 2 + 1) // 2
        return self.out(x.transpose(1, 2).flatten(2)), lengths


class TorchaudioEncoder(torch.nn.Module):
    """torchaudio's Conformer with the sizes of a Config, behind two convolutions."""

    def __init__(self, config):
        super().__init__()
        self.subsampling = TwoConvolutions(config)
        self.conformer = torchaudio.models.Conformer(
            config.dim,
            config.attention_heads,
            config.expansion * config.dim,
            config.layers,
            config.kernel,
            dropout=config.dropout,
        )

    def forward(self, features, lengths):
        return self.conformer(*self.subsampling(features, lengths))


def demo_batch(utterances, batch_seconds, **options):
    """-> (a Loader as training has it, the indices of a batch of it)"""
    loader = data.Loader(utterances, batch_seconds, augment=True, speeds=(0.9, 1.0, 1.1), **options)
    return loader, loader.batches(0)[0]


class Stopwatch:
    """stopwatch(name) notes the seconds since it was made or last called."""

    def __init__(self):
        self.seconds = {}
        self.last = time.perf_counter()

    def __call__(self, name):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now


def untimed(name):
    """For a step of which nobody wants to know the parts"""


def stage1_step(student, targets, batch, part=untimed):
    """Forward and backward of stage 1; part(name) is called when a part is done."""
    with autocast(DEVICE, DTYPE):
        hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
        part("encoder")
        loss = 0
        for head, target in zip(student.heads, targets):
            loss = loss + model.l1_loss(head(hidden), target, lengths)
        part("heads and L1")
    student.zero_grad()
    (loss / lengths.sum()).backward()
    part("backward")


def stage2_step(student, batch, part=untimed):
    """The same of stage 2"""
    with autocast(DEVICE, DTYPE):
        hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
        part("encoder")
        predicted = student.predict(batch.targets)
        part("predictor")
        labelled = batch.targets, lengths, batch.target_lengths
        loss = model.transducer_loss_from_joiner(student.joiner, hidden, predicted, *labelled)
        part("joiner and transducer loss")
        loss = loss + 0.3 * model.ctc_loss(student.ctc(hidden), *labelled).mean()
        part("CTC")
    student.zero_grad()
    loss.backward()
    part("backward")


def time_update(step, optimizer, loader, indices):
    """An update with the data of its batch; step(batch, part) as above -> {part: seconds}"""
    part = Stopwatch()
    batch = loader.load(0, indices).to(DEVICE)
    part("data")
    step(batch, part)
    optimizer.step()
    part("optimizer")
    return part.seconds


def print_parts(title, update, repeat):
    """Medians of the parts of an update, and their shares of it."""
    turns = [update() for _ in range(repeat + 1)][1:]  # the first warms up
    seconds = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    whole = sum(seconds.values())
    print(f"| {title} | ms | share |\n|---|---|---|")
    for name, own in seconds.items():
        print(f"| {name} | {1000 * own:.1f} | {100 * own / whole:.0f} % |")
    print(f"| all | {1000 * whole:.1f} | |")


def benchmark_train(args):
    repeat = args.repeat or 10
    utterances = data.load_utterances(data.DEMO / "corpus/train", transcribed=True)
    tokenizer = data.train_tokenizer([u.text for u in utterances], 256)
    loader, indices = demo_batch(utterances, args.batch_seconds, tokenizer=tokenizer)
    batch = loader.load(0, indices).to(DEVICE)
    config = replace(model.PRESETS[args.size], dropout=0.0)
    student = model.Student(replace(config, head_dims=(320, 288))).to(DEVICE)
    theirs = TorchaudioEncoder(config).to(DEVICE)

    def encode(encoder):
        with autocast(DEVICE, DTYPE):
            hidden, _ = encoder(batch.features, batch.feature_lengths)
        hidden.sum().backward()

    ways = {
        "ours": functools.partial(encode, student.encoder),
        "torchaudio's Conformer": functools.partial(encode, theirs),
    }
    seconds = medians(ways, repeat)
    title = f"{args.size}, {len(batch.utterances)} utterances, {batch.seconds:.0f} s"
    print_table(f"encoder, forward and backward: {title}", seconds, batch)
    ratio = seconds["torchaudio's Conformer"] / seconds["ours"]
    print(f"our encoder is {ratio:.2f} times as fast as torchaudio's\n")

    hidden, _ = student.encoder(batch.features, batch.feature_lengths)
    targets = [torch.randn(*hidden.shape[:2], head.out_features) for head in student.heads]
    targets = [target.to(DEVICE) for target in targets]
    optimizer = pretrain_kd.new_optimizer(student, 1e-3)
    step = functools.partial(stage1_step, student, targets)
    update = functools.partial(time_update, step, optimizer, loader, indices)
    print_parts("stage 1 from a cache", update, repeat)
    print()
    student = model.Student(replace(config, vocab_size=tokenizer.get_vocab_size())).to(DEVICE)
    defaults = finetune_rnnt.parse([])
    optimizer = finetune_rnnt.new_optimizer(defaults, student, None, "encoder")
    step = functools.partial(stage2_step, student)
    update = functools.partial(time_update, step, optimizer, loader, indices)
    print_parts("stage 2", update, repeat)


def print_table(title, seconds, batch):
    print(f"| {title} | ms | s of audio per s |\n|---|---|---|")
    for name, own in seconds.items():
        print(f"| {name} | {1000 * own:.0f} | {batch.seconds / own:.0f} |")


# ---------------------------------------- teacher


def benchmark_teacher(args):
    """Is a step of distillation worth its parts, and one from the cache what the student costs?"""
    utterances = data.load_utterances(data.DEMO / "corpus/unlabelled")
    live, indices = demo_batch(utterances, args.batch_seconds)
    dtype = fast_dtype(DEVICE)
    teachers = [pretrain_kd.Teacher(spec, DEVICE, dtype) for spec in args.teachers]
    chosen = [live.utterances[i] for i in indices]
    with tempfile.TemporaryDirectory() as folder:
        caches, _, _ = teacher_cache.fill(
            Path(folder), teachers, chosen, chosen[:1], (0.9, 1.0, 1.1), args.batch_seconds
        )
        cached = replace(live, utterances=chosen, caches=caches)
        batch = live.load(0, indices).to(DEVICE)
        widths = [width for teacher in teachers for width in teacher.widths]
        config = replace(model.PRESETS[args.size], dropout=0.0, head_dims=tuple(widths))
        student = model.Student(config).to(DEVICE)
        optimizer = pretrain_kd.new_optimizer(student, 1e-3)
        fixed = pretrain_kd.teacher_targets(teachers, batch)

        def step(loader, some, targets=None):
            # Read here; in a training worker processes read ahead.
            one = loader.load(0, some).to(DEVICE)
            if targets is None:
                targets = pretrain_kd.teacher_targets(teachers, one)
            stage1_step(student, targets, one)
            optimizer.step()

        ways = {}
        for teacher in teachers:
            ways[f"teacher {teacher.spec}"] = functools.partial(teacher.embed, batch.waveforms)
        ways["student alone"] = functools.partial(step, live, indices, fixed)
        ways["a step of distillation"] = functools.partial(step, live, indices)
        everything = list(range(len(chosen)))
        ways["a step from the cache"] = functools.partial(step, cached, everything)
        seconds = medians(ways, args.repeat or 10)
    print_table(f"{len(batch.utterances)} utterances, {batch.seconds:.0f} s", seconds, batch)
    *alone, student_alone, whole, from_cache = seconds.values()
    print(f"step / (teachers + student) {whole / (sum(alone) + student_alone):.2f}")
    print(f"step from the cache / student {from_cache / student_alone:.2f}")


# ---------------------------------------- decode


class ForTorchaudio:
    """Our student in the shape that torchaudio's RNNTBeamSearch wants: blank is its last label."""

    def __init__(self, student):
        self.student = student
        self.blank = student.config.vocab_size - 1

    def transcribe(self, hidden, lengths):
        return hidden, lengths  # all searches begin with the same hidden states

    def predict(self, labels, lengths, state):
        labels = torch.where(labels == self.blank, 0, labels + 1)
        out, state = self.student.predictor(labels, state and state[0][0])
        return out, lengths, [[state]]

    def join(self, hidden, lengths, predicted, predicted_lengths):
        logits = self.student.joiner(hidden, predicted)
        return logits.roll(-1, -1), lengths, predicted_lengths


@torch.no_grad()
def benchmark_decode(args):
    """100 utterances of 12 s in batches of ten; torchaudio takes one at a time, and two of them
    will do.

    The small student has random weights, and a blank that leaves about as many labels as speech
    has. Such a student does not stop writing where it begins: so one label a frame, here and
    there.
    """
    utterances = data.load_utterances(data.DEMO / "corpus/test")
    audio = torch.cat([data.load_audio(u.path) for u in utterances])
    pieces = [audio[i * 50_000 :][: 12 * data.SAMPLE_RATE] for i in range(100)]
    features = torch.stack([data.log_mel(piece) for piece in pieces]).to(DEVICE)
    lengths = torch.full((10,), features.shape[1], device=DEVICE)
    student = model.Student(replace(model.PRESETS["small"], vocab_size=256)).to(DEVICE).eval()

    def encode():
        return [student.encoder(batch, lengths) for batch in features.split(10)]

    batches = encode()
    nothing = torch.zeros(10, 0, dtype=torch.long, device=DEVICE)
    logits = student.joiner(batches[0][0], student.predict(nothing))
    margin = logits[..., 1:].amax(-1) - logits[..., 0]
    student.joiner.out.bias[0] += margin.quantile(0.5)
    everything = torch.cat([hidden for hidden, _ in batches])
    all_lengths = torch.cat([frames for _, frames in batches])

    def in_batches(new_search):
        written = 0
        for hidden, frames in batches:
            search = new_search(student, len(hidden))
            search.advance(hidden, frames)
            written += sum(len(best.tokens) for best, *_ in search.results())
        return written

    def at_once(new_search):
        new_search(student, 100).advance(everything, all_lengths)

    def two_alone(new_search):
        for hidden in everything[:2]:
            new_search(student, 1).advance(hidden[None], all_lengths[:1])

    def two_of_torchaudio(beam):
        wrapped = ForTorchaudio(student)
        search = torchaudio.models.RNNTBeamSearch(wrapped, wrapped.blank, step_max_tokens=1)
        for hidden in everything[:2]:
            search(hidden, all_lengths[0], beam)

    greedy = functools.partial(decode.GreedyTransducer, max_symbols=1)
    ways = {
        "encoder": (encode, 1200),
        "greedy CTC": (functools.partial(in_batches, decode.GreedyCTC), 1200),
        "greedy transducer": (functools.partial(in_batches, greedy), 1200),
        "greedy transducer, all 100 at once": (functools.partial(at_once, greedy), 1200),
        "greedy transducer, one by one": (functools.partial(two_alone, greedy), 24),
        "torchaudio, beam 1": (functools.partial(two_of_torchaudio, 1), 24),
    }
    for k in (4, 8):
        beam = functools.partial(BeamTransducer, beam=k, max_symbols=1)
        ways[f"beam {k}"] = (functools.partial(in_batches, beam), 1200)
        ways[f"beam {k}, one by one"] = (functools.partial(two_alone, beam), 24)
        ways[f"torchaudio, beam {k}"] = (functools.partial(two_of_torchaudio, k), 24)
    seconds = medians({name: way for name, (way, _) in ways.items()}, args.repeat or 3)
    print(f"small student, 100 utterances of 12 s, {in_batches(greedy) / 1200:.1f} labels a second")
    print("| part | RTF |\n|---|---|")
    for name, own in seconds.items():
        print(f"| {name} | {own / ways[name][1]:.5f} |")


BENCHMARKS = {
    "loss": benchmark_loss,
    "train": benchmark_train,
    "teacher": benchmark_teacher,
    "decode": benchmark_decode,
}


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("what", choices=list(BENCHMARKS))
    parser.add_argument("--repeat", type=positive_int, help="turns (default: 3 to 10)")
    parser.add_argument(
        "--batch-seconds", type=positive_float, default=24, help="of train and teacher"
    )
    parser.add_argument("--size", choices=list(model.PRESETS), default="nano")
    parser.add_argument("--teachers", nargs="+", default=TEACHERS, help="of teacher")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    print(ABOUT_DEVICE)
    BENCHMARKS[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
