"""For mkdocs: links of the docs to code beside them are links in the repository, and names of files in the site."""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

# a warning ends a strict build
logger = logging.getLogger("mkdocs.hooks.links")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Puts the path of a file in the place of a link that leaves docs/, and warns where there is no such file."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    root = Path(config.config_file_path).parent

    def plain(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        if path.startswith("docs/"):
            return link[0]
        if not (root / path).exists():
            logger.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        return f"`{path}`" if link[1].strip("`") in path else f"{link[1]} (`{path}`)"

    return LINK.sub(plain, markdown)
