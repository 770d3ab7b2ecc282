"""Which implementation an operator takes for a tensor: Triton's for CUDA tensors, one for CPUs, else plain PyTorch's.

DEEPSKIP_KERNELS=reference, =triton or =next overrides the choice, and `choose` (the config's run.kernels) overrides both.
"next" is Triton's with the launches that no GPU has timed yet in the place of those that one has.
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

BACKENDS = ("auto", "triton", "next", "reference")
# bf16 and the instructions that the kernels are tuned for
OLDEST = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_chosen = "auto"


def choose(name: str) -> None:
    """Sets the implementation for all that follows in this process; raises ValueError for an unknown name."""
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"the kernels' backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    _chosen = name


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Sets the implementation while the block runs."""
    before = _chosen
    choose(name)
    try:
        yield
    finally:
        choose(before)


def implementation(x: Tensor) -> str:
    """Return "triton", "cpu" or "reference" for a tensor; raises ValueError for an unknown name in DEEPSKIP_KERNELS."""
    asked = _requested()
    if asked == "reference" or x.dtype not in DTYPES:
        return "reference"
    if asked in ("triton", "next") or (x.is_cuda and _usable(x.device.index or 0)):
        return "triton"
    # a compiler does better with the plain form than with one in blocks
    return "cpu" if x.device.type == "cpu" and not torch.compiler.is_compiling() else "reference"


def uses_next() -> bool:
    """Return whether Triton's launches are the new ones, that no GPU has timed yet; raises ValueError as `implementation`."""
    return _requested() == "next"


def _requested() -> str:
    name = _chosen if _chosen != "auto" else os.environ.get("DEEPSKIP_KERNELS", "auto")
    if name not in BACKENDS:
        raise ValueError(f"DEEPSKIP_KERNELS is {name!r}; it must be one of {', '.join(BACKENDS)}")
    return name


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's GPU the current one while the block runs: Triton launches on the current device, whatever it is given."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def folds_norms(x: Tensor) -> bool:
    """Says whether a norm of fixed statistics goes into the convolution before it: on CPUs, where no gradient is wanted."""
    return not torch.is_grad_enabled() and implementation(x) == "cpu"


@cache
def _usable(device: int) -> bool:
    # the cache is what makes it one warning
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
    # what Triton itself looks for when it compiles a kernel's launcher
    missing = (
        [] if os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang"))) else ["gcc or clang (CC names another)"]
    )
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder that has none
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    if not Path(sysconfig.get_path("include", scheme), "Python.h").is_file():
        missing.append("Python.h")
    if missing:
        warnings.warn(
            f"Triton needs a C compiler and Python's headers, and there is no {', no '.join(missing)}: the plain PyTorch "
            "operators are used",
            stacklevel=3,
        )
        return False
    return True
