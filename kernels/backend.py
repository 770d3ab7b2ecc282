"""Choose an operator's implementation: Triton on CUDA tensors, a blocked one on CPUs, else plain PyTorch.

DEEPSKIP_KERNELS=reference, =triton or =next overrides the choice, and `choose` (the config's run.kernels) overrides both.
"next" is Triton with new launches instead of the established ones; "auto" takes them on a GPU where a stored timing says that
they are faster (`timings`).
"""

import os
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deepskip.kernels import timings

BACKENDS = ("auto", "triton", "next", "reference")
# Oldest compute capability with bf16 and the instructions that the kernels are tuned for.
OLDEST = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_chosen = "auto"


def choose(name: str) -> None:
    """Set the backend for the rest of this process.

    Args:
        name: one of BACKENDS.

    Raises:
        ValueError: if the name is not one of BACKENDS.
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"the kernel backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    _chosen = name


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Set the backend while the block runs.

    Args:
        name: one of BACKENDS.

    Raises:
        ValueError: if the name is not one of BACKENDS.
    """
    before = _chosen
    choose(name)
    try:
        yield
    finally:
        choose(before)


def implementation(x: Tensor) -> str:
    """Return which implementation a tensor gets: "triton", "cpu" or "reference".

    Args:
        x: tensor of any shape (*,).

    Raises:
        ValueError: if DEEPSKIP_KERNELS is not one of BACKENDS.
    """
    asked = _requested()
    if asked == "reference" or x.dtype not in DTYPES:
        return "reference"
    if asked in ("triton", "next") or (x.is_cuda and _usable(x.device.index or 0)):
        return "triton"
    # torch.compile optimizes the plain implementation better than the blocked one.
    return "cpu" if x.device.type == "cpu" and not torch.compiler.is_compiling() else "reference"


def uses_next(operator: str, x: Tensor) -> bool:
    """Return whether Triton uses the new launches: if they are asked for, or were timed as faster on the tensor's GPU.

    Args:
        operator: name of the operator and its channels (`timings`).
        x: its input (N, C, H, W).

    Raises:
        ValueError: if DEEPSKIP_KERNELS is not one of BACKENDS.
    """
    asked = _requested()
    if asked != "auto" or not x.is_cuda:
        return asked == "next"
    return timings.next_wins(_gpu_name(x.device.index or 0), operator, x.numel() // x.shape[1])


@cache
def _gpu_name(device: int) -> str:
    return torch.cuda.get_device_name(device)


def _requested() -> str:
    name = _chosen if _chosen != "auto" else os.environ.get("DEEPSKIP_KERNELS", "auto")
    if name not in BACKENDS:
        raise ValueError(f"DEEPSKIP_KERNELS is {name!r}; it must be one of {', '.join(BACKENDS)}")
    return name


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's GPU the current device while the block runs.

    Triton launches on the current device, whatever device its arguments are on.

    Args:
        x: tensor of any shape (*,).
    """
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def folds_norms(x: Tensor) -> bool:
    """Return whether to fold batch norm with fixed statistics into the preceding convolution.

    This pays on CPUs, and only if no gradient is needed.

    Args:
        x: the convolution's input, of any shape (*,).
    """
    return not torch.is_grad_enabled() and implementation(x) == "cpu"


@cache
def _usable(device: int) -> bool:
    # The cache limits this to one warning for each device.
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, DeepSkip's "
            f"kernels need {OLDEST[0]}.{OLDEST[1]}: the plain PyTorch operators are used",
            stacklevel=3,
        )
        return False
    try:
        import triton  # noqa: F401
    except ImportError as error:
        warnings.warn(f"Triton cannot be imported ({error}): the plain PyTorch operators are used", stacklevel=3)
        return False
    # Triton looks for these when it compiles a kernel's launcher.
    missing = (
        [] if os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang"))) else ["gcc or clang (CC names another)"]
    )
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder without headers.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    if not Path(sysconfig.get_path("include", scheme), "Python.h").is_file():
        missing.append("Python.h")
    if missing:
        warnings.warn(
            f"Triton needs a C compiler and Python's headers, and cannot find {', '.join(missing)}: the plain PyTorch "
            "operators are used",
            stacklevel=3,
        )
        return False
    return True
