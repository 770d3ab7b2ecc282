"""Folders import only what they may, read from the source, and files and functions are short."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("cluster", "data_shards", "deepskip", "jobs", "kernels")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "cluster": ("cluster",),
    "data_shards": ("data_shards",),
    "kernels": ("kernels",),
    # These prepare an image before the network, and read files wherever they are.
    "deepskip": ("deepskip", "kernels", "data_shards.preparation", "data_shards.storage"),
    "jobs": ROOMS,
}
# deepskip knows neither Ray nor tar files nor the tracker.
FOREIGN = {"deepskip": {"ray", "webdataset", "mlflow", "tarfile"}, "kernels": {"ray", "webdataset", "mlflow"}}
LONGEST_FILE, LONGEST_FUNCTION = 500, 100


def imported(path: Path) -> set[str]:
    """Return the full names that a file imports: modules, or names from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    # The folders belong to one package and lie next to each other.
    rooms = tuple(f"deepskip.{room}" for room in ROOMS if room != "deepskip")
    return {name.removeprefix("deepskip.") if is_in(name, rooms) else name for name in names}


def is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        # deepskip.train joins the network with the shards. A folder with its old name imports its new one.
        up = {"__init__": ("jobs.train",), "__main__": ("jobs.cli",)}.get(path.stem, ()) if room == "deepskip" else ()
        allowed = (*MAY_IMPORT[room], "deepskip.old_names", *up)
        for name in imported(path):
            assert not is_in(name, ROOMS) or is_in(name, allowed), (path, name)
            assert name.split(".")[0] not in FOREIGN.get(room, set()), (path, name)


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_files_and_functions_are_short_and_files_named_for_what_they_hold(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert path.stem not in ("utils", "helpers", "common"), path
        assert len(path.read_text().splitlines()) <= LONGEST_FILE, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, (path, node.name)


# The extras that each list is compiled of: by make lock, and by tests/hashes.sh.
@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("requirements.lock", ("test", "docs", "export", "geo", "ingest", "networks", "serve", "stream", "train")),
        ("requirements-cluster.txt", ("train", "cloud", "export", "geo", "ingest", "serve", "server", "stream")),
    ],
)
def test_every_dependency_is_pinned(file: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {normal(name) for name in re.findall(r"^([\w.-]+)==", (ROOT / file).read_text(), re.MULTILINE)}
    for each in [
        *project["dependencies"],
        *(one for extra in extras for one in project["optional-dependencies"][extra]),
    ]:
        name = normal(re.split(r"[\[<>=; ]", each)[0])
        assert name == "deepskip" or name in pinned, name


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_one_place_steps_an_optimizer() -> None:
    """Check that all training shares one step, since a second one would diverge."""
    stepping = [
        path for room in ROOMS for path in (ROOT / room).rglob("*.py") if "optimizer.step()" in path.read_text()
    ]
    assert stepping == [ROOT / "deepskip" / "training_step.py"]
