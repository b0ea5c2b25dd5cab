"""What a training loop needs besides its method: a run directory, exact resume, processes, signals.

Nothing here depends on the method. The loops stand in pretrain_kd.py and finetune_rnnt.py:

    run = Run(args)                                   # device, processes, run directory
    with run.start(student, optimizer, about, "frame"):  # new, or where it was interrupted
        for step, batches in run.steps(loader):       # --accumulate of them, of this process
            set_learning_rates(optimizer, run.progress)
            optimizer.zero_grad()
            for batch in batches:
                with run.autocast():
                    loss = ...                        # a SUM over `count` frames or utterances
                loss.backward()
                run.add(batch, count=..., loss=loss, part=...)
            if run.sum_gradients():                   # of all processes; False if not finite
                optimizer.step()
            run.average_weights()
            run.log()
            if run.evaluation_is_due():
                run.keep_best("dev L1", results)      # the least is the best
    return run.finish("python ...")                   # the next command

The first pass through the loop is a rehearsal: it gets the batches that need the most memory and
changes no weight, so memory is short at once or hardly ever.
"""

import contextlib
import copy
import json
import math
import os
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from data import mix
from model import load_checkpoint, save_checkpoint
from tools.command_line import (
    UserError,
    count,
    cure_of,
    first_line,
    positive_float,
    positive_int,
    share,
)
from tools.machine import all_gather, autocast, choose_device, start_processes

WARM_UP = 0.1  # share of the updates in which the learning rate rises
LARGEST_GRADIENT = 5.0  # norm at which gradients are clipped
LOG_EVERY = 20  # updates
SAVE_EVERY = 300  # seconds
PATIENCE = 10  # updates in a row that may go wrong

# These options decide where and how fast a run computes, not what it learns: it may go on with
# others.
FREE_OPTIONS = {"device", "workers", "out", "overwrite", "probe"}


def add_training_options(parser, out, steps, dropout, spec_augment):
    """The options that both stages have, with the defaults of one of them."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--steps", type=positive_int, default=steps, help="updates to make (default %(default)s)"
    )
    group.add_argument(
        "--batch-seconds",
        type=positive_float,
        default=24.0,
        help="seconds of audio a batch, padding included, per process; lower it if you run out of "
        "memory, 300-800 suits a large GPU; longer utterances are left out (default %(default)s)",
    )
    group.add_argument(
        "--accumulate",
        type=positive_int,
        default=1,
        help="batches per update: larger updates in the same memory (default %(default)s)",
    )
    group.add_argument(
        "--dropout",
        type=share,
        default=dropout,
        help="share of the encoder's values that is dropped (default %(default)s)",
    )
    group.add_argument(
        "--spec-augment",
        type=count,
        default=spec_augment,
        metavar="BINS",
        help="SpecAugment whose frequency masks cover fewer than BINS of 80 bins, 0: none, the "
        "paper's: 27. Like dropout it slows learning and pays where few hours are seen often "
        "(default %(default)s)",
    )
    group.add_argument(
        "--eval-every",
        type=positive_int,
        metavar="N",
        help="updates between evaluations (default: ten in all)",
    )
    group.add_argument("--seed", type=int, default=0, help="default %(default)s")
    group = parser.add_argument_group("machine and files")
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default %(default)s)"
    )
    workers = min(4, os.cpu_count() or 1) if torch.cuda.is_available() else 0
    group.add_argument(
        "--workers",
        type=count,
        default=workers,
        help="processes that read audio ahead; without a GPU they only take its cores "
        "(default here %(default)s)",
    )
    group.add_argument(
        "--out", type=Path, default=Path(out), help="run directory (default %(default)s)"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="start anew even if --out holds a run"
    )


def code_checksum():
    """Of all scripts and modules of this repository: a run that goes on with others says so"""
    root = Path(__file__).parents[1]
    checksum = 0
    for pattern in ("*.py", "methods/*.py", "tools/*.py"):
        for path in sorted(root.glob(pattern)):
            checksum = zlib.crc32(path.read_bytes(), checksum)
    return checksum


def learning_rate_factor(progress):
    """Share of the updates that are made -> factor in [0.001, 1]: linear warm-up, cosine to almost
    zero"""
    if progress < WARM_UP:
        factor = progress / WARM_UP
    else:
        rest = (progress - WARM_UP) / (1 - WARM_UP)
        factor = 0.5 + 0.5 * math.cos(math.pi * rest)
    return max(factor, 1e-3)


def set_learning_rates(optimizer, progress):
    """Each group has its peak rate, all follow one schedule."""
    for group in optimizer.param_groups:
        peak = group.setdefault("peak_lr", group["lr"])
        group["lr"] = peak * learning_rate_factor(progress)


@contextlib.contextmanager
def stop_signals():
    """SIGTERM and SIGINT ask the loop to save and leave, a second one leaves at once. -> list of
    numbers"""
    received = []
    times = []

    def handle(number, frame):
        times.append(time.monotonic())
        # Slurm and torchrun may both pass on one and the same signal within a moment.
        if times[-1] > times[0] + 0.3:
            os.write(2, b"\nleaving at once, without saving\n")
            os._exit(128 + number)
        if not received:
            os.write(
                2, b"\nthis update is finished and saved, then the run stops (again: at once)\n"
            )
        received.append(number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Run:
    """A training in a directory: last.pt to go on from, best.pt to use, log.jsonl, the command
    line.

    The same command again goes on where it was interrupted, bit by bit; a finished run is left
    alone; other arguments or other data are named and refused.
    """

    def __init__(self, args):
        self.args = args
        self.out = args.out
        self.device, self.dtype, self.about_device = choose_device(args.device)
        self.rank, self.world = start_processes(self.device)
        self.state = None  # of an interrupted run
        self.finished = False
        self.stop_signal = 0
        self.settings = {}
        for name, value in vars(args).items():
            if name not in FREE_OPTIONS:
                text = "not given" if value is None else str(value)
                if isinstance(value, Path):
                    text = "given"  # where a cache lies may change
                if isinstance(value, list):
                    text = " ".join(map(str, value))
                self.settings[f"--{name.replace('_', '-')}"] = text
        self.settings["the number of processes"] = str(self.world)
        self.open_directory()
        self.print(self.about_device + (f", {self.world} processes" if self.world > 1 else ""))

    # -------------------------------- the directory

    def open_directory(self):
        """Find what an interrupted run left in --out."""
        last = self.out / "last.pt"
        self.overwrite_marker = self.out / "overwrite"
        # torchrun --max-restarts gives the same command again, when --overwrite has done its work.
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        self.overwrite = self.args.overwrite
        if restarted and not self.overwrite_marker.exists():
            self.overwrite = False
        with self.writing():
            self.out.mkdir(parents=True, exist_ok=True)
            if self.overwrite and self.rank == 0:
                self.overwrite_marker.touch()
        position = None
        if last.exists() and not self.overwrite:
            self.state = load_checkpoint(last)
            if "position" not in self.state:
                raise UserError(
                    f"{last} is not the state of a training; choose another --out or add "
                    f"--overwrite"
                )
            self.finished = self.state["position"]["finished"]
            position = self.state["position"]["step"]
        if len(set(all_gather(position))) > 1:
            raise UserError(
                f"--out {self.out} is not the same folder on every machine; choose one that they "
                f"share"
            )
        self.check_settings(self.settings)

    def check_settings(self, settings):
        """Keep what the run is made of, {name: text}; UserError if an interrupted one had other
        settings."""
        self.settings |= settings
        if self.state is None:
            return
        old = self.state["position"]["settings"]
        changed = []
        for name, value in settings.items():
            if old.get(name) != value:
                changed.append(f"{name} was {old.get(name)}, is {value}")
        if changed:
            raise UserError(
                f"{self.out} holds a run with other settings ({'; '.join(changed)}); choose "
                f"another --out or add --overwrite"
            )

    def begin_directory(self):
        """Write here from now on. What --overwrite takes away goes only now that all that a new run
        needs has been loaded."""
        if self.rank > 0:
            return
        with self.writing():
            for half_written in self.out.glob("*.pt.tmp"):
                half_written.unlink()
            if self.overwrite:
                for name in ("last.pt", "best.pt"):
                    (self.out / name).unlink(missing_ok=True)
            self.overwrite_marker.unlink(missing_ok=True)
            self.cut_log()
            (self.out / "command.txt").write_text(" ".join(sys.argv) + "\n")

    def cut_log(self):
        """Updates after the last checkpoint were lost: their lines of the log go, and a
        half-written one.

        In place, which even a full disk allows.
        """
        with open(self.out / "log.jsonl", "a+b") as log:
            log.seek(0)
            size = 0
            while self.state:
                line = log.readline()
                if not line.endswith(b"\n") or json.loads(line)["step"] > self.position["step"]:
                    break
                size += len(line)
            log.truncate(size)

    @contextlib.contextmanager
    def writing(self):
        try:
            yield
        except OSError as error:
            cure = "choose another folder"
            if error.errno == 28:  # ENOSPC
                cure = "free some space and run the same command again, or choose another folder"
            if error.errno == 27:  # EFBIG, a limit on the size of files
                cure = "free some space or raise the limit, and run the same command again"
            raise UserError(f"cannot write to --out {self.out} ({error.strerror}); {cure}")

    def print(self, line):
        """On stdout, beside the progress bar, by the first process only."""
        if self.rank == 0:
            tqdm.write(line)

    def write_log(self, **entry):
        if self.rank > 0:
            return
        for name, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                entry[name] = None  # JSON has no NaN
        with self.writing(), open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self, name, **entries):
        if self.rank == 0:
            save_checkpoint(self.out / name, **entries, **self.about)

    # -------------------------------- start and end

    @contextlib.contextmanager
    def start(self, student, optimizer, about, per, beside=None):
        """Begin, or go on with all that the interrupted run knew.

        per: what a loss is counted by, "frame" or "utterance".
        about: what a checkpoint holds besides weights (config, tokenizer ...), in plain types.
        beside: a module that trains with the student and is not part of best.pt.
        """
        self.student = student
        self.optimizer = optimizer
        self.about = about
        self.per = per
        self.beside = beside
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.averaged = copy.deepcopy(student).eval().requires_grad_(False)
        self.position = {
            "step": 0,
            "epoch": 0,
            "batch": 0,
            "seconds": 0.0,
            "best": math.inf,
            "finished": False,
            "skipped": 0,
            "skipped_in_a_row": 0,
            "sums": {},
            "settings": self.settings,
            "code": code_checksum(),
        }
        if self.state:
            self.resume()
        self.unreadable = set()
        self.latest = []  # of the batches of this update: (batch, loss)
        self.best_name = ""
        self.begin_directory()
        student.train()
        self.bar = tqdm(
            total=self.args.steps,
            initial=self.position["step"],
            unit="step",
            desc=self.out.name,
            disable=self.rank > 0,
            dynamic_ncols=True,
        )
        try:
            with stop_signals() as self.signals, self.bar:
                yield
        except RuntimeError as error:
            if "memory" not in (cure_of(error) or "") or not self.latest:
                raise
            batch, _ = self.latest[-1]
            raise MemoryError(
                f"out of memory with a batch of {len(batch.utterances)} utterances, "
                f"{batch.seconds:.0f} s, features {list(batch.features.shape)}; lower "
                f"--batch-seconds from {self.args.batch_seconds:g}, with more --accumulate the "
                f"update stays as large"
            )

    def resume(self):
        try:
            self.student.load_state_dict(self.state["raw_model"])
            self.averaged.load_state_dict(self.state["model"])
            self.optimizer.load_state_dict(self.state["optimizer"])
            if self.beside:
                self.beside.load_state_dict(self.state["beside"])
        except (RuntimeError, ValueError) as error:  # the code has been edited
            raise UserError(
                f"{self.out} holds a run of another model ({first_line(error)[:100]}); choose "
                f"another --out or add --overwrite"
            )
        code = self.position["code"]
        self.position |= self.state["position"]
        self.print(f"continuing {self.out} at step {self.position['step']}")
        if self.position["code"] != code:
            self.print("the code was edited since this run began; --overwrite starts anew")

    def save_last(self):
        self.saved_at = time.monotonic()
        entries = {"beside": self.beside.state_dict()} if self.beside else {}
        self.save(
            "last.pt",
            model=self.averaged.state_dict(),
            raw_model=self.student.state_dict(),
            optimizer=self.optimizer.state_dict(),
            position=self.position,
            **entries,
        )

    def finish(self, next_command):
        """Print how it went -> exit code: 0, or that of the signal which stopped the run"""
        position = self.position
        if self.stop_signal:
            # The first process may still be saving, and torchrun ends it when another has left.
            all_gather(None)
            self.print(
                f"stopped by signal {self.stop_signal} at step {position['step']}; the same "
                f"command goes on from here"
            )
            return 128 + self.stop_signal
        unreadable = set().union(*all_gather(self.unreadable))
        line = f"{position['step']} steps in {position['seconds'] / 60:.1f} minutes; best "
        line += f"{self.best_name} {position['best']:.4g}: {self.out / 'best.pt'}"
        if unreadable:
            line += f"; {len(unreadable)} files could not be used"
        if position["skipped"]:
            line += f"; {position['skipped']} updates were skipped"
        self.print(line)
        self.print(f"next: {next_command}")
        return 0

    # -------------------------------- the loop

    @property
    def progress(self):
        """Share of the updates that have been made before this one"""
        return max(0, self.position["step"] - 1) / self.args.steps

    def autocast(self):
        return autocast(self.device, self.dtype)

    def steps(self, loader):
        """-> (number of the update, its batches) until --steps are made or a signal comes

        loader.epoch(number, skip) yields batches, the same ones whenever it is asked again: that
        makes resuming exact. loader.worst() gives those that need the most memory.
        """
        position = self.position
        started = time.monotonic()
        seconds_before = position["seconds"]
        self.saved_at = started
        self.audio_seconds = 0.0
        self.started = started

        # The rehearsal, beside the room that the optimizer will take.
        self.rehearsing = True
        room = []
        if not self.optimizer.state:
            room = [torch.empty_like(p) for p in self.parameters for _ in range(2)]
        yield 0, self.rehearsal_batches(loader)
        del room
        self.optimizer.zero_grad()
        self.rehearsing = False

        source = self.endless_batches(loader)
        while position["step"] < self.args.steps and not self.stop_signal:
            position["step"] += 1
            self.sums = {}
            self.latest = []
            yield position["step"], self.batches_of_update(source)
            position["seconds"] = seconds_before + time.monotonic() - started
            position["finished"] = position["step"] == self.args.steps
            overdue = time.monotonic() - self.saved_at > SAVE_EVERY
            if self.evaluation_is_due() or self.stop_signal or overdue:
                self.save_last()
        self.stop_signal = 0 if position["finished"] else self.stop_signal

    def rehearsal_batches(self, loader):
        self.sums = {}
        for batch in loader.worst():
            check_usable(batch)
            self.latest = [(batch, None)]
            yield batch.to(self.device)

    def endless_batches(self, loader):
        """Batch after batch from where the run stands"""
        position = self.position
        while True:
            for batch in loader.epoch(position["epoch"], position["batch"]):
                position["batch"] += 1
                self.name_unreadable(batch)
                check_usable(batch)
                yield batch
            position["epoch"] += 1
            position["batch"] = 0

    def name_unreadable(self, batch):
        """Name each file of a batch that cannot be read, once."""
        for problem in sorted(set(batch.failed) - self.unreadable):
            tqdm.write(f"skipped: {problem}", file=sys.stderr)
        self.unreadable.update(batch.failed)

    def batches_of_update(self, source):
        for k in range(self.args.accumulate):
            batch = next(source)
            self.latest.append((batch, None))
            # What is random in an update depends on its number and the batch's place in it, not on
            # what ran before or where. Only now: to draw a batch takes numbers from this
            # generator, too.
            place = k * self.world + self.rank
            torch.manual_seed(mix(self.args.seed, self.position["step"] - 1, place))
            yield batch.to(self.device)

    def add(self, batch, count, loss, **parts):
        """Add up what a batch contributes to an update: all are sums over `count` things."""
        self.latest[-1] = (batch, loss.detach())
        for name, value in {"count": count, "loss": loss, **parts}.items():
            # float32 whatever autocast says: in bfloat16 321 utterances would be 320.
            value = torch.as_tensor(value, device=self.device).detach().float()
            self.sums[name] = self.sums.get(name, 0) + value

    def sum_gradients(self):
        """Add up the gradients of all processes, divide by the count, clip -> whether they are
        finite

        Losses are sums, so this is exactly the gradient of one large batch, whatever each process
        had; an average of the processes' means would not be. Accumulated batches are the same sum.
        """
        if self.rehearsing:
            return False
        # The signal travels with the sums: all processes stop after the same update.
        sums = torch.stack(list(self.sums.values()))
        sums = torch.cat([sums, sums.new_tensor([max(self.signals, default=0)])])
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if dist.is_initialized():
            flat = parameters_to_vector([sums, *gradients])
            dist.all_reduce(flat)
            vector_to_parameters(flat, [sums, *gradients])
        for gradient in gradients:
            gradient.div_(sums[0])
        norm = clip_grad_norm_(self.parameters, LARGEST_GRADIENT)
        *values, stop, norm = torch.cat([sums, norm[None]]).tolist()
        if stop:
            # A process that got no signal itself stops with the others.
            self.stop_signal = max(self.signals, default=signal.SIGTERM)
        self.means = {"gradient_norm": norm}
        for name, value in zip(self.sums, values):
            if name != "count":
                self.means[name] = value / values[0]
        if math.isfinite(self.means["loss"]) and math.isfinite(norm):
            self.position["skipped_in_a_row"] = 0
            return True
        self.means = {}
        self.skip_update()
        return False

    def skip_update(self):
        """Name the utterances of an update that is not finite; give up after PATIENCE of them in a
        row."""
        position = self.position
        position["skipped"] += 1
        position["skipped_in_a_row"] += 1
        mine = []
        for batch, loss in self.latest:
            mine.append((bool(loss.isfinite()), [u.id for u in batch.utterances]))
        everywhere = sum(all_gather(mine), [])
        guilty = [ids for finite, ids in everywhere if not finite]
        if not guilty:
            # Some gradient is not finite: any of the utterances may be the cause.
            guilty = [ids for _, ids in everywhere]
        ids = sum(guilty, [])
        names = ", ".join(ids[:5]) + " ..." * (len(ids) > 5)
        what = f"loss or gradient is not finite ({names})"
        self.write_log(step=position["step"], skipped=ids)
        if self.rank == 0:
            tqdm.write(f"step {position['step']}: update skipped, {what}", file=sys.stderr)
        if position["skipped_in_a_row"] == PATIENCE:
            raise UserError(
                f"{PATIENCE} updates in a row skipped, {what}; last.pt and best.pt are intact: "
                f"look at these utterances or start anew with a lower --lr"
            )

    @torch.no_grad()
    def average_weights(self):
        """An exponential mean of the weights, whose horizon is a twentieth of the updates so
        far."""
        if self.rehearsing:
            return
        weight = 1 / (1 + 0.05 * self.position["step"])
        averages = self.averaged.state_dict().values()
        for average, value in zip(averages, self.student.state_dict().values()):
            if value.is_floating_point():
                average.lerp_(value, weight)
            else:
                average.copy_(value)  # counters, such as BatchNorm has

    def log(self):
        """Every LOG_EVERY updates the means since the last time, on the bar and in the log."""
        if self.rehearsing:
            return
        position = self.position
        self.audio_seconds += self.world * sum(batch.seconds for batch, _ in self.latest)
        self.bar.update(position["step"] - self.bar.n)
        sums = position["sums"]
        if self.means:  # the update was not skipped
            for name, value in {"updates": 1, **self.means}.items():
                sums[name] = sums.get(name, 0) + value
        if (position["step"] % LOG_EVERY and position["step"] != 1) or not sums:
            return
        updates = sums.pop("updates")
        means = {name: value / updates for name, value in sums.items()}
        position["sums"] = {}
        speed = self.audio_seconds / (time.monotonic() - self.started)
        rate = self.optimizer.param_groups[0]["lr"]
        text = f"loss {means['loss']:.3f} per {self.per}, lr {rate:.1e}, {speed:.0f} s of audio/s"
        memory = {}
        if self.device.type == "cuda":
            memory["GiB"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
            text += f", {memory['GiB']} GiB"
        self.bar.set_postfix_str(text)
        self.write_log(
            step=position["step"], lr=rate, **means, audio_per_second=round(speed, 1), **memory
        )

    def evaluation_is_due(self):
        """Every --eval-every updates, else ten times in all; and at the end."""
        if self.rehearsing:
            return False
        step = self.position["step"]
        steps = self.args.steps
        if step == steps:
            return True
        if self.args.eval_every:
            return step % self.args.eval_every == 0
        return 10 * step // steps > 10 * (step - 1) // steps

    def keep_best(self, name, results):
        """Print and log an evaluation of the averaged weights; best.pt gets those with the least
        results[name]."""
        step = self.position["step"]
        self.best_name = name
        texts = [f"{key} {value:.4g}" for key, value in results.items()]
        self.print(f"step {step}: {', '.join(texts)}")
        self.write_log(step=step, **results)
        score = results[name]
        if score <= self.position["best"] or not (self.out / "best.pt").exists():
            self.position["best"] = score if math.isfinite(score) else math.inf
            self.save("best.pt", model=self.averaged.state_dict(), results=results, step=step)


def check_usable(batch):
    if not batch.utterances:
        raise UserError(f"none of the training audio can be used any more ({batch.failed[0]})")
