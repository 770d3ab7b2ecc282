"""The web page on which people drop an image: one file without external assets, and a policy that forbids others."""

import base64
import hashlib
import json
import re
from functools import lru_cache
from importlib import resources
from typing import Any


def build(about: dict[str, Any]) -> tuple[str, str]:
    """Return the web page, and its Content-Security-Policy.

    Args:
        about: what the page must know of the server, as JSON: "bands", "classes" and "token".

    Returns:
        The page's HTML, and the value of the header.
    """
    # A script element of another type is data: browsers do not run it, and the policy need not name it.
    data = json.dumps(about).replace("<", "\\u003c")
    text, policy = template()
    return text.replace("{{about}}", data), policy


@lru_cache(maxsize=1)
def template() -> tuple[str, str]:
    """Read the page, and build its policy from the hashes of its script and its style.

    Returns:
        The page's HTML with a placeholder for the data, and the Content-Security-Policy.
    """
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
