import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest

from deepskip.data_shards.commands import pack_coins
from deepskip.jobs import submit, train
from deepskip.jobs.settings import NotHere
from deepskip.jobs.submit import Screen, look, main


def test_progress_stays_on_one_line_of_a_terminal() -> None:
    screen = Screen(terminal=True, columns=20)
    text = "".join(screen.show(line, 0.0) for line in ("hello", "step 1/9 loss 1", "step 2/9 " + "x" * 40, "done"))
    assert text == "hello\n\rstep 1/9 loss 1\x1b[K\rstep 2/9 xxxxxxxxxx\x1b[K\ndone\n"


def test_elsewhere_progress_comes_now_and_then_and_the_last_line_always() -> None:
    screen = Screen(terminal=False)
    text = "".join(screen.show(f"step {t}", float(t)) for t in range(25))
    assert text == "step 0\nstep 10\nstep 20\n"
    assert screen.show("done", 25.0) == "step 24\ndone\n"
    assert screen.rest() == ""


def test_errors_of_a_job_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    class Client:
        async def tail_job_logs(self, submission: str) -> AsyncIterator[str]:
            for text in ("training\nstep 1/", "2\nerr", "or: the disk is full\n", "error: cut"):
                yield text

    asyncio.run(submit.follow(Client(), "train-1", Screen(terminal=False)))  # type: ignore[arg-type]
    said = capsys.readouterr()
    assert (said.out, said.err) == ("training\nstep 1/2\n", "error: the disk is full\nerror: cut\n")


def test_what_ray_says_first_is_not_shown() -> None:
    screen = Screen(terminal=False)
    assert screen.show("Running entrypoint for job train-1: sh -c ...", 0.0) == ""
    assert screen.show("2026-11-24 02:58:10,482\tINFO job_manager.py:581 -- Runtime env is setting up.", 0.0) == ""


def test_unknown_jobs_are_named_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["trian"])
    assert stopped.value.code == 2
    assert "unknown job trian; jobs are compare, evaluate, export, predict, serve, train" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["", "http://127.0.0.1:1"])
def test_what_a_clusters_machines_may_have_does_not_stop_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", address)
    absent = {
        "train": ["--data.path", "/shared/mine"],
        "evaluate": ["--model", "/shared/runs/mine"],
        "export": ["--checkpoint", "/shared/runs/mine"],
        "predict": ["--model", "/shared/runs/mine", "--images", "/shared/images", "--out", "/shared/out"],
        "serve": ["--model", "/shared/runs/mine"],
    }
    report = ["--model", "/shared/runs/mine", "--evaluation", "/shared/report.json"]
    token = ["--model", "/shared/runs/mine", "--token_file", "/shared/token"]
    for job, arguments in [*absent.items(), ("export", report), ("serve", token)]:
        if address:
            look(f"deepskip.jobs.{job}", arguments)
            found = "not on this machine, so checked by the job: "
        else:
            with pytest.raises(NotHere):
                look(f"deepskip.jobs.{job}", arguments)
            found = "error: "
        said = capsys.readouterr().err
        assert said.startswith(found)
        assert "/shared/" in said
    # These settings are wrong on all machines.
    with pytest.raises(SystemExit) as stopped:
        look("deepskip.jobs.train", ["--data.path", "/shared/mine", "--data.crop", "-1"])
    assert (stopped.value.code, type(stopped.value)) == (2, SystemExit)
    assert capsys.readouterr().err.startswith("error: data.crop is -1")


def test_a_cluster_whose_agents_still_start_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    said = "Request failed with status code 500: {}, please try again later."
    say = f"echo >> {asked}; echo '{said}'; test $(wc -l < {asked}) -gt 2"
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    submit.hand_over(["sh", "-c", say.format("No available agent to submit job")], "http://127.0.0.1:1")
    assert asked.read_text().count("\n") == 3
    asked.unlink()
    with pytest.raises(submit.SubmitError, match="Request failed with status code 500: out of order"):
        submit.hand_over(["sh", "-c", say.format("out of order")], "http://127.0.0.1:1")
    assert asked.read_text().count("\n") == 1


def test_a_run_of_other_data_or_settings_is_found_before_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*_: object, **__: object) -> NoReturn:
        raise AssertionError("Ray was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(submit, "start_head", started)
    for name, seed_images in (("one", 4), ("other", 6)):
        pack_coins(tmp_path / name, {"train": seed_images, "val": 2})
    settings = ["--run.name", "mine", "--optim.steps", "1", "--data.crop", "32", "--model.base_channels", "4"]
    settings += ["--model.levels", "3", "--run.tracking_uri", "none", "--cluster.gpu", "false", "--run.panels", "0"]
    train.main(["--local", "--data.path", "one", *settings])
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    noted = json.loads((tmp_path / "runs" / "mine" / "run.json").read_text())["data"]
    assert noted.keys() == {"train", "val"}
    same = ["train", "--data.path", "one", *settings]
    # Each case is (arguments, reason).
    cases = [
        (["train", "--data.path", "other", *settings], "has other settings (data.path)"),
        (
            [*same, "--optim.learning_rate", "0.1", "--run.seed", "3"],
            "has other settings (optim.learning_rate, run.seed)",
        ),
    ]
    capsys.readouterr()
    for arguments, reason in cases:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        said = capsys.readouterr()
        assert stopped.value.code == 2
        folder = tmp_path / "runs"
        assert (
            said.err == f"error: run mine in {folder} {reason}; choose another run.name or remove {folder / 'mine'}\n"
        )
        assert said.out == ""
    # The same shards, packed again, are the same data, so the job reaches Ray.
    pack_coins(tmp_path / "again", {"train": 4, "val": 2})
    (tmp_path / "one").rename(tmp_path / "first")
    (tmp_path / "again").rename(tmp_path / "one")
    for arguments in (same, [*same, "--run.log_every", "3"], [*same, "--optim.steps", "2"]):
        with pytest.raises(AssertionError, match="Ray was started"):
            main(arguments)
    # Other shards lie at the same path.
    (tmp_path / "one").rename(tmp_path / "again")
    (tmp_path / "other").rename(tmp_path / "one")
    with pytest.raises(SystemExit):
        main(same)
    assert "was trained on other data (train has samples " in capsys.readouterr().err
    # It may have another name, or run on machines where the folder may be another one.
    with pytest.raises(AssertionError, match="Ray was started"):
        main([*same, "--run.name", "new"])
    monkeypatch.setenv("RAY_ADDRESS", "http://head.example:8265")
    submit.look("deepskip.jobs.train", same[1:])
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
