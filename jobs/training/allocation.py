"""Start Ray, and decide how many workers a training gets, with or without GPUs, from the cluster's free resources."""

import math
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.train import ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deepskip.cluster.local import STARTED_SLOWLY, STARTS, TEMPORARY, lacking
from deepskip.cluster.settings import LOOPBACK_ONLY, NODE_SETTINGS, past_proxies
from deepskip.config import ClusterConfig, workers_range
from deepskip.data_shards import trouble
from deepskip.jobs import runs
from deepskip.jobs.settings import NotHere, stop

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class WorkerAllocation:
    """The number and kind of workers that a training gets.

    Attributes:
        fewest: smallest number of workers that the training runs with; 0 if the default is one per GPU and there is none.
        most: largest number of workers.
        gpu: whether each worker has a GPU.
        fitting: number of workers that the machines now alive have resources for.
        description: the cluster's resources, as words for messages.
        machines: number of machines that the largest number of workers takes, if all are like the largest one now.
    """

    fewest: int
    most: int
    gpu: bool
    fitting: int
    description: str
    machines: int = 1

    def __str__(self) -> str:
        many = str(self.most) if self.fewest == self.most else f"{self.fewest} to {self.most}"
        return f"{many} {'GPU' if self.gpu else 'CPU'} worker{'s' * (self.most > 1)}"


def start_ray() -> None:
    """Start Ray on this machine, or join the cluster at RAY_ADDRESS.

    Raises:
        NotHere: if the cluster at RAY_ADDRESS cannot be joined; an `error:` line is printed.
        SystemExit: if Ray does not start on this machine, or may have too little; an `error:` line is printed.
        Exception: any error that `trouble.in_words` can explain, such as a full disk, for the caller to report.
    """
    settings = own_ray()
    if settings and (lack := lacking(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or TEMPORARY)):
        stop(lack)
    try:
        _init_ray(settings)
    # Ray raises errors of many types when its processes lack a resource.
    except Exception as error:
        if trouble.in_words(error):
            raise
        what = " ".join(str(error).split()).split(". ")[0][:200]
        if not settings:
            stop(f"Ray at {os.environ.get('RAY_ADDRESS')} cannot be joined: {what}", NotHere)
        stop(
            f"Ray does not start on this machine: {what}. It needs memory without a limit by ulimit -v{trouble.limit()}, "
            "and free space in /tmp/ray, where its logs are"
        )


def _init_ray(settings: dict[str, Any]) -> None:
    for left in reversed(range(STARTS if settings else 1)):
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **settings)
            return
        except Exception as error:
            if not left or STARTED_SLOWLY not in str(error):
                raise


def own_ray() -> dict[str, Any]:
    """Return the arguments of ray.init for a Ray on this machine alone, bound to loopback; empty if RAY_ADDRESS is set.

    Sets the environment variables that Ray is started with. The most important is an authentication token: without it, any
    user of the machine could run code in this Ray. Proxies are bypassed, also for a head on loopback.
    """
    os.environ.update(past_proxies(os.environ))
    if os.environ.get("RAY_ADDRESS"):
        return {}
    if os.environ.get("RAY_AUTH_MODE") != "token" or not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        # Without a mode, Ray requires a token and uses this one. Setting the mode after Ray was imported has no effect.
        os.environ.pop("RAY_AUTH_MODE", None)
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    settings = LOOPBACK_ONLY | {
        "RAY_worker_niceness": NODE_SETTINGS["RAY_worker_niceness"],
        # Nobody drains the only machine, so Ray needs no process that looks for it.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}


def cpus_of(requested: ClusterConfig) -> float:
    """Return the number of CPU cores of each worker; 1 if the settings name none."""
    return requested.cpus_per_worker or 1.0


def allocation(requested: ClusterConfig) -> WorkerAllocation:
    """Return how many workers are requested, with or without GPUs, and how many fit on the machines now alive.

    The default is one worker per GPU, or one or two workers without GPUs. If GPUs are required and the cluster has none yet,
    `fewest` is 0 by default.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    gpu = requested.gpu if requested.gpu is not None else gpus > 0
    # A worker does not span machines, so whole workers are counted on each machine.
    room = [
        int(min(node.get("CPU", 0) // cpus_of(requested), node.get("GPU", 0) if gpu else math.inf)) for node in nodes
    ]
    fitting = sum(room)
    by_default = int(gpus) if gpu else max(1, min(2, int(cpus // cpus_of(requested))))
    fewest, most = workers_range(requested.workers) or (by_default, by_default)
    machines = f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} machines, room for {fitting}"
    return WorkerAllocation(fewest, most, gpu, fitting, machines, -(-most // max([1, *room])))


def resources(requested: ClusterConfig) -> WorkerAllocation:
    """Wait until the cluster has resources for the smallest number of workers requested, and return the allocation.

    Raises:
        SystemExit: if they are still missing after cluster.wait_seconds; an `error:` line is printed.
    """
    deadline = time.monotonic() + requested.wait_seconds
    while True:
        found = allocation(requested)
        if found.fewest and found.fitting >= found.fewest:
            return found
        if time.monotonic() > deadline:
            need = f"{cpus_of(requested):g} CPU{' and 1 GPU' if found.gpu else ''}"
            stop(
                f"cluster.workers is {requested.workers or found.most or 'one per GPU'}, each with {need}, but the cluster has "
                f"{found.description}; waited {requested.wait_seconds:g} s. Ask for fewer, or add machines."
            )
        time.sleep(POLL_SECONDS)


def scaling_config(requested: ClusterConfig, allocated: WorkerAllocation) -> ScalingConfig:
    """Return Ray Train's scaling: a fixed number of workers, or for an elastic training a range of numbers."""
    return ScalingConfig(
        num_workers=allocated.most if allocated.fewest == allocated.most else (allocated.fewest, allocated.most),
        use_gpu=allocated.gpu,
        resources_per_worker={"CPU": cpus_of(requested)} | ({"GPU": 1} if allocated.gpu else {}),
        elastic_resize_monitor_interval_s=requested.resize_seconds,
    )


def look_at_machines() -> None:
    """Make Ray count its machines now; otherwise an elastic training is planned by a count that is up to 20 s old."""
    # This is internal to Ray. If a version lacks it, or it is slow, recovery takes longer and nothing else changes.
    with suppress(ValueError, AttributeError, TypeError, ray.exceptions.RayError):
        count_machines(2.0)


def count_machines(seconds: float) -> None:
    """Make Ray count its machines now.

    Args:
        seconds: longest time to wait.

    Raises:
        ValueError: if no elastic training has started the actor that counts.
        ray.exceptions.RayError: if the actor does not answer in time.
    """
    actor = coordinator()
    try:
        counted = actor.get_reserved_resources.remote("", recompute=True)
    except TypeError:
        # Ray before 2.60 has no such argument.
        counted = actor.__ray_call__.remote(lambda self: self._tick())
    ray.get(counted, timeout=seconds)


def coordinator() -> Any:
    """Return the actor with which Ray divides the machines among elastic trainings.

    Raises:
        ValueError: if there is no such actor.
    """
    return ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")


def claim_machines(trainer: Any, note: Path) -> None:
    """Release the machines that this run's previous driver reserved, and record the name of the new reservation.

    Ray keeps an elastic training's machines reserved for three minutes after its driver was killed.

    Args:
        trainer: the run's TorchTrainer, whose run id names the new reservation.
        note: JSON file in the run's folder that holds the name of the newest reservation.
    """
    earlier = runs.read_json(note).get("requester")
    with suppress(ValueError, AttributeError, TypeError, ray.exceptions.RayError):
        if earlier:
            ray.get(coordinator().cancel_request.remote(earlier), timeout=5)
    with suppress(AttributeError):
        runs.write_json(note, {"requester": f"train-{trainer.train_run_context.run_id}"})


def beside_driver() -> dict[str, Any]:
    """Return the options of an actor that runs on the driver's machine, and ends if that machine is lost."""
    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
