"""How the benchmarks measure: bytes that a call allocates and keeps, the machine's copy bandwidth, what the machine is."""

import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# more than any last-level cache, so that rotated buffers come from memory
ROTATED = 2**29
# clock cycles, some 20 ms, for which a GPU waits while the host starts what is to be timed
AHEAD = 40_000_000


def copies(make: Callable[[], tuple[Tensor, ...]], device: torch.device) -> list[tuple[Tensor, ...]]:
    """Makes as many sets of inputs as are needed to pass the caches on a GPU; on a CPU two."""
    first = make()
    size = sum(x.numel() * x.element_size() for x in first)
    count = max(2, min(64, ROTATED // max(size, 1))) if device.type == "cuda" else 2
    return [first, *(make() for _ in range(count - 1))]


def wait(device: torch.device) -> None:
    """Waits for all that was asked of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Times a call, on a GPU by events: the card's own time, as in a training whose host runs ahead of it."""
    if device.type == "cuda":
        torch.cuda._sleep(AHEAD)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Gives every call's median seconds; in turns, so that a slow spell of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            took = seconds(call, device)
            if turn >= 3:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Gives the most bytes that were allocated at once during a call, beyond those before it."""
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
    """Gives the bytes that a forward call keeps for backward, without its inputs."""
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
    """Counts the kernels, copies and fills that a call starts on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    wait(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        wait(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events() or ())


def copy_bandwidth(device: torch.device) -> float:
    """Measures bytes/s of copying a large tensor: read and written bytes over the median of 20 times."""
    x = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    times = []
    for _ in range(25):
        wait(device)
        started = time.perf_counter()
        y.copy_(x)
        wait(device)
        times.append(time.perf_counter() - started)
    return 2 * x.numel() / statistics.median(times[5:])


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measures operations/s of a large matrix product, the median of 10 times."""
    n = 8192 if device.type == "cuda" else 2048
    x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = sorted(seconds(lambda: torch.mm(x, y), device) for _ in range(13))
    return 2 * n**3 / times[len(times) // 2]


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
    """Gives (operator, seconds a call of `call`, times it runs in one), the longest first and the rest as one.

    On a GPU from the profiler, by kernel. On a CPU every operator is timed as it is dispatched: the profiler's own memory
    grows among the tensors', and costs those of some megabytes page faults that they do not have without it.
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
            # without what a template was made for, which takes a page
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
    """Writes the profiler's trace of one call, to be looked at in Perfetto or Chrome."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    call()
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        wait(device)
    profile.export_chrome_trace(str(path))


def environment(device: torch.device) -> dict[str, Any]:
    """Says what the numbers were taken on."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found: dict[str, Any] = {
        "device": device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        import triton

        found |= {"name": torch.cuda.get_device_name(device), "triton": triton.__version__, "cuda": torch.version.cuda}
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(driver, capture_output=True, text=True, check=False).stdout.strip()
    else:
        found |= {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    return found


def cpu_name() -> str:
    """Names this machine's processor as Linux does, elsewhere by its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
