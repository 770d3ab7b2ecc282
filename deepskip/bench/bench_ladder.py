"""Benchmark the CPU kernels, added one at a time; `make bench` runs it if there is no GPU."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch

from deepskip import BCEDiceLoss, DeepSkipUNet, kernels
from deepskip.allocator import keep_freed_memory
from deepskip.kernels import reference
from deepskip.kernels.bench import measure

CPU = torch.device("cpu")
SIZE = (8, 3, 128, 128)
ROUNDS = 15
FORMS = ("deep_skip_cpu", "conv3_cpu", "batch_norm_cpu")


class Rung:
    """The network in a memory layout with some of the CPU kernels, in fp32 or under autocast to bf16.

    Args:
        layout: memory format of weights and images.
        forms: names in FORMS that are used; the reference replaces the others.
        bf16: run under autocast.
    """

    def __init__(self, layout: torch.memory_format, forms: tuple[str, ...] = (), bf16: bool = False) -> None:
        torch.manual_seed(0)
        self.network = DeepSkipUNet(3, 1).to(memory_format=layout)  # type: ignore[call-overload]
        self.image = torch.randn(SIZE).contiguous(memory_format=layout)
        self.mask = (torch.rand(SIZE[0], *SIZE[2:]) < 0.1).to(torch.uint8)
        self.forms, self.bf16, self.criterion = forms, bf16, BCEDiceLoss()

    def run(self, training: bool) -> None:
        """Run a training step without the optimizer, or inference."""
        self.network.train(training)
        with ExitStack() as stack:
            for form in FORMS:
                if form not in self.forms:
                    stack.enter_context(mock.patch.object(kernels, form, reference))
            if "conv3_cpu" not in self.forms:
                stack.enter_context(mock.patch.object(kernels.backend, "folds_norms", return_value=False))
            stack.enter_context(torch.set_grad_enabled(training))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                logits = self.network(self.image)
            if training:
                self.network.zero_grad()
                self.criterion(logits, self.mask).backward()


def rows_of(rungs: dict[str, Rung], first: dict[str, float] | None) -> list[dict[str, Any]]:
    """Measure rungs alternately.

    Args:
        rungs: by name.
        first: seconds of "train" and "inference" that ratios are relative to; None takes the first rung's.

    Returns:
        A row for each rung, with images/s.
    """

    def calls(training: bool) -> dict[str, Callable[[], None]]:
        return {name: lambda rung=rung: rung.run(training) for name, rung in rungs.items()}  # type: ignore[misc]

    inference, train = (measure.in_turns(calls(training), ROUNDS, CPU) for training in (False, True))
    name = next(iter(rungs))
    first = first or {"train": train[name], "inference": inference[name]}
    return [
        {
            "size": "x".join(map(str, SIZE)), "implementation": name,
            "dtype": "float32, or bfloat16 where it says so",
            "train": SIZE[0] / train[name], "train_ratio": first["train"] / train[name],
            "inference": SIZE[0] / inference[name], "inference_ratio": first["inference"] / inference[name],
        }
        for name in rungs
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="these are the forms for CPUs")
def test_ladder(benchmark: Any) -> None:
    """Time the network without CPU kernels, with one more at a time, and with freed memory kept."""
    last = torch.channels_last
    rungs = {
        "plain, contiguous": Rung(torch.contiguous_format),
        "channels last": Rung(last),
        "+ deeper maps convolved at their own resolution": Rung(last, FORMS[:1]),
        "+ few channels by pairs of pixels, norms folded in inference": Rung(last, FORMS[:2]),
        "+ batch norm and ReLU in full vectors": Rung(last, FORMS),
        "plain, channels last, bf16 autocast": Rung(last, bf16=True),
    }
    rows = rows_of(rungs, None)
    first = {key: SIZE[0] / rows[0][key] for key in ("train", "inference")}
    if keep_freed_memory():
        kept = ("plain, contiguous", "channels last", "+ batch norm and ReLU in full vectors")
        rows += rows_of({f"{name}; freed memory kept": rungs[name] for name in kept}, first)
    benchmark.extra_info |= {"suite": "ladder", "rows": rows}
    benchmark.pedantic(lambda: rungs["+ batch norm and ReLU in full vectors"].run(True), rounds=3)
