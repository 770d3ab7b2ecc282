"""What a call starts on a GPU, found without one: Triton's launches, built as they would be there, and all other operators.

The call runs on tensors of torch's meta device. Its Triton kernels are built by their own launchers, with the types and the
specialisations (a constant for 1, divisible by 16) that a real launch gets, and not started.
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

# kernel parameters stand there in the constant bank
_PARAMETERS = {80: 0x160, 90: 0x210}
_BANK_WORDS = 4096


class TritonLaunch(NamedTuple):
    """A kernel as it would be launched: the build, its grid, and its arguments (type, value) without constants."""

    build: Any
    grid: tuple[int, int, int]
    arguments: list[tuple[str, Any]]
    named: dict[str, Any]

    def address(self, x: Tensor) -> int:
        """Return where a tensor argument lies: each storage far from the others, and none at 0."""
        storages = list(dict.fromkeys(y.untyped_storage()._cdata for kind, y in self.arguments if kind.startswith("*")))
        place = storages.index(x.untyped_storage()._cdata)
        return (place + 1 << 40) + int(x.storage_offset()) * x.element_size()

    def constants(self, architecture: int) -> np.ndarray:
        """Return its constant bank as 32-bit words."""
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
    """One launch of a call: what it moves, and the Triton launch where it is one of ours."""

    moved: Moved
    launch: TritonLaunch | None
    arguments: tuple[Any, ...]


class _Driver:
    """Stands in for CUDA's driver in front of Triton's launchers."""

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
    """Count the bytes that a launch reads and writes of what is its operator's alone; `made` gets what it writes first."""
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
    """Collects a call's launches while it is on; use `started`, and meta tensors.

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
        # with the operators inside: a copy that makes an input contiguous is a launch of its own
        with self:
            result = mine._init_fn(*args, **kwargs)
        before = len(self.moved)
        self.note(func, args, kwargs, result)
        told = self.moved[before:]
        # of most operators the moves are told at once, without what one launch hands to the next
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
        """Build a kernel in the place of launching it."""
        made = _run(kernel, *args, grid=grid, warmup=True, **kwargs)
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {key: value for key, value in kwargs.items() if key in names}
        found = [pair for name in names for pair in _flat(made.src.signature[name], values[name])]
        self._building.append(TritonLaunch(made, (*grid, 1, 1)[:3], found, values))
        return made

    def build_launch(self, kernel: JITFunction, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> TritonLaunch:
        """Build one kernel as a launch of it would be."""
        self.build(kernel, *args, grid=grid, warmup=True, **kwargs)
        return self._building.pop()

    @contextmanager
    def watching(self, kind: str = "triton") -> Iterator["Launches"]:
        """Collect while the block runs.

        Args:
            kind: the backend of the kernels, "triton" or "next".

        Raises:
            RuntimeError: the interpreter of Triton is on.
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
    """Make a tensor without memory, channels last where it has four dimensions."""
    layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
