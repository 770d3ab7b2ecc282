"""Exported models, run by onnxruntime or by torch without our network, equal the model itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import deepskip
from deepskip import checkpoint
from deepskip.jobs import export, model_card
from deepskip.jobs.report import METRICS
from tests.deepskip.test_predictor import state_of

REPORT = {
    "model": {},
    "data": {"path": "data/val", "images": 2},
    "threshold": 0.5,
    "metrics": dict.fromkeys(METRICS, 0.5),
    "classes": [
        {"iou": 0.5, "best_threshold": 0.4, "at_best_threshold": dict.fromkeys(("iou", "f1", "precision", "recall"))}
    ],
    "by_size": [],
}  # fmt: skip
ODD = ((1, 37, 53), (2, 101, 33), (3, 45, 71))


def save(folder: Path, bands: int, classes: int, normalize: str, norm: str, enlarge: int) -> None:
    state = state_of(bands, classes, norm, longest_side=512)
    state["config"]["model"]["enlarge"] = enlarge
    rng = np.random.default_rng(0)
    state["config"]["data"]["normalize"] = normalize
    state["data"]["mean"], state["data"]["std"] = (rng.uniform(50, 200, bands).tolist() for _ in range(2))
    state["best"] = {"iou": 0.5, "dice": 2 / 3, "object_recall": float("nan"), "step": 7} | dict.fromkeys(
        ("pixel_accuracy", "precision", "recall", "f1", "false_alarms_per_image"), 0.25
    )
    checkpoint.save(state, folder / "runs" / "some" / checkpoint.FOLDER / checkpoint.BEST)


@pytest.mark.parametrize(
    ("bands", "classes", "normalize", "norm", "enlarge", "formats", "tolerance"),
    [
        (3, 1, "image", "batch", 1, ["onnx", "pt2"], 1e-4),
        (7, 4, "dataset", "sync-batch", 2, ["onnx"], 1e-4),
        # The dark image has little contrast, which instance norm amplifies. torch's own fp32 is 1e-4 from fp64.
        (7, 4, "dataset", "instance-batch", 1, ["onnx"], 2e-4),
    ],
)
def test_the_files_are_the_model_at_any_size_and_batch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bands: int,
    classes: int,
    normalize: str,
    norm: str,
    enlarge: int,
    formats: list[str],
    tolerance: float,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path, bands, classes, normalize, norm, enlarge)
    folder = tmp_path / "exports" / "some"
    folder.mkdir(parents=True)
    # what the same run's model of an earlier step left
    for name in ("README.md", *(f"model.{kind}" for kind in formats)):
        (folder / name).write_text("old")
    (folder / "model.json").write_text(json.dumps({"model": {"name": "runs/some", "weights": "0" * 64}}))
    export.main(["--model", "runs/some", "--formats", json.dumps(formats)])
    assert {path.name for path in folder.iterdir()} == {
        "model.json",
        "README.md",
        *(f"model.{kind}" for kind in formats),
    }
    model = deepskip.load("runs/some")
    graph = onnx.load(folder / "model.onnx")
    # The graph has only ONNX's own operators, and needs no second file.
    assert {node.domain for node in graph.graph.node} == {""}
    assert not graph.functions
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("image", ["batch", bands, "height", "width"])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("probabilities", ["batch", classes, "height", "width"])
    ]
    images = [np.random.default_rng(N).integers(0, 256, (N, H, W, bands)).astype(np.uint8) for N, H, W in ODD]
    # This image is dark, of little contrast, and large enough for sums in fp32 to lose digits.
    dark = np.random.default_rng(9).integers(99, 102, (1, 450, 450, bands)).astype(np.uint8)
    for image in (*images, dark):
        (found,) = session.run(None, {"image": image.transpose(0, 3, 1, 2).astype(np.float32)})
        np.testing.assert_allclose(found, model.predict_proba(image).transpose(0, 3, 1, 2), atol=tolerance)
    if "pt2" in formats:
        check_program(tmp_path, images, model)

    card = json.loads((folder / "model.json").read_text())
    assert (card["input"]["layout"], card["input"]["normalization"]) == (["batch", bands, "height", "width"], normalize)
    assert card["sizes"]["parameters"] == sum(p.numel() for p in model.network.parameters())
    assert card["sizes"]["file_bytes"]["model.onnx"] == (folder / "model.onnx").stat().st_size
    assert card["metrics"]["validation"]["iou"] == 0.5
    assert all(value <= 1e-4 for sizes in card["difference_from_pytorch"].values() for value in sizes.values())
    assert any("512 pixels a side" in limit for limit in card["limits"])
    said = {entry.key: entry.value for entry in graph.metadata_props}
    assert (said["bands"], said["threshold"]) == (str(bands), "0.5" if classes == 1 else "null")
    names = ["foreground"] if classes == 1 else [f"class {k}" for k in range(1, classes)]
    assert json.loads(said["classes"]) == names == card["output"]["classes"][-len(names) :]
    assert len(card["output"]["classes"]) == classes
    text = (folder / "README.md").read_text()
    assert "| IoU | 0.5000 |" in text
    assert "| object recall | undefined |" in text
    # By hand, a 3x3 convolution of the stage takes 2 * 9 * C * K operations a pixel.
    assert card["sizes"]["gigaflops"]["256 x 256"] == pytest.approx(
        enlarge**2 * flops_by_hand(bands, classes, 4, 3) / 1e9, rel=1e-6
    )


def check_program(folder: Path, images: list[np.ndarray], model: deepskip.Predictor) -> None:
    """Run model.pt2 with torch alone."""
    np.savez(folder / "images.npz", *[image.transpose(0, 3, 1, 2).astype(np.float32) for image in images])
    code = (
        "import sys, numpy, torch; program = torch.export.load('exports/some/model.pt2').module();"
        "images = numpy.load('images.npz');"
        "numpy.savez('found.npz', *[program(torch.from_numpy(images[n])).detach().numpy() for n in images.files]);"
        "assert not {'deepskip', 'kernels'} & set(sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, timeout=250)
    with np.load(folder / "found.npz") as found:
        for image, name in zip(images, found.files, strict=True):
            np.testing.assert_allclose(found[name], model.predict_proba(image).transpose(0, 3, 1, 2), atol=1e-4)


def flops_by_hand(bands: int, classes: int, b: int, levels: int) -> int:
    """Count two operations for each multiply-add of the convolutions, at 256 x 256."""
    pixels = [(256 // 2**u) ** 2 for u in range(levels)]
    c = [b * 2**u for u in range(levels)]
    total = sum(pixels[u] * 9 * ((bands if u == 0 else c[u - 1]) * c[u] + c[u] ** 2) for u in range(levels))
    for u in range(levels - 1):
        inputs = [*c[u : levels - 1], c[u + 1]]
        total += pixels[u] * 9 * (sum(inputs) * c[u] + len(inputs) * c[u] * c[u] + c[u] ** 2)
    return 2 * (total + pixels[0] * c[0] * classes)


def test_a_graph_that_is_not_the_model_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 3, 1, "image", "batch", 1)
    runner = export.program_runner
    monkeypatch.setattr(export, "program_runner", lambda data: lambda image: runner(data)(image) + 2e-4)
    with pytest.raises(SystemExit) as stopped:
        export.main(["--model", "runs/some", "--formats", "[pt2]"])
    assert stopped.value.code == 2
    assert "model.pt2 is not written: at 1 x 97 x 61 pixels its probabilities differ" in capsys.readouterr().err
    assert not (tmp_path / "exports").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "runs/none"], "error: model: runs/none does not exist"),
        (["--model", "runs/some", "--formats", "[tflite]"], "formats is"),
        (["--model", "runs/some", "--formats", "[]"], "error: formats is []"),
        (
            ["--model", "runs/some", "--evaluation", "none.json"],
            "error: evaluation is none.json: there is no such file",
        ),
        (
            ["--model", "runs/some", "--evaluation", "flips.json"],
            "error: evaluation is flips.json: it was made with --flips true, but exported files predict without flips",
        ),
        (
            ["--model", "runs/some", "--evaluation", "other.json"],
            "error: evaluation is other.json: it is of other, step 9, not of some",
        ),
        (["--model", "runs/some", "--out", "mine"], "error: mine holds README.md but no model.json"),
        (
            ["--model", "runs/some", "--out", "unknown"],
            "error: unknown/model.json does not say which model was exported",
        ),
        (
            ["--model", "runs/some", "--out", "another"],
            "error: another holds the export of another model, runs/another",
        ),
        (
            ["--model", "runs/some", "--out", "both", "--formats", "[pt2]"],
            "error: both holds model.onnx of an earlier export",
        ),
        (["--model", "runs/some", "--out", "flips.json/x"], "error: out is flips.json/x, but flips.json is a file"),
        (["--model", "runs/some", "--out", ""], "error: out is empty; name a folder"),
        *(
            (
                ["--model", "runs/some", "--evaluation", f"{name}.json"],
                f"error: evaluation is {name}.json: it is not a report of deepskip evaluate",
            )
            for name in ("text", "list", "empty", "hollow")
        ),
    ],
)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 3, 1, "image", "batch", 1)
    other = {"name": "runs/another", "weights": "0" * 64, "title": "other, step 9"}
    hollow = dict.fromkeys(("model", "data", "threshold", "metrics", "classes", "by_size"))
    reports = {"flips": REPORT | {"flips": True}, "other": REPORT | {"model": other}, "hollow": hollow}
    reports |= {"list": [1], "empty": {}}
    for name, report in reports.items():
        Path(f"{name}.json").write_text(json.dumps(report))
    Path("text.json").write_text("loss, 0.1")
    cards = {"mine": None, "unknown": {}, "another": {"model": other}, "both": {"model": {"name": "runs/some"}}}
    for folder, card in cards.items():
        Path(folder).mkdir()
        Path(folder, "README.md").write_text("mine")
        if card is not None:
            Path(folder, "model.json").write_text(json.dumps(card))
    Path("both/model.onnx").write_text("earlier")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        export.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_the_card_of_several_classes_tells_each() -> None:
    classes = [{"class": k, "iou": iou, "average_precision": 0.5} for k, iou in ((1, 0.25), (2, float("nan")))]
    lines = model_card.metrics_lines(None, REPORT | {"threshold": None, "classes": classes})
    assert "| 1 | 0.2500 | 0.5000 |" in lines
    assert "| 2 | undefined | 0.5000 |" in lines
