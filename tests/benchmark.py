"""Side by side in one run: python tests/benchmark.py loss|train|teacher|decode      (yardsticks, not tests)"""
import argparse
import functools
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


def loss(repeat, _):
    print("| (B, T, U, V), forward + backward | ours, ms | torchaudio, ms | ours / torchaudio |\n|---|---|---|---|")
    for shape in ((8, 100, 20, 128), (8, 250, 40, 500)):
        B, T, U, V = shape
        logits = torch.randn(B, T, U + 1, V, device=DEVICE, requires_grad=True)
        targets = torch.randint(1, V, (B, U), device=DEVICE, dtype=torch.int32)
        lengths = [torch.full((B,), n, device=DEVICE, dtype=torch.int32) for n in (T, U)]
        ways = {"ours": losses.transducer_loss, "theirs": functools.partial(torchaudio.functional.rnnt_loss, blank=0)}
        run = lambda f: torch.autograd.grad(f(logits, targets, *lengths), logits)
        ours, theirs = medians({name: functools.partial(run, f) for name, f in ways.items()}, repeat).values()
        print(f"| {shape} | {1000 * ours:.1f} | {1000 * theirs:.1f} | {ours / theirs:.2f} |")


def train(repeat, batch_seconds):
    """A step of stage 1 on the demo, and its parts."""
    utterances = data.load_utterances(running.DEMO / "corpus/unlabelled")
    loader = data.Loader(utterances, batch_seconds, waveforms=True, augment=True, speeds=(0.9, 1.0, 1.1))
    dataset, [indices] = data._Dataset(loader, 0), loader.batches(0)[:1]
    batch = dataset[indices].to(DEVICE)
    folders = [str(running.DEMO / "teachers" / name) for name in ("hubert", "whisper")]
    teachers = [pretrain_kd.Teacher(folder, DEVICE, DTYPE) for folder in folders]
    student = model.Student(replace(model.PRESETS["nano"], head_dims=tuple(t.dim for t in teachers))).to(DEVICE)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
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
        student = model.Student(replace(model.PRESETS["nano"], head_dims=widths)).to(DEVICE)
        optimizer, heads = torch.optim.AdamW(student.parameters(), fused=True), len(student.heads)
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


def decoding(repeat, batch_seconds):
    """RTF of the small student. Random weights babble: the search is dearer than after training."""
    utterances = data.load_utterances(running.DEMO / "corpus/test", transcribed=True)
    tokenizer = data.train_tokenizer([u.text for u in utterances], 256, 10)
    student = model.Student(replace(model.PRESETS["small"], vocab_size=tokenizer.get_vocab_size())).to(DEVICE).eval()
    batch = next(data.Loader(utterances, batch_seconds).epoch()).to(DEVICE)
    with torch.no_grad():
        hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
        ways = {"encoder": lambda: student.encoder(batch.features, batch.feature_lengths)}
        for name, search in decode.METHODS.items():
            ways[f"greedy {name}"] = functools.partial(search, student, hidden, lengths)
        seconds = medians(ways, repeat)
    labels = sum(map(len, decode.greedy_transducer(student, hidden, lengths)))
    print(f"{len(batch.ids)} utterances, {batch.seconds:.0f} s; {labels / batch.seconds:.0f} labels emitted per second")
    print("| part | ms | RTF |\n|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {1000 * s:.0f} | {s / batch.seconds:.4f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["loss", "train", "teacher", "decode"])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--batch-seconds", type=float, default=24)
    parser.add_argument("--teachers", nargs="+",
                        default=[str(running.DEMO / "teachers" / name) for name in ("hubert", "whisper")])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    print(WHY)
    ways = {"loss": loss, "train": train, "decode": decoding,
            "teacher": functools.partial(teacher, specs=args.teachers)}
    ways[args.what](args.repeat, args.batch_seconds)
