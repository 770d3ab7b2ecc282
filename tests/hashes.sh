#!/usr/bin/env bash
# Make or check requirements-cluster.txt, which lists with hashes what a machine of a cluster needs.
#   tests/hashes.sh make [WHEEL...]   write the file; WHEEL: torch's CPU builds, which are in another index
#   tests/hashes.sh check             compare it with the index, and install the CPU build into an empty environment
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
cd "$top"
lock=requirements-cluster.txt
extras=(--extra train --extra cloud --extra export --extra geo --extra ingest --extra serve --extra server --extra stream)

# Print the index's own hashes of each version in requirements.lock.
compiled() {
  { sed -n 's/^requires = \["\(setuptools==[0-9.]*\)"\]$/\1/p' pyproject.toml; } >"$folder/build.in"
  .venv/bin/uv pip compile --quiet --universal --python-version 3.11 "${extras[@]}" --generate-hashes --no-annotate --no-header \
    --constraint requirements.lock pyproject.toml "$folder/build.in" --output-file "$folder/compiled"
  cat "$folder/compiled"
}

# Print the list without CUDA's packages, which torch's CPU build does not require.
for_cpu() {
  # Of two builds of one version, pip takes the one whose hash is in the index.
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
  # Our list may have more hashes, of torch's CPU builds.
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
