"""What has to be seen on a GPU: tests, yardsticks, the demo. For an H100 or H200 and 8 minutes.

    python tests/on_gpu.py                       # -> exp/on_gpu/results.jsonl and table.md
    python tests/on_gpu.py --device cpu --quick  # is this script sound? tiny sizes, 20 seconds

The machine may lack the soundfile package and a network. Where there is one, fetch wheels for its
Python, and 2 h of audio as Ogg Opus (29 MB at most):

    pip download -d wheels --no-deps --only-binary=:all: --python-version 3.12 \\
        soundfile cffi pycparser
    python tests/on_gpu.py --pack LibriSpeech/train-clean-100 audio

and there, with both folders in that of the repository:

    pip install --no-index --find-links wheels soundfile
    python tests/on_gpu.py --audio audio

Each part is a process with a time limit. What it prints is in OUT/PART.log.
"""

import json
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # A process that has begun CUDA cannot fork.
sys.path.insert(0, str(Path(__file__).parent.parent))

import soundfile
import torch
import torch._dynamo  # Every optimizer imports it.
import transformers
from torch.utils.flop_counter import FlopCounterMode

import data
import decode
import finetune_rnnt
import model
import pretrain_kd
from data import DEMO, SAMPLE_RATE
from tools.beam_search import BeamTransducer
from tools.command_line import Parser, first_line, one_line_errors, positive_float
from tools.machine import autocast, choose_device
from tools.stream import encode_chunks

PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # FLOP/s, dense bfloat16
COUNTED = "FLOPs of matrix products, convolutions and attention, forward and backward (no LSTM)"
PACKED_SECONDS = 2 * 3600
PACKED_BYTES = 29e6
FORK = multiprocessing.get_context("fork")  # The imports above are then made once.


class Row(NamedTuple):
    """One line of the results."""

    what: str
    value: float | str
    note: str = ""  # unit, limit or reason
    passed: bool | None = None  # None: a measurement, not a test


def compared(what, found, expected, tolerance):
    """Row of the norm of the difference of two tensors, relative to that of `expected`"""
    expected = expected.detach().cpu().double()
    difference = (found.detach().cpu().double() - expected).norm()
    error = (difference / expected.norm()).item()
    return Row(what, error, f"relative error, at most {tolerance:g}", error <= tolerance)


def use_exact_products():
    """float32 without TF32, so that what differs from a CPU is an error and no rounding"""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


# ---------------------------------------- scripts, as from the command line


def start(main, arguments, log):
    """Run a script's main in a process of its own. This process must not have used CUDA."""

    def run():
        redirect_output(log)
        sys.exit(main(list(map(str, arguments))))

    process = FORK.Process(target=run)
    process.start()
    return process


def redirect_output(path):
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def run_script(main, arguments, log):
    """-> (what it printed, seconds). RuntimeError with its last line if it fails"""
    started = time.monotonic()
    process = start(main, arguments, log)
    process.join()
    printed = log.read_text(errors="replace")
    if process.exitcode != 0:
        last = printed.strip().splitlines()[-1]
        raise RuntimeError(f"{main.__module__} ended with {process.exitcode}: {last}")
    return printed, time.monotonic() - started


def training_options(args, name, steps):
    """-> arguments of a stage: --out and so on, and a few short utterances of the demo"""
    utterances = data.load_utterances(DEMO / "corpus/train", transcribed=True)
    utterances.sort(key=lambda u: (u.seconds, u.id))
    options = ["--device", args.device, "--out", args.runs / name, "--steps", steps]
    options += ["--eval-every", steps]
    count = 64
    if args.quick:
        count = 4
        options += ["--batch-seconds", 3, "--workers", 0, "--speeds", 1]
    for option, some in (("--data", utterances[:count]), ("--dev", utterances[count : count + 2])):
        manifest = args.runs / f"{name}{option}.jsonl"
        with open(manifest, "w") as file:
            for u in some:
                row = {"audio_filepath": u.path, "text": u.text, "duration": u.seconds}
                file.write(json.dumps(row) + "\n")
        options += [option, manifest]
    return options


def losses_of(run):
    """-> the training losses in a run's log, and the log's last row that has one"""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    return [row["loss"] for row in rows], rows[-1]


def falling(what, losses):
    """Row about losses, which are None where they were not finite"""
    fine = None not in losses and losses[-1] <= losses[0]
    text = f"{losses[0]} to {losses[-1]}"
    return Row(what, text, "finite, and not larger at the end", fine)


# ---------------------------------------- tests


def machine(args):
    """What the numbers below were made on"""
    device, _, about = choose_device(args.device)
    yield Row("device", about)
    name = "no GPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    yield Row("card", name, f"torch {torch.__version__}, {os.cpu_count()} CPU cores")


def losses(args):
    """Values and gradients beside those of a CPU in float32"""
    device, _, _ = choose_device(args.device)
    use_exact_products()
    expected = loss_values(torch.device("cpu"), torch.float32, args.quick)
    for dtype, tolerances in (
        (torch.float32, (1e-5, 1e-4, 1e-2)),
        (torch.bfloat16, (1e-2, 5e-2, 2e-1)),
    ):
        of_value, of_gradient, of_sign = tolerances
        for name, (value, gradient) in loss_values(device, dtype, args.quick).items():
            what = f"{name} in {str(dtype).removeprefix('torch.')}"
            yield compared(f"{what}: value", value, expected[name][0], of_value)
            # The gradient of an L1 is a sign, and rounding turns some.
            limit = of_sign if name == "L1" else of_gradient
            yield compared(f"{what}: gradient", gradient, expected[name][1], limit)


def loss_values(device, dtype, quick):
    """-> {name: (loss, its gradient for all inputs and weights, one vector)}"""
    torch.manual_seed(0)
    B, T, U, V = (2, 20, 5, 30) if quick else (8, 200, 40, 256)
    config = model.Config(layers=1, vocab_size=V, head_dims=(64,), predictor_dropout=0.0)
    student = model.Student(config)
    hidden = torch.randn(B, T, config.dim)
    embeddings = torch.randn(B, T, 64).to(device)
    targets = torch.randint(1, V, (B, U)).to(device)
    lengths = torch.randint(T // 2, T + 1, (B,)).to(device)
    target_lengths = torch.randint(0, U + 1, (B,)).to(device)
    student.to(device)
    hidden = hidden.to(device).requires_grad_()
    labelled = targets, lengths, target_lengths
    inputs = [hidden]
    for part in (student.heads, student.predictor, student.joiner, student.ctc):
        inputs += part.parameters()

    with autocast(device, dtype):
        predicted = student.predict(targets)
        logits = student.joiner(hidden, predicted)
        joiner = student.joiner
        values = {
            "transducer loss of logits": model.transducer_loss(logits, *labelled),
            "transducer loss of the joiner's inputs": model.transducer_loss_from_joiner(
                joiner, hidden, predicted, *labelled
            ),
            "CTC loss": model.ctc_loss(student.ctc(hidden), *labelled).mean(),
            "L1": model.l1_loss(student.heads[0](hidden).float(), embeddings, lengths),
        }
    results = {}
    for name, loss in values.items():
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
        results[name] = (loss, torch.cat([g.flatten() for g in gradients]))
    return results


def stages(args):
    """Both stages for a few updates, in the precision that the device gets"""
    steps = 2 if args.quick else 60
    for name, main, more in (
        ("stage1", pretrain_kd.main, []),
        ("stage2", finetune_rnnt.main, ["--init", args.runs / "stage1"]),
    ):
        arguments = [*training_options(args, name, steps), *more]
        printed, _ = run_script(main, arguments, args.out / f"{name}.log")
        yield falling(f"{name}: loss", losses_of(args.runs / name)[0])
        precision = re.search(r"float32|bfloat16 autocast", printed)[0]
        expected = "bfloat16 autocast" if "device cuda" in printed else "float32"
        yield Row(f"{name}: precision", precision, f"expected {expected}", precision == expected)


def resume(args):
    """A run that SIGTERM interrupts goes on as if nothing had been"""
    steps = 3 if args.quick else 60
    log = args.out / "resume.log"
    weights = {}
    for name in ("whole", "again", "interrupted"):
        run = args.runs / name
        arguments = [*training_options(args, name, steps), "--init", "none"]
        if name == "interrupted":
            process = start(finetune_rnnt.main, arguments, log)
            # The log begins with the first update.
            while process.is_alive() and not (run / "log.jsonl").exists():
                time.sleep(0.01)
            process.terminate()
            process.join()
            yield Row("exit code of the interrupted run", process.exitcode, "expected 143")
        run_script(finetune_rnnt.main, arguments, log)
        state = model.load_checkpoint(run / "last.pt")["raw_model"]
        weights[name] = torch.cat([value.flatten() for value in state.values()])
    whole = weights["whole"]
    # Sums on a GPU depend on the order of its threads, so equal runs come apart.
    noise = compared("two undisturbed runs, their weights", weights["again"], whole, math.inf)
    yield noise._replace(note="relative difference", passed=None)
    limit = 1e-6 + 10 * noise.value
    yield compared(
        "interrupted and undisturbed, their weights", weights["interrupted"], whole, limit
    )


def teachers(args):
    """The demo's teachers: bfloat16 beside float32, and the device beside a CPU"""
    device, _, _ = choose_device(args.device)
    utterances = data.load_utterances(DEMO / "corpus/dev")[: 2 if args.quick else 16]
    waveforms = [data.load_audio(u.path) for u in utterances]
    for name in ("hubert",) if args.quick else ("hubert", "whisper"):
        spec = str(DEMO / "teachers" / name)
        on_cpu = pretrain_kd.Teacher(spec)
        exact = pretrain_kd.Teacher(spec, device)
        narrow = pretrain_kd.Teacher(spec, device, torch.bfloat16)
        expected, _ = on_cpu.embed(waveforms)
        yield compared(f"{name} in float32 (TF32)", exact.embed(waveforms)[0], expected, 3e-3)
        yield compared(f"{name} in bfloat16", narrow.embed(waveforms)[0], expected, 5e-2)
        # What a teacher is was measured when it was loaded; that must not depend on rounding.
        same = str(exact) == str(on_cpu)
        yield Row(f"{name}: what was measured of it", str(exact), "as on a CPU", same)


def writing_student(size, features, lengths, **changes):
    """-> a Student with random weights and a blank that leaves it about as many labels as speech
    has, on a CPU"""
    torch.manual_seed(0)
    student = model.Student(replace(model.PRESETS[size], vocab_size=256, **changes)).eval()
    with torch.no_grad():
        hidden, _ = student.encoder(features, lengths)
        nothing = torch.zeros(len(hidden), 0, dtype=torch.long)
        logits = student.joiner(hidden, student.predict(nothing))
        margin = logits[..., 1:].amax(-1) - logits[..., 0]
        student.joiner.out.bias[0] += margin.quantile(0.9)
    return student


def searches(args):
    """Greedy and beam search on the device and on a CPU, from audio to labels"""
    device, _, _ = choose_device(args.device)
    use_exact_products()
    B = 2 if args.quick else 16
    [batch, *_] = data.Loader(data.load_utterances(DEMO / "corpus/dev")[:B], 1e6).epoch()
    student = writing_student("nano", batch.features, batch.feature_lengths)
    for name, new_search in (
        ("greedy CTC", decode.GreedyCTC),
        ("greedy transducer", partial(decode.GreedyTransducer, max_symbols=1)),
        ("beam 4", partial(BeamTransducer, beam=4, max_symbols=1)),
    ):
        best = []
        for place in (torch.device("cpu"), device):
            search = new_search(student.to(place), B)
            decode.search_batch(student, batch, [search])
            best.append([ranked[0] for ranked in search.results()])
        labels = [[[t.label for t in one.tokens] for one in some] for some in best]
        count = sum(map(len, labels[0]))
        note = f"{count} labels of {B} utterances, on both alike"
        yield Row(f"{name}: labels", labels[0] == labels[1], note, labels[0] == labels[1])
        scores = [torch.tensor([one.score for one in some]) for some in best]
        yield compared(f"{name}: scores", scores[1], scores[0], 1e-4)


def streaming(args):
    """Chunk by chunk beside the masked pass over the whole audio"""
    device, _, _ = choose_device(args.device)
    use_exact_products()
    torch.manual_seed(0)
    waveform = 0.1 * torch.randn((3 if args.quick else 30) * SAMPLE_RATE)
    features = data.log_mel(waveform)[None].to(device)
    lengths = torch.tensor([features.shape[1]], device=device)
    student = model.Student(replace(model.PRESETS["nano"], chunk=16)).to(device).eval()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        with torch.no_grad(), autocast(device, dtype):
            expected, _ = student.encoder(features, lengths)
        chunks = list(encode_chunks(student, waveform.split(5_000), 16, device, dtype))
        yield compared(f"hidden states in {dtype}", torch.cat(chunks, 1), expected, tolerance)


def out_of_memory(args):
    """A batch that the memory does not hold ends the run with one line"""

    def little_memory(arguments):
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(2**30 / total)
        else:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 300 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return finetune_rnnt.main(arguments)

    arguments = [*training_options(args, "memory", 2), "--init", "none", "--batch-seconds", 1e6]
    arguments += ["--data", DEMO / ("corpus/dev" if args.quick else "corpus/train")]
    log = args.out / "out_of_memory.log"
    process = start(little_memory, arguments, log)
    process.join()
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    fine = process.exitcode == 2 and "Traceback" not in "\n".join(lines)
    fine = fine and "out of memory with a batch of" in lines[-1] and "--batch-seconds" in lines[-1]
    yield Row("message", lines[-1], f"exit code {process.exitcode}, expected 2", fine)


# ---------------------------------------- yardsticks


def transducer_losses(args):
    """Forward and backward, beside torchaudio's"""
    from tools import benchmark  # It uses the device as soon as it is imported.

    shape = (2, 20, 6, 30) if args.quick else (32, 400, 81, 500)
    ways = benchmark.loss_ways(*shape)
    for name, way in sorted(ways.items(), key=lambda item: "torchaudio" in item[0]):
        what = f"{name} at (B, T, U+1, V) = {shape}"
        try:
            [seconds] = benchmark.medians({name: way}, 2 if args.quick else 5).values()
            yield Row(f"{what}: time", 1000 * seconds, "ms, forward and backward")
            if benchmark.DEVICE.type == "cuda":
                peak = benchmark.peak_memory(name, shape) / 2**30
                yield Row(f"{what}: memory", peak, "GiB beyond the inputs")
        except RuntimeError as error:  # torchaudio may come without its kernels.
            yield Row(what, "failed", first_line(error))


def random_batch(args, device):
    """-> TranscribedBatch of random features and labels, four labels a second: 396 s of audio"""
    B, seconds = (2, 1) if args.quick else (33, 12)
    frames = 100 * seconds
    labels = 4 * seconds
    batch = data.TranscribedBatch(
        utterances=[],
        features=torch.randn(B, frames, 80),
        feature_lengths=torch.full((B,), frames),
        seconds=float(B * seconds),
        failed=[],
        waveforms=[0.1 * torch.randn(seconds * SAMPLE_RATE) for _ in range(B)],
        embeddings=[],
        targets=torch.randint(1, 256, (B, labels)),
        target_lengths=torch.full((B,), labels),
        weights=torch.ones(B),
    )
    return batch.to(device)


def stage2_step(student, batch):
    """Forward and backward of stage 2."""
    hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
    predicted = student.predict(batch.targets)
    labelled = batch.targets, lengths, batch.target_lengths
    loss = model.transducer_loss_from_joiner(student.joiner, hidden, predicted, *labelled)
    loss = loss + 0.3 * model.ctc_loss(student.ctc(hidden), *labelled).mean()
    student.zero_grad()
    loss.backward()


def utilisation(step, seconds, device):
    """-> text: the share of the device's peak that `step` reaches if it takes so many seconds"""
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    text = f"{flops / 1e12:.3g} TFLOP"
    peak = None
    if device.type == "cuda":
        peak = PEAKS.get(torch.cuda.get_device_name(device))
    if peak is None:
        return f"{text}, utilisation unknown: no peak is known of this device"
    return f"{text}, utilisation {flops / seconds / peak:.1%} of {peak / 1e12:.0f} TFLOP/s"


def training_steps(args):
    """An update with the optimizer, on random features"""
    device, dtype, _ = choose_device(args.device)
    from tools import benchmark

    yield Row("how it is counted", COUNTED, "time: with the optimizer, without data and teachers")
    batch = random_batch(args, device)
    rates = SimpleNamespace(lr=1e-3, encoder_lr=1e-3)
    for size in ("nano",) if args.quick else ("small", "medium", "large"):
        config = model.PRESETS[size]
        taught = model.Student(replace(config, head_dims=(1024,))).to(device)
        frames = batch.features.shape[1] // 4
        target = torch.randn(len(batch.features), frames, 1024, device=device)
        written = model.Student(replace(config, vocab_size=256)).to(device)
        for name, optimizer, step in (
            (
                "stage 1",
                benchmark.new_optimizer(taught),
                partial(benchmark.stage1_step, taught, batch, [target]),
            ),
            (
                "stage 2",
                finetune_rnnt.new_optimizer(rates, written, None),
                partial(stage2_step, written, batch),
            ),
        ):

            def update():
                with autocast(device, dtype):
                    step()
                optimizer.step()

            [seconds] = benchmark.medians({name: update}, 1 if args.quick else 5).values()
            with autocast(device, dtype):
                note = utilisation(step, seconds, device)
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2**30
                torch.cuda.reset_peak_memory_stats()
                note += f"; {peak:.1f} GiB"
            note = f"s of audio per s in batches of {batch.seconds:.0f} s; {note}"
            yield Row(f"{name}, {size}", batch.seconds / seconds, note)


def whisper_config(quick):
    """Of the size of Whisper base, with a decoder that nobody needs"""
    width = 16 if quick else 512
    layers = 2 if quick else 6
    return transformers.WhisperConfig(
        d_model=width,
        decoder_attention_heads=1,
        encoder_layers=layers,
        encoder_attention_heads=max(1, width // 64),
        encoder_ffn_dim=4 * width,
        max_source_positions=200 if quick else 1500,
        decoder_layers=1,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )


def teacher_forward(args):
    """What of a step of distillation is the teacher's: a random one of the size of Whisper base"""
    device, dtype, _ = choose_device(args.device)
    from tools import benchmark

    config = whisper_config(args.quick)
    whisper = transformers.WhisperModel(config)
    window = 4 if args.quick else 30
    whisper.save_pretrained(args.runs / "whisper")
    extractor = transformers.WhisperFeatureExtractor(chunk_length=window)
    extractor.save_pretrained(args.runs / "whisper")
    teacher = pretrain_kd.Teacher(str(args.runs / "whisper"), device, dtype)
    batch = random_batch(args, device)
    size = "nano" if args.quick else "small"
    student = model.Student(replace(model.PRESETS[size], head_dims=tuple(teacher.widths)))
    student.to(device)
    optimizer = benchmark.new_optimizer(student)

    def step():
        with autocast(device, dtype):
            targets = pretrain_kd.teacher_targets([teacher], batch)
            benchmark.stage1_step(student, batch, targets)
        optimizer.step()

    ways = {
        "the teacher": partial(teacher.embed, batch.waveforms),
        "its feature extractor": partial(
            extractor, [w.numpy() for w in batch.waveforms], sampling_rate=SAMPLE_RATE
        ),
        "a step": step,
    }
    seconds = benchmark.medians(ways, 1 if args.quick else 3)
    title = f"{size} student, batches of {batch.seconds:.0f} s"
    yield Row(f"a step of distillation: {title}", 1000 * seconds["a step"], "ms")
    for name in ("the teacher", "its feature extractor"):
        share = seconds[name] / seconds["a step"]
        yield Row(f"share of {name}", share, "of a step; the extractor runs on the CPU")

    encoder = whisper.get_encoder().to(device, dtype).eval().requires_grad_(False)
    for B in (2,) if args.quick else (8, 32, 128):
        features = torch.randn(B, 80, 100 * window, device=device, dtype=dtype)
        forward = partial(encoder, features)
        [seconds] = benchmark.medians({"": forward}, 1 if args.quick else 5).values()
        note = f"s of audio per s; {utilisation(forward, seconds, device)}"
        yield Row(f"the network alone, {B} windows of {window} s", B * window / seconds, note)


def waiting_for_data(args):
    """How much of a step is spent waiting for the processes that read audio?"""
    device, dtype, _ = choose_device(args.device)
    from tools import benchmark

    batch_seconds = 4 if args.quick else 400
    size = "nano" if args.quick else "small"
    student = model.Student(replace(model.PRESETS[size], head_dims=(64,))).to(device)
    optimizer = benchmark.new_optimizer(student)
    folder = DEMO / ("corpus/dev" if args.quick else "corpus/unlabelled")
    utterances = data.load_utterances(args.audio or folder)
    for workers in (1,) if args.quick else (4, 12):
        loader = data.Loader(
            utterances, batch_seconds, augment=True, speeds=(0.9, 1.0, 1.1), workers=workers
        )
        batches = loader.epoch()
        next(batches)  # The processes have started.
        waited = 0.0
        seconds = 0.0
        started = time.perf_counter()
        for _ in range(2 if args.quick else 8):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            seconds += batch.seconds
            batch = batch.to(device)
            frames = (batch.features.shape[1] + 1) // 4
            target = torch.randn(len(batch.features), frames, 64, device=device)
            with autocast(device, dtype):
                benchmark.stage1_step(student, batch, [target])
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        whole = time.perf_counter() - started
        note = f"of a step ({size}, no teacher); {seconds / whole:.0f} s of audio per s"
        yield Row(f"share spent waiting, --workers {workers}", waited / whole, note)


def decoding(args):
    """RTF of the small student with random weights, all utterances at once"""
    device, dtype, _ = choose_device(args.device)
    from tools import benchmark

    batch = random_batch(args, torch.device("cpu"))
    size = "nano" if args.quick else "small"
    student = writing_student(size, batch.features, batch.feature_lengths).to(device)
    batch = batch.to(device)
    with torch.no_grad(), autocast(device, dtype):
        hidden, lengths = student.encoder(batch.features, batch.feature_lengths)
    hidden = hidden.float()

    def search(new_search):
        new_search(student, len(hidden)).advance(hidden, lengths)

    ways = {
        "encoder": partial(decode.search_batch, student, batch, [], dtype),
        "greedy CTC": partial(search, decode.GreedyCTC),
        "greedy transducer": partial(search, partial(decode.GreedyTransducer, max_symbols=1)),
        "beam 4": partial(search, partial(BeamTransducer, beam=4, max_symbols=1)),
    }
    for name, seconds in benchmark.medians(ways, 1 if args.quick else 3).items():
        yield Row(f"RTF of {name}", seconds / batch.seconds, f"{size}, {batch.seconds:.0f} s")


# ---------------------------------------- the scripts as they are used


def demo(args):
    """The three commands of the README"""
    stage1 = args.runs / "demo1"
    stage2 = args.runs / "demo2"
    common = ["--device", args.device]
    commands = {
        pretrain_kd: [*common, "--out", stage1],
        finetune_rnnt: [*common, "--init", stage1, "--out", stage2],
        decode: [*common, "--checkpoint", stage2],
    }
    if args.quick:
        commands[pretrain_kd] = training_options(args, "demo1", 1)
        commands[finetune_rnnt] = [*training_options(args, "demo2", 1), "--init", stage1]
        commands[decode] += ["--data", args.runs / "demo2--dev.jsonl", "--workers", 0]
    for script, arguments in commands.items():
        name = script.__name__
        printed, seconds = run_script(script.main, arguments, args.out / f"{name}.log")
        yield Row(f"{name}.py", seconds, "s, without the imports")
    yield Row("WER", re.search(r"%WER .*", printed)[0])
    yield Row("RTF", re.search(r"RTF .*", printed)[0])


def real_audio(args):
    """A minute of stage 1 on the audio of --audio, taught by the demo's teachers"""
    if not args.audio:
        yield Row("stage 1 on real audio", "left out", "no --audio")
        return
    run = args.runs / "audio"
    steps = 1 if args.quick else 120
    arguments = [*training_options(args, "audio", steps), "--data", args.audio]
    if not args.quick:
        arguments += ["--size", "small", "--batch-seconds", 400, "--workers", 12]
    process = start(pretrain_kd.main, arguments, args.out / "audio.log")
    process.join(75)
    process.terminate()
    process.join()
    some, last = losses_of(run)
    yield falling(f"stage 1: loss until update {last['step']}", some)
    yield Row(
        "stage 1: speed", last["audio_per_second"], "s of audio per s, with data and teachers"
    )
    yield Row("stage 1: memory", last.get("GiB", "unknown"), "GiB")


# ---------------------------------------- the parts, one after the other


class Part(NamedTuple):
    run: Callable  # args -> iterator of Rows
    limit: float  # seconds
    is_test: bool = False


PARTS = [
    Part(machine, 60, is_test=True),
    Part(losses, 40, is_test=True),
    Part(stages, 60, is_test=True),
    Part(resume, 60, is_test=True),
    Part(teachers, 40, is_test=True),
    Part(searches, 40, is_test=True),
    Part(streaming, 30, is_test=True),
    Part(out_of_memory, 40, is_test=True),
    Part(transducer_losses, 40),
    Part(training_steps, 60),
    Part(teacher_forward, 40),
    Part(waiting_for_data, 40),
    Part(decoding, 40),
    Part(demo, 200),
    Part(real_audio, 110),
]


def write_row(args, part, row):
    entry = {"part": part.run.__name__, **row._asdict()}
    with open(args.out / "results.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def work(part, args):
    """What the process of a part does."""
    os.setsid()  # Its limit is that of all processes that it starts.
    redirect_output(args.out / f"{part.run.__name__}.log")
    try:
        for row in part.run(args):
            write_row(args, part, row)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {first_line(error)}"
        write_row(args, part, Row("the rest", "failed", reason, False if part.is_test else None))


def run_part(part, args, limit):
    """Run a part in a process of its own and end it, with all that it started, at its limit."""
    process = FORK.Process(target=work, args=(part, args))
    process.start()
    try:
        process.join(limit)
        if process.is_alive():
            reason = f"ended at its limit of {limit:.0f} s"
        elif process.exitcode:
            reason = f"its process ended with {process.exitcode}"
        else:
            return
        write_row(args, part, Row("the rest", "failed", reason, False if part.is_test else None))
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.join()


def write_table(args):
    """results.jsonl -> table.md. Returns how many tests failed"""
    lines = ["| part | what | value | | test |", "|---|---|---|---|---|"]
    rows = [json.loads(line) for line in open(args.out / "results.jsonl")]
    for row in rows:
        value = row["value"]
        if isinstance(value, float):
            value = f"{value:.3g}"
        verdict = {True: "passed", False: "**failed**", None: ""}[row["passed"]]
        cells = [row["part"].replace("_", " "), row["what"], str(value), row["note"], verdict]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    return sum(row["passed"] is False for row in rows)


def pack(source, folder):
    """The first hours of a source as small files of Ogg Opus, and manifest.jsonl"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    size = 0
    with open(folder / "manifest.jsonl", "w") as manifest:
        for number, u in enumerate(data.load_utterances(source)):
            if seconds + u.seconds > PACKED_SECONDS or size > PACKED_BYTES:
                break
            path = folder / f"{number:05d}.opus"
            waveform = data.load_audio(u.path, u.offset, u.seconds).numpy()
            # About 20 kbit/s
            kind = {"format": "OGG", "subtype": "OPUS", "compression_level": 0.945}
            soundfile.write(path, waveform, SAMPLE_RATE, **kind)
            row = {"audio_filepath": path.name, "text": u.text, "duration": u.seconds}
            manifest.write(json.dumps(row) + "\n")
            seconds += u.seconds
            size += path.stat().st_size
    print(f"{folder}: {seconds / 3600:.2f} h, {size / 1e6:.1f} MB")


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("exp/on_gpu"), help="default %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--minutes", type=positive_float, default=8, help="default %(default)s")
    parser.add_argument("--audio", metavar="SOURCE", help="audio to train on, as --pack leaves it")
    parser.add_argument("--pack", nargs=2, metavar=("SOURCE", "FOLDER"), help="pack audio, no more")
    args = parser.parse_args(argv)
    if args.pack:
        return pack(*args.pack)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tools/benchmark.py takes the best device.
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    for old in (*args.out.glob("*.log"), args.out / "results.jsonl"):
        old.unlink(missing_ok=True)
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        args.runs = Path(folder)  # checkpoints and manifests
        for part in PARTS:
            started = time.monotonic()
            run_part(part, args, max(1.0, min(part.limit, end - started)))
            failed = write_table(args)
            print(f"{part.run.__name__}: {time.monotonic() - started:.1f} s", flush=True)
    print(f"{failed} tests failed; {args.out / 'table.md'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
