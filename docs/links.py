"""Rewrite links of the docs to code, or to a folder's README in the repository, as an mkdocs hook."""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

# A warning fails a strict build.
logger = logging.getLogger("mkdocs.hooks.links")
ROOMS = ("cluster", "data_shards", "jobs", "kernels")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def lay_out(root: Path) -> None:
    """Link the top-level folders into one package, as they are installed, for tools that read files.

    Args:
        root: root of the repository.
    """
    package = root / "build" / "types" / "deepskip"
    package.mkdir(parents=True, exist_ok=True)
    for room in (*(root / name for name in ROOMS), *(root / "deepskip").iterdir()):
        link = package / room.name
        if not link.is_symlink():
            link.symlink_to(room)


# Call it on import: mkdocstrings looks for its paths before any hook is called.
lay_out(Path(__file__).parents[1])


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Replace links that leave docs/ by a path, and links to a README by its page; warn of missing files.

    Args:
        markdown: text of the page.
        page: mkdocs' page.
        config: mkdocs' configuration.
        files: mkdocs' files; unused.

    Returns:
        Text with the links replaced.
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
