"""All code blocks of the pages run at toy size, or state why they do not."""

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
import traceback
from pathlib import Path

import numpy as np
import pytest
import yaml

from deepskip.jobs import cli
from tests.blocks import KINDS, Block, blocks, commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md") if (ROOT / name).exists()]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
WITH_BLOCKS = [page for page in PAGES if any(True for _ in blocks(page))]
# These run in another environment, by tests/readers.
ELSEWHERE = "make test-readers runs it"
# At most this many blocks may be skipped. A page whose blocks can no longer run needs a look.
NOT_RUN = 25
# These options make any training small. The last value of an option counts.
SMALL = (
    "--local", "--optim.steps=2", "--optim.warmup_steps=1", "--optim.global_batch_size=2", "--run.tracking_uri=none",
    "--run.panels=0", "--cluster.workers=1", "--model.base_channels=4", "--data.crop=64",
)  # fmt: skip
# Data and runs that most pages use without making them, and the options that name what a command makes.
GIVEN = ("data/coins", "data/mine", "runs/coins", "runs/mine")
MAKES = {"--out": "", "--run.name": "runs/"}
FEW = ("--train", "6", "--val", "2", "--test", "2")


def at_toy_size(words: list[str]) -> list[str]:
    """Return the words of a deepskip command, changed to run quickly."""
    if words[0] == "train":
        # DeepSkip's widths are an error with another network, and other ones with the weights of a file.
        other = bool({"--model.network", "--run.weights"} & set(words))
        return [*words, *(word for word in SMALL if not (other and word.startswith("--model.base_channels")))]
    return [*words, *FEW] if words[:2] == ["pack", "coins"] else words


def in_child(words: list[str], folder: Path) -> str:
    """Run a deepskip command in a fork, which has torch loaded; return its output, or raise if it failed."""
    printed = folder / ".printed"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(folder)
            with printed.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    cli.main(words)
                    status = 0
                except SystemExit as ended:
                    status = 0 if not ended.code else 1
                    out.write("" if ended.code in (None, 0) else f"\n{ended.code}")
                except BaseException:
                    traceback.print_exc(file=out)
                out.flush()
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    text = printed.read_text()
    assert status == 0, f"deepskip {' '.join(words)}\n{text}"
    return text


def without(words: list[str], given: set[str], folder: Path) -> None:
    """Remove what the world gave if a deepskip command makes it: the page begins before it."""
    made = [prefix + words[words.index(option) + 1] for option, prefix in MAKES.items() if option in words]
    for name in given.intersection(made):
        shutil.rmtree(folder / name)
        given.remove(name)


def run(block: Block, folder: Path, given: set[str]) -> None:
    """Run a block; raise AssertionError if any of it fails."""
    if block.kind == "python":
        script = folder / "block.py"
        script.write_text(block.text)
        done = subprocess.run([sys.executable, script.name], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block.place}\n{done.stderr}"
        return
    for command in commands(block):
        # A command that runs in a fork has no shell to expand variables.
        words = shlex.split(command.replace("$PWD", str(folder)), comments=True)
        if words[0] == "deepskip" and not set(words) & {"|", ">", "&"}:
            without(words, given, folder)
            try:
                in_child(at_toy_size(words[1:]), folder)
            except AssertionError as failed:
                raise AssertionError(f"{block.place}: {failed}") from None
            continue
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, f"{block.place}: {command}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write what the pages mention: images, masks, arrays, a COCO file, shards and trained runs."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "examples" / "make_images.py"], cwd=folder, capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    images = sorted((folder / "images").iterdir())
    np.save(folder / "x.npy", np.zeros((4, 64, 64, 3), np.uint8))
    np.save(folder / "y.npy", np.eye(64, dtype=np.uint8)[None].repeat(4, 0))
    square = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 100, "bbox": [9, 9, 10, 10]}
    (folder / "instances.json").write_text(json.dumps({
        "images": [{"id": i + 1, "file_name": path.name, "height": 128, "width": 128} for i, path in enumerate(images)],
        "categories": [{"id": 1, "name": "coin"}],
        "annotations": [
            square | {"id": i + 1, "image_id": i + 1, "segmentation": [[9, 9, 19, 9, 19, 19, 9, 19]]}
            for i in range(len(images))
        ],
    }))  # fmt: skip
    in_child(["pack", "coins", "--out", "data/coins", *FEW], folder)
    in_child(
        ["pack", "folder", "--images", "images", "--masks", "masks", "--out", "data/mine", "--val_share", "0.2"], folder
    )
    (folder / "data" / "theirs" / "train").mkdir(parents=True)
    for shard in (folder / "data" / "mine" / "train").glob("*.tar"):
        shutil.copy(shard, folder / "data" / "theirs" / "train")
    for name in ("coins", "mine"):
        in_child(["train", f"data/{name}", "--run.name", name, *SMALL], folder)
    return folder


@pytest.mark.pages
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page: Path, world: Path, tmp_path: Path) -> None:
    folder, given = tmp_path / "page", set(GIVEN)
    shutil.copytree(world, folder, symlinks=True)
    for block in blocks(page):
        assert block.kind in KINDS, f"{block.place}: a code block names its language, one of {', '.join(KINDS)}"
        if block.reason or block.kind == "text":
            continue
        if block.kind == "yaml":
            yaml.safe_load(block.text)
        elif block.kind == "toml":
            tomllib.load(io.BytesIO(block.text.encode()))
        elif block.kind == "json":
            json.loads(block.text)
        else:
            run(block, folder, given)


def test_few_blocks_are_not_run() -> None:
    skipped = [block for page in PAGES for block in blocks(page) if block.reason not in ("", ELSEWHERE)]
    assert len(skipped) <= NOT_RUN, "\n".join(f"{block.place}: {block.reason}" for block in skipped)
