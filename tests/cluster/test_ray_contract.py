"""Contracts: what Ray does not document, and cluster/ and jobs/ rely on, is as they expect.

Most of these uses are silent when Ray changes: a suppressed error, or a variable that nobody reads. These tests are not.
"""

import inspect
import json
import mmap
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import ray
import ray.exceptions
from ray.scripts.scripts import cli
from ray.train import Result, RunConfig
from ray.train.torch import TorchTrainer

from deepskip.cluster import local, preempt
from deepskip.cluster.settings import DRIVER_SETTINGS, LOOPBACK_ONLY, NODE_SETTINGS
from deepskip.config import ClusterConfig
from deepskip.jobs.serving.model import close_back_door
from deepskip.jobs.train import prepare_environment
from deepskip.jobs.training import allocation, preemption, process_group, restarts

RAY = Path(ray.__file__).parent
# Folders of Ray's sources, and its binaries, that read environment variables.
SOURCES = [
    path
    for name in ("_common", "_private", "autoscaler", "dashboard", "train/v2")
    for path in (RAY / name).rglob("*.py")
]
BINARIES = [RAY / "_raylet.so", RAY / "core/src/ray/raylet/raylet", RAY / "core/src/ray/gcs/gcs_server"]


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    before = dict(os.environ)
    # ray.init refuses arguments that it does not know, such as another version's _node_ip_address.
    allocation.start_ray()
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


def test_the_actor_that_divides_the_machines(started: None) -> None:
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as theirs

    with pytest.raises(ValueError, match="AutoscalingCoordinator"):
        allocation.coordinator()
    actor = theirs.get_or_create_autoscaling_coordinator()
    assert allocation.coordinator() == actor
    # As look_at_machines and claim_machines call it, but with nothing suppressed.
    allocation.count_machines(60)
    ray.get(allocation.coordinator().cancel_request.remote("train-none"), timeout=60)


def test_a_function_runs_in_an_actors_main_thread(started: None) -> None:
    class Actor:
        def ask(self) -> bool:
            # As preemption.listen does in a training's thread.
            handle = ray.get_runtime_context().current_actor
            return hasattr(handle, "__ray_call__")

    actor = ray.remote(Actor).options(num_cpus=0).remote()
    assert ray.get(actor.ask.remote(), timeout=60)
    main = "__import__('threading').current_thread() is __import__('threading').main_thread()"
    assert ray.get(actor.__ray_call__.remote(lambda self: eval(main)), timeout=60)  # noqa: S307


def test_the_name_that_ray_gives_a_trainings_request_is_the_one_we_note(tmp_path: Path) -> None:
    from ray.train.v2._internal.execution.scaling_policy import scaling_policy

    assert 'self._requester_id = f"train-{train_run_context.run_id}"' in inspect.getsource(scaling_policy)
    trainer = TorchTrainer(lambda: None, run_config=RunConfig(name="ray", storage_path=str(tmp_path)))
    allocation.claim_machines(trainer, tmp_path / "machines.json")
    noted = json.loads((tmp_path / "machines.json").read_text())["requester"]
    assert re.fullmatch(r"train-[0-9a-f]{32}", noted)


def test_a_worker_knows_that_its_node_is_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.execution import context as theirs
    from ray.train.v2._internal.execution.preemption import PreemptionContext
    from ray.train.v2.api.preemption import PreemptionInfo

    of_worker = PreemptionContext()
    context: Any = object.__new__(theirs.TrainContext)
    context.preemption_context = of_worker
    monkeypatch.setattr(theirs, "_train_context", None)
    theirs.set_train_context(context)
    assert "preemption_context" in theirs.TrainContext.__dataclass_fields__
    assert not preemption.requested()
    of_worker.preemption_info = PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={"node": [0]})
    assert preemption.requested()


def test_the_group_of_workers_that_our_backend_is_given() -> None:
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

    for name, taken in (
        ("execute", ["fn"]), ("execute_single", ["rank", "fn"]), ("execute_single_async", ["rank", "fn"]),
        ("get_resources_per_worker", []), ("__len__", []),
    ):  # fmt: skip
        found = list(inspect.signature(getattr(WorkerGroup, name)).parameters)[1 : 1 + len(taken)]
        # They are called by position.
        assert len(found) == len(taken), (name, found)
    assert process_group.ProcessGroup(timeout_s=5).timeout_s == 5
    assert process_group.ProcessGroup().backend_cls is process_group.ProcessGroupBackend
    theirs = process_group.Backend.on_start
    ours = process_group.ProcessGroupBackend.on_start
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_the_error_of_a_worker_that_does_not_answer() -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    assert (
        restarts.why(WorkerHealthCheckFailedError("", ray.exceptions.RayActorError()))
        == "died, or its machine was lost"
    )
    theirs, ours = restarts.UserCallback.after_exception, restarts.FailureReports.after_exception
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_the_name_of_a_workers_process() -> None:
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

    assert f"ray::{RayTrainWorker.__name__}" == preempt.WORKER


def test_a_result_is_read_from_a_folder() -> None:
    assert next(iter(inspect.signature(Result.from_path).parameters)) == "path"


def test_the_port_of_a_replica_is_opened_by_the_function_that_we_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private import replica

    monkeypatch.setattr(replica, "add_port_to_grpc_server", replica.add_port_to_grpc_server)
    codes = [replica.__loader__.get_code(replica.__name__)]  # type: ignore[union-attr]
    calls = 0
    while codes:
        code = codes.pop()
        calls += "add_port_to_grpc_server" in code.co_names and code.co_name != "<module>"
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    assert calls
    assert "add_insecure_port" not in inspect.getsource(replica)
    close_back_door()
    assert replica.add_port_to_grpc_server(None, "[::]:0") == 0


def test_a_start_that_was_too_slow_says_so() -> None:
    from ray._private import node

    assert local.STARTED_SLOWLY.partition("node ")[2] in inspect.getsource(node)


def options_of(*words: str) -> set[str]:
    command: click.Command = cli
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    return {option for parameter in command.params for option in parameter.opts}


def test_commands_have_the_options_that_we_give() -> None:
    # The commands as cluster/ and jobs/ write them, in their sources.
    started = set(re.findall(r'"(--[a-z-]+)["=]', inspect.getsource(local._start_head)))
    started |= set(re.findall(r'f"(--[a-z-]+)=', inspect.getsource(local._start_head)))
    assert {"--head", "--block", "--port", "--temp-dir"} <= started
    assert started <= options_of("start")
    drained = {"--reason", "--reason-message", "--deadline-remaining-seconds"}
    assert drained <= options_of("drain-node")
    assert {"--no-wait", "--submission-id", "--working-dir"} <= options_of("job", "submit")
    options_of("job", "stop")
    (reason,) = (each for each in cli.commands["drain-node"].params if "--reason" in each.opts)
    assert preempt.DRAIN[-1] in reason.type.choices


def test_every_variable_that_we_set_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DRIVER_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:1")
    before = set(os.environ)
    prepare_environment(60)
    names = {*NODE_SETTINGS, *DRIVER_SETTINGS, *LOOPBACK_ONLY, *(set(os.environ) - before)}
    for module in (local._start_head, allocation.own_ray):
        names |= set(re.findall(r'"(RAY_[A-Za-z_]+)"', inspect.getsource(module)))
    for name in set(os.environ) - before:
        monkeypatch.delenv(name)
    assert len(names) > 15
    missing = {name for name in names if name != "RAY_ADDRESS"}
    for path in SOURCES:
        text = path.read_text(errors="replace")
        missing = {name for name in missing if name not in text}
    for path in BINARIES:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # Ray's own settings are variables after RAY_, and its binaries have their names alone.
            missing = {name for name in missing if data.find(name.removeprefix("RAY_").encode()) < 0}
    assert not missing


def test_elastic_settings() -> None:
    scaling = allocation.scaling_config(
        ClusterConfig(resize_seconds=7.0), allocation.WorkerAllocation(1, 3, False, 3, "three")
    )
    assert (scaling.num_workers, scaling.elastic_resize_monitor_interval_s) == ((1, 3), 7.0)
