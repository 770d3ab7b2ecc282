"""The comparison's objects by size, and their IoU, from the small grid and a cell whose numbers are known by hand."""

from pathlib import Path

import pytest

from jobs.comparison import claims
from jobs.comparison.results import by_size, object_iou, over_categories, read
from tests.jobs.made_grid import table, write_grid


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grid(tmp_path_factory.mktemp("comparison") / "out")


def test_object_sizes_by_hand(grid: Path) -> None:
    results = read(grid)
    (objects, recall, iou), (none, *_) = by_size(results, "deepskip", results.categories)
    assert (objects, none) == (40, 0)
    # 5 of 10 and 9 of 30
    assert recall.value == pytest.approx(14 / 40)
    assert iou.value == pytest.approx((10 * 0.5 + 30 * 0.3) / 40)
    # 35 % of every network that has both categories, in every seed
    assert [row[1:5] for row in claims.sizes_rows(results, "deepskip")] == [
        ["**cannot be told**", "40", "+0.0", "35.0 ± 0.0"]
    ]
    # it lacks a category, and the objects of the others are other objects
    assert by_size(results, "fcn", results.categories)[0][0] == 0


def test_iou_of_an_object_by_hand(grid: Path) -> None:
    rows = [
        {"from": 0, "to": 16, "objects": 30, "found": 9, "iou": 0.25},
        {"from": 16, "to": 64, "objects": 0, "found": 0, "iou": None},
        {"from": 64, "to": None, "objects": 10, "found": 8, "iou": 0.75},
    ]
    # every object counts the same, of whatever size
    assert object_iou({"by_size": rows}) == pytest.approx((30 * 0.25 + 10 * 0.75) / 40)
    assert object_iou({"by_size": rows[1:2]}) is object_iou({}) is None
    # and every category: 50 % of coins, 30 % of small targets
    mean = over_categories(read(grid), "deepskip", "object_iou")
    assert (mean.value, mean.deviation, mean.seeds) == (pytest.approx(0.4), pytest.approx(0), 3)
    assert table(read(grid), "table-3-scores-default")["DEEPSKIP"]["IoU of an object"].startswith("**40.0 ± 0.0**")
