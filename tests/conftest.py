"""Triton's own functions are made for its interpreter when triton is first imported: before any test imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # gluon is imported when a kernel first runs
    import triton.experimental.gluon
    import triton.language  # noqa: F401

    # what the tests start must not see it
    del os.environ["TRITON_INTERPRET"]
