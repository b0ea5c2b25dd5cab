"""Side by side in one run: python tests/benchmark.py loss|train|teacher|decode      (yardsticks, not tests)"""
import argparse
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

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import decode
import losses
import model
import pretrain_kd
import run as running
import search
import training

DEVICE, DTYPE, WHY = running.choose_device()


def medians(ways, repeat):
    """{name: function} -> {name: median seconds}. They take turns: other load hits all alike."""
    times = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if turn:                                                               # the first turn warms up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def transducer_ways(B, T, U1, V):
    """Forward + backward of each transducer loss at logits (B, T, U+1, V): {name: function}. Inputs are made here."""
    torch.manual_seed(0)
    config = model.Config(vocab_size=V)
    joiner, simple = model.Joiner(config).to(DEVICE), model.SimpleJoiner(config).to(DEVICE)
    leaf = functools.partial(torch.randn, device=DEVICE, requires_grad=True)
    logits, inputs = leaf(B, T, U1, V), (leaf(B, T, config.dim), leaf(B, U1, config.predictor_dim))
    rest = [torch.randint(1, V, (B, U1 - 1)), torch.full((B,), T), torch.full((B,), U1 - 1)]
    rest = [x.to(DEVICE, torch.int32) for x in rest]
    theirs = functools.partial(torchaudio.functional.rnnt_loss, blank=0)
    return {"from logits: torchaudio": lambda: torch.autograd.grad(theirs(logits, *rest), logits),
            "from logits: exact": lambda: torch.autograd.grad(losses.transducer_loss(logits, *rest), logits),
            "from the joiner's inputs: torchaudio": lambda: theirs(joiner(*inputs), *rest).backward(),
            "from the joiner's inputs: exact": lambda: losses.transducer_loss_from_joiner(joiner, *inputs,
                                                                                          *rest).backward(),
            "from the joiner's inputs: pruned": lambda: sum(losses.pruned_transducer_loss(joiner, simple, *inputs,
                                                                                          *rest)).backward()}


def peak_memory(name, shape):
    """Most bytes beyond the inputs while it runs; to be called in a fresh process. Linux and CUDA."""
    transducer_ways(2, 9, 5, shape[3])[name]()                                         # what libraries load once
    way = transducer_ways(*shape)[name]
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        return torch.cuda.max_memory_allocated() - before
    in_status = lambda key: 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])
    Path("/proc/self/clear_refs").write_text("5")                                      # VmHWM counts from here
    before = in_status("VmRSS")
    way()
    return in_status("VmHWM") - before


def loss(repeat):
    print(f"{torch.get_num_threads()} threads; forward + backward; memory beyond the inputs in multiples of the logits")
    print("| (B, T, U+1, V) | loss | ms | / torchaudio | memory / logits |\n|---|---|---|---|---|")
    for shape in ((8, 100, 21, 128), (8, 250, 40, 500), (8, 400, 80, 500)):
        seconds = medians(transducer_ways(*shape), repeat)
        for name, s in seconds.items():
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                memory = fresh.apply(peak_memory, (name, shape)) / (4 * math.prod(shape))
            print(f"| {shape} | {name} | {1000 * s:.0f} | {s / seconds[name.split(':')[0] + ': torchaudio']:.3f} | "
                  f"{memory:.2f} |", flush=True)


def train(repeat, batch_seconds):
    """A step of stage 1 on the demo, and its parts."""
    utterances = data.load_utterances(running.DEMO / "corpus/unlabelled")
    loader = data.Loader(utterances, batch_seconds, waveforms=True, augment=True, speeds=(0.9, 1.0, 1.1))
    dataset, [indices] = data._Dataset(loader, 0), loader.batches(0)[:1]
    batch = dataset[indices].to(DEVICE)
    folders = [str(running.DEMO / "teachers" / name) for name in ("hubert", "whisper")]
    teachers = [pretrain_kd.Teacher(folder, DEVICE, DTYPE) for folder in folders]
    widths = tuple(one.dim for one in teachers)
    student = model.Student(replace(model.PRESETS["nano"], dropout=0.0, head_dims=widths)).to(DEVICE)
    optimizer = training.Muon(student, 1e-3)
    listen = lambda: pretrain_kd.teacher_targets(teachers, batch)
    targets = listen()

    def student_step(targets):
        with running.autocast(DEVICE, DTYPE):
            total, frames, _ = pretrain_kd.stage1_loss(student, batch, targets, [1.0, 1.0], ["l1", "l1"])
        optimizer.zero_grad()
        (total / frames).backward()

    def whole_step():
        dataset[indices]                                            # read here; in training workers read ahead
        student_step(listen())
        optimizer.step()
    seconds = medians({"data, one process": lambda: dataset[indices], "teachers, forward": listen,
                       "student, forward + backward": lambda: student_step(targets), "whole step": whole_step}, repeat)
    print(f"| {len(batch.ids)} utterances, {batch.seconds:.0f} s | ms | s of audio per s | share |\n|---|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {1000 * s:.0f} | {batch.seconds / s:.0f} | {s / seconds['whole step']:.2f} |")


def teacher(repeat, batch_seconds, specs):
    """Is a step of distillation worth its parts, and one from the cache what the student costs?"""
    utterances = data.load_utterances(running.DEMO / "corpus/unlabelled")
    speeds, caches = (0.9, 1.0, 1.1), []
    teachers = [pretrain_kd.Teacher(spec, DEVICE, running.inference_dtype(DEVICE)) for spec in specs]
    loaders = [data.Loader(utterances, batch_seconds, waveforms=True, augment=True, speeds=speeds)]
    [indices] = loaders[0].batches(0)[:1]
    batch = data._Dataset(loaders[0], 0)[indices]
    with tempfile.TemporaryDirectory() as folder:
        for k, one in enumerate(teachers):
            caches.append(pretrain_kd.Cache(folder, one, f"teacher-{k}"))
            caches[-1].open()
            for speed in speeds:
                for u in (utterances[i] for i in indices):
                    caches[-1].append([u], speed, *one.embed([data._speed(speed)(data.load_audio(u.path))[0]]))
            caches[-1].close()
            caches[-1].read()
        loaders.append(data.Loader(utterances, batch_seconds, augment=True, speeds=speeds, caches=caches))
        live, from_cache = (data._Dataset(loader, 0) for loader in loaders)
        widths = tuple(width for one in teachers for width in one.widths)
        student = model.Student(replace(model.PRESETS["nano"], dropout=0.0, head_dims=widths)).to(DEVICE)
        optimizer, heads = training.Muon(student, 1e-3), len(student.heads)
        fixed = pretrain_kd.teacher_targets(teachers, batch)

        def step(dataset, targets=None):
            heard = dataset[indices].to(DEVICE)                     # read here; in training workers read ahead
            with running.autocast(DEVICE, DTYPE):
                targets = targets or pretrain_kd.teacher_targets(teachers, heard)
                total, frames, _ = pretrain_kd.stage1_loss(student, heard, targets, [1.0] * heads, ["l1"] * heads)
            optimizer.zero_grad()
            (total / frames).backward()
            optimizer.step()
        ways = {f"teacher {one.spec}": functools.partial(one.embed, batch.waveforms) for one in teachers}
        ways |= {"student alone": lambda: step(live, fixed), "distillation step": lambda: step(live),
                 "distillation step from the cache": lambda: step(from_cache)}
        seconds = medians(ways, repeat)
    *alone, student, whole, cached = seconds.values()
    print(f"| {len(batch.ids)} utterances, {batch.seconds:.0f} s | ms | s of audio per s |\n|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {1000 * s:.0f} | {batch.seconds / s:.0f} |")
    print(f"step / (teachers + student) {whole / (sum(alone) + student):.2f}, "
          f"cached step / student {cached / student:.2f}")


class ForTorchaudio:
    """Our student in the shape that torchaudio's RNNTBeamSearch wants: blank is the last label, not the first."""

    def __init__(self, student):
        self.student, self.blank = student, student.config.vocab_size - 1

    def transcribe(self, hidden, lengths):
        return hidden, lengths                                          # searches start from the same hidden states

    def predict(self, labels, lengths, state):
        out, state = self.student.predictor(torch.where(labels == self.blank, 0, labels + 1), state and state[0][0])
        return out, lengths, [[state]]

    def join(self, hidden, lengths, predicted, predicted_lengths):
        return self.student.joiner(hidden, predicted).roll(-1, -1), lengths, predicted_lengths


@torch.no_grad()
def decoding(repeat, checkpoint):
    """100 utterances of 12 s in the batches of decode.py; torchaudio takes one at a time, and two of them will do.

    Without a checkpoint the small student with random weights, and a blank that leaves about as many labels as speech
    has. Where such a student speaks at all it does not stop: so one label a frame, here and there.
    """
    audio = torch.cat([data.load_audio(u.path) for u in data.load_utterances(running.DEMO / "corpus/test")])
    features = torch.stack([data.log_mel(audio[i * 50_000:][:12 * 16_000]) for i in range(100)]).to(DEVICE)
    lengths = torch.full((10,), features.shape[1], device=DEVICE)
    if checkpoint:
        student, limit = decode.load_recogniser(checkpoint, DEVICE)[0], 5
    else:
        student, limit = model.Student(replace(model.PRESETS["small"], vocab_size=256)).to(DEVICE).eval(), 1
    encode = lambda: [student.encoder(batch, lengths) for batch in features.split(10)]
    batches = encode()
    if not checkpoint:
        logits = student.joiner(batches[0][0], student.predict(torch.zeros(10, 0, dtype=torch.long, device=DEVICE)))
        student.joiner.out.bias[0] += (logits[..., 1:].amax(-1) - logits[..., 0]).quantile(0.5)
    hidden, T = batches[0][0][:2], batches[0][1][:1]

    def ours(new_search):
        said = 0
        for states, frames in batches:
            one = new_search(student, len(states))
            one.advance(states, frames)
            said += sum(len(best.tokens) for best, *_ in one.results())
        return said

    def at_once():
        greedy(student, 100).advance(torch.cat([states for states, _ in batches]), torch.cat([n for _, n in batches]))

    def alone(new_search):
        for states in hidden:
            new_search(student, 1).advance(states[None], T)

    def theirs(beam):
        wrapped = ForTorchaudio(student)
        for states in hidden:
            torchaudio.models.RNNTBeamSearch(wrapped, wrapped.blank, step_max_tokens=limit)(states, T[0], beam)

    greedy = functools.partial(search.GreedyTransducer, max_symbols=limit)
    beam = lambda k: functools.partial(search.BeamTransducer, beam=k, max_symbols=limit)
    ways = {"encoder": (encode, 1200), "greedy CTC": (lambda: ours(search.GreedyCTC), 1200),
            "greedy transducer": (lambda: ours(greedy), 1200),
            "greedy transducer, all 100 at once": (at_once, 1200),
            "greedy transducer, one by one": (lambda: alone(greedy), 24),
            "torchaudio, beam 1": (lambda: theirs(1), 24)}
    for k in (4, 8):
        ways |= {f"beam {k}": (lambda k=k: ours(beam(k)), 1200),
                 f"beam {k}, one by one": (lambda k=k: alone(beam(k)), 24),
                 f"torchaudio, beam {k}": (lambda k=k: theirs(k), 24)}
    seconds = medians({name: way for name, (way, _) in ways.items()}, repeat)
    print(f"{student.parameter_count / 1e6:.1f} M student, 100 utterances of 12 s; {ours(greedy) / 1200:.1f} labels "
          f"emitted per second")
    print("| part | RTF |\n|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {s / ways[name][1]:.5f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["loss", "train", "teacher", "decode"])
    parser.add_argument("--repeat", type=int, help="default: 10, or 3 for decode")
    parser.add_argument("--batch-seconds", type=float, default=24, help="for train and teacher")
    parser.add_argument("--teachers", nargs="+", help="for teacher",
                        default=[str(running.DEMO / "teachers" / name) for name in ("hubert", "whisper")])
    parser.add_argument("--checkpoint", help="for decode: a trained student instead of a random one")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    print(WHY)
    repeat = args.repeat or (3 if args.what == "decode" else 10)
    {"loss": lambda: loss(repeat), "train": lambda: train(repeat, args.batch_seconds),
     "teacher": lambda: teacher(repeat, args.batch_seconds, args.teachers),
     "decode": lambda: decoding(repeat, args.checkpoint)}[args.what]()
