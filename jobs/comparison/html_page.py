"""The page as one HTML file that needs nothing else: figures are in it, there are no scripts and no links outside."""

import base64
import html
import re
from collections.abc import Mapping

KINDS = {"svg": "image/svg+xml", "png": "image/png"}
CSS = """
:root { color-scheme: light dark; --text: #1c1c1c; --page: #fff; --line: #d4d4d4; --head: #f3f3f3; --dim: #5c5c5c; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --page: #161616; --line: #3d3d3d; --head: #242424; --dim: #a0a0a0; }
  /* what is dark becomes bright, and colours stay what they are */
  img.svg { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 82rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 0.6rem; }
h1 { margin-top: 0.5rem; }
p, li { max-width: 48rem; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.5rem; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left; }
td { white-space: nowrap; }
td.words { white-space: normal; min-width: 9rem; }
th { background: var(--head); }
/* the network stays in sight while its numbers are scrolled */
tr > :first-child { position: sticky; left: 0; background: var(--page); max-width: 11rem; }
tr > th:first-child { background: var(--head); }
sup { color: var(--dim); font-weight: normal; line-height: 0; }
img { display: block; max-width: 100%; height: auto; }
img.svg { min-width: 40rem; background: #fff; }
pre { overflow-x: auto; padding: 0.6rem; background: var(--head); font-size: 0.82rem; }
code { font-size: 0.86em; overflow-wrap: anywhere; }
a { color: inherit; }
"""


def data_uri(name: str, data: bytes) -> str:
    """Writes a picture into an address."""
    return f"data:{KINDS[name.rsplit('.', 1)[-1]]};base64,{base64.b64encode(data).decode()}"


def to_html(text: str, title: str, pictures: Mapping[str, bytes]) -> str:
    """Turns the page's Markdown into one HTML file; pictures: what its images name.

    Raises KeyError for an image that is not among them, ValueError where the Markdown package is missing.
    """
    try:
        # comes with the docs, which most users never build
        import markdown  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise ValueError("the page needs the package markdown: pip install '.[docs]'") from None
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "toc", "sane_lists"], output_format="html")
    body = re.sub(r'<img alt="([^"]*)" src="([^"]*)" ?/?>', lambda found: image(found[1], found[2], pictures), body)
    # an address outside of the page leads nowhere when the file lies by itself
    body = re.sub(r'<a href="(?!#)[^"]*">(.*?)</a>', r"\1", body, flags=re.DOTALL)
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    body = body.replace("<td>", '<td class="words">')
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def image(words: str, name: str, pictures: Mapping[str, bytes]) -> str:
    """Makes an image that is part of the page; drawings may be scrolled, photographs are not turned dark."""
    kind = name.rsplit(".", 1)[-1]
    return f'<div class="scroll"><img class="{kind}" alt="{words}" src="{data_uri(name, pictures[name])}"></div>'
