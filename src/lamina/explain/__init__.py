"""What a word means: an error code, a method or another part, a key of the config, a file of a run. All offline.

codes   a page per code: pages/E103.md, the one place where codes are explained
keys    every key of the config, from signatures and docstrings
parts   methods, codecs, models, data sets, presets, from their own docstrings
files   every file of a run folder, every column
schema  the config as a JSON schema, for editors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lamina.errors import ConfigError
from lamina.explain import codes, files, keys, parts, schema, words

__all__ = ["Answer", "explain", "names", "topics"]


class Answer(NamedTuple):
    kind: str  # "code" | "key" | "part" | "file" | "topic"
    facts: dict[str, Any]  # plain JSON
    lines: Callable[[int | None], list[str]]  # for a terminal of that width


def explain(word: str) -> Answer:
    """Raises ConfigError E101, with what may have been meant, for a word that means nothing here."""
    found = next(_meanings(word), None)
    if found is None:
        close = words.close(word, names())
        listed = ", ".join(close)
        remedy = f"did you mean {listed}?" if close else "`lamina explain` lists what there is"
        raise ConfigError(f"{word!r} is no code, part, key or file", where="command line, argument 1", remedy=remedy)
    return found


def _meanings(word: str) -> Iterator[Answer]:
    """The first is the one that counts: what is written in full goes before what is short for it."""
    if word in _TOPICS:
        yield _TOPICS[word]()
    if word.upper() in codes.names():
        page = codes.page(word.upper())
        yield Answer("code", page._asdict(), lambda width: codes.lines(page, width))
    if file := files.find(word):
        yield Answer("file", file.facts, lambda width: files.lines(file, width))
    known = keys.known()
    if word in known:
        key = known[word]
        yield Answer("key", key.facts, lambda width: keys.lines([key], width))
    part = parts.find(word)
    if part is not None:
        yield Answer("part", part.facts, lambda width: parts.lines(part, width))
    if below := [key for name, key in known.items() if name.startswith(f"{word}.")]:
        yield Answer("key", {"keys": [key.facts for key in below]}, lambda width: keys.table(below, width))
    if ends := [key for name, key in known.items() if name.rpartition(".")[2] == word]:
        yield Answer("key", {"keys": [key.facts for key in ends]}, lambda width: keys.lines(ends, width))


def names() -> list[str]:
    """Everything that can be asked for."""
    return [*_TOPICS, *codes.names(), *keys.known(), *parts.names(), *(file.name for file in files.FILES)]


def topics() -> Answer:
    """What there is to ask for."""
    rows = [
        ("CODE", f"such as E103: {len(codes.names())} of them, `lamina explain codes`"),
        ("METHOD", "its rule, settings, cost; likewise a codec, a model, a data set, a preset: `lamina list methods`"),
        ("KEY", "of the config, such as local.lr or uplink: `lamina explain keys`"),
        ("files", "what is in a run folder, or one file, such as layers.jsonl"),
        ("schema", "the config as a JSON schema, for editors"),
    ]
    return Answer("topic", dict(rows), lambda width: words.fields(rows, width))


def _all_codes() -> Answer:
    pages = [codes.page(code) for code in codes.names()]
    return Answer(
        "topic",
        {page.code: page.title for page in pages},
        lambda width: words.fields([(page.code, page.title) for page in pages], width),
    )


def _all_keys() -> Answer:
    known = list(keys.known().values())
    return Answer("topic", {"keys": [key.facts for key in known]}, lambda width: keys.table(known, width))


def _all_files() -> Answer:
    return Answer("topic", {"files": [file.facts for file in files.FILES]}, files.every)


def _schema() -> Answer:
    made = schema.made()
    return Answer("schema", made, lambda width: schema.text(made).splitlines())


_TOPICS: dict[str, Callable[[], Answer]] = {
    "codes": _all_codes,
    "files": _all_files,
    "keys": _all_keys,
    "schema": _schema,
}
