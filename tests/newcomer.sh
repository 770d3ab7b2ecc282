#!/usr/bin/env bash
# Do what a newcomer does, in a fresh clone of HEAD with an empty home: run the unchanged commands of README and of the
# first tutorial, then make train and make test. Each is timed, and the log is kept. The two pages with this run's
# output go to OUT.
#   tests/newcomer.sh OUT [BUSY] [pages]    BUSY: number of processes that keep a core busy, 0 by default;
#     pages: run only the commands of the two pages
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
busy=${2:-0}
only=${3:-}
top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
folder=$(mktemp -d "${TMPDIR:-/tmp}/newcomer-XXXXXX")
pids=()
finish() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  rm -rf "$folder"
}
trap finish EXIT
git clone --quiet "$top" "$folder/deepskip"
mkdir "$folder/home"
for ((i = 0; i < busy; i++)); do
  python3 -c 'while True: pass' &
  pids+=($!)
done
log="$out/$(git -C "$top" rev-parse --short HEAD).log"
{
  echo "$(date -u +%F) commit $(git -C "$top" rev-parse --short HEAD), $(nproc) cores, $busy busy processes"
  grep -m1 'model name' /proc/cpuinfo || uname -m
} | tee "$log"
# run NAME COMMAND ...: time a command of the newcomer, and exit with its status if it fails.
run() {
  local started status=0
  started=$(date +%s)
  (cd "$folder/deepskip" && HOME="$folder/home" "${@:2}") >>"$log" 2>&1 || status=$?
  echo "$1: status $status, $(($(date +%s) - started)) s" | tee -a "$log"
  if [ "$status" -ne 0 ]; then
    tail -n 40 "$log"
    exit "$status"
  fi
}
for page in README.md docs/tutorials/first-model.md; do
  run "$page" python3 -m tests.blocks "$page" --folder . --update
  mkdir -p "$out/$(dirname "$page")" && cp "$folder/deepskip/$page" "$out/$page"
done
if [ "$only" != pages ]; then
  run "make train" make train
  run "make test" make test
fi
echo "the whole log: $log"
