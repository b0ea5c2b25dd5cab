"""What the scripts need of the machine: a device, its precision, and the processes of torchrun.

Two machines of eight GPUs: the same line on both, HOST1 being the first, --out and --cache on a
disk that they share (untried by us):

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 2 --nproc_per_node 8 --max-restarts 3 \\
        --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint HOST1:29500 finetune_rnnt.py ...

Slurm: that line behind `srun` with `--ntasks-per-node 1`, `#SBATCH --signal=TERM@120 --requeue`,
and for HOST1 `$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)`.
"""

import contextlib
import datetime
import functools
import os

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tools.command_line import UserError, first_line


def choose_device(name="auto"):
    """-> (device, dtype of autocast, one line that says what was chosen and why)"""
    reason = "as --device says"
    if name == "auto":
        name = "cpu"
        reason = "the best that this machine has"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    if name == "cuda":
        # torchrun tells each process which of the machine's GPUs is its own.
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({first_line(error)}); try --device cpu"
        )
    dtype = torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        dtype = fast_dtype(device)
    precision = "float32"
    if dtype == torch.bfloat16:
        precision = "bfloat16 autocast, float32 weights"
    threads = torch.get_num_threads()
    threads = f"{threads} CPU thread{'s' * (threads != 1)}"
    return device, dtype, f"device {device} ({reason}), {precision}, {threads}"


@functools.cache  # The optimizer asks for every matrix of every update.
def fast_dtype(device):
    """What autocast, frozen models and Muon compute in: bfloat16 where the device multiplies it
    faster than float32.

    Many CPUs only emulate it, which is slower.
    """
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def autocast(device, dtype):
    """Mixed precision where dtype is narrower than float32, nothing elsewhere."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def start_processes(device):
    """Join the process group if torchrun started this process. -> (rank, number of processes)"""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        store, rank, world = next(rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps its store over a restart, and in it the addresses of dead processes.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            # Some process may fill its part of a cache much faster than another.
            timeout=datetime.timedelta(hours=1),
        )
    return dist.get_rank(), world


def all_gather(value):
    """-> the values of all processes, as a list that is the same on each"""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
