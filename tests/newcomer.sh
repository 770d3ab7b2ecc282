#!/usr/bin/env bash
# What a newcomer does: a fresh clone of HEAD with an empty home, make train, make test; both timed, the log kept.
#   tests/newcomer.sh OUT [BUSY]    BUSY: processes that keep a core busy each meanwhile, 0 by default
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
busy=${2:-0}
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
  echo "$(date -u +%F) commit $(git -C "$top" rev-parse --short HEAD), $(nproc) cores, $busy busy processes beside"
  grep -m1 'model name' /proc/cpuinfo || uname -m
} | tee "$log"
for target in train test; do
  started=$(date +%s)
  status=0
  (cd "$folder/deepskip" && HOME="$folder/home" make "$target") >>"$log" 2>&1 || status=$?
  echo "make $target: status $status, $(($(date +%s) - started)) s" | tee -a "$log"
  if [ "$status" -ne 0 ]; then
    tail -n 40 "$log"
    exit "$status"
  fi
done
echo "the whole log: $log"
