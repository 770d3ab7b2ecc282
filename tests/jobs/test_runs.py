import errno
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deepskip import checkpoint
from deepskip.config import Config
from deepskip.identity import OtherData, name_of
from deepskip.jobs import runs


def config(steps: int = 10, workers: int = 2) -> dict[str, Any]:
    return {"optim": {"steps": steps}, "cluster": {"workers": workers}, "run": {"name": None}}


def trained(storage: Path, name: str | None, settings: dict[str, Any], finish: bool) -> str:
    run = runs.claim(storage, name, "coins", settings)
    runs.record(run, settings, "mlflow-id")
    if finish:
        runs.write_json(run.folder / runs.SUMMARY, {"name": run.name})
    run.lock.close()
    return run.name


def test_an_unfinished_run_goes_on_and_a_finished_one_is_numbered_on(tmp_path: Path) -> None:
    assert trained(tmp_path, None, config(), finish=False) == "coins"
    # Other numbers of workers are the same training.
    run = runs.claim(tmp_path, None, "coins", config(workers=1))
    assert (run.name, run.mlflow_run_id) == ("coins", "mlflow-id")
    run.lock.close()
    assert trained(tmp_path, None, config(), finish=True) == "coins"
    assert trained(tmp_path, None, config(), finish=False) == "coins-2"
    assert trained(tmp_path, None, config(steps=11), finish=False) == "coins-3"


def test_a_run_in_progress_is_not_taken(tmp_path: Path) -> None:
    first = runs.claim(tmp_path, None, "coins", config())
    second = runs.claim(tmp_path, None, "coins", config())
    assert (first.name, second.name) == ("coins", "coins-2")
    with pytest.raises(runs.RunError, match="being trained by another process"):
        runs.claim(tmp_path, "coins", "x", config())


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    with pytest.raises(runs.RunError, match=r"cannot be locked: Function not implemented\. Set run\.storage"):
        runs.claim(tmp_path, None, "coins", config())
    assert [path.name for path in tmp_path.iterdir()] == ["coins"]


def test_a_folder_that_machines_do_not_share(tmp_path: Path) -> None:
    with pytest.raises(runs.NotShared, match=r"mine does not exist on .*; set run\.storage to a folder"):
        runs.check_shared(tmp_path / "mine", 0)
    trained(tmp_path, "mine", config(), finish=False)
    runs.check_shared(tmp_path / "mine", 0)


def test_a_named_run_of_other_settings_is_an_error(tmp_path: Path) -> None:
    trained(tmp_path, "mine", config(), finish=True)
    with pytest.raises(runs.RunError, match=r"has other settings \(optim\.steps\)"):
        runs.claim(tmp_path, "mine", "x", config(steps=5))
    with pytest.raises(runs.RunFinished, match="is finished"):
        runs.claim(tmp_path, "mine", "x", config())


def test_a_run_of_an_earlier_version_goes_on_with_settings_that_it_did_not_know(tmp_path: Path) -> None:
    trained(tmp_path, "mine", config(), finish=False)
    optim = config()["optim"]
    same = {"data": {"copy_paste": 0.0}, "model": {"enlarge": 1}, "optim": optim | {"momentum": 0.95}}
    run = runs.claim(tmp_path, "mine", "x", config() | same)
    run.lock.close()
    # The former values of other settings are unknown.
    for changed in ({"data": {"copy_paste": 0.5}}, {"data": {"shuffle_window": 16}}):
        [(key, _)] = changed["data"].items()
        with pytest.raises(runs.RunError, match=rf"has other settings \(data\.{key}\)"):
            runs.claim(tmp_path, "mine", "x", config() | changed)
    with pytest.raises(runs.RunError, match=r"has other settings \(optim\.momentum\)"):
        runs.claim(tmp_path, "mine", "x", config() | {"optim": optim | {"momentum": 0.9}})


def test_a_named_run_may_grow(tmp_path: Path) -> None:
    trained(tmp_path, "mine", config(), finish=True)
    run = runs.claim(tmp_path, "mine", "x", config(steps=20))
    assert run.mlflow_run_id == "mlflow-id"
    runs.record(run, config(steps=20), "mlflow-id")
    assert not (run.folder / runs.SUMMARY).exists()


def test_a_run_that_patience_ended_goes_on_with_more(tmp_path: Path) -> None:
    run = {"name": None, "patience": 3}
    trained(tmp_path, "mine", config() | {"run": run}, finish=False)
    runs.write_json(tmp_path / "mine" / runs.SUMMARY, {"stopped_early": True, "steps": 4})
    for patience in (3, 2):
        with pytest.raises(runs.RunFinished):
            runs.claim(tmp_path, "mine", "x", config() | {"run": run | {"patience": patience}})
    for patience in (4, 0):
        runs.claim(tmp_path, "mine", "x", config() | {"run": run | {"patience": patience}}).lock.close()
    runs.write_json(tmp_path / "mine" / runs.SUMMARY, {"stopped_early": False, "steps": 10})
    with pytest.raises(runs.RunFinished):
        runs.claim(tmp_path, "mine", "x", config() | {"run": run | {"patience": 0}})


def test_a_run_that_lost_its_record_is_known_by_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    trained(tmp_path, "mine", settings, finish=False)
    (tmp_path / "mine" / runs.RECORD).unlink()
    path = checkpoint.step_path(tmp_path / "mine", 4)
    path.parent.mkdir()
    path.write_bytes(b"")
    state = {"config": settings, "mlflow_run_id": "mlflow-id", "data": {}}
    monkeypatch.setattr(checkpoint, "newest", lambda folder: (state, []))
    with pytest.raises(runs.RunError, match=r"has other settings \(optim\.steps\)"):
        runs.claim(tmp_path, "mine", "x", config(steps=5))
    run = runs.claim(tmp_path, "mine", "x", settings)
    assert run.mlflow_run_id == "mlflow-id"


def test_how_often_a_run_looks_up_may_change(tmp_path: Path) -> None:
    pace = {"log_every": 10, "validate_every": 100, "checkpoint_every": 100, "patience": 0, "seed": 0}
    trained(tmp_path, "mine", config() | {"run": {"name": None, **pace}}, finish=False)
    other = {"log_every": 1, "validate_every": 7, "checkpoint_every": 3, "patience": 4, "seed": 0}
    runs.claim(tmp_path, "mine", "x", config() | {"run": {"name": None, **other}}).lock.close()
    with pytest.raises(runs.RunError, match=r"has other settings \(run\.seed\)"):
        runs.claim(tmp_path, "mine", "x", config() | {"run": {"name": None, **other, "seed": 1}})


def identities(samples: int = 8, tars: str = "a") -> dict[str, dict[str, str | int]]:
    counts = {"samples": samples, "shards": 2, "bands": 3, "num_classes": 1, "ignore_index": 255}
    split = {**counts, "contents": f"{samples}", "statistics": "s", "reading": "r", "tars": tars}
    return {"train": split, "val": split | {"samples": 2}}


def test_other_data_at_the_same_path_is_another_run(tmp_path: Path) -> None:
    mine, other = identities(), identities(9)
    # A run of an earlier version has recorded no data, and one of a later a digest.
    trained(tmp_path, "mine", config(), finish=True)
    run = runs.claim(tmp_path, "mine", "x", config(steps=20), mine)
    for recorded in (mine, {"train": "a", "val": "a"}):
        run.data = recorded  # type: ignore[assignment]
        runs.record(run, config(steps=20), "mlflow-id")
        run.lock.close()
        found = identities(9, tars="b")
        differing = "samples 9 instead of 8, other contents" if recorded is mine else "other tars"
        for steps in (20, 30):
            with pytest.raises(runs.RunError, match=rf"was trained on other data \(train has {differing}") as fault:
                runs.claim(tmp_path, "mine", "x", config(steps), found)
            assert f"give --data.accept {name_of(other)}; choose another run.name or remove" in str(fault.value)
            with pytest.raises(runs.RunError, match="was trained on other data"):
                runs.check_name(tmp_path / "mine", config(steps), found)
            runs.check_name(tmp_path / "mine", config(steps), mine)
            runs.claim(tmp_path, "mine", "x", config(steps), mine).lock.close()
        # A name that is chosen here gets a number.
        run = runs.claim(tmp_path, None, "mine", config(steps=20), found)
        assert run.name == "mine-2"
        run.lock.close()
        # On purpose: then the record has the new data, which needs no word the next time.
        run = runs.claim(tmp_path, "mine", "x", config(20) | {"data": {"accept": name_of(other)}}, found)
        runs.record(run, config(steps=20), "mlflow-id")
        run.lock.close()
        run = runs.claim(tmp_path, "mine", "x", config(steps=20), found)


def test_a_rank_that_loaded_other_data_than_the_job(tmp_path: Path) -> None:
    run = runs.claim(tmp_path, "mine", "x", config(), identities())
    runs.check_data(run.folder, identities(9))
    runs.record(run, config(), None)
    runs.check_data(run.folder, identities())
    with pytest.raises(OtherData, match=r"changed while the training .* started: train has samples 9 instead of 8"):
        runs.check_data(run.folder, identities(9))


def test_lanes_are_chosen_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def settings(lanes: int | str) -> Config:
        made = Config()
        made.optim.global_batch_size, made.data.lanes = 48, lanes  # type: ignore[assignment]
        return made

    def part(lanes: int | str, machines: int) -> int | str:
        asked = settings(lanes)
        run = runs.claim(tmp_path, "mine", "x", asdict(asked))
        runs.record(run, asdict(asked), None)
        runs.choose_lanes(run, asked, machines)
        run.lock.close()
        return asked.data.lanes

    assert part("auto", 2) == 8
    assert capsys.readouterr().out == "data.lanes is 8, for 2 machines\n"
    # It may resume on any number of machines, and with the number itself.
    assert (part("auto", 4), part(8, 1), part("auto", 1)) == (8, 8, 8)
    assert capsys.readouterr().out == ""
    for lanes in (1, 16):
        with pytest.raises(runs.RunError, match=r"has other settings \(data\.lanes\)"):
            part(lanes, 2)
    # A run of an earlier version has one lane.
    trained(tmp_path, "old", config(), finish=False)
    assert runs.claim(tmp_path, "old", "x", config() | {"data": {"lanes": "auto", "fixed_lanes": False}}).lanes == 1
    with pytest.raises(runs.RunError, match=r"has other settings \(data\.lanes\)"):
        runs.claim(tmp_path, "old", "x", config() | {"data": {"lanes": 8}})


def test_a_look_at_a_name_leaves_nothing(tmp_path: Path) -> None:
    runs.check_name(tmp_path / "new", config(), None)
    assert not list(tmp_path.iterdir())
    trained(tmp_path, "mine", config(), finish=True)
    # A finished run is no error, and the job prints its result.
    runs.check_name(tmp_path / "mine", config(), None)
    with pytest.raises(runs.RunError, match=r"has other settings \(optim\.steps\); choose another run\.name") as fault:
        runs.check_name(tmp_path / "mine", config(steps=5), None)
    with pytest.raises(runs.RunError) as claimed:
        runs.claim(tmp_path, "mine", "x", config(steps=5))
    assert str(fault.value) == str(claimed.value)
