"""The journal of an ingest: each refused item is a whole line, once."""

import json
from pathlib import Path

from deepskip.data_shards.ingest.journal import Journal


def test_a_journal_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    for number in range(2):
        journal = Journal(path, "a")
        assert journal.add("x", "1", "bad") == (number == 0)
        assert journal.add("topic/0", 7, "bad") == (number == 0)
        assert not journal.add("topic/0", 6, "bad")
        journal.close()
        with path.open("ab") as file:
            file.write(b'{"source": "a", "item": "y", "ver')
    journal = Journal(path, "a")
    assert journal.add("x", "2", "still bad")
    journal.close()
    assert [(told["item"], told["version"]) for told in map(json.loads, path.read_text().splitlines())] == [
        ("x", "1"), ("topic/0", 7), ("x", "2"),
    ]  # fmt: skip
