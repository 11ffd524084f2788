"""The wire: trees to bytes and back, with every byte counted (format FLC1).

`container` seals and opens blobs, `index`, `values` (with `exact`, `lossy`) and `scalars` code what is in them, `codec`
joins these, `dense` and `sparse` are the codecs, `frame` packs several blobs into one message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from lamina.errors import ConfigError, WireError, meant
from lamina.wire.codec import (
    Codec,
    Content,
    Context,
    Schema,
    Size,
    Spec,
    decode,
    encode,
    layout,
    read,
    schema_of,
    sized,
    transmit,
)
from lamina.wire.dense import Dense, Mask
from lamina.wire.sparse import RandomK, TopK
from lamina.wire.values import CHOICES, named

__all__ = [
    "CODECS",
    "Codec",
    "Content",
    "Context",
    "Dense",
    "Mask",
    "RandomK",
    "Schema",
    "Size",
    "Spec",
    "TopK",
    "WireError",
    "decode",
    "encode",
    "layout",
    "parse",
    "read",
    "schema_of",
    "sized",
    "transmit",
]

CODECS: dict[str, type[Any]] = {"dense": Dense, "topk": TopK, "randomk": RandomK}


def parse(spec: str | Mapping[str, Any] | Codec) -> Codec:
    """A codec from a config value.

    Args:
        spec: ``"int8"`` or ``"dense:int8"``; ``"topk:0.01"``, with ``:global``, ``:released``, ``:sign`` in any order;
            ``"randomk:0.1"``; ``"ring:24"``; or a mapping ``{"name": "topk", "density": 0.01, "values": "sign"}``,
            whose name may be any of these strings. A codec is returned as it is.

    Raises:
        ConfigError: an unknown name, option or key, or a value out of range.
    """
    if isinstance(spec, str):
        name, options = _read(spec)
    elif isinstance(spec, Mapping):
        if not isinstance(spec.get("name"), str):
            raise ConfigError(f"codec {dict(spec)!r}: expected a name, one of {', '.join(CODECS)}")
        name, options = _read(spec["name"])
        options |= {key: value for key, value in spec.items() if key != "name"}
    else:
        return spec
    known = {field.name: field for field in fields(CODECS[name])}
    for key in options:
        if key not in known:
            raise ConfigError(f"codec {name}: unknown key {key!r}", remedy=_suggest(key, known))
    for key, field in known.items():
        if field.default is MISSING and key not in options:
            raise ConfigError(f"codec {name}: {key} is missing", remedy=f'for example "{name}:0.01"')
    codec: Codec = CODECS[name](**options)
    return codec


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``name:option:option`` or of a bare value coding."""
    name, *rest = re.split(r"(?<!\bring):", text)  # ring:24 is one word
    if named(name) is not None:
        name, rest = "dense", [name, *rest]
    if name not in CODECS:
        raise ConfigError(f"unknown codec {name!r}", remedy=_suggest(name, [*CODECS, *CHOICES]))
    options: dict[str, Any] = {}
    for word in rest:
        key, value = _option(word, text)
        if key in options:
            raise ConfigError(f"codec {text!r}: {key} given twice")
        options[key] = value
    return name, options


def _option(word: str, text: str) -> tuple[str, Any]:
    choices = {"layer": "scope", "global": "scope", "exact": "keep", "released": "keep"}
    choices |= dict.fromkeys(CHOICES, "values")
    if named(word) is not None:
        return "values", word
    if word in choices:
        return choices[word], word
    try:
        return "density", float(word)
    except ValueError:
        message = f"codec {text!r}: unknown option {word!r}"
        raise ConfigError(message, remedy=_suggest(word, choices)) from None


def _suggest(word: str, known: Mapping[str, Any] | list[str]) -> str:
    return meant(word, known) or f"one of {', '.join(known)}"
