"""Each tensor gets its implementation, and an error names what is missing."""

import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deepskip.kernels import backend, bce_dice_wide_triton

NORM_LAUNCHES = (
    "batch_norm_sums", "batch_norm_statistics", "batch_norm_relu", "batch_norm_gradient_sums", "batch_norm_coefficients",
    "batch_norm_input_gradient",
)  # fmt: skip


def test_which_backend_a_tensor_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert (backend.implementation(x), backend.implementation(x.double())) == ("cpu", "reference")
    monkeypatch.setenv("DEEPSKIP_KERNELS", "triton")
    assert (backend.implementation(x), backend.implementation(x.double())) == ("triton", "reference")
    monkeypatch.setattr(backend, "_chosen", "reference")
    assert backend.implementation(x) == "reference"
    monkeypatch.setattr(backend, "_chosen", "auto")
    assert not backend.uses_next("bce_dice 1", x)
    monkeypatch.setenv("DEEPSKIP_KERNELS", "next")
    assert (backend.implementation(x), backend.uses_next("bce_dice 1", x)) == ("triton", True)
    monkeypatch.setenv("DEEPSKIP_KERNELS", "cuda")
    with pytest.raises(ValueError, match="DEEPSKIP_KERNELS is 'cuda'; it must be one of auto, triton, next, reference"):
        backend.implementation(x)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        backend.choose("fast")


def test_every_launch_is_on_the_device_of_its_tensors(
    triton_form: ModuleType, triton_loss: ModuleType, triton_deep_skip: ModuleType, triton_batch_norm: ModuleType,
    subpixel: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Mocks give this machine two GPUs. Tensors say that they are on the second, and the first is the current device.
    monkeypatch.setattr(backend, "_gpu_name", lambda index: "NVIDIA Test 1")
    current = [0]
    launched: list[str] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted.index)
        yield
        current.pop()

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., None]:
            def launch(*args: object, **kwargs: object) -> None:
                flat = [x for a in args for x in (a if isinstance(a, tuple) else (a,)) if isinstance(x, torch.Tensor)]
                assert {x.device.index for x in flat} == {1}
                assert current[-1] == 1, f"{self.name} on cuda:{current[-1]}"
                launched.append(self.name)

            return launch

    for module, names in (
        (triton_form, ("_sigmoid_sums", "_sigmoid_gradient", "_softmax_sums", "_softmax_gradient", "_add_rows")),
        (bce_dice_wide_triton, ("_sigmoid_sums_wide", "_sigmoid_gradient_wide")),
        (triton_loss, ("_loss_of_sums", "_loss_of_sums_gradient")),
        (triton_deep_skip, ("_branches",)),
        (triton_batch_norm.passes, NORM_LAUNCHES),
        (subpixel.subpixel_tables, ("_expand", "_add_rows", "_contract")),
        (subpixel.subpixel_triton, ("_stage",)),
        (subpixel.subpixel_gradients_triton, ("_gather_stage", "_weight_sums")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name))
    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        there = {"device": torch.device("cuda", 1)}
        for V in (1, 3):
            logits, target = torch.empty(2, V, 8, 8, **there), torch.empty(2, 8, 8, dtype=torch.uint8, **there)
            triton_form._sums._init_fn(logits, target, None, 0.5, 255)
            triton_form._gradient._init_fn(torch.empty(2 + 3 * V, **there), logits, target, None, 0.5, 255)
        logits, target = torch.empty(2, 1, 8, 8, **there), torch.empty(2, 8, 8, dtype=torch.uint8, **there)
        at = triton_form._layout(logits, target)
        bce_dice_wide_triton.sum_rows(at, logits, target, None, 0.5, 255)
        bce_dice_wide_triton.gradient(at, torch.empty(5, **there), logits, target, None, logits, 0.5, 255)
        sums, grad = torch.empty(5, **there), torch.empty((), **there)
        triton_loss._loss._init_fn(sums, None, 1.0, 1.0)
        triton_loss._loss_gradient._init_fn(grad, None, None, sums, None, 1.0, 1.0)
        own, taps = torch.empty(2, 8, 8, 8, **there), [torch.empty(2, 4, 4, 72, **there)]
        triton_deep_skip._spread._init_fn(own, taps, "bilinear")
        triton_deep_skip._gather._init_fn(torch.empty(2, 16, 8, 8, **there), [2], "bilinear")
        channels = [torch.empty(8, **there) for _ in range(4)]
        stats = triton_batch_norm._batch_statistics._init_fn(own, None, 128, *channels, 0.1, 1e-5)
        triton_batch_norm._normalise_relu._init_fn(own, *channels[:2], stats, True)
        triton_batch_norm._normalise_relu_gradient._init_fn(own, own, stats, True)
        # A copy to this layout would require CUDA.
        last: dict[str, Any] = there | {"memory_format": torch.channels_last}
        maps = [torch.empty(2, 8, 8, 8, **last), torch.empty(2, 16, 4, 4, **last)]
        weights = [torch.empty(8, C, 3, 3, **there) for C in (8, 16)]
        subpixel._stage._init_fn(maps, weights, [], [0, 1], "bilinear")
        grad = torch.empty(2, 16, 8, 8, **last)
        subpixel._stage_gradients._init_fn(grad, maps, weights, [], [0, 1], "bilinear", [True] * 4)
    assert launched == [
        "_sigmoid_sums", "_add_rows", "_sigmoid_gradient", "_softmax_sums", "_add_rows", "_softmax_gradient",
        "_sigmoid_sums_wide", "_sigmoid_gradient_wide", "_loss_of_sums", "_loss_of_sums_gradient", "_branches", "_branches",
        *NORM_LAUNCHES, "_expand", "_stage", "_expand", "_gather_stage", "_weight_sums", "_add_rows", "_contract",
    ]  # fmt: skip


def test_an_old_gpu_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    backend._usable.cache_clear()
    with pytest.warns(UserWarning, match=r"Old GPU has compute capability 7\.5, DeepSkip's kernels need 8\.0"):
        assert not backend._usable(0)
    assert not backend._usable(0)
    assert backend._usable.cache_info().hits == 1
    backend._usable.cache_clear()


def test_triton_on_a_cpu_says_what_to_do(triton_form: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_form, "INTERPRETED", False)
    with pytest.raises(
        ValueError, match=r"cannot run on a tensor on cpu; set DEEPSKIP_KERNELS and run\.kernels to auto"
    ):
        triton_form.bce_dice_sums(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8))


def test_without_a_compiler_for_triton_the_plain_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    backend._usable.cache_clear()
    include = tmp_path / "include"
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(include))
    with pytest.warns(UserWarning, match=r"find gcc or clang \(CC names another\), Python\.h: the plain"):
        assert not backend._usable(0)
    monkeypatch.setenv("CC", "cc")
    backend._usable.cache_clear()
    with pytest.warns(UserWarning, match=r"headers, and cannot find Python\.h: the plain"):
        assert not backend._usable(0)
    include.mkdir()
    (include / "Python.h").touch()
    backend._usable.cache_clear()
    assert backend._usable(0)
    backend._usable.cache_clear()


def test_without_triton_the_plain_operators_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    backend._usable.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton cannot be imported .*: the plain PyTorch operators are used"):
        assert not backend._usable(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend._usable(0)
    backend._usable.cache_clear()
