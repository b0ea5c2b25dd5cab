"""Side by side in one run: python tests/benchmark.py loss|train|decode      (yardsticks, not tests)"""
import argparse
import functools
import statistics
import sys
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
    listen = lambda: pretrain_kd.teacher_targets(teachers, batch.waveforms, "heads")
    targets = listen()

    def student_step(targets):
        with running.autocast(DEVICE, DTYPE):
            total, frames, _ = pretrain_kd.stage1_loss(student, batch, targets, [1.0, 1.0])
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
    parser.add_argument("what", choices=["loss", "train", "decode"])
    parser.add_argument("--repeat", type=int, help="default: 10, or 3 for decode")
    parser.add_argument("--batch-seconds", type=float, default=24, help="for train")
    parser.add_argument("--checkpoint", help="for decode: a trained student instead of a random one")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    print(WHY)
    repeat = args.repeat or (3 if args.what == "decode" else 10)
    if args.what == "decode":
        decoding(repeat, args.checkpoint)
    else:
        {"loss": loss, "train": train}[args.what](repeat, args.batch_seconds)
