"""Count for test_builds in a process without Triton's interpreter: `python -m tests.kernels.counting FILE`."""

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
    # Each iteration depends on the previous one, so the compiler can omit none.
    at = tl.program_id(0) * 32 + tl.arange(0, 32)
    total = tl.load(x_ptr + at)
    for i in range(trips):
        total = tl.load(x_ptr + at + i * 64) + total * 3
    tl.store(x_ptr + at, total)


def trips() -> list[int]:
    """Count a loop's instructions for trip counts that differ by the compiler's unroll factor."""
    found = []
    for times in (8, 12, 16, 20, 24):
        seen = Launches(ARCHITECTURE)
        with seen.watching():
            launch = seen.build_launch(_looping, (4,), meta(4096, dtype=torch.int32), times, num_warps=1)
        found.append(sum(sum(warp.issued.values()) for warp in counts.executed(launch, ARCHITECTURE, [1])))
    return found


def stores(launch: TritonLaunch, tensors: list[torch.Tensor]) -> dict[str, int]:
    """Run all programs of a launch and compare what it stores with the tensors that it writes."""
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
    """Check the stage at a size where borders, masks and channels do not fill whole blocks."""
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


def next_stores() -> dict[str, Any]:
    """Check the stage in sub-pixel form and the gradients of its maps, at a size that does not fill whole blocks."""
    N, K, H, W = 2, 5, 36, 20
    factors = (1, 2, 4)
    maps = [meta(N, K * s, H // s, W // s).requires_grad_() for s in factors]
    weights = [meta(K, K * s, 3, 3).requires_grad_() for s in factors]
    seen = Launches(ARCHITECTURE)
    with seen.watching("next"):
        out = kernels.deep_skip(maps, weights)
        out.backward(torch.empty_like(out))
    found = {one.launch.build.name: one.launch for one in seen.started if one.launch is not None}
    return {
        "forward, next": stores(found["_stage"], [found["_stage"].named["out_ptr"]]),
        "backward, next": stores(found["_gather_stage"], list(found["_gather_stage"].named["maps"])),
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


def norm_call(size: tuple[int, int, int, int], last: bool) -> list[TritonLaunch]:
    """Build the launches of batch norm and ReLU, forward and backward, for a map of a size."""
    x = meta(*size, last=last).requires_grad_()
    channels = [meta(size[1], dtype=torch.float32) for _ in range(4)]
    seen = Launches(ARCHITECTURE)
    with seen.watching("next"):
        kernels.batch_norm_relu(x, *channels, True, 0.1, 1e-5).backward(torch.empty_like(x))
    return [one.launch for one in seen.started if one.launch is not None]


def norm_stores() -> dict[str, Any]:
    """Check the two passes that write a map, at sizes whose pixels and channels do not fill whole blocks."""
    found: dict[str, Any] = {}
    for layout, size in (("last", (2, 67, 9, 31)), ("first", (2, 3, 23, 61))):
        _, _, forward, _, _, backward = norm_call(size, layout == "last")
        found[f"norm, {layout}"] = stores(forward, [forward.named["y_ptr"]])
        found[f"norm gradient, {layout}"] = stores(backward, [backward.named["dx_ptr"]])
    return found


def far_accesses() -> list[dict[str, Any]]:
    """Return how far the first and last programs reach into maps of over 2^31 elements, channels last and first."""
    found = []
    # In each case, pixels, channels or samples are far apart.
    for size, last in (
        ((2, 8, 1 << 14, 1 << 14), True),
        ((1, 3, 1 << 15, 1 << 15), False),
        ((3, 1, 1 << 15, 1 << 15), True),
    ):
        for launch in norm_call(size, last):
            if launch.build.name not in ("batch_norm_relu", "batch_norm_input_gradient"):
                continue
            across, down, _ = launch.grid
            maps = [launch.named[name] for name in ("x_ptr", "dy_ptr", "y_ptr", "dx_ptr") if name in launch.named]
            starts = {launch.address(x): x for x in maps}
            reached = dict.fromkeys(starts, (2**63, 0))
            corners = [0, across - 1, across * (down - 1), across * down - 1]
            for warp in counts.executed(launch, ARCHITECTURE, corners):
                for access in warp.accesses:
                    for at in access.addresses if access.addresses is not None else ():
                        start = max((one for one in starts if one <= at), default=0)
                        if start in reached and at < start + 2 * starts[start].numel():
                            low, high = reached[start]
                            reached[start] = min(low, int(at) - start), max(high, int(at) - start + access.width)
            found.append({"name": launch.build.name, "bytes": 2 * maps[0].numel(), "reached": list(reached.values())})
    return found


def of_today() -> dict[str, Any]:
    """Count the default launches, and those of the new loss."""
    shapes = candidates.all_of((2, 32, 32), (3,), ((2, 1, 64, 64),))
    mine = [one for one in shapes if one.operator not in candidates.NORM_OPERATORS]
    next_loss = [part for part in counts.PARTS if isinstance(part, tuple) and part[-1] == counts.NEXT]
    parts = [counts.PARTS[0], ((16, 1, 1024, 1024), torch.uint8, ""), *next_loss]
    return {
        "rows": [row for part in parts for row in counts.rows(ARCHITECTURE, part)],
        "trips": trips(),
        "spills": candidates.spilled(mine[0], ARCHITECTURE) | candidates.spilled(mine[-1], ARCHITECTURE),
        "stores": stage_stores()
        | {
            "gradient of the loss": loss_stores("triton", (37, 41)),
            "gradient of the loss, next": loss_stores("next", (16, 40)),
            "gradient of the loss, next, whole blocks": loss_stores("next", (16, 48)),
        },
    }


def of_next() -> dict[str, Any]:
    """Count the new stage, convolutions and norms, whose machine code takes minutes to build."""
    parts = [counts.Next(1), counts.Next(1, (8, 8)), counts.Norm(1, False), counts.Norm(1, True)]
    return {
        "rows": [row for part in parts for row in counts.rows(ARCHITECTURE, part)],
        "stores": next_stores() | norm_stores(),
        "far": far_accesses(),
    }


if __name__ == "__main__":
    kind, out = sys.argv[1:]
    Path(out).write_text(json.dumps({"today": of_today, "next": of_next}[kind]()))
