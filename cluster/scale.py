"""A model of how a training scales: the time of a step on n devices, and what faults leave of it.

Times are seconds, sizes bytes, bandwidths bytes a second. The step follows the trainer's: every device computes its share
of the global batch, sums of the loss are all-reduced, then gradients in DistributedDataParallel's buckets. Faults are a
Poisson process; the closed form is Daly's (Future Generation Computer Systems 22, 2006), and a simulation stands beside it.
docs/scale.md is made of it and compares it with measured runs.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

# 645,665 fp32 gradients; DDP's first bucket is 1 MiB, so that it can leave early
GRADIENT_BYTES = 2_582_660
BUCKETS = (1_048_576, GRADIENT_BYTES - 1_048_576)
LOSS_BYTES = 40
# of a step's computation that follows the first gradient: backward is two thirds of it
BACKWARD = 2 / 3

Algorithm = Literal["ring", "tree"]


@dataclass(frozen=True)
class Link:
    """What joins two devices: seconds a message takes to arrive, and bytes a second after that."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """The devices of a cluster and what joins them.

    image_seconds: computation of one image, forward and backward. step_seconds: what a step costs whatever its batch:
    optimizer, launches. deviation: of a device's step from step to step, relative. overlap: whether gradients travel while
    the device computes. loader_images: images a second that the loader processes of one device decode.
    """

    image_seconds: float
    step_seconds: float
    deviation: float
    inner: Link
    outer: Link
    devices_per_node: int = 8
    overlap: bool = True
    loader_images: float = math.inf


def all_reduce_link(n: int, size: float, link: Link, algorithm: Algorithm) -> float:
    """Gives the time of an all-reduce over n equal links.

    ring: 2 (n-1) messages of size / n. tree: up and down ceil(log2 n) levels, pipelined, so all of the size twice.
    """
    if n == 1:
        return 0.0
    if algorithm == "ring":
        return 2 * (n - 1) * link.latency + 2 * (n - 1) / n * size / link.bandwidth
    return 2 * math.ceil(math.log2(n)) * link.latency + 2 * size / link.bandwidth


def all_reduce(
    n: int, size: float, machine: Machine, algorithm: Algorithm = "tree", hierarchical: bool = True
) -> float:
    """Gives the time of an all-reduce over n devices.

    hierarchical: a ring within each node, then `algorithm` between nodes, whose devices share the node's link; else
    `algorithm` over all devices, at the pace of the slowest link.
    """
    nodes = math.ceil(n / machine.devices_per_node)
    if nodes == 1:
        return all_reduce_link(n, size, machine.inner, "ring")
    if not hierarchical:
        return all_reduce_link(n, size, machine.outer, algorithm)
    within = all_reduce_link(machine.devices_per_node, size, machine.inner, "ring")
    return within + all_reduce_link(nodes, size, machine.outer, algorithm)


def slowest_of(n: int) -> float:
    """Gives the expected maximum of n standard normals: how many deviations the slowest of n devices is late."""
    x = np.linspace(-9, 9, 3601)
    below = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])
    density = n * below ** (n - 1) * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(x * density, x))


@dataclass(frozen=True)
class Step:
    """Where the time of a step goes, seconds: `compute` by an average device, `waiting` for the slowest one, `sums` of the
    loss, `gradients` that did not travel while the devices computed, and `loader`, where decoding is slower than all that."""

    compute: float
    waiting: float
    sums: float
    gradients: float
    loader: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.waiting + self.sums + self.gradients + self.loader


def step(
    n: int,
    global_batch_size: int,
    machine: Machine,
    buckets: tuple[int, ...] = BUCKETS,
    algorithm: Algorithm = "tree",
    hierarchical: bool = True,
) -> Step:
    """Models a step of n devices that share a global batch; a device with less than the largest share waits for the others."""
    images = math.ceil(global_batch_size / n)
    compute = machine.step_seconds + images * machine.image_seconds
    waiting = machine.deviation * compute * slowest_of(n) if n > 1 else 0.0
    sums = all_reduce(n, LOSS_BYTES, machine, algorithm, hierarchical)
    times = [all_reduce(n, bucket, machine, algorithm, hierarchical) for bucket in buckets]
    if machine.overlap:
        # the last bucket is full when the computation ends
        early = max(0.0, sum(times[:-1]) - BACKWARD * images * machine.image_seconds)
        gradients = early + times[-1]
    else:
        gradients = sum(times)
    rest = compute + waiting + sums + gradients
    return Step(compute, waiting, sums, gradients, max(0.0, images / machine.loader_images - rest))


def strong(ns: list[int], global_batch_size: int, machine: Machine) -> list[float]:
    """Gives the efficiency of each n with the global batch fixed: the speed over n times that of one device."""
    one = step(1, global_batch_size, machine).seconds
    return [one / (n * step(n, global_batch_size, machine).seconds) for n in ns]


def weak(ns: list[int], images_per_device: int, machine: Machine) -> list[float]:
    """Gives the efficiency of each n with the batch of a device fixed."""
    one = step(1, images_per_device, machine).seconds
    return [one / step(n, n * images_per_device, machine).seconds for n in ns]


@dataclass(frozen=True)
class Faults:
    """What faults cost, seconds: mean time between those of one node, from a fault to the next step, and of a checkpoint
    as far as a step waits for it."""

    node_mtbf: float
    recovery: float
    checkpoint: float

    def mtbf(self, nodes: int) -> float:
        """The mean time between faults of so many nodes."""
        return self.node_mtbf / nodes


def goodput(interval: float, mtbf: float, recovery: float, checkpoint: float) -> float:
    """Gives the share of time that is kept work, with a checkpoint each `interval` seconds of work, as Daly gives it.

    A fault costs the work since the last checkpoint and a recovery, which faults can interrupt too.
    """
    # exp(x) - 1 with all its digits where faults are rare
    spent = mtbf * math.exp(recovery / mtbf) * math.expm1((interval + checkpoint) / mtbf)
    return interval / spent


def best_interval(mtbf: float, checkpoint: float) -> float:
    """Gives the work between checkpoints, seconds, that loses least: Young's sqrt(2 c M), corrected by Daly."""
    if checkpoint >= 2 * mtbf:
        return mtbf
    ratio = checkpoint / (2 * mtbf)
    return math.sqrt(2 * checkpoint * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint


def fitted_link(measured: list[tuple[float, float]], n: int) -> Link:
    """Fits a ring's latency and bandwidth to measured (bytes, seconds) of all-reduces over n; least relative squares."""
    size, seconds = np.array(measured, dtype=float).T
    columns = np.stack([np.full(len(size), 2.0 * (n - 1)), 2 * (n - 1) / n * size], axis=1)
    latency, inverse = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(size)), rcond=None)[0]
    return Link(float(latency), float(1 / inverse))


def fitted_machine(alone: dict[int, tuple[float, float]], link: Link) -> Machine:
    """Fits a machine to one process' steps {images: (mean seconds, deviation seconds)}; processes compute and talk in turn."""
    images = np.array(sorted(alone), dtype=float)
    seconds = np.array([alone[int(count)][0] for count in images])
    slope, offset = np.polyfit(images, seconds, 1)
    deviation = float(np.mean([alone[int(count)][1] / alone[int(count)][0] for count in images]))
    one_node = Machine(float(slope), float(offset), deviation, link, link)
    return replace(one_node, devices_per_node=64, overlap=False)
