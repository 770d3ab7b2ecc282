"""Check docs, docstrings, comments and messages for words that readers stumble over: `python -m tests.words`.

Arguments are files and folders. Without any, all that users read is checked. The exit status is 1 if anything is found.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

READ = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs",
    "cluster",
    "data_shards",
    "deepskip",
    "jobs",
    "kernels",
)
# These are searched in text of any case, each with its replacement.
PHRASES = {
    r"so many": "a number, or `n`",
    r"(goes|go|going|went) on": "continue, resume",
    r"beside": "next to, alongside, compared with",
    r"of (ours|theirs|yours)": "our, their, your",
    r"(is|are) no (setting|settings|field)": "unknown setting",
    r"what becomes of": "how ... is handled",
    r"in turns": "alternately",
    r"to be had": "available",
    r"(is|was|are|were) said": "is reported",
    r"lets? go of": "close, release",
    r"where there (is|are) (one|none|any)": "if there is one",
    r"of before": "former, earlier",
    r"strangers?'?": "untrusted",
    r"(is|are|was|were) not there": "is missing",
    r"left out": "skipped, omitted",
    r"left to the job": "checked by the job",
    r"with(out)? a word": "with a warning, silently",
    r"sees? to it": "ensure",
    r"an ordinary end": "a normal exit",
    r"paper's print": "published equations",
    r"closed doors|where things are|beside others": "the field's term",
    r"by the book": "as documented",
    r"takes? note of": "record",
    r"as it stands": "unchanged",
    r"so far as": "as far as",
    r"put up with": "accept",
    r"what is (asked|wanted|given) for": "what is requested",
    r"makes? of (it|them)": "the result",
}
# These are wrong at the head of a docstring.
VERBS = {
    "Give": "Return", "Gives": "Return", "Say": "Return whether", "Says": "Return whether", "Tell": "Return, Report",
    "Tells": "Return, Report", "See": "Ensure", "Sees": "Ensure", "Bring": "Convert, Resize", "Put": "Write, Insert",
}  # fmt: skip
PATTERN = re.compile(rf"\b({'|'.join(f'(?:{phrase})' for phrase in PHRASES)})\b", re.IGNORECASE)


def advice(found: str) -> str:
    """Return what to write in the place of a phrase that PATTERN found."""
    return next(better for phrase, better in PHRASES.items() if re.fullmatch(phrase, found, re.IGNORECASE))


def texts_of_python(source: str, messages: bool = True) -> Iterator[tuple[int, str]]:
    """Yield line and text of each comment, docstring and message (a literal with a space in it) of Python code."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        # A docstring is an expression of its own.
        text = node if messages else node.value if isinstance(node, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str) and " " in text.value:
            yield text.lineno, text.value


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring of a function or class."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
            text := ast.get_docstring(node)
        ):
            yield node.body[0].lineno, text


def texts_of_markdown(source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of prose, without blocks of code and without code in backticks."""
    code = False
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            yield number, re.sub(r"`[^`]*`", "", line)


def findings(path: Path) -> Iterator[str]:
    """Yield a line for each phrase in a file that has a better word."""
    source = path.read_text()
    python = path.suffix == ".py"
    # Literals of tests are data and names of cases, the list above among them.
    messages = path.parts[0] != "tests"
    for line, text in texts_of_python(source, messages) if python else texts_of_markdown(source):
        for match in PATTERN.finditer(text):
            at = line + text[: match.start()].count("\n")
            yield f'{path}:{at}: "{match[0]}": {advice(match[0])}'
    if python:
        for line, text in docstrings(source):
            first = text.split()[0]
            if first in VERBS:
                yield f'{path}:{line}: "{first} ...": {VERBS[first]}'


def main() -> int:
    """Check the files that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path(x) for x in READ if Path(x).exists()])
    files: list[Path] = []
    for path in parser.parse_args().paths:
        files += [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.suffix in (".py", ".md"))
    found = [line for path in files for line in findings(path)]
    sys.stdout.writelines(f"{line}\n" for line in found)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
