"""The comparison's data, batches and scores, against other libraries and sums by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
from PIL import Image
from skimage.measure import label, regionprops

from data_shards.sources.coins import coins
from deepskip.config import OptimConfig
from deepskip.optimizer import build_optimizer
from jobs.comparison import scores
from jobs.comparison.cell import Cell, Supervised, run_cell
from jobs.comparison.data import Rule, encode, pack
from jobs.comparison.rows import Row, build
from jobs.comparison.samples import IGNORE_INDEX, ZOOM, Category, Split, batch, draw_plan, load, maps, view
from tests.deepskip.networks.small import SMALL

CPU = torch.device("cpu")


def write_category(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Six images, two a split, of the sizes given by stem, with a disc each."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    lines = ["stem,split"]
    for i, (stem, (H, W)) in enumerate(sizes.items()):
        rows, columns = np.mgrid[:H, :W]
        disc = (rows - H / 2) ** 2 + (columns - W / 3) ** 2 < (H / 5) ** 2
        image = rng.integers(0, 100, (H, W, 3)) + 100 * disc[..., None]
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{stem}.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(folder / "masks" / f"{stem}.png")
        lines.append(f"{stem},{('train', 'val', 'test')[i // 2]}")
    (folder / "split.csv").write_text("\n".join(lines) + "\n")


def split_of(images: torch.Tensor, masks: torch.Tensor) -> Split:
    return Split([str(i) for i in range(len(images))], images, masks, images.permute(0, 2, 3, 1).numpy())


def test_pack_keeps_the_split_shrinks_by_area_and_repeats_its_bytes(tmp_path: Path) -> None:
    sizes = dict.fromkeys("fdbeca", (64, 96))
    write_category(tmp_path / "discs", sizes)
    first = pack("discs", tmp_path / "discs", tmp_path / "one", 32, Rule()).read_bytes()
    assert pack("discs", tmp_path / "discs", tmp_path / "two", 32, Rule()).read_bytes() == first
    category = load(tmp_path / "one" / "discs.npz", CPU)
    assert {name: sorted(split.keys) for name, split in category.splits.items()} == {
        "train": ["d", "f"],
        "val": ["b", "e"],
        "test": ["a", "c"],
    }
    train = category.splits["train"]
    torch.testing.assert_close(train.images.mean((2, 3)), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.images.std((2, 3), correction=0), torch.ones(2, 3))
    true = np.asarray(Image.open(tmp_path / "discs" / "masks" / f"{train.keys[0]}.png")) > 0
    # an area of 64 x 96 pixels on 32 x 32
    assert abs(train.masks[0].float().mean().item() - true.mean()) < 0.01
    image = np.asarray(Image.open(tmp_path / "discs" / "images" / f"{train.keys[0]}.png").convert("RGB"))
    means = image.reshape(32, 2, 32, 3, 3).mean((1, 3))
    # the triangle filter is wider than a block, and JPEG rounds
    assert np.corrcoef(means.ravel(), train.raw[0].ravel())[0, 1] > 0.9


def test_pack_cuts_into_parts_and_pads_cubes(tmp_path: Path) -> None:
    write_category(tmp_path / "discs", dict.fromkeys("abcdef", (64, 96)))
    parts = load(pack("discs", tmp_path / "discs", tmp_path, 32, Rule(parts=(2, 3))), CPU)
    whole = np.asarray(Image.open(tmp_path / "discs" / "masks" / "a.png")) > 0
    train = parts.splits["train"]
    for r in range(2):
        for c in range(3):
            mask = train.masks[train.keys.index(f"a-{r}-{c}")]
            np.testing.assert_array_equal(mask == 1, whole[32 * r : 32 * r + 32, 32 * c : 32 * c + 32])

    cubes = tmp_path / "cubes"
    cubes.mkdir()
    rng = np.random.default_rng(0)
    stored = {}
    for i, stem in enumerate("abc"):
        stored[stem] = rng.integers(-2000, 60000, (20, 30 - 8 * i, 12))
        np.savez(cubes / f"{stem}.npz", cube=stored[stem], mask=(stored[stem][..., 0] > 50000).astype(np.uint8))
    (cubes / "split.csv").write_text("stem,split\na,train\nb,val\nc,test\n")
    packed = load(pack("cubes", cubes, tmp_path, 0, Rule(bands=4, padded_to=24)), CPU)
    # a is 30 wide, and so two parts of 15
    assert (packed.bands, packed.size, packed.splits["train"].keys) == (4, 24, ["a-0-0", "a-0-1"])
    val = packed.splits["val"]
    assert (val.masks[0, 20:] == IGNORE_INDEX).all()
    assert (val.masks[0, :, 22:] == IGNORE_INDEX).all()
    np.testing.assert_array_equal(val.masks[0, :20, :22], stored["b"][..., 0] > 50000)
    # four bands of twelve are means of three
    bands = stored["b"].reshape(20, 22, 4, 3).mean(3)
    expected = (bands - bands.mean((0, 1))) / bands.std((0, 1))
    np.testing.assert_allclose(val.raw[0, :20, :22].astype(float), expected, atol=4e-3)


def test_pack_shrinks_the_built_in_coins(tmp_path: Path) -> None:
    category = load(pack("coins", None, tmp_path, 48, Rule(), most=2), CPU)
    assert (category.size, category.bands, [len(split) for split in category.splits.values()]) == (48, 3, [2, 2, 2])
    _, _, mask = next(coins("train", 1))
    assert category.splits["train"].masks[0].float().mean().item() == pytest.approx(mask.mean(), abs=0.005)


def test_views_are_the_squares_eight_positions() -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.random((1, 2, 16, 16), dtype=np.float32))
    mask = torch.from_numpy((rng.random((1, 16, 16)) < 0.3).astype(np.uint8))
    split = split_of(image, mask)
    seen = []
    for position in range(8):
        where = torch.from_numpy(maps(np.ones(1), np.zeros((1, 2)), np.array([(position + 0.5) / 8])))
        shown, labels = view(split, torch.tensor([0]), where)
        matches = [
            (turn, mirrored)
            for turn in range(4)
            for mirrored in (False, True)
            if torch.allclose(shown, torch.rot90(image.flip(3) if mirrored else image, turn, (2, 3)), atol=1e-4)
            and torch.equal(labels, torch.rot90(mask.flip(2) if mirrored else mask, turn, (1, 2)))
        ]
        seen += matches
    assert len(set(seen)) == 8


def test_plan_is_the_same_for_all_and_takes_each_sample_once_an_epoch() -> None:
    masks = torch.zeros(5, 32, 32, dtype=torch.uint8)
    masks[:, 3:5, 20:22] = 1
    split = split_of(torch.randn(5, 1, 32, 32), masks)
    plain = draw_plan(split, 10, 3, seed=1)
    other = draw_plan(split, 10, 3, seed=1, foreground_crops=0.5, copy_paste=0.5)
    assert torch.equal(plain.sample, other.sample)
    assert not torch.equal(plain.sample, draw_plan(split, 10, 3, seed=2).sample)
    for epoch in plain.sample.flatten().split(5):
        assert sorted(epoch.tolist()) == [0, 1, 2, 3, 4]
    same = (plain.map == other.map).flatten(2).all(2)
    # about half are laid around foreground, the others as they were
    assert 5 < same.sum() < 25
    scale = plain.map[..., :2, :2].det().abs().sqrt()
    assert ((scale > 1 / ZOOM - 1e-4) & (scale < ZOOM + 1e-4)).all()
    near = draw_plan(split, 10, 3, seed=1, foreground_crops=1.0)
    assert all((batch(split, near, step)[1] == 1).flatten(1).any(1).all() for step in range(10))
    # nothing from outside of the image
    assert all((batch(split, near, step)[1] != IGNORE_INDEX).all() for step in range(10))
    pasted = [batch(split, other, step, paste=True)[1].eq(1).sum() for step in range(10)]
    bare = [batch(split, other, step)[1].eq(1).sum() for step in range(10)]
    assert sum(pasted) > sum(bare)


def test_threshold_is_the_best_of_all_on_validation() -> None:
    rng = np.random.default_rng(0)
    masks = (rng.random((3, 20, 20)) < 0.2).astype(np.uint8)
    probability = np.clip(0.3 * masks + rng.random(masks.shape) * 0.6, 0, 1).astype(np.float32)
    masks[0, :3] = IGNORE_INDEX
    threshold, iou = scores.choose_threshold(torch.from_numpy(probability), torch.from_numpy(masks), None)
    counted = masks != IGNORE_INDEX
    # an eighth of a logit apart, from 0.0004 to 0.9996
    byhand = {}
    for k in range(-63, 64):
        chosen = probability >= scipy.special.expit(k / 8)
        byhand[k] = (chosen & (masks == 1)).sum() / ((chosen | (masks == 1)) & counted).sum()
    assert iou == pytest.approx(max(byhand.values()))
    assert byhand[round(8 * scipy.special.logit(threshold))] == pytest.approx(iou)
    # what the threshold was chosen on is what it does
    assert (scores.predict(torch.from_numpy(probability), threshold).numpy() == (probability >= threshold)).all()
    fixed, iou = scores.choose_threshold(torch.from_numpy(probability), torch.from_numpy(masks), 0.5)
    assert (fixed, iou) == (0.5, pytest.approx(byhand[0]))


def test_thresholds_reach_what_is_rare_and_bear_the_ends() -> None:
    # a network that is nowhere sure of foreground
    masks = torch.zeros(1, 8, 8, dtype=torch.uint8)
    masks[0, 0, 0] = 1
    probability = torch.full((1, 8, 8), 0.004)
    probability[0, 0, 0] = 0.006
    threshold, iou = scores.choose_threshold(probability, masks, None)
    assert iou == 1
    assert 0.004 < threshold <= 0.006
    # rounding may leave more than 1
    assert scores.predict(torch.tensor([1 + 1e-7, 1.0]), 0.5).tolist() == [1, 1]
    # certain pixels: infinite logits
    certain = masks.float()
    assert scores.choose_threshold(certain, masks, None) == (0.5, 1.0)
    assert scores.predict(certain, 0.999).equal(masks)
    # fixed ones at the ends take all and, but for what is certain, nothing
    assert scores.predict(certain, 0.0).all()
    assert scores.predict(probability, 1.0).sum() == 0


def test_metrics_sizes_and_images_by_hand_and_by_skimage() -> None:
    rng = np.random.default_rng(1)
    masks = np.zeros((4, 48, 48), np.uint8)
    for n in range(4):
        for _ in range(6):
            r, c, size = rng.integers(0, 40), rng.integers(0, 40), rng.integers(1, 12)
            masks[n, r : r + size, c : c + size] = 1
    prediction = np.roll(masks, 2, 2) | (rng.random(masks.shape) < 0.01).astype(np.uint8)
    masks[3] = 0
    prediction[3] = 0
    guess, truth = torch.from_numpy(prediction), torch.from_numpy(masks)
    tp, fp = int((prediction & masks).sum()), int((prediction & (1 - masks)).sum())
    fn, tn = int(((1 - prediction) & masks).sum()), int(((1 - prediction) & (1 - masks)).sum())
    found = scores.metrics_of(guess, truth)
    assert found["iou"] == pytest.approx(tp / (tp + fp + fn))
    assert found["miou"] == pytest.approx((tp / (tp + fp + fn) + tn / (tn + fp + fn)) / 2)
    assert found["pixel_accuracy"] == pytest.approx((tp + tn) / masks.size)

    expected = []
    for own, mask in zip(prediction, masks, strict=True):
        components = label(own, connectivity=2)
        for region in regionprops(label(mask, connectivity=2)):
            rows, columns = region.coords.T
            best = 0.0
            for number in set(components[rows, columns].tolist()) - {0}:
                common = int((components[rows, columns] == number).sum())
                best = max(best, common / (region.area + int((components == number).sum()) - common))
            expected.append((region.area, 2 * int(own[rows, columns].sum()) > region.area, best))
    sizes = scores.by_size(guess, truth)
    assert sum(row["objects"] for row in sizes) == len(expected)
    for row in sizes:
        own = [e for e in expected if row["from"] <= e[0] and (row["to"] is None or e[0] < row["to"])]
        assert (row["objects"], row["found"]) == (len(own), sum(e[1] for e in own))
        assert row["iou"] == (pytest.approx(np.mean([e[2] for e in own])) if own else None)
    recall = sum(e[1] for e in expected) / len(expected)
    assert found["object_recall"] == pytest.approx(recall)

    split = Split([*"abcd"], torch.zeros(4, 1, 48, 48), truth, np.zeros((4, 48, 48, 1), np.uint8))
    images = scores.image_scores(guess, split)
    assert images[0]["iou"] == pytest.approx((prediction[0] & masks[0]).sum() / (prediction[0] | masks[0]).sum())
    assert images[3] == {"key": "d", "iou": 1.0}
    panel = scores.with_pictures(scores.panel(guess, split, images), split)
    # the empty image is in no panel
    assert set(panel["keys"]) == {"a", "b", "c"}
    assert panel["best_image"].shape == (48, 48, 3)


@pytest.mark.usefixtures("one_thread")
def test_cell_learns_and_repeats_itself() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((8, 32, 32), np.uint8)
    for mask in masks:
        r, c = rng.integers(2, 24, 2)
        mask[r : r + 6, c : c + 6] = 1
    images = (masks[:, None] * 2 + rng.normal(0, 0.5, (8, 3, 32, 32))).astype(np.float32)
    split = split_of(torch.from_numpy(images), torch.from_numpy(masks))
    category = Category("squares", {"train": split, "val": split, "test": split})
    row = Row("ours", "ours", loss="bce_dice", optimizer="muon", learning_rate=4e-3, ema_decay=0.8)
    cell = Cell("squares", "deepskip", 0, 20, 4, 4)
    record, panel = run_cell(row, category, cell, True)
    assert record["test"]["iou"] > 0.8
    assert record["test"] == record["validation"]
    assert record["parameters"] == 645_665
    assert [point["step"] for point in record["curves"]["validation"]] == [5, 10, 15, 20]
    best = max(record["curves"]["validation"], key=lambda point: (point["iou"], point["step"]))
    assert record["best_step"] == best["step"]
    assert panel["worst_mask"].shape == (32, 32)
    again, _ = run_cell(row, category, cell, False)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in record.items() if k != "seconds"}
    assert record["precision"] == "fp32"
    # rounded otherwise, and as good
    half, _ = run_cell(row, category, dataclasses.replace(cell, bf16=True), False)
    assert half["precision"] == "bf16"
    first, rounded = (each["curves"]["train"][0]["loss"] for each in (record, half))
    assert rounded != first
    assert rounded == pytest.approx(first, rel=0.02)
    assert half["test"]["iou"] > 0.8
    # heads on lower levels count for the loss and not as the network's
    supervised, _ = run_cell(dataclasses.replace(row, deep_supervision=0.5), category, cell, False)
    assert supervised["parameters"] == 645_665
    assert supervised["curves"]["train"][0]["loss"] > record["curves"]["train"][0]["loss"]


@pytest.mark.parametrize("network", ["unet", "fcn", "h_dense_unet", "pspnet", "unet3plus", "nnunet"])
def test_a_rivals_head_starts_at_the_prior_and_nothing_else_changes(network: str) -> None:
    drawn = Row("", "rival", network=network, widths=SMALL[network])
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (
            build(dataclasses.replace(drawn, head=head), 3, 0).eval()(image) for head in ("drawn", "prior")
        )
    moved = after - before
    torch.testing.assert_close(moved, moved.mean().expand_as(moved), atol=1e-5, rtol=0)
    # log(0.1 / 0.9) less what was drawn, of 4 or more inputs
    assert moved.mean().item() == pytest.approx(-2.197, abs=0.5)


def test_enlarged_rivals_are_as_ours_are() -> None:
    ours = Row("", "ours", widths={"deep_skips": False}, enlarge=2)
    rival = Row("", "rival", network="plain_unet", size="paper", enlarge=2)
    image = torch.randn(2, 3, 33, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second, plain = (
            build(row, 3, 0).eval()(image) for row in (ours, rival, dataclasses.replace(rival, enlarge=1))
        )
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    assert first.shape == plain.shape == (2, 1, 33, 48)
    assert not torch.allclose(first, plain, atol=1e-4)


def test_deepskips_heads_start_at_the_prior_with_the_optimizers_weights() -> None:
    ours = Row("", "ours")
    for head, low, high in (("drawn", 0, 0.02), ("prior", 0.1, 0.3)):
        conv = build(dataclasses.replace(ours, head=head), 3, 0).head
        assert torch.sigmoid(conv.bias).item() == pytest.approx(0.1)
        assert low < conv.weight.std() < high
    network = Supervised(build(ours, 3, 0))
    logits = network.train()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert logits.shape == (2, 4, 64, 64)
    torch.testing.assert_close(torch.sigmoid(logits).mean((0, 2, 3)), torch.full((4,), 0.1), atol=0.02, rtol=0)
    muon, adam = build_optimizer(OptimConfig(optimizer="muon"), network).param_groups
    heads = {id(p) for p in network.head.parameters()}
    assert len(heads) == 8
    assert heads <= {id(p) for p in adam["params"]}
    assert not heads & {id(p) for p in muon["params"]}


def test_files_that_are_no_category_are_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.npz"
    np.savez(path, keys=np.array(["a"]))
    with pytest.raises(ValueError, match=r"broken\.npz is not what jobs\.comparison\.data writes"):
        load(path, CPU)
    square = ("a", np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8), np.uint8))
    path.write_bytes(encode([square], ["train"])[:-200])
    with pytest.raises(ValueError, match=r"broken\.npz"):
        load(path, CPU)
