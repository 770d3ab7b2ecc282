"""What Ray gives to a training: workers and GPUs, and the settings under which lost workers and machines are noticed soon."""

import math
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.exceptions
import torch.distributed as dist
from ray.train import ScalingConfig, UserCallback
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deepskip.config import ClusterConfig, workers_range
from jobs import runs
from jobs.settings import stop

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Room:
    """What a training gets: fewest and most workers, whether each has a GPU, and how many of them fit right now."""

    fewest: int
    most: int
    gpu: bool
    fitting: int
    description: str

    def __str__(self) -> str:
        many = str(self.most) if self.fewest == self.most else f"{self.fewest} to {self.most}"
        return f"{many} {'GPU' if self.gpu else 'CPU'} worker{'s' * (self.most > 1)}"


def own_ray() -> dict[str, Any]:
    """Gives what ray.init needs where no cluster is named: a Ray on this machine alone, bound to loopback."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    # a head without authentication mode writes a token into the home that every later head then asks for
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    return {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}


def room(asked: ClusterConfig) -> Room:
    """Looks how many workers, of what kind, fit on the machines that are alive; fewest is 0 where there is no GPU yet."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    gpu = asked.gpu if asked.gpu is not None else gpus > 0
    # a worker does not span machines
    fitting = sum(
        int(min(node.get("CPU", 0) // asked.cpus_per_worker, node.get("GPU", 0) if gpu else math.inf)) for node in nodes
    )
    by_default = int(gpus) if gpu else max(1, min(2, int(cpus // asked.cpus_per_worker)))
    fewest, most = workers_range(asked.workers) or (by_default, by_default)
    machines = f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} machines, room for {fitting}"
    return Room(fewest, most, gpu, fitting, machines)


def resources(asked: ClusterConfig) -> Room:
    """Waits for the cluster to have the fewest workers asked for; ends the program after cluster.wait_seconds."""
    deadline = time.monotonic() + asked.wait_seconds
    while True:
        found = room(asked)
        if found.fewest and found.fitting >= found.fewest:
            return found
        if time.monotonic() > deadline:
            need = f"{asked.cpus_per_worker:g} CPU{' and 1 GPU' if found.gpu else ''}"
            stop(
                f"cluster.workers is {asked.workers or found.most or 'one a GPU'}, each with {need}, but the cluster has "
                f"{found.description}; waited {asked.wait_seconds:g} s. Ask for fewer, or add machines."
            )
        time.sleep(POLL_SECONDS)


def scaling_config(asked: ClusterConfig, given: Room) -> ScalingConfig:
    """Makes Ray Train's scaling: a fixed number of workers, or as many between two as there is room for."""
    return ScalingConfig(
        num_workers=given.most if given.fewest == given.most else (given.fewest, given.most),
        use_gpu=given.gpu,
        resources_per_worker={"CPU": asked.cpus_per_worker} | ({"GPU": 1} if given.gpu else {}),
        elastic_resize_monitor_interval_s=asked.resize_seconds,
    )


def look_at_machines() -> None:
    """Has Ray count its machines now: an elastic training is planned by a count that is up to 20 s old otherwise."""
    # an inner part of ray: where a version lacks it, or it is slow, so is recovery, and nothing else
    with suppress(ValueError, AttributeError, TypeError, ray.exceptions.RayError):
        ray.get(coordinator().get_reserved_resources.remote("", recompute=True), timeout=2)


def coordinator() -> Any:
    """Gives the actor by which Ray shares machines out among elastic trainings; raises ValueError where there is none."""
    return ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")


def claim_machines(trainer: Any, note: Path) -> None:
    """Gives back the machines that this run's last driver had, and notes in a file under what name this one has its own.

    Ray leaves an elastic training's machines to it for three minutes after its driver was killed.
    """
    earlier = runs.read_json(note).get("requester")
    with suppress(ValueError, AttributeError, TypeError, ray.exceptions.RayError):
        if earlier:
            ray.get(coordinator().cancel_request.remote(earlier), timeout=5)
    with suppress(AttributeError):
        runs.write_json(note, {"requester": f"train-{trainer.train_run_context.run_id}"})


def beside_driver() -> dict[str, Any]:
    """Gives the options of an actor that lives, and dies, with the driver's machine."""
    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


@dataclass
class ProcessGroup(TorchConfig):
    """The workers' process group: its sockets on the address by which Ray knows each machine, and on no other.

    timeout_s: a collective that takes longer has failed.
    """

    @property
    def backend_cls(self) -> type:
        """What Ray Train calls on the controller when a group of workers starts."""
        return ProcessGroupBackend


class ProcessGroupBackend(Backend):
    """Joins the workers. At their end it does nothing: to leave the group in order would be to wait for dead workers."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Joins all workers in one process group; raises where one dies meanwhile."""
        kind = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        size = len(worker_group)
        worker_group.execute(use_own_interface)
        address, port = worker_group.execute_single(0, open_store)
        ray.get(
            [
                worker_group.execute_single_async(rank, join, kind, address, port, rank, size, backend_config.timeout_s)
                for rank in range(size)
            ]
        )


def use_own_interface() -> None:
    """Names to gloo the network interface of this machine's Ray address.

    By itself gloo takes the address of the host's name, which is 127.0.0.1 or 127.0.1.1 on many machines.
    """
    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            if interface == "lo":
                os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
            return


# rank 0's, for as long as its process lives
opened: list[dist.TCPStore] = []


def open_store() -> tuple[str, int]:
    """Opens the store where ranks find each other, on this machine's Ray address; torch's own listens on every one."""
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as door:
        door.bind((address, 0))
        door.listen(4096)
        port = door.getsockname()[1]
        opened.append(
            dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=door.detach())
        )
    return address, port


def join(kind: str, address: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
    """Joins the process group; a collective of it that takes longer than timeout_s raises."""
    timeout = timedelta(seconds=timeout_s)
    store = opened[-1] if rank == 0 else dist.TCPStore(address, port, is_master=False, timeout=timeout)
    dist.init_process_group(kind, store=store, rank=rank, world_size=world_size, timeout=timeout)


class Failures(UserCallback):
    """Tells the driver, through its mailbox, that workers failed and how; runs in Ray's controller."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Takes the errors by rank."""
        reasons: dict[str, list[str]] = {}
        for rank, error in sorted(worker_exceptions.items()):
            reasons.setdefault(why(error), []).append(str(rank))
        text = "; ".join(f"rank {', '.join(ranks)} {reason}" for reason, ranks in reasons.items())
        self.mailbox.put.remote("failure", 0, {"text": text})
        # next the controller decides on how many workers to go on with
        look_at_machines()


def why(error: Exception) -> str:
    """Puts a worker's failure into a few words."""
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, ray.exceptions.RayActorError):
        return "died, or its machine was lost"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Watch:
    """Decides when a training is given up: it fails again and again at one place, or workers do not start.

    starts: how often a group of workers began to train.
    """

    def __init__(self, asked: ClusterConfig, checkpoint_every: int) -> None:
        self.asked, self.checkpoint_every = asked, checkpoint_every
        self.starts = self.failures = self.start_step = self.newest_step = 0
        self.last_failure = ""
        self.waiting_since: float | None = time.monotonic()

    def started(self, step: int) -> None:
        """Takes note that a group of workers goes on after `step`."""
        self.starts += 1
        if step > self.start_step:
            self.failures = 0
        self.start_step = self.newest_step = step
        self.waiting_since = None

    def came_to(self, step: int) -> None:
        """Takes note of a step that was done."""
        self.newest_step = max(self.newest_step, step)

    def failed(self, text: str) -> None:
        """Takes note that the group failed; a failure past a new checkpoint is the first in its row."""
        further = self.newest_step // self.checkpoint_every > self.start_step // self.checkpoint_every
        self.failures = 1 if further else self.failures + 1
        self.last_failure = text
        self.waiting_since = time.monotonic()

    def reason_to_give_up(self) -> str | None:
        """Says why the training must end, or gives None."""
        if 0 <= self.asked.max_failures < self.failures:
            return f"the training failed {self.failures} times after step {self.start_step}: {self.last_failure}"
        if self.waiting_since is not None and time.monotonic() - self.waiting_since > self.asked.recovery_seconds:
            found = room(self.asked)
            return (
                f"no workers started for {self.asked.recovery_seconds:g} s (cluster.recovery_seconds): the training needs "
                f"{found.fewest or 'some'}, the cluster has {found.description}. The same command goes on."
            )
        return None
