"""Model how a training scales: the time of a step on n devices, and the goodput under faults.

Times are in seconds, sizes in bytes, and bandwidths in bytes per second. The step is that of the trainer. Each device computes
its share of the global batch, the sums of the loss are all-reduced, then the gradients in DistributedDataParallel's buckets.
Faults are a Poisson process, with Daly's closed form (Future Generation Computer Systems 22, 2006). A test compares it with a
simulation. docs/scale.md is computed from this model and compares it with measured runs.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

# There are 645,665 fp32 gradients. DDP's first bucket has 1 MiB, so that its communication starts early.
GRADIENT_BYTES = 2_582_660
BUCKETS = (1_048_576, GRADIENT_BYTES - 1_048_576)
LOSS_BYTES = 40
# The share of an image's computation that is the backward pass, which can overlap with communication.
BACKWARD = 2 / 3

Algorithm = Literal["ring", "tree"]


@dataclass(frozen=True)
class Link:
    """Describe a connection between two devices.

    Attributes:
        latency: Time until a message arrives, seconds.
        bandwidth: Throughput after that, bytes per second.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """Describe the devices of a cluster and their connections.

    Attributes:
        image_seconds: Computation of one image, forward and backward, seconds.
        step_seconds: Part of a step that does not depend on the batch, such as optimizer and launches, seconds.
        deviation: Relative standard deviation of a device's time from step to step.
        inner: Link between devices of a node.
        outer: Link between nodes.
        devices_per_node: Number of devices in a node.
        overlap: Whether gradients are communicated while the device computes.
        loader_images: Images per second that the loader processes of one device decode.
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
    """Return the time of an all-reduce over n devices with equal links, seconds.

    A ring sends 2 (n-1) messages of size / n. A tree goes up and down ceil(log2 n) levels, pipelined, and sends the whole
    size twice.

    Args:
        n: Number of devices.
        size: Size of the data, bytes.
        link: Link between the devices.
        algorithm: "ring" or "tree".
    """
    if n == 1:
        return 0.0
    if algorithm == "ring":
        return 2 * (n - 1) * link.latency + 2 * (n - 1) / n * size / link.bandwidth
    return 2 * math.ceil(math.log2(n)) * link.latency + 2 * size / link.bandwidth


def all_reduce(
    n: int, size: float, machine: Machine, algorithm: Algorithm = "tree", hierarchical: bool = True
) -> float:
    """Return the time of an all-reduce over the n devices of a machine, seconds.

    Args:
        n: Number of devices.
        size: Size of the data, bytes.
        machine: The devices and their links.
        algorithm: "ring" or "tree"; within a single node it is always a ring.
        hierarchical: Use a ring within each node, then `algorithm` between nodes, whose devices share the node's link.
            Otherwise `algorithm` runs over all devices, at the speed of the slowest link.
    """
    nodes = math.ceil(n / machine.devices_per_node)
    if nodes == 1:
        return all_reduce_link(n, size, machine.inner, "ring")
    if not hierarchical:
        return all_reduce_link(n, size, machine.outer, algorithm)
    within = all_reduce_link(machine.devices_per_node, size, machine.inner, "ring")
    return within + all_reduce_link(nodes, size, machine.outer, algorithm)


def slowest_of(n: int) -> float:
    """Return the expected maximum of n standard normal variables: the delay of the slowest device, in deviations."""
    x = np.linspace(-9, 9, 3601)
    below = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])
    density = n * below ** (n - 1) * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(x * density, x))


@dataclass(frozen=True)
class Step:
    """Split the time of a step into its parts, in seconds.

    Attributes:
        compute: Computation of an average device.
        waiting: Waiting for the slowest device.
        sums: All-reduce of the sums of the loss.
        gradients: All-reduce of the gradients that does not overlap with computation.
        loader: Additional time if decoding is slower than all of that.
    """

    compute: float
    waiting: float
    sums: float
    gradients: float
    loader: float

    @property
    def seconds(self) -> float:
        """Time of the whole step, seconds."""
        return self.compute + self.waiting + self.sums + self.gradients + self.loader


def step(
    n: int,
    global_batch_size: int,
    machine: Machine,
    buckets: tuple[int, ...] = BUCKETS,
    algorithm: Algorithm = "tree",
    hierarchical: bool = True,
) -> Step:
    """Return the times of a step of n devices that share a global batch; all wait for those with the largest share.

    Args:
        n: Number of devices.
        global_batch_size: Images in a step over all devices.
        machine: The devices and their links.
        buckets: Sizes of the gradient buckets, bytes.
        algorithm: "ring" or "tree", of the all-reduces.
        hierarchical: Whether the all-reduces use a ring within each node first.
    """
    images = math.ceil(global_batch_size / n)
    compute = machine.step_seconds + images * machine.image_seconds
    waiting = machine.deviation * compute * slowest_of(n) if n > 1 else 0.0
    sums = all_reduce(n, LOSS_BYTES, machine, algorithm, hierarchical)
    times = [all_reduce(n, bucket, machine, algorithm, hierarchical) for bucket in buckets]
    if machine.overlap:
        # The last bucket is full only when the computation ends, so it never overlaps.
        early = max(0.0, sum(times[:-1]) - BACKWARD * images * machine.image_seconds)
        gradients = early + times[-1]
    else:
        gradients = sum(times)
    rest = compute + waiting + sums + gradients
    return Step(compute, waiting, sums, gradients, max(0.0, images / machine.loader_images - rest))


def strong(ns: list[int], global_batch_size: int, machine: Machine) -> list[float]:
    """Return the strong-scaling efficiency of each n: the speed over n times that of one device, for a fixed global batch."""
    one = step(1, global_batch_size, machine).seconds
    return [one / (n * step(n, global_batch_size, machine).seconds) for n in ns]


def weak(ns: list[int], images_per_device: int, machine: Machine) -> list[float]:
    """Return the weak-scaling efficiency of each n, for a fixed batch per device."""
    one = step(1, images_per_device, machine).seconds
    return [one / step(n, n * images_per_device, machine).seconds for n in ns]


@dataclass(frozen=True)
class Faults:
    """Describe the rate and the cost of faults, in seconds.

    Attributes:
        node_mtbf: Mean time between the faults of one node.
        recovery: Time from a fault to the next step.
        checkpoint: Time that a step waits for a checkpoint.
    """

    node_mtbf: float
    recovery: float
    checkpoint: float

    def mtbf(self, nodes: int) -> float:
        """Return the mean time between faults of a number of nodes, seconds."""
        return self.node_mtbf / nodes


def goodput(interval: float, mtbf: float, recovery: float, checkpoint: float) -> float:
    """Return the share of time that is spent on work that is kept (Daly 2006).

    A fault costs the work since the last checkpoint and a recovery, which faults can interrupt as well.

    Args:
        interval: Work between checkpoints, seconds.
        mtbf: Mean time between faults, seconds.
        recovery: Time from a fault to the next step, seconds.
        checkpoint: Time that a step waits for a checkpoint, seconds.
    """
    # expm1 computes exp(x) - 1 without cancellation if faults are rare.
    spent = mtbf * math.exp(recovery / mtbf) * math.expm1((interval + checkpoint) / mtbf)
    return interval / spent


def best_interval(mtbf: float, checkpoint: float) -> float:
    """Return the best work between checkpoints, seconds: Young's sqrt(2 c M) with Daly's correction.

    Args:
        mtbf: Mean time M between faults, seconds.
        checkpoint: Time c that a step waits for a checkpoint, seconds.
    """
    if checkpoint >= 2 * mtbf:
        return mtbf
    ratio = checkpoint / (2 * mtbf)
    return math.sqrt(2 * checkpoint * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint


def fitted_link(measured: list[tuple[float, float]], n: int) -> Link:
    """Fit a ring's latency and bandwidth to measured all-reduces, by least squares of the relative errors.

    Args:
        measured: Size (bytes) and time (seconds) of each all-reduce.
        n: Number of devices.
    """
    size, seconds = np.array(measured, dtype=float).T
    columns = np.stack([np.full(len(size), 2.0 * (n - 1)), 2 * (n - 1) / n * size], axis=1)
    latency, inverse = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(size)), rcond=None)[0]
    return Link(float(latency), float(1 / inverse))


def fitted_machine(alone: dict[int, tuple[float, float]], link: Link) -> Machine:
    """Fit a machine to the steps of a single process; its processes do not overlap computation and communication.

    Args:
        alone: Mean and standard deviation of the time of a step (seconds) by the number of its images.
        link: Link between the processes.
    """
    images = np.array(sorted(alone), dtype=float)
    seconds = np.array([alone[int(count)][0] for count in images])
    slope, offset = np.polyfit(images, seconds, 1)
    deviation = float(np.mean([alone[int(count)][1] / alone[int(count)][0] for count in images]))
    one_node = Machine(float(slope), float(offset), deviation, link, link)
    return replace(one_node, devices_per_node=64, overlap=False)
