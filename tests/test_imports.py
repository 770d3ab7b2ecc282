"""The house's floors: what may import what, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("cluster", "data_shards", "deepskip", "jobs", "kernels")
MAY_IMPORT = {
    "cluster": {"cluster"},
    "data_shards": {"data_shards"},
    "kernels": {"kernels"},
    "deepskip": {"deepskip", "kernels"},
    "jobs": set(ROOMS),
}
# deepskip knows neither Ray nor tar files nor the tracker
FOREIGN = {"deepskip": {"ray", "webdataset", "mlflow", "tarfile"}, "kernels": {"ray", "webdataset", "mlflow"}}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        names = imported(path)
        if path == ROOT / "deepskip" / "__init__.py":
            # deepskip.train, which joins the network with the shards
            names -= {"jobs"}
        assert not names & (set(ROOMS) - MAY_IMPORT[room]), path
        assert not names & FOREIGN.get(room, set()), path


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_files_are_short_and_named_for_what_they_hold(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert path.stem not in ("utils", "helpers", "common"), path
        assert len(path.read_text().splitlines()) <= 500, path
