"""Fixtures of the Triton kernels: compiled if there is a GPU, otherwise interpreted."""

from types import ModuleType

import pytest
import torch

from deepskip.kernels import (
    batch_norm_triton,
    bce_dice_loss_triton,
    bce_dice_triton,
    conv3_triton,
    deep_skip_triton,
    subpixel,
)


@pytest.fixture(scope="session")
def triton_form() -> ModuleType:
    assert torch.cuda.is_available() != bce_dice_triton.INTERPRETED
    # cuDNN may compute fp32 convolutions in TF32, which is less exact than these tests require of our kernels.
    torch.backends.cudnn.allow_tf32 = False
    return bce_dice_triton


@pytest.fixture(scope="session")
def triton_loss(triton_form: ModuleType) -> ModuleType:
    return bce_dice_loss_triton


@pytest.fixture(scope="session")
def triton_deep_skip(triton_form: ModuleType) -> ModuleType:
    return deep_skip_triton


@pytest.fixture(scope="session")
def triton_batch_norm(triton_form: ModuleType) -> ModuleType:
    return batch_norm_triton


@pytest.fixture(scope="session", name="subpixel")
def subpixel_form(triton_form: ModuleType) -> ModuleType:
    return subpixel


@pytest.fixture(scope="session", name="conv3_triton")
def conv3_form(triton_form: ModuleType) -> ModuleType:
    return conv3_triton
