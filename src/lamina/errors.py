"""The one family of errors. Each carries a code, and says what, where, the allowed range and the remedy."""

from __future__ import annotations

import difflib
import math
import traceback
from collections.abc import Iterable


class LaminaError(Exception):
    """Base of every error lamina raises on purpose.

    Args:
        message: what is wrong, with the offending value and what was expected.
        code: stable identifier, e.g. ``"E102"``; its first digit says the kind (and gives the exit code).
        where: file:line, argument, key, layer or client it came from.
        remedy: what to do about it.
    """

    default_code = "E300"

    def __init__(self, message: str, *, code: str | None = None, where: str | None = None, remedy: str | None = None):
        self.code = code or self.default_code
        self.message = message
        self.where = where
        self.remedy = remedy
        super().__init__(message)

    def __str__(self) -> str:
        place = f"  [{self.where}]" if self.where else ""
        remedy = f"\n      {self.remedy}" if self.remedy else ""
        return f"{self.code}  {self.message}{place}{remedy}"

    @property
    def exit_code(self) -> int:
        """Process exit status: E1xx -> 2, E2xx -> 3, E3xx -> 4, E4xx -> 5, E5xx -> 6."""
        return int(self.code[1]) + 1


class ConfigError(LaminaError, ValueError):
    """E1xx: an impossible value, an unknown key, parts that do not fit together."""

    default_code = "E101"


class DataError(LaminaError):
    """E2xx: a data set or a client's data cannot be had or used."""

    default_code = "E201"


class RunError(LaminaError):
    """E3xx: a run cannot go on."""

    default_code = "E301"


class WireError(LaminaError):
    """E34x: bytes that are not what the receiver's own schema implies."""

    default_code = "E340"


class StorageError(LaminaError):
    """E4xx: the disk: no space, damaged or foreign files."""

    default_code = "E401"


def meant(word: str, known: Iterable[str]) -> str:
    """A suggestion for a word that is not known: ``did you mean 'phi'?``, or "" when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def class_of(code: str) -> type[LaminaError]:
    """The class that errors with this code belong to."""
    kinds = {"E1": ConfigError, "E2": DataError, "E34": WireError, "E3": RunError, "E4": StorageError}
    return next((kind for start, kind in kinds.items() if code.startswith(start)), LaminaError)


def place(error: BaseException) -> str:
    """file:line of the innermost frame that is not in an installed library: where the user's own code failed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def is_number(value: object, least: float, below: float = math.inf) -> bool:
    """Whether it is a number with least <= value < below; True, False and NaN are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < below


def is_whole(value: object, least: int) -> bool:
    """Whether it is a whole number >= least; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def expect(
    condition: bool, message: str, *, code: str = "E101", where: str | None = None, remedy: str | None = None
) -> None:
    """Raise ConfigError unless `condition`. For user input at construction: never `assert`."""
    if not condition:
        raise ConfigError(message, code=code, where=where, remedy=remedy)
