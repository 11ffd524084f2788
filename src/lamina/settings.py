"""Where settings come from: layers of keys, each with its origin.

    default < preset < file < LAMINA_* < command line

A part may be written short (``method = "fedlama"``) and its keys be set one by one (``method.phi=4``). Naming another
part drops what lower layers said about the one before.
"""

from __future__ import annotations

import fnmatch
import importlib.resources
import os
import re
import tomllib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lamina.entry import anchored, is_entry
from lamina.errors import ConfigError, meant

PARTS = ("model", "data", "method", "uplink", "downlink", "aggregate")  # sections that name something
SECTIONS = (*PARTS, "local", "run", "faults", "stop", "network", "privacy", "secure", "sign", "metrics")
_OWN_VARIABLES = (
    "LAMINA_RUNS",
    "LAMINA_OFFLINE",
    "LAMINA_DATA",
    "LAMINA_MKL",
    "LAMINA_KEY",
)  # of the environment, not keys

IDLE = ("run.*", "sign.*", "workers", "engine", "store")  # keys that cannot change the result
CHANGEABLE = (  # keys that may change in a run that has begun; what a round puts up with, for the rounds that come
    "rounds", "run.*", "stop.*", "sign.*", "faults.reply_deadline_s", "faults.min_replies", "faults.on_quorum",
    "faults.rest_rounds", "workers", "engine", "store",
)  # fmt: skip

Key = tuple[str, ...]  # ("method", "phi"), or ("method", "0", "phi") in a chain
Values = dict[Key, tuple[Any, str]]  # key -> value, origin


def is_among(key: str, patterns: Collection[str]) -> bool:
    """Whether one of these names stands for this key; ``"run.*"`` does for all keys of a section."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def collect(
    target: str | Path, arguments: Sequence[str], env: Mapping[str, str] | None, known: Collection[str]
) -> Values:
    """What all layers say together; the last word on every key.

    Args:
        known: keys and sections at the top. A variable of another name may not be meant for lamina: it is left out,
            with a warning.

    Raises:
        ConfigError: E101 an argument that is no key=value, E104 not TOML, E105 no such file or preset.
    """
    name, text, base = _read(target)
    values: Values = {("name",): (name, "default")}
    if base is None:
        _lay(values, _toml(text, f"preset {name}", None))
    else:
        layer = _toml(text, Path(target).name if Path(target).is_file() else "config.toml", base)
        preset = layer.pop(("preset",), None)
        if preset is not None:
            _lay(values, _toml(_preset(str(preset[0]), preset[1]), f"preset {preset[0]}", None))
        _lay(values, layer)
    _lay(values, _environment(os.environ if env is None else env, known))
    _lay(values, _command_line(arguments))
    return values


def merged(layers: Sequence[tuple[str, Mapping[str, Any]]], arguments: Sequence[str] = ()) -> Values:
    """What tables in the form of a TOML file say together, the lowest first, each with its origin; then `key=value`."""
    values: Values = {}
    for origin, tree in layers:
        _lay(values, {path: (value, origin) for path, value in _flat(tree)})
    _lay(values, _command_line(arguments))
    return values


def presets() -> dict[str, str]:
    """Name -> TOML text of the presets that come with lamina."""
    folder = importlib.resources.files("lamina") / "presets"
    found = {p.name.removesuffix(".toml"): p for p in folder.iterdir() if p.name.endswith(".toml")}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


def _read(target: str | Path) -> tuple[str, str, Path | None]:
    """Name and text of the target, and the folder that its entries are relative to (None for a preset)."""
    path = Path(target)
    if path.is_dir() and (path / "config.toml").is_file():
        path = path / "config.toml"
    if (python := re.fullmatch(r"(.+\.py)(?::(.*))?", str(target))) and Path(python[1]).is_file():
        _refuse_python(python[1], python[2] or "NAME")
    if not path.is_file() and path.suffix != ".toml":
        return str(target), _preset(str(target), "command line"), None
    try:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip(".-_") or "experiment"
        return name, path.read_text(encoding="utf-8"), path.resolve().parent
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {reason}", code="E105", where="command line") from error


def _refuse_python(file: str, part: str) -> NoReturn:
    named = f"{file}:{part}"
    raise ConfigError(
        f"{file} is a Python file, not TOML",
        code="E104",
        where="command line",
        remedy=f"a model in it is named {named}: `lamina inspect {named}`, `lamina run quickstart model={named}`",
    )


def _preset(name: str, where: str) -> str:
    known = presets()
    if name not in known:
        raise ConfigError(
            f"no file and no preset is named {name!r}",
            code="E105",
            where=where,
            remedy=f"{meant(name, known)}  presets: {', '.join(known)}".strip(),
        )
    return known[name]


def _toml(text: str, source: str, base: Path | None) -> Values:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}", code="E104", where=source) from error
    lines = _lines(text)

    def origin(path: Key) -> str:
        if base is None:
            return source
        for end in range(len(path), 0, -1):
            if path[:end] in lines:
                return f"{source}:{lines[path[:end]]}"
        return source

    return {path: (_anchored(path, value, base), origin(path)) for path, value in _flat(tree)}


def _lines(text: str) -> dict[Key, int]:
    """Line of each table header and key. A scan, not a parser: the text is known to be TOML."""
    found: dict[Key, int] = {}
    table: Key = ()
    counts: dict[Key, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*(\[\[?)\s*([A-Za-z0-9_.\-\s\"']+?)\s*\]", line):
            table = _keys(header[2])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, str(counts[table]))
            found.setdefault(table, number)
        elif key := re.match(r"\s*([A-Za-z0-9_.\-\s\"']+?)\s*=", line):
            found.setdefault((*table, *_keys(key[1])), number)
    return found


def with_values(text: str, values: Mapping[Key, str], why: str) -> str:
    """A TOML text with other values for these keys, written as TOML, each with a comment that says why."""
    lines = text.splitlines()
    for path, value in values.items():
        places = _lines("\n".join(lines))
        said = f"{path[-1]} = {value}"
        if path in places:
            width = max(len(lines[places[path] - 1].partition("#")[0].rstrip()), len(said))
            lines[places[path] - 1] = f"{said:<{width}}  # {why}"
            continue
        if path[:-1] and path[:-1] not in places:
            lines += ["", f"[{'.'.join(path[:-1])}]"]
        lines.insert(places.get(path[:-1], len(lines)) if path[:-1] else 0, f"{said}  # {why}")
    return "".join(f"{line}\n" for line in lines)


def _keys(dotted: str) -> Key:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _environment(env: Mapping[str, str], known: Collection[str]) -> Values:
    layer: Values = {}
    for variable in sorted(env):
        if not variable.startswith("LAMINA_") or variable in _OWN_VARIABLES:
            continue
        key = variable.removeprefix("LAMINA_").lower()
        if key.startswith("data_") and "__" not in key:
            continue  # LAMINA_DATA_<SET>: a folder with raw files
        if key.split("__")[0] not in known:
            names = [*(own.removeprefix("LAMINA_") for own in _OWN_VARIABLES), *(name.upper() for name in known)]
            close = meant(key.upper(), names).replace("'", "'LAMINA_", 1)
            warnings.warn(f"{variable} of the environment is no key and is left out  {close}".rstrip(), stacklevel=2)
            continue
        for path, value in _flat(_nested(key.split("__"), _value(env[variable]))):
            layer[path] = (_anchored(path, value, Path.cwd()), f"environment {variable}")
    return layer


def _command_line(arguments: Sequence[str]) -> Values:
    layer: Values = {}
    for number, argument in enumerate(arguments, start=2):  # the first is the preset or file
        where = f"command line, argument {number}"
        key, equals, text = argument.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key):
            raise ConfigError(f"{argument!r}: expected key=value", code="E101", where=where, remedy="e.g. rounds=200")
        for path, value in _flat(_nested(key.split("."), _value(text))):
            layer[path] = (_anchored(path, value, Path.cwd()), where)
    return layer


def _value(text: str) -> Any:
    """As TOML; what is none is a bare text, and ``[ssfl,fedlama]`` a list of them, as shells take the quotes away."""
    try:
        tree = tomllib.loads(f"v = {text}")
    except tomllib.TOMLDecodeError:
        words = re.fullmatch(r"\[\s*([A-Za-z][\w.:/-]*(\s*,\s*[A-Za-z][\w.:/-]*)*)\s*\]", text)
        return re.split(r"\s*,\s*", words[1]) if words else text
    plain = tree.keys() == {"v"} and isinstance(tree["v"], str | int | float | list | dict)
    return tree["v"] if plain else text


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    """Path and value of every key. Names given short are written out; a chain's methods are numbered."""
    for key, value in tree.items():
        if key not in SECTIONS:
            yield (key,), value
        elif key == "method" and isinstance(value, list):
            for i, part in enumerate(value):
                yield from _part_keys((key, str(i)), part)
        elif key == "method" and isinstance(value, dict) and value and all(k.isdigit() for k in value):
            for i, part in value.items():
                yield from _part_keys((key, i), part)
        else:
            yield from _part_keys((key,), value)


def _part_keys(path: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key), inner
    elif isinstance(value, str) and path[0] in PARTS:
        yield (*path, "entry" if is_entry(value) else "name"), value
    elif path == ("metrics",) and isinstance(value, str | list):  # names, or entries by the last word of theirs
        for name in [value] if isinstance(value, str) else value:
            yield (*path, str(name).rpartition(":")[2]), name
    else:
        yield path, value


def _anchored(path: Key, value: Any, base: Path | None) -> Any:
    """An entry with its file as an absolute path: the resolved config must mean the same from elsewhere."""
    names_code = path[-1] == "entry" or path == ("loss",) or path[0] == "metrics"
    return anchored(value, base) if names_code and is_entry(value) and base is not None else value


def _lay(values: Values, layer: Values) -> None:
    """One layer over those below it. A part that is named anew forgets what was said about the one before."""
    for section in PARTS:
        below = {path: given for path, given in values.items() if path[0] == section}
        heads = {p: v for p, (v, _) in layer.items() if p[0] == section and p[-1] in ("name", "entry")}
        same = all(p in below and below[p][0] == v for p, v in heads.items())
        chained = {len(p) > 2 for p in (*below, *heads)}  # one method below and a chain above, or the reverse
        if heads and (not same or len(chained) > 1):
            for path in below:
                if len(chained) > 1 or any(path[: len(p) - 1] == p[:-1] for p in heads):
                    del values[path]
    values.update(layer)
