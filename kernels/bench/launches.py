"""Find what a call starts on a GPU, without one: Triton's launches, built as on a GPU, and all other operators.

The call runs on tensors of torch's meta device. Triton's own launchers build its kernels, with the types and specialisations (a
constant for 1, divisible by 16) of a real launch, but do not start them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from deepskip.kernels import backend
from deepskip.kernels.bench.traffic import Moved, Traffic, as_on_gpu

# Offset of the kernel's parameters in the constant bank.
_PARAMETERS = {80: 0x160, 90: 0x210}
_BANK_WORDS = 4096


class TritonLaunch(NamedTuple):
    """A kernel as it would be launched.

    Attributes:
        build: the build.
        grid: programs along each axis.
        arguments: type and value of each argument, without constants.
        named: arguments by name.
    """

    build: Any
    grid: tuple[int, int, int]
    arguments: list[tuple[str, Any]]
    named: dict[str, Any]

    def address(self, x: Tensor) -> int:
        """Return the address of a tensor argument: each storage is far from the others, and none is at 0.

        Args:
            x: argument of any shape (*,).
        """
        storages = list(dict.fromkeys(y.untyped_storage()._cdata for kind, y in self.arguments if kind.startswith("*")))
        place = storages.index(x.untyped_storage()._cdata)
        return (place + 1 << 40) + int(x.storage_offset()) * x.element_size()

    def constants(self, architecture: int) -> np.ndarray:
        """Return the launch's constant bank as 32-bit words."""
        bank = np.zeros(4 * _BANK_WORDS, np.uint8)
        header = [32 * self.build.metadata.num_warps, 1, 1, *self.grid]
        bank[:24] = np.array(header, np.uint32).view(np.uint8)
        at = _PARAMETERS[architecture]
        for kind, value in self.arguments:
            if kind.startswith("*"):
                raw = np.array([self.address(value)], np.uint64)
            else:
                raw = np.array([value], {"i32": np.int32, "i64": np.int64, "fp32": np.float32}[kind])
            at += -at % raw.itemsize
            bank[at : at + raw.itemsize] = raw.view(np.uint8)
            at += raw.itemsize
        return bank.view(np.uint32)


class Started(NamedTuple):
    """One launch of a call.

    Attributes:
        moved: bytes that it moves.
        launch: the Triton launch, or None for a library's.
        arguments: arguments of the operator.
    """

    moved: Moved
    launch: TritonLaunch | None
    arguments: tuple[Any, ...]


class _Driver:
    """A stand-in for CUDA's driver in Triton's launchers."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def _flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(kind, tuple):
        for one, other in zip(kind, value, strict=True):
            yield from _flat(one, other)
    elif kind != "constexpr":
        yield kind, value


def _between(launch: TritonLaunch, known: set[int], made: set[int]) -> tuple[int, int]:
    """Count the bytes that a launch reads and writes of tensors that only its operator sees.

    `made` collects those that it writes first.
    """
    read = written = 0
    for x in {
        value.untyped_storage()._cdata: value for kind, value in launch.arguments if kind.startswith("*")
    }.values():
        at, size = x.untyped_storage()._cdata, x.numel() * x.element_size()
        if at in made:
            read += size
        elif at not in known:
            written += size
            made.add(at)
    return read, written


class Launches(Traffic):
    """Collect a call's launches while the mode is active; for meta tensors.

    Attributes:
        started: a row for each launch, in order.
    """

    def __init__(self, architecture: int) -> None:
        super().__init__()
        self.architecture = architecture
        self.started: list[Started] = []
        self._building: list[TritonLaunch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mine = OPDEFS.get(func._schema.name) if func.namespace == "deepskip" else None
        before = len(self.moved)
        if mine is None:
            result = as_on_gpu(func, args, func(*args, **kwargs))
            self.note(func, args, kwargs, result)
            self.started += [Started(row, None, args) for row in self.moved[before:]]
            return result
        self._building = []
        # Include the operators inside: a copy that makes an input contiguous is a separate launch.
        with self:
            result = mine._init_fn(*args, **kwargs)
        before = len(self.moved)
        self.note(func, args, kwargs, result)
        told = self.moved[before:]
        # Most operators have one row for all launches, without tensors that one launch passes to the next.
        whole = len(told) == 1
        told += [told[0]._replace(read=0, written=0)] * (len(self._building) - 1 if whole else 0)
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
        made: set[int] = set()
        for row, launch in zip(told, self._building, strict=True):
            read, written = _between(launch, known, made) if whole else (0, 0)
            self.started.append(
                Started(row._replace(read=row.read + read, written=row.written + written), launch, args)
            )
        return result

    def build(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        """Build a kernel instead of launching it."""
        made = _run(kernel, *args, grid=grid, warmup=True, **kwargs)
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {key: value for key, value in kwargs.items() if key in names}
        found = [pair for name in names for pair in _flat(made.src.signature[name], values[name])]
        self._building.append(TritonLaunch(made, (*grid, 1, 1)[:3], found, values))
        return made

    def build_launch(self, kernel: JITFunction, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> TritonLaunch:
        """Build one kernel as its launch would."""
        self.build(kernel, *args, grid=grid, warmup=True, **kwargs)
        return self._building.pop()

    @contextmanager
    def watching(self, kind: str = "triton") -> Iterator["Launches"]:
        """Collect while the block runs.

        Args:
            kind: backend of the kernels, "triton" or "next".

        Raises:
            RuntimeError: if Triton's interpreter is on.
        """
        if triton.knobs.runtime.interpret:
            raise RuntimeError("TRITON_INTERPRET is set: there is nothing to build")
        active = triton.runtime.driver._active
        triton.runtime.driver.set_active(_Driver(self.architecture))
        JITFunction.run = lambda kernel, *args, **kwargs: self.build(kernel, *args, **kwargs)
        try:
            with backend.chosen(kind), self:
                yield self
        finally:
            JITFunction.run = _run
            triton.runtime.driver._active = active


_run = JITFunction.run


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, last: bool = True) -> Tensor:
    """Return a tensor without memory, channels last if it has four dimensions."""
    layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
