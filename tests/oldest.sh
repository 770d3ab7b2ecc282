#!/usr/bin/env bash
# The lowest version of Ray that pyproject.toml allows works: the contract tests hold, and it trains and reports. Other packages
# have the versions of requirements.lock.
#   tests/oldest.sh            the version of pyproject.toml
#   tests/oldest.sh VERSION    another one, to find the lowest
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-$(sed -n 's/.*"ray\[data,default,train\]>=\([0-9.]*\)".*/\1/p' pyproject.toml)}
python=$PWD/.venv-oldest/bin/python
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT

"${PYTHON:-python3}" -m venv .venv-oldest
grep -v '^ray' requirements.lock > "$home/constraints.txt"
what=(--constraint "$home/constraints.txt" --editable '.[train,serve]' "ray==$version" pytest pytest-timeout)
"$python" -m pip install --quiet --disable-pip-version-check --no-input uv
UV_FIND_LINKS=${PIP_FIND_LINKS:-} .venv-oldest/bin/uv pip install --quiet --python "$python" "${what[@]}" ||
  "$python" -m pip install --quiet --disable-pip-version-check --no-input "${what[@]}"

"$python" -m pytest tests/cluster/test_ray_contract.py
export PYTHONPATH=$PWD
cd "$home"
"$python" -m deepskip pack coins --out coins --train 8 --val 2 --test 1 > packed
"$python" -m deepskip train coins --optim.steps 2 --optim.warmup_steps 1 --optim.global_batch_size 2 --data.crop 64 \
  --model.base_channels 4 --run.name oldest --run.tracking_uri none --cluster.workers 2 --cluster.gpu false
"$python" - "$version" << 'END'
import json
import math
import sys
from pathlib import Path

import ray
from ray.train import Result

run = Path("runs/oldest").absolute()
assert f"{ray.__version__}.".startswith(f"{sys.argv[1]}."), ray.__version__
summary, reported = json.loads((run / "summary.json").read_text()), Result.from_path(str(run / "ray")).metrics
assert summary["steps"] == reported["step"] == 2, (summary, reported)
best = {name: value for name, value in summary["val"].items() if name != "step" and value and math.isfinite(value)}
assert best and all(reported[f"val/{name}"] == value for name, value in best.items()), (summary, reported)
print(f"Ray {ray.__version__}: the contracts hold, and it trains")
END
