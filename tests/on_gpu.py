"""What has to be seen on a GPU: tests, yardsticks, the demo. 8 minutes of an H100 or H200.

    python tests/on_gpu.py                       # -> exp/on_gpu/results.jsonl and table.md
    python tests/on_gpu.py --device cpu --quick  # is this script sound? tiny sizes, 20 seconds

The machine may lack the soundfile package and a network. Where there is one, fetch the wheels for
its Python, and make 2 h of audio small (Ogg Opus, 29 MB at most):

    pip download -d wheels --no-deps --only-binary=:all: --python-version 3.12 \\
        soundfile cffi pycparser
    python tests/on_gpu.py --pack LibriSpeech/train-clean-100 audio

and there, with both folders in that of the repository:

    pip install --no-index --find-links wheels soundfile
    python tests/on_gpu.py --audio audio

Each part is a process with a time limit. What it prints is in OUT/PART.log.
"""

import itertools
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
from dataclasses import replace
from functools import partial
from pathlib import Path
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
LIMITS = {"demo": 200, "real_audio": 110}  # seconds; of the other parts 50
PACKED_SECONDS = 2 * 3600
PACKED_BYTES = 29e6
FORK = multiprocessing.get_context("fork")  # The imports above are then made once.


class Row(NamedTuple):
    """One line of the results"""

    what: str
    value: float | str
    note: str = ""  # unit, limit or reason
    passed: bool | None = None  # None: a measurement, not a test


def compared(what, found, expected, tolerance):
    """Row of the norm of the difference of two tensors, relative to that of `expected`"""
    expected = expected.detach().cpu().double()
    difference = found.detach().cpu().double() - expected
    error = (difference.norm() / expected.norm()).item()
    return Row(what, error, f"relative error, at most {tolerance:.2g}", error <= tolerance)


def use_exact_products():
    """float32 without TF32, so that what differs from a CPU is an error and no rounding"""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


# ---------------------------------------- scripts, as from the command line


def redirect_output(path):
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def start(main, arguments, log):
    """Run a script's main in a process of its own. This one must not have used torch before."""

    def run():
        redirect_output(log)
        sys.exit(main(list(map(str, arguments))))

    process = FORK.Process(target=run)
    process.start()
    return process


def run_script(main, arguments, log, limit=None):
    """-> what it printed. Stopped by SIGTERM at `limit` seconds; RuntimeError if it fails"""
    process = start(main, arguments, log)
    process.join(limit)
    process.terminate()
    process.join()
    printed = log.read_text(errors="replace")
    if process.exitcode not in (0, 143):
        raise RuntimeError(f"exit code {process.exitcode}: {printed.strip().splitlines()[-1]}")
    return printed


def short_run(args, name, quick_steps=2):
    """-> arguments of a stage for a few updates"""
    steps = quick_steps if args.quick else 60
    options = ["--device", args.device, "--out", args.runs / name, "--steps", steps]
    if args.quick:
        options += ["--data", DEMO / "corpus/dev/145", "--batch-seconds", 6, "--workers", 0]
    return [*options, "--eval-every", steps]


def falling(what, run):
    """-> Row about the losses in a run's log, the last row that has one"""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    # A log has null for what is not finite.
    losses = [math.inf if row["loss"] is None else row["loss"] for row in rows]
    fine = losses[-1] <= losses[0] < math.inf
    text = " to ".join(f"{loss:.4g}" for loss in (losses[0], losses[-1]))
    note = f"until update {rows[-1]['step']}; finite, not rising"
    return Row(what, text, note, fine), rows[-1]


# ---------------------------------------- tests


def machine(args):
    """What the numbers were measured on"""
    device, _, about = choose_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    yield Row(name, about, f"torch {torch.__version__}, {os.cpu_count()} CPU cores")


def losses(args):
    """Values and gradients beside those of a CPU in float32"""
    device, _, _ = choose_device(args.device)
    use_exact_products()
    expected = loss_values(torch.device("cpu"), torch.float32, args.quick)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        for name, (value, gradient) in loss_values(device, dtype, args.quick).items():
            what = f"{name}, {dtype}"
            yield compared(f"{what}: value", value, expected[name][0], tolerance / 5)
            yield compared(f"{what}: gradient", gradient, expected[name][1], tolerance)


def loss_values(device, dtype, quick):
    """-> {name: (loss, its gradient for hidden states and all weights, one vector)}"""
    torch.manual_seed(0)
    B, T, U, V = (2, 20, 5, 30) if quick else (8, 200, 40, 256)
    config = model.Config(layers=0, vocab_size=V, head_dims=(64,), predictor_dropout=0.0)
    student = model.Student(config)
    hidden = torch.randn(B, T, config.dim)
    # Far from all predictions: where an L1 is near 0, rounding turns its gradient, a sign.
    embeddings = (3 * torch.randn(B, T, 64).sign()).to(device)
    targets = torch.randint(1, V, (B, U)).to(device)
    lengths = torch.randint(T // 2, T + 1, (B,)).to(device)
    target_lengths = torch.randint(0, U + 1, (B,)).to(device)
    student.to(device)
    hidden = hidden.to(device).requires_grad_()
    labelled = targets, lengths, target_lengths

    with autocast(device, dtype):
        predicted = student.predict(targets)
        logits = student.joiner(hidden, predicted)
        from_joiner = model.transducer_loss_from_joiner
        values = {
            "transducer loss of logits": model.transducer_loss(logits, *labelled),
            "transducer loss": from_joiner(student.joiner, hidden, predicted, *labelled),
            "CTC loss": model.ctc_loss(student.ctc(hidden), *labelled).mean(),
            "L1": model.l1_loss(student.heads[0](hidden), embeddings, lengths),
        }
    inputs = [hidden, *student.parameters()]
    results = {}
    for name, loss in values.items():
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
        results[name] = (loss, torch.cat([g.flatten() for g in gradients]))
    return results


def stages(args):
    """Both stages for a few updates; SIGTERM interrupts one that goes on as if nothing had been"""
    log = args.out / "stages.log"
    printed = run_script(pretrain_kd.main, [*short_run(args, "stage1"), *args.taught], log)
    yield falling("stage 1: loss", args.runs / "stage1")[0]
    expected = "bfloat16 autocast" if "device cuda" in printed else "float32"
    yield Row("precision", expected, "as printed", f", {expected}, " in printed)

    names = ("stage2", "again", "interrupted")
    for name in names:
        run = args.runs / name
        arguments = [*short_run(args, name, 6), "--init", args.runs / "stage1"]
        if name == "interrupted":
            process = start(finetune_rnnt.main, arguments, log)
            # The log begins with the first update.
            log_file = run / "log.jsonl"
            while process.is_alive() and not (log_file.exists() and log_file.stat().st_size):
                time.sleep(0.01)
            process.terminate()
            process.join()
            code = process.exitcode
            yield Row("stage 2 after SIGTERM: exit code", code, "expected 143", code == 143)
        run_script(finetune_rnnt.main, arguments, log)
    yield falling("stage 2: loss", args.runs / "stage2")[0]

    # Not before the last fork: torch's threads do not survive one.
    weights = []
    for name in names:
        state = model.load_checkpoint(args.runs / name / "last.pt")["raw_model"]
        weights.append(torch.cat([value.flatten() for value in state.values()]))
    # A GPU adds up in any order, so that equal runs come apart.
    whole, again, resumed = weights
    noise = compared("weights of two undisturbed runs", again, whole, 1e-2)
    yield noise
    limit = min(2e-2, 1e-6 + 10 * noise.value)
    yield compared("weights of the interrupted run", resumed, whole, limit)


def teachers(args):
    """The demo's teachers: bfloat16 beside float32, and the device beside a CPU"""
    device, _, _ = choose_device(args.device)
    utterances = data.load_utterances(DEMO / "corpus/dev/145")[: 2 if args.quick else 11]
    waveforms = [data.load_audio(u.path) for u in utterances]
    for name in ("hubert",) if args.quick else ("hubert", "whisper"):
        spec = str(DEMO / "teachers" / name)
        on_cpu = pretrain_kd.Teacher(spec)
        expected, _ = on_cpu.embed(waveforms)
        for dtype, tolerance in ((torch.float32, 3e-3), (torch.bfloat16, 3e-2)):
            teacher = pretrain_kd.Teacher(spec, device, dtype)
            found, _ = teacher.embed(waveforms)
            yield compared(f"{name}, {dtype}: embeddings", found, expected, tolerance)
            # What it is was measured when it was loaded, which rounding must not change.
            yield Row(name, str(teacher), "as on a CPU", str(teacher) == str(on_cpu))


def labels_of(hypothesis):
    """-> text whose words are numbers"""
    return " ".join(str(token.label) for token in hypothesis.tokens)


def searches(args):
    """From features to labels on the device and on a CPU; RTF of each search"""
    device, _, _ = choose_device(args.device)
    from tools import benchmark  # It begins CUDA when it is imported.

    use_exact_products()
    torch.manual_seed(0)
    size = "nano" if args.quick else "small"
    student = model.Student(replace(model.PRESETS[size], vocab_size=256)).eval()
    batch = random_batch(args, torch.device("cpu"))
    B = len(batch.features)
    with torch.no_grad():
        # A blank that leaves such a student about as many labels as speech has.
        hidden, _ = student.encoder(batch.features, batch.feature_lengths)
        logits = student.joiner(hidden, student.predict(torch.zeros(B, 0, dtype=torch.long)))
        margin = logits[..., 1:].amax(-1) - logits[..., 0]
        student.joiner.out.bias[0] += margin.quantile(0.9)

    def best_of(new_search):
        search = new_search(student, B)
        decode.search_batch(student, batch, [search])
        return [ranked[0] for ranked in search.results()]

    for name, new_search in (
        ("greedy CTC", decode.GreedyCTC),
        ("greedy transducer", partial(decode.GreedyTransducer, max_symbols=1)),
        ("beam 4", partial(BeamTransducer, beam=4, max_symbols=1)),
    ):
        student.cpu()
        expected = best_of(new_search)
        student.to(device)
        found = best_of(new_search)
        # Rounding decides between two labels that are equally good; the rest must be the same.
        errors = decode.Errors()
        for ours, theirs in zip(found, expected):
            errors += decode.word_errors(labels_of(theirs), labels_of(ours))
        yield Row(f"{name}: labels", str(errors), "at most 5 %", errors.rate <= 5)
        scores = [torch.tensor([one.score for one in some]) for some in (found, expected)]
        yield compared(f"{name}: scores", *scores, 1e-3)
        [seconds] = benchmark.medians({name: partial(best_of, new_search)}, 1).values()
        note = f"with the encoder ({size}, float32), {B} utterances at once"
        yield Row(f"{name}: RTF", seconds / batch.seconds, note)


def streaming(args):
    """Chunk by chunk beside the masked pass over the whole audio"""
    device, _, _ = choose_device(args.device)
    use_exact_products()
    torch.manual_seed(0)
    waveform = 0.1 * torch.randn((3 if args.quick else 30) * SAMPLE_RATE)
    features = data.log_mel(waveform)[None].to(device)
    lengths = torch.tensor([features.shape[1]], device=device)
    student = model.Student(replace(model.PRESETS["nano"], chunk=16)).to(device).eval()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        with torch.no_grad(), autocast(device, dtype):
            expected, _ = student.encoder(features, lengths)
        chunks = list(encode_chunks(student, waveform.split(5_000), 16, device, dtype))
        yield compared(f"hidden states, {dtype}", torch.cat(chunks, 1), expected, tolerance)


def out_of_memory(args):
    """A batch that the memory does not hold ends the run with one line"""

    def with_little_memory(arguments):
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(2**30 / total)
        else:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 2**30
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return finetune_rnnt.main(arguments)

    corpus = DEMO / ("corpus/dev" if args.quick else "corpus/train")
    arguments = [*short_run(args, "memory"), "--data", corpus, "--batch-seconds", 1e6]
    log = args.out / "memory.log"
    process = start(with_little_memory, [*arguments, "--init", "none", "--size", "medium"], log)
    process.join()
    printed = log.read_text()
    last = printed.strip().splitlines()[-1]
    fine = "out of memory" in last and "lower --batch-seconds" in last
    fine = fine and process.exitcode == 2 and "Traceback" not in printed
    yield Row("the last line", last, f"exit code {process.exitcode}, expected 2", fine)


# ---------------------------------------- yardsticks


def transducer_losses(args):
    """Forward and backward, beside torchaudio's"""
    from tools import benchmark

    shape = (2, 20, 6, 30) if args.quick else (32, 400, 80, 500)
    for name, way in sorted(benchmark.loss_ways(*shape).items(), reverse=True):
        what = f"{name}, (B, T, U+1, V) = {shape}"
        try:
            [seconds] = benchmark.medians({name: way}, 1 if args.quick else 5).values()
            yield Row(f"{what}: time", 1000 * seconds, "ms, forward and backward")
            if benchmark.DEVICE.type == "cuda":
                memory = benchmark.peak_memory(name, shape) / 2**30
                yield Row(f"{what}: memory", memory, "GiB beyond the inputs")
        except (AttributeError, RuntimeError) as error:  # torchaudio may lack its kernels.
            yield Row(what, "failed", first_line(error))


def random_batch(args, device):
    """-> TranscribedBatch of random features, audio and labels, four a second: 396 s"""
    B, seconds = (2, 1) if args.quick else (33, 12)
    batch = data.TranscribedBatch(
        utterances=[],
        features=torch.randn(B, 100 * seconds, 80),
        feature_lengths=torch.full((B,), 100 * seconds),
        seconds=float(B * seconds),
        failed=[],
        waveforms=[0.1 * torch.randn(seconds * SAMPLE_RATE) for _ in range(B)],
        embeddings=[],
        targets=torch.randint(1, 256, (B, 4 * seconds)),
        target_lengths=torch.full((B,), 4 * seconds),
        weights=torch.ones(B),
    )
    return batch.to(device)


def stage1_step(student, batch, device, dtype, teachers=()):
    """Forward and backward of stage 1, without teachers towards random numbers."""
    from tools import benchmark

    with autocast(device, dtype):
        if teachers:
            targets = pretrain_kd.teacher_targets(teachers, batch)
        else:
            B, frames, _ = batch.features.shape
            width = student.heads[0].out_features
            targets = [torch.randn(B, model.encoder_frames(frames), width, device=device)]
        benchmark.stage1_step(student, targets, batch)


def stage2_step(student, batch, device, dtype):
    """Forward and backward of stage 2."""
    from tools import benchmark

    with autocast(device, dtype):
        benchmark.stage2_step(student, batch)


def utilisation(step, seconds, device):
    """-> text: the share of the device's peak that `step` reaches if it takes so many seconds

    Counted are matrix products, convolutions and attention (not the LSTM), forward and backward.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    share = "unknown"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    if card in PEAKS:
        share = f"{flops / seconds / PEAKS[card]:.1%} of {PEAKS[card] / 1e12:.0f} TFLOP/s"
    return f"{flops / 1e12:.3g} TFLOP (FlopCounterMode: no LSTM), utilisation {share}"


def training_steps(args):
    """Updates of both stages on random features"""
    device, dtype, _ = choose_device(args.device)
    from tools import benchmark

    batch = random_batch(args, device)
    for size in ("nano",) if args.quick else ("small", "medium", "large"):
        for stage in (1, 2):
            if stage == 1:
                student = model.Student(replace(model.PRESETS[size], head_dims=(1024,))).to(device)
                step = partial(stage1_step, student, batch, device, dtype)
                optimizer = pretrain_kd.new_optimizer(student, 1e-3)
            else:
                student = model.Student(replace(model.PRESETS[size], vocab_size=256)).to(device)
                step = partial(stage2_step, student, batch, device, dtype)
                defaults = finetune_rnnt.parse([])
                optimizer = finetune_rnnt.new_optimizer(defaults, student, None, "encoder")
            ways = {"step": step, "optimizer": optimizer.step}
            seconds = benchmark.medians(ways, 1 if args.quick else 5)
            note = f"s of audio per s (the optimizer {1000 * seconds['optimizer']:.0f} ms), "
            note += utilisation(step, seconds["step"], device)
            if device.type == "cuda":
                note += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
                torch.cuda.reset_peak_memory_stats()
            speed = batch.seconds / sum(seconds.values())
            yield Row(f"stage {stage}, {size}, {batch.seconds:.0f} s a batch", speed, note)


def teacher_forward(args):
    """What of a step of distillation is the teacher's: a random one of the size of Whisper base"""
    device, dtype, _ = choose_device(args.device)
    from tools import benchmark

    width, layers, window = (64, 2, 4) if args.quick else (512, 6, 30)
    config = transformers.WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        max_source_positions=50 * window,
        decoder_layers=1,
        decoder_attention_heads=1,
    )
    whisper = transformers.WhisperModel(config)
    whisper.save_pretrained(args.runs / "whisper")
    extractor = transformers.WhisperFeatureExtractor(chunk_length=window)
    extractor.save_pretrained(args.runs / "whisper")
    teacher = pretrain_kd.Teacher(str(args.runs / "whisper"), device, dtype)
    batch = random_batch(args, device)
    size = "nano" if args.quick else "small"
    student = model.Student(replace(model.PRESETS[size], head_dims=tuple(teacher.widths)))
    optimizer = pretrain_kd.new_optimizer(student.to(device), 1e-3)
    options = {"sampling_rate": SAMPLE_RATE, "return_tensors": "pt"}
    ways = {
        "the teacher": partial(teacher.embed, batch.waveforms),
        "its feature extractor, on the CPU": partial(
            extractor, [waveform.numpy() for waveform in batch.waveforms], **options
        ),
        "the step": partial(stage1_step, student, batch, device, dtype, [teacher]),
        "the optimizer": optimizer.step,
    }
    seconds = benchmark.medians(ways, 1 if args.quick else 3)
    whole = seconds["the step"] + seconds["the optimizer"]
    for name, own in seconds.items():
        note = f"of {1000 * whole:.0f} ms, {size} student, {batch.seconds:.0f} s a batch"
        yield Row(f"share of {name}", own / whole, note)

    encoder = whisper.get_encoder().to(device, dtype).eval().requires_grad_(False)
    for B in (2,) if args.quick else (8, 32, 128):
        features = torch.randn(B, 80, 100 * window, device=device, dtype=dtype)
        forward = partial(encoder, features)
        [seconds] = benchmark.medians({"": forward}, 1 if args.quick else 5).values()
        note = f"s of audio per s, {utilisation(forward, seconds, device)}"
        yield Row(f"network alone, {B} windows of {window} s", B * window / seconds, note)


def waiting_for_data(args):
    """How much of a step of stage 1 is spent waiting for the processes that read audio?"""
    device, dtype, _ = choose_device(args.device)
    size, batch_seconds, steps = ("nano", 6, 2) if args.quick else ("small", 100, 40)
    student = model.Student(replace(model.PRESETS[size], head_dims=(1024,))).to(device)
    optimizer = pretrain_kd.new_optimizer(student, 1e-3)
    source = DEMO / ("corpus/dev/145" if args.quick else "corpus/unlabelled")
    utterances = data.load_utterances(args.audio or source)
    speeds = (0.9, 1.0, 1.1)
    for workers in (1,) if args.quick else (4, 12):
        loader = data.Loader(
            utterances, batch_seconds, augment=True, speeds=speeds, workers=workers
        )
        batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
        next(batches)  # The processes have started.
        waited = 0.0
        seconds = 0.0
        started = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            seconds += batch.seconds
            stage1_step(student, batch.to(device), device, dtype)
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        whole = time.perf_counter() - started
        note = f"of a step ({size}, no teacher), {seconds / whole:.0f} s of audio per s"
        yield Row(f"share spent waiting, --workers {workers}", waited / whole, note)


# ---------------------------------------- the scripts as they are used


def demo(args):
    """The three commands of the README"""
    device = ["--device", args.device]
    stage1 = args.runs / ("stage1" if args.quick else "demo1")
    stage2 = args.runs / "demo2"
    commands = {
        pretrain_kd: [*device, "--out", stage1],
        finetune_rnnt: [*device, "--init", stage1, "--out", stage2],
        decode: [*device, "--checkpoint", stage2],
    }
    if args.quick:
        # Stage 1 is finished and left alone, unless its part failed.
        commands[pretrain_kd] = [*short_run(args, "stage1"), *args.taught]
        commands[finetune_rnnt] = [*short_run(args, "demo2"), "--init", stage1]
        commands[decode] += ["--data", DEMO / "corpus/dev/145", "--workers", 0]
    for script, arguments in commands.items():
        name = script.__name__
        started = time.monotonic()
        printed = run_script(script.main, arguments, args.out / f"{name}.log")
        yield Row(f"{name}.py", time.monotonic() - started, "s, without its imports")
    yield Row("WER", re.search(r"%WER .*", printed)[0])
    yield Row("RTF", re.search(r"RTF .*", printed)[0], "batches of 120 s, bfloat16 on a GPU")


def real_audio(args):
    """A minute of stage 1 on the audio of --audio, taught by the demo's teachers"""
    if not args.audio:
        yield Row("stage 1", "left out", "no --audio")
        return
    arguments = [*short_run(args, "audio"), "--data", args.audio, *args.taught]
    if not args.quick:
        arguments += ["--size", "small", "--batch-seconds", 400, "--workers", 12, "--steps", 100]
    run_script(pretrain_kd.main, arguments, args.out / "real_audio.log", limit=75)
    row, last = falling("stage 1: loss", args.runs / "audio")
    yield row
    note = f"s of audio per s, with data and teachers; {last.get('GiB', 'unknown')} GiB"
    yield Row("stage 1: speed", last["audio_per_second"], note)


# ---------------------------------------- the parts, one after the other

TESTS = (machine, losses, stages, teachers, searches, streaming, out_of_memory)
YARDSTICKS = (transducer_losses, training_steps, teacher_forward, waiting_for_data)


def write_row(part, args, row):
    entry = {"part": part.__name__, **row._asdict()}
    with open(args.out / "results.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def write_failure(part, args, reason):
    passed = False if part in TESTS else None
    write_row(part, args, Row("the rest of this part", "failed", reason, passed))


def work(part, args):
    """What the process of a part does."""
    os.setsid()  # Its limit is that of all processes that it starts.
    redirect_output(args.out / f"{part.__name__}.log")
    try:
        for row in part(args):
            write_row(part, args, row)
    except Exception as error:
        traceback.print_exc()
        write_failure(part, args, f"{type(error).__name__}: {first_line(error)}")


def run_part(part, args, limit):
    """Run a part in a process of its own and end it, with all that it started, at its limit."""
    process = FORK.Process(target=work, args=(part, args))
    process.start()
    try:
        process.join(limit)
        if process.is_alive():
            write_failure(part, args, f"ended at its limit of {limit:.0f} s")
        elif process.exitcode:
            write_failure(part, args, f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.join()


def write_table(out):
    """results.jsonl -> table.md. -> how many tests have failed"""
    lines = ["| part | what | value | | test |", "|---|---|---|---|---|"]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    verdicts = {True: "passed", False: "**failed**", None: ""}
    for row in rows:
        value = row["value"]
        if isinstance(value, float):
            value = f"{value:.3g}"
        cells = [row["part"], row["what"], str(value), row["note"], verdicts[row["passed"]]]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    return sum(row["passed"] is False for row in rows)


def pack(source, folder):
    """The first hours of a source as small files of Ogg Opus, and manifest.jsonl"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    size = 0
    kind = {"format": "OGG", "subtype": "OPUS", "compression_level": 0.945}  # about 20 kbit/s
    with open(folder / "manifest.jsonl", "w") as manifest:
        for number, u in enumerate(data.load_utterances(source)):
            if seconds + u.seconds > PACKED_SECONDS or size > PACKED_BYTES:
                break
            path = folder / f"{number:05d}.opus"
            waveform = data.load_audio(u.path, u.offset, u.seconds)
            soundfile.write(path, waveform.numpy(), SAMPLE_RATE, **kind)
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
    args.taught = ["--teachers", DEMO / "teachers/whisper"] if args.quick else []
    args.out.mkdir(parents=True, exist_ok=True)
    for old in (*args.out.glob("*.log"), args.out / "results.jsonl"):
        old.unlink(missing_ok=True)
    end = time.monotonic() + 60 * args.minutes
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        args.runs = Path(folder)  # checkpoints
        for part in (*TESTS, *YARDSTICKS, demo, real_audio):
            started = time.monotonic()
            if started < end:
                run_part(part, args, min(LIMITS.get(part.__name__, 50), end - started))
            else:
                write_failure(part, args, "no time was left for it")
            failed = write_table(args.out)
            print(f"{part.__name__}: {time.monotonic() - started:.1f} s", flush=True)
    print(f"{failed} tests failed; {args.out / 'table.md'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
