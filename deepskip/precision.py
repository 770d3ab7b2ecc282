"""Choose the number format of a training: fp32, or bf16 autocast."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from deepskip.checkpoint import State

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies numbers of bf16 in hardware; others imitate it, at a tenth of the speed.

    Args:
        device: a GPU or the CPU.
    """
    if device.type == "cuda":
        return True
    # The processor may be able to, and ATEN_CPU_CAPABILITY forbid it.
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def agreed_precision(
    asked: str | None, state: State | None, device: torch.device, world_size: int, warn: Callable[[str], None]
) -> torch.dtype:
    """Return the format in which all ranks train.

    Args:
        asked: run.precision: "float32", "bfloat16", "auto" for bf16 if all ranks multiply it in hardware, or None for bf16
            on GPUs and fp32 on CPUs.
        state: the checkpoint to resume from, whose format stays; None at the start.
        device: where this rank trains.
        world_size: number of ranks; with several, each must call.
        warn: called on rank 0 with a message if its device computes in the format slowly.
    """
    recorded = None if state is None else state["config"]["run"].get("precision")
    if name := recorded or (asked if asked in DTYPES else None):
        is_first = world_size == 1 or dist.get_rank() == 0
        if is_first and DTYPES[name] == torch.bfloat16 and not multiplies_bf16(device):
            began = "the run began in bfloat16" if recorded else "run.precision is bfloat16"
            warn(f"{began}, which this CPU imitates, over ten times slower; a new run with float32 is fast")
        return DTYPES[name]
    if asked is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    able = torch.tensor(int(multiplies_bf16(device)), device=device)
    if world_size > 1:
        dist.all_reduce(able, dist.ReduceOp.MIN)
    return torch.bfloat16 if able.item() else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return a context that computes in bf16 where it is enough, if that is the precision.

    Args:
        device: where the network is.
        precision: torch.float32 or torch.bfloat16.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
