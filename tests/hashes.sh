#!/usr/bin/env bash
# requirements-cluster.txt: what a machine of a cluster needs, with hashes.
#   tests/hashes.sh make [WHEEL...]   writes it anew; WHEEL: torch's CPU builds, which are at an index of their own
#   tests/hashes.sh check             compares it with the index, and installs the CPU build by it into an empty environment
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
cd "$top"
lock=requirements-cluster.txt
extras=(--extra train --extra cloud --extra export --extra geo --extra serve --extra server)

# the index's own hashes of every version in requirements.lock
compiled() {
  { sed -n 's/^requires = \["\(setuptools==[0-9.]*\)"\]$/\1/p' pyproject.toml; } >"$folder/build.in"
  .venv/bin/uv pip compile --quiet --universal --python-version 3.11 "${extras[@]}" --generate-hashes --no-annotate --no-header \
    --constraint requirements.lock pyproject.toml "$folder/build.in" --output-file "$folder/compiled"
  cat "$folder/compiled"
}

# without CUDA's packages, which torch's CPU build does not ask for
for_cpu() {
  # of two builds of one version pip takes the one whose hash the index tells
  awk '/^[^ ]/ {keep = !/^(nvidia-|cuda-)/} /^torch==/ {sub(/torch==[^ ]*/, "&+cpu")} keep' "$lock"
}

folder=$(mktemp -d "${TMPDIR:-/tmp}/hashes-XXXXXX")
trap 'rm -rf "$folder"' EXIT
case ${1:-check} in
make)
  {
    echo '# What a machine of a cluster needs, by hash; made by: tests/hashes.sh make'
    echo '#   pip install --require-hashes -r requirements-cluster.txt && pip install --no-deps --no-build-isolation .'
    compiled | awk '{print} /^torch==/ {while (getline line < "/dev/fd/3") print "    --hash=sha256:" line " \\"}' \
      3< <(for wheel in "${@:2}"; do sha256sum "$wheel" | cut -c1-64; done)
  } >"$folder/new"
  mv "$folder/new" "$lock"
  ;;
check)
  compiled | grep -v '^#' | sort >"$folder/index"
  grep -v '^#' "$lock" | sort >"$folder/ours"
  # ours may have more: torch's CPU builds
  comm -23 "$folder/index" "$folder/ours" >"$folder/missing"
  if [ -s "$folder/missing" ]; then
    echo "the index has other versions or hashes than $lock:"
    head "$folder/missing"
    exit 1
  fi
  echo "$(grep -c '^[a-z]' "$lock") packages with the index's hashes"
  "${PYTHON:-python3}" -m venv "$folder/venv"
  for_cpu >"$folder/cpu.txt"
  "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --require-hashes -r "$folder/cpu.txt"
  "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-build-isolation .
  "$folder/venv/bin/python" -m pip check
  "$folder/venv/bin/deepskip" --version
  ;;
esac
