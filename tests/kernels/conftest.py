"""Our Triton kernels for the tests: interpreted, or compiled where there is a GPU."""

from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def triton_form() -> ModuleType:
    # as in tests/conftest.py, for our kernels; what the tests start must not see it
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        from kernels import bce_dice, bce_dice_loss, deep_skip_gpu  # noqa: F401

    assert torch.cuda.is_available() != bce_dice.INTERPRETED
    # cuDNN's convolutions of fp32 take tf32 where they may, which is less than the tests ask of ours
    torch.backends.cudnn.allow_tf32 = False
    return bce_dice


@pytest.fixture(scope="session")
def triton_loss(triton_form: ModuleType) -> ModuleType:
    from kernels import bce_dice_loss

    return bce_dice_loss


@pytest.fixture(scope="session")
def triton_deep_skip(triton_form: ModuleType) -> ModuleType:
    from kernels import deep_skip_gpu

    return deep_skip_gpu
