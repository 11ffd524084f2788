"""The config as a JSON schema (draft 7, which editors read): for completion, and for marks at what cannot be.

Where a section names a part, it is one of alternatives, each with that part's keys and no other; a table without a name
(a file that only changes its preset) may have the keys of any. Values are those of a TOML file: None is "none".
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from lamina import config, settings, wire
from lamina.config import TABLES, Config
from lamina.explain import keys
from lamina.metrics import METRICS
from lamina.settings import PARTS
from lamina.training import LocalSGD
from lamina.wire.values import VALUES

Schema = dict[str, Any]

_ENTRY: Schema = {"type": "string", "pattern": r"\.py:[A-Za-z_]", "description": 'A name in a file: "mine.py:thing".'}
_LIMITS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "pattern": "pattern",
}
_SIMPLE: dict[Any, Schema] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    str: {"type": "string"},
    type(None): {"const": "none"},
}


def made() -> Schema:
    """The schema of a config file."""
    properties: dict[str, Schema] = {
        "preset": {"enum": list(settings.presets()), "description": _meaning("preset")},
    }
    for name in Config.model_fields:
        if name in PARTS:
            properties[name] = _part(name)
        elif name == "local":
            said = config.takes(LocalSGD).items()
            properties[name] = _table({key: _key(f"local.{key}", taken.annotation) for key, taken in said})
        elif name in TABLES:
            options = TABLES[name]
            said_too = {key: _key(f"{name}.{key}", config.annotation_of(options, key)) for key in options.model_fields}
            properties[name] = _table(said_too)
        elif name == "metrics":
            table: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
            names: Schema = {"type": "array", "items": {"anyOf": [{"enum": list(METRICS)}, _ENTRY]}}
            properties[name] = _described({"anyOf": [table, names]}, _meaning(name))
        else:
            properties[name] = _key(name, config.annotation_of(Config, name))
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A lamina experiment",
        **_table(properties),
    }


def text(schema: Schema) -> str:
    return json.dumps(schema, indent=1, ensure_ascii=False)


def _table(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _part(section: str) -> Schema:
    alternatives: list[Schema] = [_short(section)]
    every: dict[str, Schema] = {}
    for name, thing in config.catalogue(section).items():
        taken = config.arguments_of(section, thing).items()
        own = {key: _typed(section, thing, key, x.annotation) for key, x in taken}
        for key, value in own.items():
            every[key] = _either(every[key], value) if key in every else value
        head = {"name": {**_named(section, name), "description": config.about(section, name)}}
        alternatives.append({**_table({**head, **own}), "required": ["name"], "title": name})
    alternatives += [
        {"type": "object", "properties": {"entry": _ENTRY}, "required": ["entry"], "title": "of your own"},
        {**_table(every), "title": "as the preset has it, but"},
    ]
    whole: Schema = {"anyOf": alternatives}
    if section == "method":
        whole = {"anyOf": [*alternatives, {"type": "array", "items": {"anyOf": alternatives}, "title": "a chain"}]}
    return {**whole, "description": _meaning(section)}


def _short(section: str) -> Schema:
    """A part in one word; a codec with what it takes behind colons."""
    if section not in ("uplink", "downlink"):
        return {"anyOf": [{"enum": list(config.catalogue(section))}, _ENTRY]}
    heads = [word for name in wire.CODECS for word in _spellings(name)]
    return {"anyOf": [{"enum": heads}, {"type": "string", "pattern": _coded(heads)}, _ENTRY]}


def _named(section: str, name: str) -> Schema:
    if section not in ("uplink", "downlink"):
        return {"const": name}
    return {"type": "string", "pattern": _coded(_spellings(name))}


def _coded(heads: Sequence[str]) -> str:
    return f"^({'|'.join(heads)})(:[^:]+)*$"


def _spellings(codec: str) -> list[str]:
    """A dense codec goes by the name of its values as well."""
    return [codec, *VALUES, "ring"] if codec == "dense" else [codec]


def _typed(section: str, thing: Callable[..., Any], key: str, annotation: Any) -> Schema:
    return _described(_of(annotation), keys.meaning_of(section, thing, key))


def _key(name: str, annotation: Any) -> Schema:
    return _described(_of(annotation), _meaning(name))


def _meaning(name: str) -> str:
    return keys.known()[name].taken[0].meaning


def _described(schema: Schema, meaning: str) -> Schema:
    return {**schema, "description": meaning} if meaning else schema


def _either(one: Schema, other: Schema) -> Schema:
    known = one["anyOf"] if one.keys() == {"anyOf"} else [one]
    return one if other in known else {"anyOf": [*known, other]}


def _of(annotation: Any) -> Schema:
    """A type as a schema. What cannot stand in a file is left out; what is not known allows everything."""
    kind, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is Annotated:
        said = [inner for entry in parts[1:] for inner in getattr(entry, "metadata", [entry])]
        limits = {
            word: limit
            for inner in said
            for name, word in _LIMITS.items()
            if (limit := getattr(inner, name, None)) is not None
        }
        return {**_of(parts[0]), **limits}
    if kind in (typing.Union, types.UnionType):
        options = [_of(part) for part in parts if typing.get_origin(part) is not Callable and part is not Path]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if kind is Literal:
        return {"enum": list(parts)}
    if inspect.isclass(kind) and issubclass(kind, tuple) and Ellipsis not in parts:
        return {"type": "array", "items": [_of(part) for part in parts], "minItems": len(parts), "maxItems": len(parts)}
    if inspect.isclass(kind) and issubclass(kind, Mapping):
        return {"type": "object", "additionalProperties": _of(parts[1])}
    if inspect.isclass(kind) and issubclass(kind, Sequence):
        return {"type": "array", "items": _of(parts[0])}
    return dict(_SIMPLE.get(annotation, {}))
