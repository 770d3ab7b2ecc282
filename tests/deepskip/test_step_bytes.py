"""The counter's bytes of a step equal those computed by hand."""

import torch
from torch import nn

from deepskip.bench import step_bytes
from deepskip.kernels.bench.traffic import Moved


def test_a_block_moves_what_is_worked_out_by_hand() -> None:
    # The block is a 3x3 convolution 4 -> 8 with batch norm and ReLU, under bf16 autocast, and a head 8 -> 1. There are
    # N x H x W pixels.
    with torch.device("meta"):
        block = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        network = nn.Sequential(block, nn.Conv2d(8, 1, 1, bias=False))
    N, H, W = 2, 32, 64
    rows = step_bytes.step(network, {"block": block}, (N, 4, H, W), "triton")
    found: dict[tuple[str, str], list[Moved]] = {}
    for row in rows:
        found.setdefault((row.operator, row.part), []).append(row)
    pixels, weight = N * H * W, 2 * 8 * 4 * 9
    x, y = 2 * 4 * pixels, 2 * 8 * pixels
    conv = found["convolution", ""][0]
    assert (conv.read, conv.written, conv.place) == (x + weight, y, "block")
    statistics, normalise = found["native_batch_norm", "statistics"][0], found["native_batch_norm", "normalise"][0]
    assert (statistics.read, statistics.written, normalise.read, normalise.written) == (y, 0, y, y)
    sums, gradient = (found["native_batch_norm_backward", part][0] for part in ("sums", "input gradient"))
    assert (sums.read, sums.written, gradient.read, gradient.written) == (2 * y, 0, 2 * y, y)
    relu, mask = found["relu_", ""][0], found["threshold_backward", ""][0]
    assert (relu.read, relu.written, mask.read, mask.written) == (y, y, 2 * y, y)
    # The image needs no gradient, so its convolution has only the weight's.
    assert [row.place for row in found["convolution_backward", "weight gradient"]] == ["", "block"]
    (head,) = found["convolution_backward", "input gradient"]
    assert (head.read, head.written, head.place) == (2 * pixels + 2 * 8, y, "")
    (loss_sums,) = found["bce_dice_sums", ""]
    assert loss_sums.read == 2 * pixels + pixels


def test_a_whole_step_moves_about_what_the_plan_says() -> None:
    size = (32, 3, 512, 512)
    sums: dict[str, dict[str, float]] = {}
    for form in ("triton", "next", "reference"):
        rows = step_bytes.rows(form, size)
        sums[form] = {"all": sum(row["bytes_per_pixel"] for row in rows)}
        for row in rows:
            sums[form][row["level"]] = sums[form].get(row["level"], 0.0) + row["bytes_per_pixel"]
    # Counted by hand, without the counter: about 2,300 at level 1, and 36 GB in all.
    assert 2100 <= sums["triton"]["level 1"] <= 2400
    assert 34e9 <= sums["triton"]["all"] * 32 * 512 * 512 <= 38e9
    # The new launches save two things at level 1. Four norms have no passes of ReLU's own, two maps forward and three
    # back, and no pass of the norm's own sums, a map each. A stage has no taps, 9 x 8 channels at a quarter of the
    # pixels for two maps and at a sixteenth for another, written and read in both directions.
    taps = 2 * 72 * (2 / 4 + 1 / 16)
    assert sums["triton"]["level 1"] - sums["next"]["level 1"] >= 4 * 6 * 16 + 4 * taps
    assert 1200 <= sums["next"]["level 1"] <= 1350
    # The plain form at least writes and reads each upsampled map, forward and backward.
    upsampled = 2 * (16 + 32 + 64 + 16)
    assert sums["reference"]["level 1"] - sums["triton"]["level 1"] >= 2 * upsampled


def test_the_table_adds_up() -> None:
    forms = {"deepskip": step_bytes.rows("triton", (1, 3, 64, 64))}
    text = step_bytes.table(forms, (1, 3, 64, 64))
    levels = [line for line in text.splitlines() if line.startswith("| level ") and line[8].isdigit()]
    assert len(levels) == 5
