#!/usr/bin/env bash
# Install DeepSkip in each way, and predict or train: the wheel in an empty environment next to PyPI's packages of our
# old names, then with [train]; an editable installation; a bare checkout; `ray job submit` with a working directory.
#   tests/package.sh [OUT]    OUT: folder of the log, build/package by default
set -euo pipefail
top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
out=$(mkdir -p "${1:-$top/build/package}" && cd "${1:-$top/build/package}" && pwd)
folder=$(mktemp -d "${TMPDIR:-/tmp}/package-XXXXXX")
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
say() { echo "== $*" | tee -a "$out/log"; }
quiet() { "$@" >>"$out/log" 2>&1 || { tail -n 30 "$out/log"; echo "failed: $*"; exit 1; }; }
pip() { "$1/bin/python" -m pip "${@:2}" --quiet --disable-pip-version-check --no-input; }
: >"$out/log"

say "wheel and source distribution"
git clone --quiet "$top" "$folder/checkout"
"$python" -m venv "$folder/build"
quiet pip "$folder/build" install build
quiet "$folder/build/bin/python" -m build --outdir "$folder/dist" "$folder/checkout"
wheel=$(ls "$folder"/dist/*.whl)
roots=$("$python" -m zipfile -l "$wheel" | awk 'NR > 1 {print $1}' | cut -d/ -f1 | sort -u | tr '\n' ' ')
[[ $roots =~ ^deepskip\ deepskip-[0-9.]+\.dist-info\ $ ]] || { echo "the wheel holds $roots"; exit 1; }
if "$python" -m zipfile -l "$wheel" | grep -E '/(bench|tests)/'; then exit 1; fi

say "base environment, beside PyPI's kernels and cluster"
"$python" -m venv "$folder/base"
quiet pip "$folder/base" install --constraint "$top/requirements.lock" "$wheel"
say "size: $(du -sm "$folder/base" | cut -f1) MB"
# cluster requires pkg_resources, which newer versions of setuptools lack.
quiet pip "$folder/base" install kernels==0.10.1 cluster==1.4.1.post3 'setuptools<81'
for package in ray mlflow; do
  if "$folder/base/bin/python" -c "import $package" 2>/dev/null; then echo "$package is there"; exit 1; fi
done
mkdir "$folder/work" && cd "$folder/work"
cp "$top/tests/golden/stored/checkpoint.pt" .
"$folder/base/bin/python" - <<'CODE'
import cluster, deepskip, kernels, numpy
from deepskip import cluster as our_cluster, kernels as our_kernels
from PIL import Image

assert kernels.get_kernel and cluster.HierarchicalClustering
assert our_kernels is not kernels and our_cluster is not cluster
Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype("uint8")).save("image.png")
CODE
quiet "$folder/base/bin/deepskip" --help
quiet "$folder/base/bin/deepskip" predict --model checkpoint.pt --images image.png --out predicted
test -s predicted/masks/image.png
said=$("$folder/base/bin/deepskip" train coins --local 2>&1 || true)
[[ $said == *"which is not installed: pip install 'deepskip[train]'"* ]] || { echo "$said"; exit 1; }

say "with [train]: pack, and 20 steps on Ray"
quiet pip "$folder/base" install --constraint "$top/requirements.lock" "${wheel}[train]"
deepskip=$folder/base/bin/deepskip
quiet "$deepskip" pack coins --out coins --train 32 --val 4 --test 4
small=(coins --model.base_channels 4 --optim.steps 20 --run.tracking_uri none --cluster.workers 1)
quiet env HOME="$folder/work" "$deepskip" train "${small[@]}" --run.name wheel
test -s runs/wheel/summary.json

say "the wheel, and a checkout as a job's working directory: ray job submit"
quiet "$deepskip" cluster up
eval "$("$deepskip" cluster up | grep ^export)"
(cd "$folder/checkout" && PATH="$folder/base/bin:$PATH" quiet ray job submit --working-dir . -- python -m jobs.train \
  --data.path "$folder/work/coins" --run.storage "$folder/work/runs" "${small[@]:1}" --run.name submitted)
quiet "$deepskip" cluster down
unset RAY_ADDRESS RAY_AUTH_TOKEN RAY_AUTH_MODE
test -s runs/submitted/summary.json
grep -q 'is now .deepskip train.' "$out/log"

say "a bare checkout, and an editable installation"
for way in bare editable; do
  if [ $way = editable ]; then
    quiet pip "$folder/base" uninstall --yes deepskip
    quiet pip "$folder/base" install --no-deps --editable "$folder/checkout"
    (cd / && "$folder/base/bin/python" -c "import deepskip.kernels as k; assert 'checkout' in k.__file__")
    quiet "$deepskip" train "${small[@]}" --local --run.name $way
  else
    quiet env PYTHONPATH="$folder/checkout" "$folder/base/bin/python" -m deepskip train "${small[@]}" --local --run.name $way
  fi
  test -s runs/$way/summary.json
done
say "all installed forms predict and train"
