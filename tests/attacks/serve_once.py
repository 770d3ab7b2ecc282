"""Serve one request and stop: `python -m tests.attacks.serve_once OUT IMAGE serve ...` writes OUT/mask.png."""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path


def main() -> int:
    """Run `deepskip serve`, request an image's mask and stop the server; return its exit status."""
    out, image, *words = sys.argv[1:]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "deepskip", *words], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if " on http://" in line:
                address = line.split(" on ")[1].split()[0]
                with urllib.request.urlopen(f"{address}/predict?format=mask", Path(image).read_bytes(), 120) as answer:
                    (Path(out) / "mask.png").write_bytes(answer.read())
                process.terminate()
        return process.wait(60)
    finally:
        process.kill()


if __name__ == "__main__":
    sys.exit(main())
