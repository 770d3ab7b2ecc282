"""Measurements of the benchmarks: time, bytes that a call allocates and keeps, copy bandwidth, and the machine."""

import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# More than any last-level cache, so that rotated buffers come from memory.
ROTATED = 2**29
# How much longer than the host's own time a GPU waits for the host, in seconds and as a share of it.
AHEAD, AHEAD_SHARE = 2e-4, 0.5


def rotated(function: Callable[..., Any], *arguments: Any, device: torch.device) -> Callable[[], Any]:
    """Return a call of a function that alternates between its arguments and copies of them, enough to exceed a GPU's caches.

    A call whose inputs are still in the cache from the last one would measure the cache. On a CPU two sets are enough.

    Args:
        function: function to call.
        arguments: its arguments; tensors of any shape (*,) are copied.
        device: device of the tensors.
    """
    size = sum(x.numel() * x.element_size() for x in tree_leaves(arguments) if isinstance(x, Tensor))
    count = max(1, min(4096, -(-ROTATED // max(size, 1)))) if device.type == "cuda" else 2

    def copy(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    chosen = itertools.cycle([arguments, *(tree_map(copy, arguments) for _ in range(count - 1))])
    return lambda: function(*next(chosen))


def wait(device: torch.device) -> None:
    """Wait for all queued work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def cycles_per_second(device: torch.device) -> float:
    """Measure the clock of a GPU, in the cycles that it sleeps in a second."""
    cycles = 20_000_000
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return cycles / min(times)


def host_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time the host's part of a call, with nothing queued on the device before it."""
    wait(device)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def seconds(call: Callable[[], Any], device: torch.device, host: float) -> float:
    """Time a call; on a GPU by events, the card's own time, as in a training whose host runs ahead.

    The card first sleeps for longer than the host needs, so that all of the call's work is queued when its clock starts.

    Args:
        call: call to time.
        device: device that it runs on.
        host: the host's time for the call, in seconds; unused on a CPU.
    """
    if device.type != "cuda":
        return host_seconds(call, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(cycles_per_second(device) * (AHEAD + (1 + AHEAD_SHARE) * host)))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, warm: int = 3
) -> dict[str, list[float]]:
    """Time calls alternately, so that a slow spell of the machine affects all of them.

    Args:
        calls: calls by name.
        rounds: timings of each call.
        device: device that they run on.
        warm: rounds before, to build and cache, and to time the host; at least one on a GPU.

    Returns:
        Seconds of every timing, by name.
    """
    host = dict.fromkeys(calls, 0.0)
    for _ in range(max(1, warm) if device.type == "cuda" else warm):
        host = {name: host_seconds(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device, host[name]))
    return times


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Return every call's median seconds, timed alternately."""
    return {name: statistics.median(times) for name, times in turns(calls, rounds, device).items()}


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """Capture a call on a GPU as a CUDA graph, and return its replay."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that were allocated at once during a call, beyond those before it."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    held = most = 0
    for event in events:
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def saved_bytes(call: Callable[[], Any], inputs: tuple[Tensor, ...]) -> int:
    """Return the bytes that a forward call keeps for backward, without its inputs.

    Args:
        call: forward call.
        inputs: tensors of any shape (*,), which are not counted.
    """
    own = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()
    del result
    return sum(kept.values())


def launches(call: Callable[[], Any], device: torch.device) -> int | None:
    """Count the kernels, copies and fills that a call starts on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    wait(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        wait(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events() or ())


def bandwidth_seconds(kind: str, size: int, device: torch.device, rounds: int = 20) -> list[float]:
    """Time moving bytes.

    Args:
        kind: "copy" (read and written bytes together are `size`), "read" or "write". "read" sums 32-bit integers in one pass,
            with nothing to write.
        size: bytes to move.
        device: device to move them on.
        rounds: number of timings.

    Returns:
        Seconds of every timing.
    """
    x = torch.zeros(size // (8 if kind == "copy" else 4), dtype=torch.int32, device=device)
    y = torch.empty_like(x) if kind == "copy" else x
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: y.copy_(x), "read": lambda: x.sum(dtype=torch.int32), "write": x.zero_,
    }  # fmt: skip
    return turns({kind: calls[kind]}, rounds, device)[kind]


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes/s of a large copy, read and written, by the median time; 2 GiB on a GPU, beyond its cache."""
    size = 2**31 if device.type == "cuda" else 2**27
    return size / statistics.median(bandwidth_seconds("copy", size, device))


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations/s of a large matrix product, by the median of 10 times."""
    n = 8192 if device.type == "cuda" else 2048
    x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / in_turns({"": lambda: torch.mm(x, y)}, 10, device)[""]


class _OperatorTimes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, list[float]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        result = operator(*args, **(kwargs or {}))
        self.times.setdefault(operator._opname, []).append(time.perf_counter() - started)
        return result


def operator_seconds(call: Callable[[], Any], device: torch.device, most: int = 12) -> list[tuple[str, float, float]]:
    """Measure the time of a call's operators, the longest first and the rest as one.

    On a GPU the profiler measures each kernel. On a CPU every operator is timed when it is dispatched: the profiler's own
    memory grows among the tensors, and causes page faults for tensors of some megabytes.

    Args:
        call: call to measure.
        device: device that it runs on.
        most: operators to list separately.

    Returns:
        For each operator its name, its seconds and its number of runs in one call.
    """
    repeats = 10
    found: dict[str, tuple[float, float]] = {}
    if device.type == "cuda":
        call()
        wait(device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(repeats):
                call()
            wait(device)
        for entry in profile.key_averages():
            # Without the template's arguments, which would fill a page.
            name = re.sub(r"^void |[<(].*", "", entry.key)[:60]
            spent, times = found.get(name, (0.0, 0.0))
            found[name] = spent + entry.self_device_time_total / 1e6 / repeats, times + entry.count / repeats
    else:
        with _OperatorTimes() as mode:
            for _ in range(repeats):
                call()
        found = {name: (sum(times) / repeats, len(times) / repeats) for name, times in mode.times.items()}
    rows = sorted(((name, *values) for name, values in found.items()), key=lambda row: -row[1])
    rest = rows[most:]
    return [*rows[:most], ("all others", sum(row[1] for row in rest), sum(row[2] for row in rest))]


def trace(call: Callable[[], Any], device: torch.device, path: Path) -> None:
    """Write the profiler's trace of one call, for Perfetto or Chrome."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    call()
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        wait(device)
    profile.export_chrome_trace(str(path))


def card_state() -> dict[str, str]:
    """Return nvidia-smi's driver version, clocks and power of the card; nothing if nvidia-smi is missing."""
    keys = (
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.draw",
        "power.limit",
        "temperature.gpu",
    )
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().splitlines()[:1]
    return dict(zip(keys, values[0].split(", "), strict=False)) if done.returncode == 0 and values else {}


def environment(device: torch.device) -> dict[str, Any]:
    """Return the device, versions, commit and date of the measurements."""
    try:
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:
        git = "unknown"
    found: dict[str, Any] = {
        "device": device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git,
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        import triton

        found |= {"name": torch.cuda.get_device_name(device), "triton": triton.__version__, "cuda": torch.version.cuda}
        found |= card_state()
    else:
        found |= {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    return found


def cpu_name() -> str:
    """Return the processor's name as Linux reports it, or its architecture on other systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
