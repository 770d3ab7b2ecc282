"""The command `deepskip`: its commands, what they import, and the old names."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepskip.data_shards.commands import pack_coins
from deepskip.jobs import cli

ROOT = Path(__file__).parents[2]


def run(code: str, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_no_help_loads_torch() -> None:
    helps = [["--help"], *([name, "--help"] for name in cli.COMMANDS), ["pack", "folder", "--help"]]
    found = run(
        f"import sys\nfrom deepskip.jobs.cli import main\nfor words in {helps!r}:\n"
        "    try: main(words)\n    except SystemExit as end: assert not end.code, words\n"
        "    assert not {'torch', 'ray', 'mlflow'} & set(sys.modules), words"
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("usage: deepskip") == len(helps)


def test_importing_the_package_loads_nothing_large() -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules)"
    found = run(
        f"import sys, deepskip\nassert not {heavy}\nprint(deepskip.__version__, deepskip.DeepSkipUNet(3, 1).levels)"
    )
    assert found.stdout == "0.1.0 5\n", found.stderr
    # The compiler takes a second or two to import.
    late = "{'torch._dynamo', 'matplotlib', 'mlflow', 'ray', 'triton'} & set(sys.modules)"
    found = run(f"import sys, deepskip.trainer, deepskip.jobs.predict, deepskip.jobs.train\nassert not {late}, {late}")
    assert found.returncode == 0, found.stderr
    assert run("import deepskip; deepskip.nothing").stderr.endswith("has no attribute 'nothing'\n")


def test_overview_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as ended:
        cli.main(["trian"])
    assert ended.value.code == 2
    assert "unknown command 'trian' (did you mean train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["pack", "coins", "--out", ""], "--out"),
        (["pack", "folder", "--images="], "--images"),
        (["preview", ""], "an argument"),
        (["predict", "--model", "coins", "--images", "a", "", "--out", "b"], "an argument"),
    ],
)
def test_an_empty_text_is_not_the_current_folder(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {named} is empty; give it a value, or leave it out\n"
    assert not list(tmp_path.iterdir())


def test_pack_train_order_and_evaluate(tmp_path: Path) -> None:
    """Run the commands as a person types them; the stream's own order is the expected one."""

    def deepskip(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "deepskip", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    deepskip("pack", "coins", "--out", "coins", "--train", "6", "--val", "2", "--test", "2")
    order = deepskip("order", "coins/train", "--global-batch-size", "3", "--steps", "2")
    steps = [json.loads(line) for line in order.splitlines()]
    assert len({key for step in steps for key in step["keys"]}) == 6
    deepskip(
        "train", "coins", "--local", "--run.name", "some", "--optim.steps", "1", "--model.base_channels", "2",
        "--run.tracking_uri", "none",
    )  # fmt: skip
    said = deepskip("evaluate", "--model", "runs/some", "--data", "coins/test", "--track", "none", "--out", "report")
    assert "report: report/report.json" in said
    assert "object recall" in said


def test_the_old_names_are_the_same_modules(tmp_path: Path) -> None:
    code = (
        "from data_shards.dataset import Shards\nimport jobs, kernels, cluster.local\n"
        "import deepskip.data_shards.dataset as new, deepskip.jobs, deepskip.kernels, deepskip.cluster.local\n"
        "assert Shards is new.Shards and jobs is deepskip.jobs and kernels.conv3 is deepskip.kernels.conv3\n"
        "assert cluster.local is deepskip.cluster.local and new.__spec__.name == 'deepskip.data_shards.dataset'"
    )
    found = run(code)
    assert found.returncode == 0, found.stderr
    assert len([line for line in found.stderr.splitlines() if line.startswith("note: ")]) == 4
    for module, new in (("jobs.train", "deepskip train"), ("data_shards", "deepskip pack")):
        old = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert old.returncode == 0, old.stderr
        assert old.stdout.startswith("usage: deepskip")
        assert f"is now `{new}" in old.stderr
        assert "Traceback" not in old.stderr
    # A module of another package with such a name is not touched.
    (tmp_path / "jobs.py").write_text("mine = 1\n")
    assert run("import deepskip, jobs; print(jobs.mine)", cwd=tmp_path).stdout == "1\n"


def test_what_the_base_installation_does_and_what_a_missing_extra_is_called(tmp_path: Path) -> None:
    """Check an installation without [train]: a model predicts and is evaluated, Ray and packing name what they need."""
    model = str(ROOT / "tests" / "golden" / "stored" / "checkpoint.pt")
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(tmp_path / "some.png")
    without = f"import sys\nfor name in {cli.EXTRAS['train']!r}: sys.modules[name] = None\n"

    def deepskip(*words: str) -> subprocess.CompletedProcess[str]:
        return run(f"{without}from deepskip.jobs.cli import main; main({list(words)!r})", cwd=tmp_path)

    predicted = deepskip("predict", "--model", model, "--images", "some.png", "--out", "out")
    assert predicted.returncode == 0, predicted.stderr
    assert (tmp_path / "out" / "masks" / "some.png").is_file()
    exported = deepskip("export", "--model", model, "--formats", "pt2")
    assert exported.returncode == 0, exported.stderr
    pack_coins(tmp_path / "packed")
    evaluated = deepskip("evaluate", "--model", "coins", "--data", "packed/val")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "MLflow: not installed" in evaluated.stdout
    assert len(list((tmp_path / "evaluations").rglob("report.json"))) == 1
    for words, package in (
        (("pack", "coins", "--out", "x"), "braceexpand"),
        (("train", "packed"), "ray"),
    ):
        refused = deepskip(*words)
        assert refused.returncode == 2, refused.stderr
        message = f"error: deepskip {words[0]} needs {package}, which is not installed: pip install '.[train]'"
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
