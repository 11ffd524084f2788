"""Checks of the models' knobs: each names the value, the range and the remedy (ConfigError E101)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from lamina.errors import ConfigError, expect


def whole(name: str, value: object, least: int = 1, remedy: str | None = None) -> int:
    """`value`, if it is an integer >= least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"{name}={value!r}: expected an integer >= {least}",
            where=name,
            remedy=remedy or f"set {name} to {least} or more",
        )
    return value


def wholes(name: str, values: Sequence[int], fewest: int = 0) -> tuple[int, ...]:
    """`values` as a tuple, if they are at least `fewest` integers >= 1."""
    expect(
        isinstance(values, Sequence) and not isinstance(values, str) and len(values) >= fewest,
        f"{name}={values!r}: expected a sequence of {fewest} or more integers >= 1",
        where=name,
        remedy=f"write {name} as a list, e.g. [32, 64]",
    )
    return tuple(whole(f"{name}[{i}]", value) for i, value in enumerate(values))


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is not among `choices`."""
    nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
    expect(
        value in choices,
        f"{name}={value!r}: expected one of " + ", ".join(f'"{choice}"' for choice in choices),
        where=name,
        remedy=f'set {name}="{nearest}"',
    )


def share(name: str, value: float) -> None:
    """Refuse a dropout probability outside [0, 1)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    expect(
        number and 0 <= value < 1,
        f"{name}={value!r}: expected 0 <= {name} < 1 (a share, not a percentage)",
        where=name,
        remedy=f"set {name} to 0 for none",
    )
