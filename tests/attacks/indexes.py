"""Indexes of shards that are wrong: fields of index.json of every wrong kind, and columns with false places."""

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepskip.data_shards.entries import SCHEMA

VALUES: list[Any] = [
    None, -1, 0, 1.5, 10**30, 1e308, float("nan"), "x", "../../etc", [], {}, [None], True, [[]], "é\0", -(2**63), 2**31,
    "a" * 10**5,
]  # fmt: skip


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value within a JSON value; of a list, only the first two."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths_in(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(min(2, len(value))):
            yield from paths_in(value[number], (*path, number))


def changed(raw: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (change, index.json): one value is wrong, missing or added, or the text is not JSON."""
    for path in paths_in(raw):
        for value in VALUES:
            made = copy.deepcopy(raw)
            place: Any = made
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            yield f"{path} is {value!r:.40}", json.dumps(made)
        made = copy.deepcopy(raw)
        place = made
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        yield f"{path} is missing", json.dumps(made)
    yield "a field more", json.dumps(raw | {"x": 1})
    for text in ("", "{", "null", "[]", '"x"', "[" * 10**5, "{}", "1" * 10**5, "\xff", json.dumps(raw)[:-20]):
        yield f"text {text:.10}", text


class Folder:
    """A packed split whose index can be rewritten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = json.loads((folder / "index.json").read_text())
        self.samples = (folder / self.raw["samples"]["file"]).read_bytes()
        self.table = pa.ipc.open_file(pa.py_buffer(self.samples)).read_all()

    def write(self, samples: bytes, honest: bool = True, text: str | None = None) -> None:
        """Write the samples file and an index.json with its SHA-256; if not `honest`, keep the former SHA-256."""
        raw = copy.deepcopy(self.raw)
        raw["samples"]["bytes"] = len(samples)
        if honest:
            raw["samples"]["sha256"] = hashlib.sha256(samples).hexdigest()
        (self.folder / raw["samples"]["file"]).write_bytes(samples)
        (self.folder / "index.json").write_text(json.dumps(raw) if text is None else text, errors="surrogateescape")

    def lying(self) -> Iterator[tuple[str, bytes]]:
        """Yield (change, samples file) for columns with false values."""
        n, columns = len(self.table), [column.chunk(0) for column in self.table.columns]
        for name, value in (
            ("image_offset", -1), ("image_offset", 2**62), ("image_offset", 2**63 - 1), ("image_length", 2**32 - 1),
            ("mask_offset", -5), ("mask_length", 2**31), ("image_format", 200), ("mask_format", 10), ("image_offset", None),
        ):  # fmt: skip
            made = list(columns)
            field = SCHEMA.get_field_index(name)
            made[field] = pa.array([value] * n, SCHEMA.field(name).type)
            yield f"{name} {value}", file_of(made, self.table.schema)
        offsets = np.frombuffer(columns[0].buffers()[1], np.int64)[: n + 1]
        at = self.samples.index(offsets.tobytes())
        for name, values in {
            "last 2**40": [*offsets[:-1], 2**40], "all -2**40": [0, *[-(2**40)] * n], "descending": offsets[::-1],
            "a megabyte beyond": [0, *(offsets[1:] + 2**20)], "100 kB beyond": [10**5 + 20 * i for i in range(n + 1)],
        }.items():  # fmt: skip
            made = np.array(values, np.int64).tobytes()
            yield f"keys: {name}", self.samples[:at] + made + self.samples[at + len(made) :]
        not_text = pa.LargeStringArray.from_buffers(
            n, pa.py_buffer(np.arange(n + 1, dtype=np.int64)), pa.py_buffer(b"\xff" * n)
        )
        yield "keys: not UTF-8", file_of([not_text, *columns[1:]], self.table.schema)
        yield "fewer rows", file_of([column.slice(1) for column in columns], self.table.schema)
        yield "other columns", file_of(columns[:3], pa.schema(list(SCHEMA)[:3]))

    def damaged(self, rng: random.Random) -> bytes:
        """Damage the samples file, mostly in its metadata."""
        data = bytearray(self.samples)
        for _ in range(rng.choice([1, 2, 8])):
            near = rng.choice(
                [rng.randrange(0, 1500), len(data) - 1 - rng.randrange(0, 1500), rng.randrange(len(data))]
            )
            at = near % len(data)
            data[at] = rng.choice([0, 255, rng.randrange(256), data[at] ^ (1 << rng.randrange(8))])
        return bytes(data)


def file_of(columns: list[Any], schema: pa.Schema) -> bytes:
    """Return columns as the bytes of a samples file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue().to_pybytes()
