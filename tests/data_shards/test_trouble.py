import errno
import os
from collections import Counter
from pathlib import Path

import pytest

from deepskip.data_shards import trouble


def behind(error: BaseException) -> BaseException:
    """Return an exception raised from another error, as libraries raise it."""
    try:
        try:
            raise error
        except BaseException as first:
            raise RuntimeError("not written") from first
    except RuntimeError as second:
        return second


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/a"),
            "the disk is full at /runs/a. Free some space, and",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full. Free some space, and"),
        (
            OSError(errno.EROFS, "Read-only file system", "/x"),
            "nothing can be written at /x: the file system is read-only.",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            "permission denied at /x. Give this user the permission",
        ),
        (OSError(errno.EMFILE, "Too many open files", "/x"), "too many files are open at /x: this process may have"),
        (MemoryError(), "there is not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "there is not enough memory"),
        (RuntimeError("can't start new thread"), "there is not enough memory"),
        (ImportError("a.so: failed to map segment from shared object"), "there is not enough memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "/dev/shm is too small"),
        (RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"), "/dev/shm is too small"),
    ],
)
def test_what_a_machine_is_short_of_is_said_whatever_it_led_to(error: BaseException, said: str) -> None:
    for found in (error, behind(error)):
        text = trouble.in_words(found, "it resumes")
        assert text is not None
        assert text.startswith(said)
        assert text.endswith(", and it resumes.")


def test_other_errors_stay_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert trouble.in_words(None) is None
    assert trouble.in_words(ValueError("No space left")) is None
    assert trouble.in_words(FileNotFoundError(errno.ENOENT, "No such file", "/x")) is None
    with pytest.raises(ValueError, match="as it is"), trouble.told():
        raise ValueError("as it is")
    with pytest.raises(SystemExit) as ended, trouble.told():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert ended.value.code == trouble.STATUS
    assert capsys.readouterr().err == "error: the disk is full. Free some space, and the same command resumes.\n"


def test_pipes_and_links_in_a_folder_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from deepskip.data_shards.sources.folder import list_files
    from deepskip.jobs.prediction.inputs import walk

    for name in ("a.png", "deep/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "deep" / "itself").symlink_to(tmp_path / "deep")
    # A second way to a folder is followed if it does not lead back.
    (tmp_path / "again").symlink_to(tmp_path / "deep")
    found = [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path)]
    assert found == ["a.png", "again/b.png", "deep/b.png"]
    said = capsys.readouterr().err
    assert said.count("a link back to a folder that it is in") == 4
    assert f"skipped {tmp_path / 'pipe.png'}: it is " in said
    assert f"skipped {tmp_path / 'gone.png'}: it is a link to nothing" in said
    assert [path.stem for path in list_files(tmp_path, Counter())] == ["a"]
    assert "pipe.png: it is not a file" in capsys.readouterr().err
