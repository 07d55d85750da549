"""Device, dtype, seeds, memory and several GPUs: what differs between machines, in one place."""

import hashlib
import os
import random
import resource
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.run import UserError


def pick_device(name="auto"):
    """"auto" is CUDA where there is one, else the CPU. UserError for a device that this machine lacks."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    kind = name.split(":")[0]
    if not available.get(kind, False):
        raise UserError(f"--device {name}: not available here "
                        f"(have: {', '.join(k for k, v in available.items() if v)})")
    if kind == "cuda" and "LOCAL_RANK" in os.environ and ":" not in name:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; {kind} or {kind}:NUMBER") from None
    if kind == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, "
                            "from cuda:0 on")
        # streams, graphs, barriers and memory figures are of the current device
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """Of the frozen backbone. "auto": bfloat16 on a GPU that computes in it (Ampere and later), else float32.
    fp16 is not offered: it overflows."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    choices = {"auto": torch.bfloat16 if native else torch.float32,
               "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in choices:
        raise UserError(f"--dtype {name}: one of {', '.join(choices)}")
    return choices[name]


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def key_seed(*key):
    """A 63-bit seed from any key such as (seed, "align", step); the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def generator(device, *key):
    """A torch.Generator that is a pure function of its key: nothing has to be fast-forwarded on resume."""
    return torch.Generator(device).manual_seed(key_seed(*key))


class Dropout(nn.Dropout):
    """nn.Dropout. On a CPU, which spends most of its time on the random numbers, one of 64 bits decides on four
    places: p is rounded to 1 / 65,536."""

    def forward(self, x):
        if not self.training or not self.p or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
        kept = bits.view(torch.int16)[:x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


def memory_gib():
    """Peak memory so far in GiB: allocated on CUDA, else resident of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024      # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def join(device):
    """(rank, world size) under torchrun, (0, 1) otherwise; device: this process's own. Start: torchrun
    --nproc-per-node N -- script.py ... (without the `--`, torchrun takes our --run for an abbreviation of its
    own)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        on_gpu = device.type == "cuda"
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo",
                                             device_id=device if on_gpu else None)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def alone(what):
    """Raise UserError under torchrun, where several processes would write the same files."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{what} runs in one process; start it without torchrun")


def part():
    """The end of what is done together: from here on every process is on its own."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def average_gradients(parameters):
    """Mean of the gradients over all processes, in the parameters' order; nothing to do for a single one."""
    if not torch.distributed.is_initialized():
        return
    for p in parameters:
        # every process must take part in every sum
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.distributed.all_reduce(p.grad)
        p.grad /= torch.distributed.get_world_size()
