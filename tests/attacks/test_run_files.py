"""Torn, garbled or linked files of a run are repaired with a message, or raise one error with the cure."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepskip.jobs import journal, runs

CONFIG: dict[str, Any] = {"optim": {"steps": 10}, "run": {"name": None}}
RECORD = json.dumps({"config": CONFIG, "mlflow_run_id": "x"})
GOOD = '["train", 1, {"loss": 0.5}, 5]\n'


def claim(folder: Path) -> runs.Run:
    """Claim the run `r` of a folder."""
    return runs.claim(folder, "r", "r", CONFIG)


def made(folder: Path, name: str, contents: str | bytes) -> Path:
    """Make the run with its record and one more file."""
    (folder / "r").mkdir()
    (folder / "r" / "run.json").write_text(RECORD)
    path = folder / "r" / name
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


GARBAGE: dict[str, str | bytes] = {
    "half": "{", "a list": "[1]", "a number": "7", "not UTF-8": b"\xff\xfe", "deep": "[" * 200_000, "zeros": bytes(64),
    "text": "hello\n",
}  # fmt: skip


@pytest.mark.parametrize("name", ["run.json", "summary.json", "machines.json", ".pen"])
@pytest.mark.parametrize("kind", [*GARBAGE, "nothing"])
def test_garbage_in_a_json_file_is_one_error_with_the_cure(tmp_path: Path, name: str, kind: str) -> None:
    path = made(tmp_path, name, GARBAGE.get(kind, ""))
    with pytest.raises(
        runs.RunError, match=rf"{path} (is not valid JSON|holds no JSON object).*Remove it and run the same command"
    ):
        claim(tmp_path)
    path.unlink()
    # The cure in the message works.
    claim(tmp_path).lock.close()


@pytest.mark.parametrize(
    "record",
    [{"a": 1}, {"config": []}, {"config": {}}, {"config": {"optim": 3}}, {"config": {"optim": {"steps": "many"}}}],
)
def test_a_record_without_settings(tmp_path: Path, record: dict[str, Any]) -> None:
    made(tmp_path, "run.json", json.dumps(record))
    with pytest.raises(runs.RunError, match=r"run\.json holds no settings of a training\. Remove it"):
        claim(tmp_path)


@pytest.mark.parametrize(
    ("left", "cut"),
    [(b'["tra', 5), (bytes(4096), 4096), (b"\xff\xfe", 2), (b"[" * 9000, 9000), (GOOD.encode()[:-1], len(GOOD) - 1)],
)  # fmt: skip
def test_a_torn_last_line_is_ignored_until_the_next_is_written(
    tmp_path: Path, left: bytes, cut: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path, journal.MEASURED, GOOD.encode() + left)
    claim(tmp_path).lock.close()
    assert f"{path}: ignored the incomplete last line ({cut} bytes)" in capsys.readouterr().out
    # Another process may be writing it.
    assert path.read_bytes() == GOOD.encode() + left
    journal.write_down(path, "train", 2, {"loss": 0.25})
    assert [(kind, step, values) for kind, step, values, _ in journal.read_measured(path)] == [
        ("train", 1, {"loss": 0.5}), ("train", 2, {"loss": 0.25}),
    ]  # fmt: skip
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ["xx", '["train", 1]', '{"a": 1}', "7", "\xff", '["train", "1", {}, 5]', '["train", 1, {"loss": "x"}, 5]']
)
def test_a_line_of_garbage_is_one_error_with_the_cure(tmp_path: Path, line: str) -> None:
    path = made(tmp_path, journal.MEASURED, f"{GOOD}{line}\n{GOOD}".encode("latin1"))
    with pytest.raises(
        runs.RunError, match=rf"{path}, line 2 is not one that DeepSkip writes.*Remove that line, or the file"
    ):
        claim(tmp_path)


@pytest.mark.parametrize("line", ["x}", '{"split": "a"}', "[]", '{"split": 1, "shard": "a", "key": "b"}'])
def test_garbage_among_the_samples_left_out(tmp_path: Path, line: str) -> None:
    path = made(tmp_path, journal.BAD_SAMPLES, f"{line}\n")
    with pytest.raises(runs.RunError, match=rf"{path}, line 1 is not one that DeepSkip writes"):
        claim(tmp_path)


@pytest.mark.parametrize("name", [".lock", journal.MEASURED, journal.BAD_SAMPLES])
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str, there: bool) -> None:
    victim = tmp_path / "victim"
    if there:
        victim.write_text("precious")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / name).symlink_to(victim)
    journal.write_down(tmp_path / "r" / journal.MEASURED, "train", 1, {})
    if name == ".lock" or there:
        with pytest.raises(runs.RunError, match="is a symbolic link, through which nothing is written; remove it"):
            claim(tmp_path)
    assert victim.exists() == there
    assert not there or victim.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_journal_on_a_full_disk_keeps_whole_lines_and_goes_on(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from deepskip.jobs import journal
path, filler = Path("metrics.jsonl"), Path("filler")
filler.write_bytes(bytes(4096))
for step in range(300):
    journal.write_down(path, "train", step, {"loss": 0.123456789})
assert path.read_bytes().endswith(b"\\n"), path.read_bytes()[-30:]
before = journal.read_measured(path)
assert 10 < len(before) < 299, len(before)
filler.unlink()
journal.write_down(path, "train", 300, {"loss": 1.0})
after = journal.read_measured(path)
assert after[:-1] == before and after[-1][1] == 300
print("well")
"""
    disk = tmp_path / "disk"
    disk.mkdir()
    line = f"mount -t tmpfs -o size=16k none {disk} && cd {disk} && exec {sys.executable} -c '{code}'"
    done = subprocess.run(["unshare", "-m", "sh", "-c", line], capture_output=True, text=True, check=False)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("this machine lets nobody mount a small disk")
    assert done.stdout.strip() == "well", done.stderr
