"""The workers' process group: joined on Ray's own addresses, and left without waiting for other workers."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig


@dataclass
class ProcessGroup(TorchConfig):
    """Settings of the workers' process group, whose sockets are bound to each machine's Ray address and to no other.

    `timeout_s` of the base class is the time, in seconds, after which a collective has failed.
    """

    @property
    def backend_cls(self) -> type:
        """Return the class that Ray Train's controller calls when a group of workers starts."""
        return ProcessGroupBackend


class ProcessGroupBackend(Backend):
    """Joins the workers in a process group; when they end it does nothing, since a clean exit would wait for dead workers."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Join all workers in one process group.

        Args:
            worker_group: Ray Train's group of workers.
            backend_config: the settings of the process group.

        Raises:
            ray.exceptions.RayError: if a worker dies meanwhile.
        """
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
    """Set gloo's network interface to that of this machine's Ray address, unless one is set; NCCL's too on loopback.

    By default gloo uses the address of the host's name, which is 127.0.0.1 or 127.0.1.1 on many machines.
    """
    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            if interface == "lo":
                os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
            return


# Rank 0's store, kept for as long as its process lives.
opened: list[dist.TCPStore] = []


def open_store() -> tuple[str, int]:
    """Open the store where ranks find each other, on this machine's Ray address.

    By default torch's store listens on every address.

    Returns:
        The store's address and port.
    """
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
    """Join the process group as one rank.

    Args:
        kind: torch.distributed's backend, "gloo" or "nccl".
        address: address of rank 0's store.
        port: port of rank 0's store.
        rank: this worker's rank; rank 0 must have called `open_store`.
        world_size: number of workers.
        timeout_s: time in seconds after which a collective raises.
    """
    timeout = timedelta(seconds=timeout_s)
    store = opened[-1] if rank == 0 else dist.TCPStore(address, port, is_master=False, timeout=timeout)
    dist.init_process_group(kind, store=store, rank=rank, world_size=world_size, timeout=timeout)
