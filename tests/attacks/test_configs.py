"""Untrusted settings import nothing that they name, and unfold to no more than they show."""

import os
import sys
from pathlib import Path

import pytest

from deepskip.jobs import settings
from deepskip.jobs.options import PredictConfig
from tests.attacks import forked

ALIASES = "x: &a0 [1]\n" + "".join(f"y{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
TRAININGS = {
    "a class for a section": "model:\n  class_path: evilmod.X\n",
    "a class and its arguments": "model:\n  class_path: evilmod.X\n  init_args: {}\n",
    "a class for a value": "data:\n  path: {class_path: evilmod.X}\n",
    "a class behind an alias": "a: &a {class_path: evilmod.X}\nmodel: *a\n",
    "a class by merging": "a: &a {class_path: evilmod.X}\nmodel: {<<: *a}\n",
    "a quoted class": 'model:\n  "class\\x5fpath": evilmod.X\n',
    "a class in JSON": '{"model": {"class_path": "evilmod.X"}}',
    "arguments alone": "model: {init_args: {base_channels: 4}}\n",
    "a call": "run:\n  name: {class_path: os.system, init_args: {command: touch PWNED}}\n",
    "a module for a section": "model: evilmod.X\n",
    "a class by its inner name": "model: {__class__: evilmod.X}\n",
    "a Python object": "model: !!python/object/apply:os.system ['touch PWNED']\n",
    "itself": "config: c.yaml\n",
    "itself in a list": "config:\n- c.yaml\n",
    "a value that holds itself": "model: &a {network: *a}\n",
    "aliases that unfold": ALIASES,
    "aliases that unfold within a section": "model: " + "{options: {a: &a [1], b: &b [*a, *a]}}\n" + ALIASES,
    "brackets": "a: " + "[" * 20_000 + "\n",
    "closed brackets": "a: " + "[" * 5_000 + "]" * 5_000 + "\n",
    "ten megabytes": "a: " + "x" * 10**7,
    "a hundred thousand keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "no text": "\x00\x01\x02",
    "infinite steps": "optim: {steps: .inf}\n",
    "too many steps": "optim: {steps: 1e400}\n",
    "digits": "optim: {steps: " + "9" * 5000 + "}\n",
    "a name with NUL": 'run: {name: "a\\0b"}\n',
    "a name that leads out": "run: {name: ../../escape}\n",
    "a long name": "run: {name: " + "x" * 5000 + "}\n",
    "an empty name": "run: {name: ''}\n",
    "a name that is the folder": "run: {name: .}\n",
    "another's home": "run: {name: '~'}\n",
    "binary": "run: {name: !!binary aGk=}\n",
    "a date": "run: {name: 2026-01-01}\n",
}


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a module that leaves a trace when it is imported, to a place where Python finds it."""
    (tmp_path / "evilmod.py").write_text("import pathlib; pathlib.Path('PWNED').touch()\nclass X: ...\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*argv: str, job: type | None = None) -> str:
    """Read settings as a command does; return the settings as text, or the error that ended it."""
    try:
        return str(
            settings.parse_settings("predict", job, list(argv)) if job else settings.parse("train", list(argv))[0]
        )
    except SystemExit as ended:
        return f"refused: {ended.__notes__[0]}" if ended.code == 2 else f"exit status {ended.code}"


@pytest.mark.parametrize("name", TRAININGS)
def test_settings_that_would_run_code_or_take_long(name: str, evil: Path) -> None:
    Path("c.yaml").write_text(TRAININGS[name])
    for argv, job in (
        (("--config", "c.yaml"), None),
        (("--config=c.yaml",), None),
        (("--config", "c.yaml"), PredictConfig),
    ):
        outcome = forked.run(lambda argv=argv, job=job: read(*argv, job=job))
        assert (outcome.error, outcome.killed) == ("", 0), f"{outcome.error}: {outcome.said}"
        assert "refused: " in outcome.said or name in ("a date", "another's home", "infinite steps"), outcome.said
        assert outcome.megabytes < 300
        assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    "argv",
    [["--model.class_path", "evilmod.X"], ["--model={class_path: evilmod.X}"], ["--model", '{"class_path": "evilmod.X"}'],
     ["--config", '{"model": {"class_path": "evilmod.X"}}'], ["--model.options", "{a: {class_path: evilmod.X}}"],
     ["--model.options", ALIASES], ["--run.name", "{class_path: evilmod.X}"]],
)  # fmt: skip
def test_words_that_would_run_code_or_take_long(argv: list[str], evil: Path) -> None:
    outcome = forked.run(lambda: read(*argv))
    assert (outcome.error, outcome.killed) == ("", 0), f"{outcome.error}: {outcome.said}"
    assert "refused: " in outcome.said
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("row", ["evilmod.X", "{class_path: evilmod.X}", "{settings: {class_path: evilmod.X}}"])
def test_rows_of_a_comparison_that_would_run_code(row: str, evil: Path) -> None:
    from deepskip.jobs.comparison.grid import Grid

    Path("c.yaml").write_text(f"networks: {{unet: {row}}}\ncategories: {{coins: coins.yaml}}\n")
    outcome = forked.run(lambda: read("--config", "c.yaml", job=Grid))
    assert (outcome.error, outcome.killed) == ("", 0), f"{outcome.error}: {outcome.said}"
    assert "refused: " in outcome.said
    assert not Path("PWNED").exists()


def test_a_file_of_settings_that_is_none(evil: Path) -> None:
    os.mkfifo("pipe.yaml")
    for path, reason in (
        ("pipe.yaml", "is not a regular file"),
        (".", "is not a regular file"),
        ("nowhere.yaml", "nowhere.yaml"),
    ):
        outcome = forked.run(lambda path=path: read("--config", path))
        assert not outcome.killed
        assert "refused: " in outcome.said
        assert reason in outcome.said
