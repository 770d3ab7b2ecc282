"""Compare what a run remembers of its data with the data that is there now.

The identity of a split is a mapping of names to numbers, such as "samples", and digests. A run has one for each split.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

Identity = Mapping[str, str | int]
# A network of other numbers of these is another network.
SHAPING = {"bands", "num_classes"}
# Digest of the shards' bytes, which earlier versions recorded alone.
TARS = "tars"
# Digests of the contents of each generation of a chain, as one text. A closed set has only its CONTENTS, which are those of
# generation 0 if others are appended later.
GENERATIONS, CONTENTS, DIGEST_LENGTH = "generations", "contents", 32
# What differs between a chain and its beginning.
GROWING = {"samples", "shards", CONTENTS, GENERATIONS, TARS}


class OtherData(RuntimeError):
    """The data is not that of the training so far, or not the same on all ranks; the message says what differs."""


def generations(identity: Mapping[str, Any]) -> int:
    """Return how many generations of a split an identity is of."""
    return max(1, len(str(identity.get(GENERATIONS, ""))) // DIGEST_LENGTH)


def beginning(before: Mapping[str, Any], now: Mapping[str, Identity]) -> dict[str, Identity]:
    """Return identities in which each split that has only grown since a run recorded it is as the run recorded it.

    Args:
        before: as for `differing`.
        now: identities by split.
    """
    found = dict(now)
    for split, identity in now.items():
        earlier = before.get(split)
        if not isinstance(earlier, Mapping) or CONTENTS not in earlier:
            continue
        old, new = (str(each.get(GENERATIONS, each.get(CONTENTS))) for each in (earlier, identity))
        same = all(identity[key] == earlier.get(key, identity[key]) for key in identity.keys() - GROWING)
        if same and len(old) < len(new) and new.startswith(old):
            found[split] = earlier
    return found


def differing(before: Mapping[str, Any], now: Mapping[str, Identity]) -> dict[str, list[str]]:
    """Return the names of the entries that differ, by split, without the splits in which none does.

    Args:
        before: identities as a run recorded them, or for a run of an earlier version only a digest of each split, which is
            compared with the entry TARS if that is there.
        now: identities by split.
    """
    found = {}
    for split, identity in now.items():
        earlier = before.get(split)
        if isinstance(earlier, Mapping):
            both = [key for key in identity if key in earlier and key != TARS]
            found[split] = [key for key in both if earlier[key] != identity[key]]
        else:
            found[split] = [TARS] if earlier is not None and identity.get(TARS, earlier) != earlier else []
    return {split: keys for split, keys in found.items() if keys}


def changes(before: Mapping[str, Any], now: Mapping[str, Identity]) -> str:
    """Return in words what differs between the data of a run and that at the same location now; empty if nothing does.

    Args:
        before: as for `differing`.
        now: identities by split.
    """

    def words(split: str, key: str) -> str:
        value = now[split][key]
        return f"other {key}" if isinstance(value, str) else f"{key} {value} instead of {before[split][key]}"

    found = differing(before, now)
    return "; ".join(f"{split} has {', '.join(words(split, key) for key in keys)}" for split, keys in found.items())


def name_of(data: Mapping[str, Identity]) -> str:
    """Return a short name of the data of a run: a letter, which no YAML takes for a number, and 11 hexadecimal digits."""
    known = {split: {key: identity[key] for key in identity if key != TARS} for split, identity in data.items()}
    return f"d{hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:11]}"


def refusal(before: Mapping[str, Any], now: Mapping[str, Identity], accepted: str | None) -> str | None:
    """Return why a run cannot resume on the data as it is now, and how it can on purpose; None if nothing is against it.

    Args:
        before: as for `differing`.
        now: identities by split.
        accepted: name of changed data on which the run may resume.
    """
    keys = {key for found in differing(before, now).values() for key in found}
    if not keys or (accepted == name_of(now) and not keys & SHAPING):
        return None
    reason = f"was trained on other data ({changes(before, now)})"
    if keys & SHAPING:
        return f"{reason}, which its network does not fit"
    return f"{reason}; to resume on the data as it is now, give --data.accept {name_of(now)}"
