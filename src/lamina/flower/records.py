"""What a Flower message holds of ours: one opaque array, and a few numbers and names beside it.

Flower takes every array apart into objects of its own, each with requests of its own: so all that is said travels in
one, of a kind that nothing but us unpacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from lamina.errors import WireError

STYPE = "lamina.packed.v1"
_ARRAYS, _ARRAY, _ABOUT = "lamina", "packed", "lamina.about"

Said: TypeAlias = int | str | list[int] | list[str]


def packed(blob: bytes, about: Mapping[str, Said] | None = None) -> RecordDict:
    array = Array("uint8", (len(blob),), STYPE, blob)
    records: dict[str, Any] = {_ARRAYS: ArrayRecord({_ARRAY: array})}
    if about:
        records[_ABOUT] = ConfigRecord(dict(about))
    return RecordDict(records)


def unpacked(content: RecordDict) -> tuple[bytes, dict[str, Any]]:
    """The bytes, and what was said about them. Raises WireError (E345) for a message that is none of ours."""
    arrays = content.array_records.get(_ARRAYS)
    array = None if arrays is None else arrays.get(_ARRAY)
    if array is None or array.stype != STYPE:
        raise WireError(f"a message with {sorted(content)}, expected an array of {STYPE}", code="E345")
    return array.data, dict(content.config_records.get(_ABOUT, {}))


def framing(content: RecordDict) -> int:
    """Bytes that Flower's records add to the packed ones, by Flower's own count."""
    counted = sum(record.count_bytes() for record in content.values())
    ours = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    return int(counted - ours + sum(len(name) for name in content))
