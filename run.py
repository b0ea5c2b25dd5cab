"""What every script needs around the method: polite errors, device and precision, processes, run directory, the loop.

Nothing here knows about speech. A reader of the method can skip this page; a reader who wants to know what happens
between
`loss.backward()` and `best.pt` finds it all here, once, for both stages.
"""
import contextlib
import functools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one line that names the cause and the cure."""


def polite(main):
    """Turn a UserError into one line on stderr and exit code 2, Ctrl-C into exit code 130; bugs keep their
    traceback."""
    @functools.wraps(main)
    def wrapper(argv=None):
        script = Path(sys.modules[main.__module__].__file__).name
        try:
            return main(argv) or 0
        except UserError as error:
            print(f"{script}: error: {error}", file=sys.stderr)
            return 2
        except torch.OutOfMemoryError as error:
            print(f"{script}: error: out of GPU memory; lower --batch-seconds ({str(error).splitlines()[0]})",
                  file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{script}: interrupted", file=sys.stderr)
            return 130
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return wrapper


def mix(*numbers):
    """Several integers -> one seed: what is random depends on these numbers and on nothing that came before."""
    return hash(numbers) % 2 ** 63


# ---------------------------------------------------------------------------- device, precision, processes

def choose_device(name=None):
    """-> (device, autocast dtype, one line that says what was chosen and why)."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if name in (None, "auto"):
        name = (f"cuda:{local_rank}" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
        why = "the best that this machine has"
    else:
        why = "as --device says"
        name = f"cuda:{local_rank}" if name == "cuda" else name
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    dtype = inference_dtype(device) if device.type == "cuda" else torch.float32
    precision = "bfloat16 autocast, float32 weights" if dtype == torch.bfloat16 else "float32"
    return device, dtype, f"device {device} ({why}), {precision}, {torch.get_num_threads()} CPU threads"


def inference_dtype(device):
    """What frozen models compute in: bfloat16 where the device multiplies it faster than float32 (many CPUs do not)."""
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def start_processes(device):
    """Join the process group if torchrun started us. -> (rank, number of processes)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def autocast(device, dtype):
    """Mixed precision where the device has it, nothing elsewhere."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


# ---------------------------------------------------------------------------- options that mean the same everywhere

DEMO = Path(__file__).parent / "demo"


def add_training_options(parser, out, steps):
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=steps, help="updates to make (default %(default)s)")
    group.add_argument("--minutes", type=float,
                       help="stop after this many minutes of training instead of after --steps")
    group.add_argument("--batch-seconds", type=float, default=24,
                       help="seconds of audio a batch, padding included, per process; lower it if "
                       "you run out of memory, 300-800 suits a large GPU (default %(default)s)")
    group.add_argument("--accumulate", type=int, default=1,
                       help="batches per update: k times the batch in the memory of one")
    group.add_argument("--warmup", type=float, default=0.1,
                       help="share of the budget in which the learning rate rises (default %(default)s)")
    group.add_argument("--clip", type=float, default=5.0, help="largest gradient norm (default %(default)s)")
    group.add_argument("--eval-every", type=int, help="updates between evaluations (default: a tenth of --steps)")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("machine and files")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1) if torch.cuda.is_available() else 0,
                       help="processes that read audio ahead; on a CPU they would only take cores from the training "
                            "(default here %(default)s)")
    group.add_argument("--out", type=Path, default=Path(out), help="run directory (default %(default)s)")
    group.add_argument("--overwrite", action="store_true", help="start anew even if --out holds a run")


def check_training_options(args):
    """Raise UserError for a budget of nothing and the like, before anything is loaded."""
    for name in ("steps", "minutes", "batch_seconds", "accumulate", "eval_every", "lr", "encoder_lr", "clip",
                 "vocab_size", "min_frequency", "kd_temperature", "essence_top_k", "essence_mass"):
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, found {value}")
    for name in ("workers", "ctc_weight", "freeze_steps", "kd_weight", "kd_shift", "pseudo_weight",
                 "bert_weight", "bert_lambda", "left"):
        value = getattr(args, name, None)
        if value is not None and not value >= 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative, found {value}")
    if not 0 < args.warmup < 1 or not min(args.speeds) > 0:
        raise UserError(f"--warmup must lie between 0 and 1 and --speeds above 0, found {args.warmup} and "
                        f"{args.speeds}")


# These say where and how fast, not what is learned: a run may be continued with others.
FREE_OPTIONS = {"device", "workers", "out", "overwrite"}


class Run:
    """A run directory: `last.pt` to go on from, `best.pt` to use, `log.jsonl`, the command line.

    The same command again continues; a finished run is left alone; other arguments are named and refused.
    """

    def __init__(self, args, rank, world, load_checkpoint, save_checkpoint):
        self.args, self.rank, self.out, self.save_checkpoint = args, rank, args.out, save_checkpoint
        self.settings = {k: [str(x) for x in v] if isinstance(v, list) else str(v) for k, v in vars(args).items()
                         if k not in FREE_OPTIONS}
        self.settings["processes"] = str(world)
        self.state = None
        last = self.out / "last.pt"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for name in ("last.pt", "best.pt", "log.jsonl") if args.overwrite and rank == 0 else ():
                (self.out / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to --out {self.out} ({error.strerror}); choose another folder")
        if dist.is_initialized():
            dist.barrier()
        if last.exists():
            self.state = load_checkpoint(last)
            if "progress" not in self.state:
                raise UserError(f"{last} is not a training state of this script; choose another --out or add "
                                f"--overwrite")
            old = self.state["progress"]["settings"]
            changed = [f"--{k.replace('_', '-')} was {old.get(k)}, is {v}" for k, v in self.settings.items()
                       if old.get(k) != v]
            if changed:
                raise UserError(f"{self.out} holds a run with other arguments ({'; '.join(changed)}); choose another "
                                f"--out or add --overwrite")
        # steps after the checkpoint were lost with the interruption: their log lines go too
        if rank == 0 and not self.finished:
            log, done = self.out / "log.jsonl", self.state["progress"]["step"] if self.state else -1
            lines = [line for line in log.read_text().splitlines() if _step_of(line) <= done] if log.exists() else []
            try:
                log.write_text("".join(line + "\n" for line in lines))
                (self.out / "command.txt").write_text(" ".join(sys.argv) + "\n")
            except OSError as error:
                raise UserError(f"cannot write to --out {self.out} ({error.strerror}); choose another folder")

    @property
    def finished(self):
        return bool(self.state and self.state["progress"]["finished"])

    def log(self, **entry):
        if self.rank == 0:
            # JSON has no NaN
            entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
            try:
                with open(self.out / "log.jsonl", "a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {self.out / 'log.jsonl'} ({error.strerror}); free some space and run the "
                                f"same command again")

    def save(self, name, **entries):
        if self.rank == 0:
            self.save_checkpoint(self.out / name, **entries)


def _step_of(line):
    try:
        return json.loads(line).get("step", 0)
    except json.JSONDecodeError:
        return math.inf  # a half-written last line


# ---------------------------------------------------------------------------- the training loop

def learning_rate(progress, warmup):
    """Factor in [0, 1]: linear warm-up, then cosine to zero; progress is the share of the budget that is spent."""
    if progress < warmup:
        return progress / warmup
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))


def average_gradients(parameters, count):
    """Gradients are sums over utterances or frames: add them over all processes, divide once by the global count.

    Unlike an average of per-process means this is exactly the gradient of one large batch, whatever each process got;
    gradient accumulation is the same sum. One flat all-reduce keeps it to a few lines.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([count.reshape(1).float()] + [g.reshape(-1) for g in gradients]) if dist.is_initialized() else None
    if flat is not None:
        dist.all_reduce(flat)
        count, parts = flat[0], flat[1:].split([g.numel() for g in gradients])
        for g, part in zip(gradients, parts):
            g.copy_(part.view_as(g))
    for g in gradients:
        g.div_(count)
    return count


class StopSignals:
    """SIGTERM and SIGINT ask the loop to save and leave; a second one leaves at once."""

    def __enter__(self):
        self.received, self.old = None, {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            self.old = {s: signal.signal(s, self.handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def handle(self, number, frame):
        if self.received:
            os._exit(128 + number)
        self.received = number

    def __exit__(self, *exception):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def train(run, student, loader, compute_loss, evaluate, optimizer, extra, device, dtype, rank=0, world=1,
          before_step=None, export=dict):
    """Train `student` until the budget of `run.args` is spent. Returns the exit code.

    compute_loss(batch) -> (loss, count, {name: value}): loss is a SUM over `count` things (frames, utterances).
    evaluate(student) -> ({name: value}, score): lower score is better; it sees the averaged weights.
    loader.epoch(number, skip) yields batches, the same ones whenever it is asked again: that makes resuming exact.
    extra: what else a checkpoint of this stage says about itself (config, tokenizer, teachers ...), plain types and
    tensors. export(weights): those that best.pt shall have.
    """
    args, parameters = run.args, [p for p in student.parameters() if p.requires_grad]
    averaged = {k: v.detach().clone() for k, v in student.state_dict().items()}
    progress = {"step": 0, "epoch": 0, "batch": 0, "seconds": 0.0, "best": math.inf, "finished": False,
                "settings": run.settings}
    if run.state:
        student.load_state_dict(run.state["raw_model"])
        averaged = {k: v.to(device) for k, v in run.state["model"].items()}
        optimizer.load_state_dict(run.state["optimizer"])
        progress = dict(run.state["progress"])
        if rank == 0:
            print(f"continuing {run.out} at step {progress['step']}")
    base_rates = [group.setdefault("base_lr", group["lr"]) for group in optimizer.param_groups]

    def save_last():
        run.save("last.pt", model=averaged, raw_model=student.state_dict(), optimizer=optimizer.state_dict(),
                 progress=progress, **extra)

    def evaluation():
        raw = {k: v.detach().clone() for k, v in student.state_dict().items()}
        student.load_state_dict(averaged)
        student.eval()
        with torch.no_grad():
            results, score = evaluate(student)
        student.load_state_dict(raw)
        student.train()
        if rank == 0:
            tqdm.write(f"step {progress['step']}: " + ", ".join(f"{k} {v:.4g}" for k, v in results.items()))
        run.log(step=progress["step"], **results)
        if score < progress["best"] or not (run.out / "best.pt").exists():
            progress["best"] = score
            run.save("best.pt", model=export(averaged), results=results, step=progress["step"], **extra)

    student.train()
    eval_every = args.eval_every or max(1, args.steps // 10)
    bar = tqdm(total=None if args.minutes else args.steps, initial=progress["step"], desc=run.out.name, unit="step",
               disable=rank > 0, dynamic_ncols=True)
    started, before, heard, totals, unreadable = time.time(), progress["seconds"], 0.0, {}, set()
    saved = started
    batches = loader.epoch(progress["epoch"], progress["batch"])
    with StopSignals() as signals:
        while True:
            spent = progress["seconds"] / (60 * args.minutes) if args.minutes else progress["step"] / args.steps
            if spent >= 1:
                break
            factor = max(learning_rate(spent, args.warmup), 1e-3)
            for group, rate in zip(optimizer.param_groups, base_rates):
                group["lr"] = rate * factor
            if before_step:
                before_step(progress["step"])
            # ---- forward and backward, one batch or several; a step's dropout depends on its number alone, so a
            # resumed run is the same run
            torch.manual_seed(mix(args.seed, progress["step"], rank))
            optimizer.zero_grad(set_to_none=True)
            count = torch.zeros((), device=device)
            for _ in range(args.accumulate):
                batch = next(batches, None)
                while batch is None:
                    progress["epoch"], progress["batch"] = progress["epoch"] + 1, 0
                    batches = loader.epoch(progress["epoch"], 0)
                    batch = next(batches, None)
                progress["batch"] += 1
                for problem in sorted(set(batch.failed) - unreadable):
                    tqdm.write(f"skipped: {problem}", file=sys.stderr)
                unreadable.update(batch.failed)
                if not batch.ids:
                    raise UserError(f"none of the training audio can be read any more ({batch.failed[0]})")
                with autocast(device, dtype):
                    loss, n, parts = compute_loss(batch.to(device))
                loss.backward()
                count, heard = count + n, heard + batch.seconds * world
                for name, value in {"loss": loss.detach() / n, **parts}.items():
                    totals.setdefault(name, []).append(value.detach())
            average_gradients(parameters, count)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            if not torch.isfinite(norm):
                tqdm.write(f"step {progress['step']}: the gradient is not finite, update skipped "
                           f"({', '.join(batch.ids[:3])} ...)")
                run.log(step=progress["step"], skipped=batch.ids)
            else:
                optimizer.step()
            progress["step"] += 1
            stop, progress["seconds"] = agree(signals.received, before + time.time() - started, device)
            # ---- averaged weights: an exponential mean whose horizon is a twentieth of the steps so far
            decay = 1 - 1 / (1 + 0.05 * progress["step"])
            with torch.no_grad():
                for name, value in student.state_dict().items():
                    averaged[name].lerp_(value, 1 - decay) if value.is_floating_point() else averaged[name].copy_(value)
            # ---- tell
            bar.update()
            if progress["step"] % 20 == 0 or progress["step"] == 1:
                means = {k: torch.stack(v).mean().item() for k, v in totals.items()}
                speed = heard / (time.time() - started)
                bar.set_postfix_str(f"loss {means['loss']:.3f}, {speed:.0f} s of audio/s")
                run.log(step=progress["step"], lr=base_rates[0] * factor, gradient_norm=norm.item(),
                        audio_per_second=round(speed, 1), **means)
                totals = {}
            if progress["step"] % eval_every == 0:
                evaluation()
            if progress["step"] % eval_every == 0 or time.time() - saved > 300:
                save_last()
                saved = time.time()
            if stop:
                save_last()
                bar.close()
                print(f"stopped by signal {signals.received} at step {progress['step']}; the same command goes on "
                      f"from here")
                return 128 + (signals.received or signal.SIGTERM)
        bar.close()
        if progress["step"] % eval_every:
            evaluation()
        progress["finished"] = True
        save_last()
    if rank == 0:
        print(f"{progress['step']} steps in {progress['seconds'] / 60:.1f} minutes; best score "
              f"{progress['best']:.4g}: {run.out / 'best.pt'}"
              + (f"; {len(unreadable)} files could not be read" if unreadable else ""))
    return 0


def agree(stop, seconds, device):
    """The same answer on every process, the largest: nobody waits for a process that has left, all follow one clock."""
    if not dist.is_initialized():
        return bool(stop), seconds
    both = torch.tensor([float(bool(stop)), seconds], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return bool(both[0]), both[1].item()
