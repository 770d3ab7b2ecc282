"""Arguments of the command line, before they are parsed."""

from collections.abc import Sequence, Set


def with_numbers(argv: Sequence[str], options: Set[str]) -> list[str]:
    """Return arguments in which `--nodata -1e20` is one word: argparse takes -1e20, and -inf, for options.

    Args:
        argv: Arguments of the command line.
        options: Options whose values are numbers.
    """
    made: list[str] = []
    for argument in argv:
        if made and made[-1] in options and is_number(argument):
            made[-1] += f"={argument}"
        else:
            made.append(argument)
    return made


def is_number(text: str) -> bool:
    """Return whether a text is a floating-point number, nan and inf too."""
    try:
        float(text)
    except ValueError:
        return False
    return True
