"""Learning-rate schedules by round, as factors of the base rate.

    "constant"  "exp:0.998"  "step:100,150:0.1"  "cosine"  "cosine:200"  "warmup:5"  and several, separated by spaces

`cosine` runs over the rounds of the run unless a length is given. `warmup:n` rises linearly over the first n rounds:
factor (t+1)/n. Several multiply: ``"warmup:5 step:100,150:0.1"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lamina.errors import ConfigError

Schedule = Callable[[int, int], float]  # (round, rounds of the run) -> factor


def parse(spec: str) -> Schedule:
    """Raises ConfigError (E103) for anything but the forms above."""
    parts = [_factor(word) for word in spec.split()]
    if not parts:
        raise ConfigError("schedule='': expected e.g. 'constant' or 'exp:0.998'", code="E103", where="local.schedule")
    return lambda round, rounds: math.prod(part(round, rounds) for part in parts)


def _factor(word: str) -> Schedule:
    name, *arguments = word.split(":")
    try:
        match name, arguments:
            case "constant", []:
                return lambda t, n: 1.0
            case "exp", [rate] if 0 < float(rate) <= 1:
                base = float(rate)
                return lambda t, n: base**t
            case "step", [rounds, factor] if 0 < float(factor) < math.inf and all(
                int(r) > 0 for r in rounds.split(",")
            ):
                marks, gamma = [int(r) for r in rounds.split(",")], float(factor)
                return lambda t, n: gamma ** sum(t >= mark for mark in marks)
            case "cosine", []:
                return lambda t, n: 0.5 * (1 + math.cos(math.pi * t / max(1, n)))
            case "cosine", [length] if int(length) >= 1:
                period = int(length)
                return lambda t, n: 0.5 * (1 + math.cos(math.pi * min(t, period) / period))
            case "warmup", [length] if int(length) >= 1:
                rise = int(length)
                return lambda t, n: min(1.0, (t + 1) / rise)
    except ValueError:
        pass  # a number that is none: said below, with the forms that are allowed
    raise ConfigError(
        f"schedule={word!r}: expected constant, exp:RATE (0 < RATE <= 1), step:R1,R2:FACTOR, cosine[:ROUNDS] or "
        "warmup:ROUNDS",
        code="E103",
        where="local.schedule",
    )
