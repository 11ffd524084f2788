"""Secrets that this process has read, kept out of what it writes and prints; what a terminal obeys, kept out of that.

Who reads a secret says so here. What is recorded of errors and commands goes through `hidden`: an exception of somebody
else's code may quote what it was given. Names and messages of others go through `printable`.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHOWN = "***"
_SHORTEST = 8  # characters: a shorter value is found in words that are none
_SECRET = re.compile(r"(?i)(token|secret|passw|credential|api_?key|auth(?!or)|(^|[_.-])key$)")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tabs and line ends
_known: set[str] = set()  # what was read as a secret: whoever prints an error cannot know which there are


def remember(secret: bytes) -> None:
    """From here on `hidden` finds it: as it is, and in hexadecimal and base64."""
    for form in (secret, secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret)):
        text = form.decode(errors="replace").rstrip("=")
        if len(text) >= _SHORTEST:
            _known.add(text)


def hidden(text: str, env: Mapping[str, str] | None = None) -> str:
    """The text without the secrets that were read, and without values of variables whose names say that they are some:
    as they are, and as Python and JSON quote them.

    Args:
        env: variables; None: of this process.
    """
    return _without(text, _secrets(env))


def hidden_in(value: Any) -> Any:
    """Every text in it by itself, names included: what is JSON stays JSON."""
    return _within(value, _secrets(None))


def _within(value: Any, secrets: Sequence[str]) -> Any:
    match value:
        case str():
            return _without(value, secrets)
        case Mapping():
            return {_within(key, secrets): _within(inner, secrets) for key, inner in value.items()}
        case list() | tuple():
            return [_within(inner, secrets) for inner in value]
    return value


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, SHOWN)
    return re.sub(r"//[^/@\s]+@", f"//{SHOWN}@", text)


def _secrets(env: Mapping[str, str] | None) -> list[str]:
    """The longest first: one may be a part of another."""
    named = {x for name, x in (os.environ if env is None else env).items() if _SECRET.search(name)}
    found = {x for x in named if len(x) >= _SHORTEST} | _known
    quoted = {form[1:-1] for x in found for form in (repr(x), json.dumps(x), json.dumps(x, ensure_ascii=False))}
    return sorted(found | quoted, key=len, reverse=True)


def printable(text: str) -> str:
    """For a terminal: with "?" for whatever would move its cursor, name its window or type for whoever looks at it."""
    return _CONTROL.sub("?", text)


def redacted(argv: Sequence[str]) -> list[str]:
    """A command line without the values of arguments whose names say that they are secret."""
    shown = []
    hide = False
    for word in argv:
        key, equals, value = word.partition("=")
        if hide or (equals and _SECRET.search(key) and not is_reference(value)):
            word = f"{key}={SHOWN}" if equals and not hide else SHOWN
        hide = not equals and word.startswith("-") and _SECRET.search(word) is not None
        shown.append(hidden(word))
    return shown


def is_reference(value: str) -> bool:
    """Whether it says where a secret is, and is none itself."""
    return re.fullmatch(r"""["']?(env:[A-Za-z_][A-Za-z0-9_]*|file:[^"'\n]+)["']?""", value) is not None
