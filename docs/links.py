"""For mkdocs: what a link of the docs is in the site, where in the repository it leads to code or to a folder's README."""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

# a warning ends a strict build
logger = logging.getLogger("mkdocs.hooks.links")
ROOMS = ("cluster", "data_shards", "jobs", "kernels")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def lay_out(root: Path) -> None:
    """Lays the rooms beside each other as the one package that they are installed as, for who reads them as files."""
    package = root / "build" / "types" / "deepskip"
    package.mkdir(parents=True, exist_ok=True)
    for room in (*(root / name for name in ROOMS), *(root / "deepskip").iterdir()):
        link = package / room.name
        if not link.is_symlink():
            link.symlink_to(room)


# when this is loaded: mkdocstrings looks for its paths before any hook is called
lay_out(Path(__file__).parents[1])


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Puts the path of a file in the place of a link that leaves docs/, and a folder's page in that of its README.

    Warns where there is no such file.
    """
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    root = Path(config.config_file_path).parent

    def plain(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        beside = posixpath.join(posixpath.dirname(path), "index.html")
        if path.endswith("/README.md") and (root / beside).exists():
            return f"[{link[1]}]({posixpath.join(posixpath.dirname(link[2]), 'index.html')})"
        if path.startswith("docs/"):
            return link[0]
        if not (root / path).exists():
            logger.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        return f"`{path}`" if link[1].strip("`") in path else f"{link[1]} (`{path}`)"

    return LINK.sub(plain, markdown)
