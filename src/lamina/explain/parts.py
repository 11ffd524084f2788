"""Methods, codecs, models, data sets and presets: their own docstrings, and what they take."""

from __future__ import annotations

import inspect
import sys
from functools import lru_cache
from typing import Any, NamedTuple

from lamina import config, settings
from lamina.explain import keys
from lamina.explain.words import fields, paragraphs

_KINDS = {"method": "method", "uplink": "codec", "aggregate": "rule", "model": "model",
          "data": "data set"}  # section -> what is in it  # fmt: skip
_ASKED = {
    "method": "lamina run quickstart method={}",
    "uplink": "lamina run quickstart uplink={}",
    "aggregate": "lamina run quickstart cohort=all aggregate={}",
    "model": "lamina run ... model={}",
    "data": "lamina data show ... data={}",
}


class Part(NamedTuple):
    kind: str
    name: str
    about: str  # one line
    text: str  # what the docstrings say, without their arguments
    settings: tuple[tuple[str, keys.Taken], ...]
    usage: str

    @property
    def facts(self) -> dict[str, Any]:
        takes = [{"key": key, **taken._asdict()} for key, taken in self.settings]
        return {**self._asdict(), "settings": takes}


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    return (*(name for section in _KINDS for name in config.catalogue(section)), *settings.presets())


def find(word: str) -> Part | None:
    """By its name, however it is written: ``fedlama``, ``FedLAMA``, ``fashion-mnist``."""
    for section in _KINDS:
        for name in config.catalogue(section):
            if name.lower() == word.lower().replace("-", "_"):
                return _part(section, name)
    text = settings.presets().get(word)
    if text is None:
        return None
    head = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    return Part("preset", word, " ".join(head), _set_off(text), (), f"lamina run {word}")


def _set_off(text: str) -> str:
    """As a block of Markdown that is not wrapped."""
    return "\n".join(f"    {row}" if row else "" for row in text.splitlines() if not row.startswith("#"))


def _part(section: str, name: str) -> Part:
    thing = config.catalogue(section)[name]
    found = [(key.name, taken) for key in keys.known().values() for taken in key.taken]
    own = [(key, taken) for key, taken in found if taken.by == f"{section} {name}"]
    needed = [f" {key}=..." for key, taken in own if taken.needed]
    usage = _ASKED[section].format(name) + "".join(needed)
    return Part(_KINDS[section], name, config.about(section, name), _text(section, thing), tuple(own), usage)


def _text(section: str, thing: Any) -> str:
    """Of a method the module's docstring too: there stand its rule, its source and its cost."""
    own = _without_arguments(inspect.cleandoc(thing.__doc__ or ""))
    if section != "method" or thing.__module__ in ("lamina.method", "lamina.config"):
        return own
    module = inspect.cleandoc(sys.modules[thing.__module__].__doc__ or "")
    return f"{module}\n\n{own}".strip()


def _without_arguments(text: str) -> str:
    """What stands before the arguments."""
    blocks = text.split("\n\n")
    ends = next((i for i, block in enumerate(blocks) if block.startswith(("Args:", "Raises:"))), len(blocks))
    return "\n\n".join(block for block in blocks[:ends] if block != "No arguments.")


def lines(part: Part, width: int | None) -> list[str]:
    shown = [f"  {part.kind} {part.name}", ""]
    if part.text and not part.text.startswith(part.about.rstrip(".")):
        shown += [*paragraphs(part.about, width), ""]
    shown += [*paragraphs(part.text, width), ""]
    if part.settings:
        shown.append("  settings")
        for key, taken in part.settings:
            shown += ["", f"    {key}", *(f"  {row}" for row in _setting(taken, width))]
        shown.append("")
    return [*shown, f"  {part.usage}"]


def _setting(taken: keys.Taken, width: int | None) -> list[str]:
    rows = [("means", taken.meaning)] if taken.meaning else []
    room = None if width is None else width - 2
    return fields([*rows, ("takes", taken.type), ("default", keys.said(taken))], room)
