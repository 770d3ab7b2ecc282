"""The page on which a person drops an image: one file, no assets from elsewhere, and a policy that allows no others."""

import base64
import hashlib
import json
import re
from functools import lru_cache
from importlib import resources
from typing import Any


def build(about: dict[str, Any]) -> tuple[str, str]:
    """Gives the page with what it should know of the server, and its Content-Security-Policy."""
    # a script of another type is data: nothing runs it, and the policy need not name it
    data = json.dumps(about).replace("<", "\\u003c")
    text, policy = template()
    return text.replace("{{about}}", data), policy


@lru_cache(maxsize=1)
def template() -> tuple[str, str]:
    """Reads the page and makes the policy from the hashes of its script and its style."""
    text = (resources.files("deepskip.jobs.serving") / "page.html").read_text()
    hashes = {}
    for tag in ("script", "style"):
        found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert found
        hashes[tag] = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy
