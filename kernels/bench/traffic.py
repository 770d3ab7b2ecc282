"""Count the bytes that every launch of a call reads and writes without running it: on tensors of torch's meta device.

A dispatch mode sees each operator under autograd. An operator moves the size of the tensors that it takes and makes, each once:
the least that a launch moves if none of it is in a cache. Operators that PyTorch does in several passes count as such (batch
norm reads its input twice). Views move nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# These allocate or alias memory, and move none.
_NOTHING = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view", "lift_fresh",
    "_local_scalar_dense",
}  # fmt: skip


class Moved(NamedTuple):
    """The bytes that one launch moves.

    Attributes:
        operator: name of the operator.
        part: which of its passes.
        read: bytes read.
        written: bytes written.
        place: part of the network.
    """

    operator: str
    part: str
    read: int
    written: int
    place: str


def _bytes(tensors: Sequence[Tensor]) -> int:
    # Expanded tensors, and those that appear twice, count once.
    sizes: dict[int, int] = {}
    for x in tensors:
        held = min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
        at = x.untyped_storage()._cdata
        sizes[at] = max(sizes.get(at, 0), held)
    return sum(sizes.values())


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def passes(name: str, arguments: tuple[Any, ...], result: Any) -> list[tuple[str, list[Tensor], list[Tensor]]] | None:
    """Return an operator's passes (name, tensors read, tensors written), or None if it has one pass."""
    if name == "convolution_backward":
        grad, x, weight = arguments[:3]
        made = zip(("input gradient", "weight gradient", "bias gradient"), result, strict=True)
        needs = {"input gradient": [grad, weight], "weight gradient": [grad, x], "bias gradient": [grad]}
        return [(part, needs[part], [out]) for part, out in made if out is not None]
    if name in ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit") and arguments[5]:
        x = arguments[0]
        return [("statistics", [x], []), ("normalise", [x], [result[0]])]
    if name in ("native_batch_norm_backward", "cudnn_batch_norm_backward"):
        return [("sums", _tensors(arguments[:2]), []), ("input gradient", _tensors(arguments[:2]), [result[0]])]
    if name == "batch_norm_statistics":
        x, rows = arguments[:2]
        return [("sums", [x], []), ("", [], [result])] if rows is None else [("", [rows], [result])]
    if name == "normalise_relu_gradient":
        dy, x, stats = arguments[:3]
        read = [dy, x, stats]
        return [("sums", read, []), ("coefficients", [stats], [*result[1:]]), ("input gradient", read, [result[0]])]
    return None


def as_on_gpu(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """Convert a convolution's output to cuDNN's layout, channels last if its input or weight is; the meta device does not."""
    if func is not torch.ops.aten.convolution.default:
        return result
    last = any(x.is_contiguous(memory_format=torch.channels_last) for x in args[:2])
    return result.contiguous(memory_format=torch.channels_last) if last else result


class Traffic(TorchDispatchMode):
    """Collect what each launch moves while the mode is active.

    Attributes:
        moved: a row for each launch, in order.
        place: part of the network that is running.
        places: start and end of autograd's sequence numbers of each part, with its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[Moved] = []
        self.place = ""
        self.places: list[tuple[int, int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = as_on_gpu(func, args, func(*args, **(kwargs or {})))
        self.note(func, args, kwargs or {}, result)
        return result

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Add the rows of one operator."""
        name = func._schema.name.split("::")[1]
        if name in _NOTHING or func._schema.name.startswith("profiler::"):
            return
        returns, taken = func._schema.returns, func._schema.arguments
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return
        values = [*args, *kwargs.values()]
        # In place, the tensor that is written is also among those read.
        changed = [v for v, a in zip(args, taken, strict=False) if a.alias_info is not None and a.alias_info.is_write]
        made = [] if any(r.alias_info is not None for r in returns) else _tensors(result)
        fresh = name in ("zeros_like", "ones_like", "zero_", "fill_", "full_like", "new_zeros", "copy_")
        read = _tensors(values[1:] if name == "copy_" else [] if fresh else values)
        for part, reads, writes in passes(name, args, result) or [("", read, [*made, *_tensors(changed)])]:
            self.moved.append(Moved(name, part, _bytes(reads), _bytes(writes), self._where()))

    def _where(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self.place
        number = node._sequence_nr()
        return next((place for start, end, place in self.places if start <= number < end), "")

    @contextmanager
    def following(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Attribute launches to these modules, forward and backward, while the block runs."""
        starts: dict[str, int] = {}

        def enter(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self.place, starts[name] = name, torch._C._autograd._get_sequence_nr()

            return hook

        def leave(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self.places.append((starts[name], torch._C._autograd._get_sequence_nr(), name))
                self.place = ""

            return hook

        handles = [module.register_forward_pre_hook(enter(name)) for name, module in modules.items()]
        handles += [module.register_forward_hook(leave(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Autocast(TorchFunctionMode):
    """Emulate torch.autocast on a GPU for the operators of our networks; the meta device has no autocast."""

    LOW = (torch.conv2d, nn.functional.linear, torch.matmul, torch.mm, torch.bmm)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.LOW:
            args = tuple(x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
        return func(*args, **(kwargs or {}))
