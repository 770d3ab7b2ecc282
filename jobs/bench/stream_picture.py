"""Draw docs/stream-way.svg, the way of a sample through a stream: `python -m deepskip.jobs.bench.stream_picture`."""

from html import escape
from pathlib import Path
from typing import NamedTuple

PICTURE = Path(__file__).parents[2] / "docs" / "stream-way.svg"
WIDTH, HEIGHT = 1000, 330
BOX, GAP, TOP, TALL = 164, 30, 40, 66
DATA, TRAIN, OUT = "#dfeaf7", "#e2f2e4", "#fbeed5"


class Place(NamedTuple):
    """A place on the way.

    Attributes:
        name: its name.
        file: file or setting in which it is found.
        promise: two lines on what is promised there.
        colour: fill of its box.
    """

    name: str
    file: str
    promise: tuple[str, str]
    colour: str


# The second row runs from right to left.
ROWS = (
    (
        Place("source", "folder, S3, Kafka", ("files appear whole,", "messages have offsets"), DATA),
        Place("ingest", "deepskip ingest", ("each item once;", "faults in refused.jsonl"), DATA),
        Place("generation", "manifest/00000007.json", ("samples and offsets in one", "atomic commit; no change"), DATA),
        Place("admission", "admissions.jsonl", ("all ranks agree; on disk", "before the first use"), TRAIN),
        Place("prequential score", "stream/iou, drift", ("measured before it", "is trained on"), TRAIN),
    ),
    (
        Place("step", "(seed, log) → samples", ("each sample once, on any", "number of workers"), TRAIN),
        Place("checkpoint", "checkpoints/", ("has the log and a checksum", "of what was taken"), TRAIN),
        Place("published model", "published.json", ("better by min_gain;", "named by its sha256"), OUT),
        Place("server", "deepskip serve", ("takes over, and loses", "no request"), OUT),
    ),
)


def left_of(row: int, number: int) -> int:
    """Return the left edge of a box; the second row runs from right to left."""
    place = number if row == 0 else len(ROWS[0]) - 1 - number
    return 30 + place * (BOX + GAP)


def text(x: float, y: float, words: str, style: str) -> str:
    """Return a centred line of text."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" {style}>{escape(words, quote=False)}</text>'


def arrow(x: float, y: float, to_x: float, to_y: float, style: str = "") -> str:
    """Return an arrow between two points."""
    return f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="#333" stroke-width="1.6" marker-end="url(#a)" {style}/>'


def picture() -> str:
    """Return the picture as SVG."""
    parts = []
    for row, places in enumerate(ROWS):
        top = TOP + 150 * row
        for number, place in enumerate(places):
            left, middle = left_of(row, number), left_of(row, number) + BOX / 2
            parts += [
                f'<rect x="{left}" y="{top}" width="{BOX}" height="{TALL}" rx="6" fill="{place.colour}" stroke="#333"/>',
                text(middle, top + 27, place.name, 'font-weight="bold"'),
                text(middle, top + 48, place.file, 'font-size="11.5" font-family="monospace"'),
                text(middle, top + TALL + 17, place.promise[0], 'font-size="11.5" fill="#333"'),
                text(middle, top + TALL + 32, place.promise[1], 'font-size="11.5" fill="#333"'),
            ]
            if number + 1 < len(places):
                y = top + TALL / 2
                begin = left + BOX if row == 0 else left
                parts.append(arrow(begin, y, begin + (GAP if row == 0 else -GAP), y))
    middle = left_of(0, len(ROWS[0]) - 1) + BOX / 2
    parts.append(arrow(middle, TOP + TALL + 38, middle, TOP + 150))
    bottom = HEIGHT - 14
    for x, colour, words in ((60, DATA, "data set"), (190, TRAIN, "training"), (320, OUT, "use")):
        parts.append(f'<rect x="{x - 24}" y="{bottom - 12}" width="16" height="16" fill="{colour}" stroke="#333"/>')
        parts.append(f'<text x="{x}" y="{bottom + 1}" font-size="12">{words}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="15">'
        '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L10 5L0 10z" fill="#333"/></marker></defs>'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>", ""])


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE)


if __name__ == "__main__":
    main()
