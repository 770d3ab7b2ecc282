"""Our Triton kernels for the tests: interpreted, or compiled where there is a GPU."""

from types import ModuleType

import pytest
import torch

from kernels import bce_dice, bce_dice_loss, deep_skip_gpu


@pytest.fixture(scope="session")
def triton_form() -> ModuleType:
    assert torch.cuda.is_available() != bce_dice.INTERPRETED
    # cuDNN's convolutions of fp32 take tf32 where they may, which is less than the tests ask of ours
    torch.backends.cudnn.allow_tf32 = False
    return bce_dice


@pytest.fixture(scope="session")
def triton_loss(triton_form: ModuleType) -> ModuleType:
    return bce_dice_loss


@pytest.fixture(scope="session")
def triton_deep_skip(triton_form: ModuleType) -> ModuleType:
    return deep_skip_gpu
