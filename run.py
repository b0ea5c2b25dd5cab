"""What every script needs around the method: polite errors, device and precision, processes, options, run directory.

Nothing here knows about speech; the loop that trains in a run directory is training.py.
"""
import contextlib
import datetime
import functools
import json
import math
import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one line that names the cause and the cure."""


FAULTS = {  # words of a RuntimeError -> what a user can do; any other is a bug
    "out of memory|can't allocate memory|not enough memory": "out of memory, lower --batch-seconds",
    "gloo|NCCL": "another process of this run has ended, its own message says why",
    "DataLoader worker": "a process that reads audio was killed, lower --workers",
}


def cure(error):
    return next((cure for words, cure in FAULTS.items() if re.search(words, str(error))), None)


def polite(main):
    """What a user can mend becomes one line on stderr and exit code 2, Ctrl-C exit code 130; bugs keep their
    traceback."""
    @functools.wraps(main)
    def wrapper(argv=None):
        script = Path(sys.modules[main.__module__].__file__).name
        try:
            code = main(argv) or 0
            if dist.is_initialized():  # (not after an error: the others would be waited for, who wait for this one)
                dist.destroy_process_group()
            return code
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            what = " ".join(str(error).splitlines())
            if isinstance(error, OSError):
                what += "; mend that and give the same command again"
            if isinstance(error, RuntimeError):
                if not cure(error):
                    raise
                what = f"{cure(error)} ({what[:200]})"
            print(f"{script}: error: {what}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{script}: interrupted", file=sys.stderr)
            return 130
    return wrapper


def mix(*numbers):
    """Several integers -> one seed: what is random depends on these numbers and on nothing that came before."""
    return hash(numbers) % 2 ** 63


# ---------------------------------------------------------------------------- device, precision, processes

def choose_device(name=None):
    """-> (device, autocast dtype, one line that says what was chosen and why)."""
    why = "as --device says"
    if name in (None, "auto"):
        name, why = "mps" if torch.backends.mps.is_available() else "cpu", "the best that this machine has"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
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


@functools.cache  # the optimizer asks for every matrix of every update
def inference_dtype(device):
    """What frozen models compute in: bfloat16 where the device multiplies it faster than float32 (many CPUs do not)."""
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def start_processes(device):
    """Join the process group if torchrun started us. -> (rank, number of processes)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        store, rank, world = next(rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # over a restart torchrun keeps its store, and in it the addresses of the dead
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                timeout=datetime.timedelta(hours=1))  # one may fill its part of a cache much faster
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def everyone(value):
    """-> the values of all processes, as a list that is the same on each."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def autocast(device, dtype):
    """Mixed precision where the device has it, nothing elsewhere."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


# ---------------------------------------------------------------------------- options that mean the same everywhere

DEMO = Path(__file__).parent / "demo"


def add_training_options(parser, out, steps, regularised):
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=steps, help="updates to make (default %(default)s)")
    group.add_argument("--minutes", type=float, help="train for so long instead of for --steps")
    group.add_argument("--batch-seconds", type=seconds_or_auto, default=24.0,
                       help="seconds of audio a batch, padding included, per process; lower it if you run out of "
                       "memory, 300-800 suits a large GPU; longer utterances are left out; auto: the most that "
                       "fits, on a CPU 36 (default %(default)s)")
    group.add_argument("--accumulate", type=int, default=1, help="batches per update: larger ones in the same memory")
    group.add_argument("--warmup", type=float, default=0.1,
                       help="share of the budget in which the learning rate rises (default %(default)s)")
    group.add_argument("--clip", type=float, default=5.0, help="largest gradient norm (default %(default)s)")
    group.add_argument("--dropout", type=float, default=0.1 * regularised,
                       help="share of the encoder's values that is dropped (default %(default)s)")
    group.add_argument("--spec-augment", type=int, default=4 * regularised, metavar="BINS",
                       help="SpecAugment whose frequency masks cover fewer than BINS of 80 bins (the paper's: 27; 0: "
                       "no masks at all). Both slow learning and pay where the model could learn its audio by heart: "
                       "many epochs, few hours (default %(default)s)")
    group.add_argument("--eval-every", type=int, help="updates between evaluations (default: ten in all)")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("machine and files")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1) if torch.cuda.is_available() else 0,
                       help="processes that read audio ahead; on a CPU they only take its cores (default here "
                       "%(default)s)")
    group.add_argument("--out", type=Path, default=Path(out), help="run directory (default %(default)s)")
    group.add_argument("--overwrite", action="store_true", help="start anew even if --out holds a run")


class Auto(float):
    """--batch-seconds auto: this many, until a GPU has tried whether more fit."""
    __str__ = lambda self: "auto"


def seconds_or_auto(text):
    return Auto(36) if text == "auto" else float(text)


def check_training_options(args):
    """Raise UserError for a budget of nothing and the like, before anything is loaded."""
    above = ("steps minutes batch_seconds accumulate eval_every lr encoder_lr clip vocab_size min_frequency "
             "kd_temperature essence_top_k essence_mass").split()
    for name in above + ("workers ctc_weight freeze_steps kd_weight kd_shift pseudo_weight bert_weight bert_lambda "
                         "left spec_augment").split():
        value = getattr(args, name, None)
        if value is not None and not (0 < value < math.inf or value == 0 and name not in above):
            raise UserError(f"--{name.replace('_', '-')} must {'be above 0' if name in above else 'not be negative'}, "
                            f"found {value}")
    if not 0 < args.warmup < 1 or not 0 <= args.dropout < 1 or not min(args.speeds) > 0:
        raise UserError(f"--warmup and --dropout must lie between 0 and 1, --speeds above 0; found {args.warmup}, "
                        f"{args.dropout}, {args.speeds}")


# These say where and how fast, not what is learned: a run may be continued with others.
FREE_OPTIONS = {"device", "workers", "out", "overwrite"}


class Run:
    """A run directory: `last.pt` to go on from, `best.pt` to use, `log.jsonl`, the command line.

    The same command again continues; a finished run is left alone; other arguments are named and refused.
    """

    def __init__(self, args, rank, world, load_checkpoint, save_checkpoint):
        self.args, self.rank, self.out, self.save_checkpoint = args, rank, args.out, save_checkpoint
        self.settings = {k: [str(x) for x in v] if isinstance(v, list) else str(v) for k, v in vars(args).items()
                         if k not in FREE_OPTIONS} | {"processes": str(world)}
        self.state, self.step, self.finished, last = None, 0, False, self.out / "last.pt"
        # torchrun --max-restarts gives the same command again, and there --overwrite has done its work
        restarted, self.asked = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", self.out / "overwrite"
        self.overwrite = args.overwrite and (not restarted or self.asked.exists())
        with self.writing():
            self.out.mkdir(parents=True, exist_ok=True)
            if self.overwrite and rank == 0:
                self.asked.touch()
        if last.exists() and not self.overwrite:
            self.state = load_checkpoint(last)
            if "progress" not in self.state:
                raise UserError(f"{last} is not a training state; choose another --out or add --overwrite")
            self.step, self.finished = (self.state["progress"][key] for key in ("step", "finished"))
            old = self.state["progress"]["settings"]
            changed = [f"--{k.replace('_', '-')} was {old.get(k)}, is {v}" for k, v in self.settings.items()
                       if old.get(k) != v]
            if changed:
                raise UserError(f"{self.out} holds a run with other arguments ({'; '.join(changed)}); choose another "
                                f"--out or add --overwrite")
        if len(set(everyone((self.step, self.finished)))) > 1:
            raise UserError(f"--out {self.out} is not the same folder on every machine; choose one that they share")

    def begin(self):
        """Write here from now on. What --overwrite takes away goes only when all that a new run needs has been loaded.
        """
        if self.rank == 0:
            with self.writing():
                for half_written in self.out.glob("*.pt.tmp"):
                    half_written.unlink()
                for name in ("last.pt", "best.pt") if self.overwrite else ():
                    (self.out / name).unlink(missing_ok=True)
                self.asked.unlink(missing_ok=True)
                self.cut_log()
                (self.out / "command.txt").write_text(" ".join(sys.argv) + "\n")

    def cut_log(self):
        """Steps after the checkpoint were lost with the interruption: their log lines go too, and a half-written one.
        In place, which even a full disk allows."""
        with open(self.out / "log.jsonl", "a+b") as log:
            size = log.seek(0)
            while self.state and (line := log.readline()).endswith(b"\n") and json.loads(line)["step"] <= self.step:
                size += len(line)
            log.truncate(size)

    @contextlib.contextmanager
    def writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to --out {self.out} ({error.strerror}); free some space and run the same "
                            f"command again, or choose another folder")

    def log(self, **entry):
        if self.rank == 0:
            # JSON has no NaN
            entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
            with self.writing(), open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
