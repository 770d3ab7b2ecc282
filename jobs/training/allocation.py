"""How many workers a training gets, of what kind, and where: what Ray has, and what it is asked for."""

import math
import os
import resource
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

from deepskip.cluster.local import STARTED_SLOWLY, STARTS
from deepskip.cluster.settings import LOOPBACK_ONLY, NODE_SETTINGS, past_proxies
from deepskip.config import ClusterConfig, workers_range
from deepskip.data_shards import trouble
from deepskip.jobs import runs
from deepskip.jobs.settings import NotHere, stop

# files and sockets that a Ray of one machine has open
LEAST_DESCRIPTORS = 200
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class WorkerAllocation:
    """What a training gets: fewest and most workers, whether each has a GPU, and how many of them fit right now."""

    fewest: int
    most: int
    gpu: bool
    fitting: int
    description: str

    def __str__(self) -> str:
        many = str(self.most) if self.fewest == self.most else f"{self.fewest} to {self.most}"
        return f"{many} {'GPU' if self.gpu else 'CPU'} worker{'s' * (self.most > 1)}"


def start_ray() -> None:
    """Start Ray on this machine, or join the one at RAY_ADDRESS; ends the program with a line where that fails."""
    settings = own_ray()
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if settings and allowed < LEAST_DESCRIPTORS:
        stop(f"this process may open {allowed} files, and Ray needs {LEAST_DESCRIPTORS}: allow more (ulimit -n 4096)")
    try:
        _init_ray(settings)
    # ray has errors of every kind for what its processes lack
    except Exception as error:
        if trouble.in_words(error):
            raise
        what = " ".join(str(error).split()).split(". ")[0][:200]
        if not settings:
            stop(f"Ray at {os.environ.get('RAY_ADDRESS')} cannot be joined: {what}", NotHere)
        stop(
            f"Ray does not start on this machine: {what}. It needs memory that is not bounded by ulimit -v{trouble.limit()}, "
            "and room in /tmp/ray; what its processes said is there"
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
    """Return what ray.init needs where no cluster is named: a Ray on this machine alone, bound to loopback.

    Sets in the environment what it is started with: a token of its own above all, without which any user of the machine
    could run code in it. To a head on loopback too no proxy is asked the way.
    """
    os.environ.update(past_proxies(os.environ))
    if os.environ.get("RAY_ADDRESS"):
        return {}
    if os.environ.get("RAY_AUTH_MODE") != "token" or not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        # where no mode is set ray asks for a token, and takes this one; setting the mode after ray's import is too late
        os.environ.pop("RAY_AUTH_MODE", None)
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in (LOOPBACK_ONLY | {"RAY_worker_niceness": NODE_SETTINGS["RAY_worker_niceness"]}).items():
        os.environ.setdefault(name, value)
    return {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}


def cpus_of(requested: ClusterConfig) -> float:
    """Return the CPU cores of each worker."""
    return requested.cpus_per_worker or 1.0


def allocation(requested: ClusterConfig) -> WorkerAllocation:
    """Count how many workers, of what kind, fit on the machines that are alive; fewest is 0 where there is no GPU yet."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    gpu = requested.gpu if requested.gpu is not None else gpus > 0
    # a worker does not span machines
    fitting = sum(
        int(min(node.get("CPU", 0) // cpus_of(requested), node.get("GPU", 0) if gpu else math.inf)) for node in nodes
    )
    by_default = int(gpus) if gpu else max(1, min(2, int(cpus // cpus_of(requested))))
    fewest, most = workers_range(requested.workers) or (by_default, by_default)
    machines = f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} machines, room for {fitting}"
    return WorkerAllocation(fewest, most, gpu, fitting, machines)


def resources(requested: ClusterConfig) -> WorkerAllocation:
    """Wait for the cluster to have the fewest workers requested; ends the program after cluster.wait_seconds."""
    deadline = time.monotonic() + requested.wait_seconds
    while True:
        found = allocation(requested)
        if found.fewest and found.fitting >= found.fewest:
            return found
        if time.monotonic() > deadline:
            need = f"{cpus_of(requested):g} CPU{' and 1 GPU' if found.gpu else ''}"
            stop(
                f"cluster.workers is {requested.workers or found.most or 'one a GPU'}, each with {need}, but the cluster has "
                f"{found.description}; waited {requested.wait_seconds:g} s. Ask for fewer, or add machines."
            )
        time.sleep(POLL_SECONDS)


def scaling_config(requested: ClusterConfig, allocated: WorkerAllocation) -> ScalingConfig:
    """Make Ray Train's scaling: a fixed number of workers, or as many between two as there is room for."""
    return ScalingConfig(
        num_workers=allocated.most if allocated.fewest == allocated.most else (allocated.fewest, allocated.most),
        use_gpu=allocated.gpu,
        resources_per_worker={"CPU": cpus_of(requested)} | ({"GPU": 1} if allocated.gpu else {}),
        elastic_resize_monitor_interval_s=requested.resize_seconds,
    )


def look_at_machines() -> None:
    """Have Ray count its machines now: an elastic training is planned by a count that is up to 20 s old otherwise."""
    # an inner part of ray: where a version lacks it, or it is slow, so is recovery, and nothing else
    with suppress(ValueError, AttributeError, TypeError, ray.exceptions.RayError):
        ray.get(coordinator().get_reserved_resources.remote("", recompute=True), timeout=2)


def coordinator() -> Any:
    """Return the actor by which Ray shares machines out among elastic trainings; raises ValueError where there is none."""
    return ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")


def claim_machines(trainer: Any, note: Path) -> None:
    """Give back the machines that this run's last driver had, and note in a file under what name this one has its own.

    Ray leaves an elastic training's machines to it for three minutes after its driver was killed.
    """
    earlier = runs.read_json(note).get("requester")
    with suppress(ValueError, AttributeError, TypeError, ray.exceptions.RayError):
        if earlier:
            ray.get(coordinator().cancel_request.remote(earlier), timeout=5)
    with suppress(AttributeError):
        runs.write_json(note, {"requester": f"train-{trainer.train_run_context.run_id}"})


def beside_driver() -> dict[str, Any]:
    """Return the options of an actor that lives, and dies, with the driver's machine."""
    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
