"""Compare what two commits do, bit for bit, on this machine: `python -m tests.golden.compare BEFORE [AFTER]`.

Each commit is checked out into a temporary folder and recorded by `tests.golden.record` of this checkout. Without
AFTER, this checkout is compared, unchanged. The status is 1 if anything differs, and each difference is printed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.golden.record import ROOT, record


def differences(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """Yield a line for each difference between two records."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            if key not in before or key not in after:
                yield f"{at}/{key}: {'only before' if key in before else 'only after'}"
            else:
                yield from differences(before[key], after[key], f"{at}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{at}/{i}")
    elif before != after:
        yield f"{at}: {str(before)[:100]} before, {str(after)[:100]} after"


def recorded(commit: str | None) -> Any:
    """Record a commit, or this checkout if there is none."""
    if commit is None:
        return json.loads(json.dumps(record(ROOT)))
    with tempfile.TemporaryDirectory(prefix="golden-checkout-") as name:
        folder = Path(name) / "checkout"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
        try:
            return json.loads(json.dumps(record(folder)))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def main() -> None:
    """Compare two commits and print the differences."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.compare", description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?")
    arguments = parser.parse_args()
    found = list(differences(recorded(arguments.before), recorded(arguments.after)))
    print("\n".join(found) or "the same, bit for bit")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
