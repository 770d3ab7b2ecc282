"""Write the table of tried cases into docs/files.md: `python -m tests.field.page`."""

import sys
from pathlib import Path

from tests.field.cases import CASES

PAGE = Path(__file__).parents[2] / "docs" / "files.md"
BEGIN, END = "<!-- made by tests.field.page -->", "<!-- end -->"


def table() -> str:
    """Return the table as Markdown."""
    lines = ["| what you have | what happens | option |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {what} | {happens} | {options} |" for what, happens, options, _ in CASES.values())])


def main() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
