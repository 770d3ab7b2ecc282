"""Run microbenchmarks and write their results, a page and plots: python -m deepskip.kernels.bench, or `make bench`."""

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from deepskip.kernels.bench import measure, report

HERE = Path(__file__).parent


def main() -> None:
    """Run the suites and exit with pytest's status."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.kernels.bench", description=__doc__)
    parser.add_argument("suites", nargs="*", type=Path, default=[HERE], help="files, or folders of bench_*.py")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = [
        file for path in arguments.suites for file in (sorted(path.glob("bench_*.py")) if path.is_dir() else [path])
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        options = ["-q", "-p", "no:timeout", "-o", "addopts=", "--benchmark-disable-gc", f"--benchmark-json={path}"]
        status = pytest.main([*map(str, files), *options])
        if status:
            sys.exit(status)
        suites: dict[str, list[dict[str, Any]]] = {}
        traces: dict[str, str] = {}
        for entry in json.loads(path.read_text())["benchmarks"]:
            suites.setdefault(entry["extra_info"]["suite"], []).extend(entry["extra_info"]["rows"])
            if trace := entry["extra_info"].get("trace"):
                traces[entry["extra_info"]["suite"]] = trace
    results: dict[str, Any] = {"environment": measure.environment(device), "suites": suites}
    name = re.sub(r"[^a-z0-9]+", "-", results["environment"]["name"].lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    for suite, trace in traces.items():
        shutil.move(trace, arguments.out / f"{name}-{suite}-trace.json.gz")
    pictures = report.plot(results, arguments.out, name)
    text = report.page(results) + "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)
    (arguments.out / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
