"""Which implementation a tensor gets, and what is said where there is none."""

import shutil
import sys
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernels import backend


def test_which_backend_a_tensor_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert (backend.implementation(x), backend.implementation(x.double())) == ("cpu", "reference")
    monkeypatch.setenv("DEEPSKIP_KERNELS", "triton")
    assert (backend.implementation(x), backend.implementation(x.double())) == ("triton", "reference")
    monkeypatch.setattr(backend, "_chosen", "reference")
    assert backend.implementation(x) == "reference"
    monkeypatch.setattr(backend, "_chosen", "auto")
    monkeypatch.setenv("DEEPSKIP_KERNELS", "cuda")
    with pytest.raises(ValueError, match="DEEPSKIP_KERNELS is 'cuda'; it must be one of auto, triton, reference"):
        backend.implementation(x)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        backend.choose("fast")


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
    with pytest.raises(ValueError, match=r"asked for a tensor on cpu; leave DEEPSKIP_KERNELS and run\.kernels at auto"):
        triton_form.bce_dice_sums(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8))


def test_without_a_compiler_for_triton_the_plain_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    backend._usable.cache_clear()
    include = tmp_path / "include"
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(include))
    with pytest.warns(UserWarning, match=r"no gcc or clang \(CC names another\), no Python\.h: the plain"):
        assert not backend._usable(0)
    monkeypatch.setenv("CC", "cc")
    backend._usable.cache_clear()
    with pytest.warns(UserWarning, match=r"headers, and there is no Python\.h: the plain"):
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
