"""Counts for test_builds, in a process without Triton's interpreter: python -m tests.kernels.counting FILE."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from deepskip import kernels
from deepskip.kernels.bench import candidates, counts
from deepskip.kernels.bench.launches import Launches, TritonLaunch, meta

ARCHITECTURE = 90


@triton.jit
def _looping(x_ptr, trips):
    # what is added in the loop hangs on the last turn, so no turn can be left out
    at = tl.program_id(0) * 32 + tl.arange(0, 32)
    total = tl.load(x_ptr + at)
    for i in range(trips):
        total = tl.load(x_ptr + at + i * 64) + total * 3
    tl.store(x_ptr + at, total)


def trips() -> list[int]:
    """Count a loop's instructions for trips that differ by as many as the compiler unrolls."""
    found = []
    for times in (8, 12, 16, 20, 24):
        seen = Launches(ARCHITECTURE)
        with seen.watching():
            launch = seen.build_launch(_looping, (4,), meta(4096, dtype=torch.int32), times, num_warps=1)
        found.append(sum(sum(warp.issued.values()) for warp in counts.executed(launch, ARCHITECTURE, [1])))
    return found


def stores(launch: TritonLaunch, tensors: list[torch.Tensor]) -> dict[str, int]:
    """Run every program of a launch and compare what it stores with the tensors that it makes."""
    across, down, _ = launch.grid
    warps = counts.executed(launch, ARCHITECTURE, list(range(across * down)))
    places = np.concatenate(
        [
            (access.addresses[:, None] + np.arange(access.width, dtype=np.uint64)).ravel()
            for warp in warps
            for access in warp.accesses
            if access.opcode.startswith("ST") and access.addresses is not None
        ]
    )
    spans = [(launch.address(x), x.numel() * x.element_size()) for x in tensors]
    inside = np.zeros(len(places), bool)
    for start, size in spans:
        inside |= (places >= start) & (places < start + size)
    return {
        "bytes": sum(size for _, size in spans), "stored": len(places), "distinct": len(np.unique(places)),
        "outside": int((~inside).sum()),
    }  # fmt: skip


def stage_stores() -> dict[str, Any]:
    """Check the stage at a size whose borders, masks and channels are none of them whole blocks."""
    N, K, H, W = 2, 5, 16, 40
    factors = (1, 2, 4, 8, 2)
    maps = [meta(N, K * s, H // s, W // s).requires_grad_() for s in factors]
    weights = [meta(K, K * s, 3, 3).requires_grad_() for s in factors]
    seen = Launches(ARCHITECTURE)
    with seen.watching():
        out = kernels.deep_skip(maps, weights)
        out.backward(torch.empty_like(out))
    forward, backward = [one.launch for one in seen.started if one.launch is not None]
    return {
        "forward": stores(forward, [forward.named["wide_ptr"]]),
        "backward": stores(backward, [backward.named["own_ptr"], *backward.named["maps"]]),
    }


def loss_stores(backend: str, size: tuple[int, int]) -> dict[str, int]:
    """Check the gradient of the loss."""
    seen = Launches(ARCHITECTURE)
    with seen.watching(backend):
        logits = meta(3, 1, *size, last=False).requires_grad_()
        kernels.bce_dice_sums(logits, meta(3, *size, dtype=torch.uint8)).backward(meta(5, dtype=torch.float32))
    (launch,) = [one.launch for one in seen.started if one.moved.operator == "bce_dice_gradient"]
    assert launch is not None
    return stores(launch, [launch.named["dz_ptr"]])


def main() -> None:
    """Write everything as JSON."""
    shapes = candidates.all_of((2, 32, 32), (3,), ((2, 1, 64, 64),))
    next_loss = [part for part in counts.PARTS if not isinstance(part, int) and part[2] == counts.NEXT]
    parts = [counts.PARTS[0], counts.PARTS[counts.LEVELS - 1], *next_loss]
    found = {
        "rows": [row for part in parts for row in counts.rows(ARCHITECTURE, part)],
        "trips": trips(),
        "spills": candidates.spilled(shapes[0], ARCHITECTURE) | candidates.spilled(shapes[-1], ARCHITECTURE),
        "stores": stage_stores()
        | {
            "gradient of the loss": loss_stores("triton", (37, 41)),
            "gradient of the loss, next": loss_stores("next", (16, 40)),
            "gradient of the loss, next, whole blocks": loss_stores("next", (16, 48)),
        },
    }
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
