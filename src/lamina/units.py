"""Numbers with units, as people write them: "5Mbit", "40ms", "1.5GB"."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lamina.errors import ConfigError, is_number

_K, _M, _G = 1e3, 1e6, 1e9
RATES = {"bit": 1.0, "kbit": _K, "Mbit": _M, "Gbit": _G, "kB": 8 * _K, "MB": 8 * _M, "GB": 8 * _G}  # bits per second
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}  # seconds
SIZES = {"B": 1.0, "kB": _K, "MB": _M, "GB": _G, "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3}  # bytes
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*?)(?:/s|ps)?\s*")


def quantity(value: float | str, units: Mapping[str, float], where: str) -> float:
    """A number >= 0 in the first of these units; a bare number is in that unit.

    Raises:
        ConfigError: no such number, or a unit that is none of them.
    """
    if is_number(value, 0):
        return float(value)
    found = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    names = {unit.lower(): unit for unit in units}
    unit = None if found is None else names.get(found[2].lower(), "" if not found[2] else None)
    if found is None or unit is None:
        known = ", ".join(units)
        raise ConfigError(f"{value!r}: expected a number >= 0 and one of {known}", code="E103", where=where)
    return float(found[1]) * (units[unit] if unit else 1.0)
