import math
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepskip.config import ClusterConfig, Config, check_values
from deepskip.data_shards import storage
from deepskip.data_shards.scan import BrokenShard, UnreachedShard
from deepskip.jobs import runs
from deepskip.jobs.settings import parse
from deepskip.jobs.training import allocation, driver, reports, restarts, worker
from deepskip.jobs.training.events import Fatal, Measured, Warned


def test_workers_are_a_number_or_a_range() -> None:
    assert parse("train", ["--cluster.workers", "3"])[0].cluster.workers == 3
    assert parse("train", ["--cluster.workers", "[1, 3]"])[0].cluster.workers == (1, 3)
    assert parse("train", [])[0].cluster.workers is None


@pytest.mark.parametrize("workers", [0, (0, 2), (3, 2)])
def test_workers_that_cannot_be_are_named(workers: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"cluster\.workers is"):
        check_values(Config(cluster=ClusterConfig(workers=workers)))


def test_an_outage_of_the_storage_is_left_to_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    queue = SimpleNamespace(
        is_over=SimpleNamespace(remote=lambda: False), put=SimpleNamespace(remote=lambda event: told.append(event))
    )
    monkeypatch.setattr(worker.ray, "get", lambda value: value)
    for error, expected in (
        (UnreachedShard("no route"), []),
        (storage.Unreached("no route"), []),
        (BrokenShard("changed"), [Fatal("changed")]),
    ):

        def failing(settings: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(worker, "train", failing)
        with pytest.raises(type(error)):
            worker.train_worker({"queue": queue})
        assert told == expected


def test_failures_count_in_a_row_and_a_new_checkpoint_ends_the_row() -> None:
    watch = restarts.RestartPolicy(ClusterConfig(max_failures=2))
    watch.started(0)
    for _ in range(2):
        watch.failed("rank 1 died", watch.start_step or None)
        assert watch.reason_to_give_up() is None
        watch.started(0)
    # After a checkpoint, the next failure counts as the first.
    watch.came_to(12)
    watch.failed("rank 1 died", 10)
    watch.started(10)
    watch.came_to(19)
    watch.failed("rank 0 died", watch.start_step or None)
    assert watch.reason_to_give_up() is None
    watch.started(10)
    watch.failed("rank 0 died", watch.start_step or None)
    assert watch.reason_to_give_up() is None
    watch.started(10)
    watch.failed("rank 0 died", watch.start_step or None)
    assert watch.reason_to_give_up() == "the training failed 3 times after step 10: rank 0 died"


def test_what_fails_before_each_checkpoint_is_not_tried_for_ever(tmp_path: Path) -> None:
    watch = restarts.RestartPolicy(ClusterConfig(max_failures=2))
    # The validation of step 100 fails each time; the step itself is done and reported.
    for _ in range(3):
        assert watch.reason_to_give_up() is None
        watch.started(0)
        watch.came_to(100)
        watch.failed("OutOfMemoryError", driver.newest_saved(tmp_path))
    assert watch.reason_to_give_up() == "the training failed 3 times after step 0: OutOfMemoryError"
    (tmp_path / "checkpoints").mkdir()
    for step in (90, 100):
        (tmp_path / "checkpoints" / f"step-{step:08d}.pt").touch()
    assert driver.newest_saved(tmp_path) == 100
    assert driver.newest_saved(tmp_path / "nowhere") is None


def test_machines_that_an_idle_stream_loses_on_other_days_do_not_count_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now)
    watch = restarts.RestartPolicy(ClusterConfig(max_failures=0))
    for _ in range(3):
        watch.started(5)
        now += 2 * restarts.IDLE_SECONDS
        watch.failed("rank 0 died", watch.start_step or None)
        assert watch.failures == 1
    watch.started(5)
    now += 2 * restarts.IDLE_SECONDS
    # This one was not idle: it comes to the same step each time.
    watch.came_to(7)
    watch.failed("rank 0 died", watch.start_step or None)
    assert watch.failures == 2


def test_no_failure_is_forgiven_or_every_one() -> None:
    for allowed, given_up in ((0, True), (-1, False)):
        watch = restarts.RestartPolicy(ClusterConfig(max_failures=allowed))
        watch.started(0)
        assert watch.reason_to_give_up() is None
        watch.failed("rank 0 died", watch.start_step or None)
        assert (watch.reason_to_give_up() is not None) == given_up


def test_waiting_for_machines_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now)
    node = {"Alive": True, "Resources": {"CPU": 3.0}}
    monkeypatch.setattr(allocation.ray, "nodes", lambda: [node, node | {"Alive": False}])
    asked = ClusterConfig(workers=(4, 8), recovery_seconds=60)
    found = allocation.allocation(asked)
    assert (found.fewest, found.most, found.fitting, found.gpu) == (4, 8, 3, False)
    # Eight workers take three machines of three CPUs.
    assert found.machines == 3
    assert str(replace(found, most=4)) == "4 CPU workers"
    watch = restarts.RestartPolicy(asked)
    watch.started(0)
    now = 1000.0
    assert watch.reason_to_give_up() is None
    watch.failed("rank 0 died", watch.start_step or None)
    now = 1059.0
    assert watch.reason_to_give_up() is None
    now = 1061.0
    said = watch.reason_to_give_up()
    assert said is not None
    assert "no workers started for 60 s" in said
    assert "needs 4, the cluster has 3 CPUs and 0 GPUs on 1 machines, room for 3" in said


def test_whoever_took_the_pen_last_has_it(tmp_path: Path) -> None:
    first = runs.acquire_writer_lease(tmp_path)
    runs.check_writer_lease(tmp_path, first)
    second = runs.acquire_writer_lease(tmp_path)
    runs.check_writer_lease(tmp_path, second)
    with pytest.raises(runs.LeaseLost):
        runs.check_writer_lease(tmp_path, first)


def test_a_run_gives_back_the_machines_of_its_last_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[str] = []
    cancel = SimpleNamespace(remote=cancelled.append)
    monkeypatch.setattr(allocation, "coordinator", lambda: SimpleNamespace(cancel_request=cancel))
    monkeypatch.setattr(allocation.ray, "get", lambda reference, timeout: reference)
    for run_id in ("one", "two", "three"):
        trainer = SimpleNamespace(train_run_context=SimpleNamespace(run_id=run_id))
        allocation.claim_machines(trainer, tmp_path / runs.MACHINES)
    assert cancelled == ["train-one", "train-two"]


def test_validations_are_reported_in_order_while_the_training_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[tuple[int, dict[str, float]]] = []
    warnings: list[str] = []
    fetched = threading.Event()

    def report(step: int, metrics: dict[str, float], run: Path | None) -> None:
        assert fetched.wait(60)
        if step < 4:
            raise OSError("no space")
        reported.append((step, metrics))

    monkeypatch.setattr(reports, "report", report)
    mine = reports.ValidationReports(Path("run"), warnings.append)
    for step, precision in ((1, 0.5), (2, 0.5), (4, 0.5), (6, math.nan)):
        mine.take(Measured("train", step, {"loss": step / 8}))
        mine.take(Measured("validation", step, {"iou": step / 10, "precision": precision}))
        mine.take(Warned("no metrics"))
        # It returns although Ray has fetched none.
        mine.validated(step)
    assert reported == []
    fetched.set()
    mine.close()
    assert reported == [
        (4, {"step": 4, "train/loss": 0.5, "val/iou": 0.4, "val/precision": 0.5}),
        # A metric that is not finite is omitted, not taken from the validation before.
        (6, {"step": 6, "train/loss": 0.75, "val/iou": 0.6}),
    ]
    assert warnings == ["Ray did not take the metrics of step 1: no space; the training continues"]
