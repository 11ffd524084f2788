"""Keys of the config: what each means, takes and defaults to, from signatures, types and docstrings."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from lamina import config
from lamina.cohort import Faults
from lamina.config import TABLES, Config
from lamina.explain.words import fields, wrapped
from lamina.federation import Federation
from lamina.settings import PARTS
from lamina.terminal import Column
from lamina.terminal import table as tabled
from lamina.training import LocalSGD

_NAMED = {  # what the sections that name a part are, and how one is named in short
    "model": "the model",
    "data": "the data set, and how it is split between clients",
    "method": "what is done differently from FedAvg; a list is a chain of several",
    "uplink": "how updates are coded on their way up",
    "downlink": "how parameters are coded on their way down",
    "aggregate": "what is made of the clients' updates: their mean, or what a few wrong ones cannot move far",
}


class Taken(NamedTuple):
    """By one part: ``phi`` by ``method fedlama``."""

    by: str
    type: str
    default: Any  # plain JSON; absent: see `needed`
    meaning: str
    needed: bool = False


class Key(NamedTuple):
    name: str
    taken: tuple[Taken, ...]

    @property
    def facts(self) -> dict[str, Any]:
        return {"key": self.name, "takes": [taken._asdict() for taken in self.taken]}


@lru_cache(maxsize=1)
def known() -> Mapping[str, Key]:
    """Every key there is, of whatever part, by its dotted name."""
    found: dict[str, list[Taken]] = {}
    said = described(Federation)
    for name, field in Config.model_fields.items():
        if name in PARTS:
            found[name] = [_part(name)]
        elif name not in ("local", *TABLES):
            meaning = field.description or said.get(name, "")
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            found[name] = [Taken("config", config.in_words(config.annotation_of(Config, name)), default, meaning)]
    found["preset"] = [Taken("config", "a text", None, "The preset that a file lays its own keys over.")]
    for name, taken in config.takes(LocalSGD).items():
        found[f"local.{name}"] = [_taken("local", taken, described(LocalSGD).get(name, ""))]
    for section, options in TABLES.items():
        also = described(Faults) if section == "faults" else {}
        for name, field in options.model_fields.items():
            meaning = field.description or also.get(name, "")
            type_ = config.in_words(config.annotation_of(options, name))
            found[f"{section}.{name}"] = [Taken(section, type_, field.get_default(), meaning)]
    for section in PARTS:
        what = _NAMED[section]
        found[f"{section}.name"] = [Taken(section, "a text", None, f"Which one; `{section} = NAME` is short for it.")]
        found[f"{section}.entry"] = [
            Taken(section, 'a text such as "mine.py:thing"', None, f"Instead of a name: {what}, from a file of yours.")
        ]
        for title, thing in config.catalogue(section).items():
            for name, taken in config.arguments_of(section, thing).items():
                own = _taken(f"{section} {title}", taken, meaning_of(section, thing, name))
                found.setdefault(f"{section}.{name}", []).append(own)
    return {name: Key(name, tuple(taken)) for name, taken in found.items()}


def _part(section: str) -> Taken:
    names = ", ".join(config.catalogue(section))
    default = config.DEFAULTS.get(section)
    about = _NAMED[section]
    return Taken("config", f"a name ({names}), an entry, or a table", default, f"{about[0].upper()}{about[1:]}.")


def _taken(by: str, taken: Any, meaning: str) -> Taken:
    needed = taken.default is inspect.Parameter.empty
    default = None if needed or callable(taken.default) else taken.default
    return Taken(by, config.in_words(taken.annotation), _plain(default), meaning, needed)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ---- what docstrings say


def described(thing: Any) -> dict[str, str]:
    """Argument -> its text in the `Args:` of a docstring; ``uplink, downlink: ...`` is the text of both."""
    text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    if inline := re.match(r"Args: (.+)", text):
        said = [item.partition(": ") for item in re.split(r"; (?=\w+(?:, \w+)*: )", inline[1])]
        return {name: meaning for names, _, meaning in said for name in names.split(", ")}
    rows = text.partition("Args:\n")[2].splitlines()
    margin = next((len(row) - len(row.lstrip()) for row in rows if row.strip()), 0)
    found: dict[str, str] = {}
    current: list[str] = []
    for row in rows:
        indent = len(row) - len(row.lstrip())
        if row.strip() and (indent < margin or row.strip() in ("Raises:", "Returns:")):
            break
        head = re.match(r"(\w+(?:, \w+)*): (.*)", row.strip()) if indent == margin else None
        if head:
            current = head[1].split(", ")
            found |= dict.fromkeys(current, head[2])
        else:
            found |= {name: f"{found[name]} {row.strip()}".strip() for name in current}
    return found


def meaning_of(section: str, thing: Callable[..., Any], name: str) -> str:
    """From its own docstring; else from one beside it, as "arguments as `cifar10`" says."""
    bases = getattr(thing, "__mro__", (thing,))
    neighbours = vars(sys.modules[thing.__module__]).values()
    near = [x for x in neighbours if getattr(x, "__module__", None) == thing.__module__]
    called = [x.__call__ for x in near if inspect.isclass(x) and "__call__" in vars(x)]
    far = config.catalogue(section).values()
    return next((text for x in (*bases, *near, *called, *far) if (text := described(x).get(name))), "")


# ---- shown


def lines(keys: list[Key], width: int | None) -> list[str]:
    shown: list[str] = []
    for key in keys:
        shown += [""] if shown else []
        shown.append(f"  {key.name}")
        shown += _sorts(key, width)
        if key.name in PARTS:
            shown += [
                "",
                *wrapped(f"keys: `lamina explain {key.name}.KEY`; those of one: `lamina explain NAME`", width),
            ]
    return shown


def _sorts(key: Key, width: int | None) -> list[str]:
    """What it takes, once for all parts of which it takes the same."""
    sorts: dict[tuple[str, str, str], list[str]] = {}
    for taken in key.taken:
        sorts.setdefault((taken.meaning, taken.type, said(taken)), []).append(taken.by)
    shown: list[str] = []
    for (meaning, type_, default), owners in sorts.items():
        shown += [""] if shown else []
        rows = [] if owners in (["config"], [key.name.partition(".")[0]]) else [("of", ", ".join(owners))]
        rows += [("means", meaning)] if meaning else []
        shown += fields([*rows, ("takes", type_), ("default", default)], width)
    return shown


def said(taken: Taken) -> str:
    """A default as a text."""
    if taken.needed:
        return "none: it must be given"
    return "none" if taken.default is None else config.literal(taken.default)


def table(keys: list[Key], width: int | None) -> list[str]:
    """A line each; what one means stands in its own answer."""
    first = [key.taken[0] for key in keys]
    defaults = [{said(taken) for taken in key.taken} for key in keys]
    columns = [
        Column("key", [key.name for key in keys], left=True),
        Column("default", [min(found) if len(found) == 1 else "by part" for found in defaults], 1, left=True),
        Column("takes", [taken.type.partition(" (")[0] for taken in first], 2, left=True),
    ]
    return tabled(columns, width)
