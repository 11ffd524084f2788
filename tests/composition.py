"""What becomes of every pair of methods in a chain, found by trying: the table of docs/methods/composition.md.

python tests/composition.py > docs/methods/composition.md
"""

from __future__ import annotations

import itertools
import sys
from functools import cache
from typing import Any, NamedTuple

import torch

import cases
from lamina import METHODS, Chain, ConfigError, LocalSGD, State, wire

ROUNDS = 5  # the longest cycle is done, and what comes after it has begun
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # orders that differ by rounding alone are the same


class Pair(NamedTuple):
    """first, second: in the order of METHODS."""

    first: str
    second: str
    kind: str  # "works" | "differs" | "first" | "second" | "refused"
    reason: str  # of a refusal, of this pair or of its other order

    @property
    def cell(self) -> str:
        return {"works": "yes", "differs": "yes, order matters"}.get(self.kind, self.kind)


def pairs() -> list[Pair]:
    names = [name for name in METHODS if name != "fedavg"]
    return [_pair(a, b) for a, b in itertools.combinations(names, 2)]


def _pair(a: str, b: str) -> Pair:
    forward, backward = _chained(a, b), _chained(b, a)
    if isinstance(forward, str) and isinstance(backward, str):
        return Pair(a, b, "refused", forward)
    if isinstance(forward, str):
        return Pair(a, b, "second", forward)
    if isinstance(backward, str):
        return Pair(a, b, "first", backward)
    return Pair(a, b, "works" if alike(run(a, b), run(b, a)) else "differs", "")


@cache
def _chained(*names: str) -> Chain | str:
    """The chain, or why it is refused."""
    try:
        return Chain(*(cases.METHODS[name]() for name in names))
    except ConfigError as error:
        return error.message.partition(": ")[2]


@cache
def run(*names: str) -> State:
    """The end of a short run of the chain, with a sparse uplink."""
    method = Chain(*(cases.METHODS[name]() for name in names))
    options: dict[str, Any] = {"uplink": wire.TopK(0.3), "local": LocalSGD(lr=0.1, batch_size=16)}
    for name in names:
        options |= {k: v for k, v in cases.OPTIONS.get(name, {}).items() if k not in ("uplink", "downlink")}
    return cases.states(cases.federation(method, **options), ROUNDS)[-1]


def alike(one: State, other: State) -> bool:
    return all(torch.allclose(x, other.params[name], **CLOSE) for name, x in one.params.items())


def table() -> str:
    """The document."""
    found = pairs()
    reasons = sorted({p.reason for p in found if p.kind == "refused"})
    orders = sorted({p.reason for p in found if p.kind in ("first", "second")})
    number = {reason: f"R{i}" for i, reason in enumerate(reasons, 1)}
    number |= {reason: f"O{i}" for i, reason in enumerate(orders, 1)}
    names = [name for name in METHODS if name != "fedavg"]
    titles = [METHODS[name].__name__ for name in names]
    cell: dict[tuple[str, str], str] = {}
    for p in found:
        here, there = {
            "works": ("✓", "✓"),
            "differs": ("✓ ↔", "✓ ↔"),
            "first": (f"← {number.get(p.reason)}", f"→ {number.get(p.reason)}"),
            "second": (f"→ {number.get(p.reason)}", f"← {number.get(p.reason)}"),
            "refused": (number.get(p.reason, ""), number.get(p.reason, "")),
        }[p.kind]
        cell[p.first, p.second], cell[p.second, p.first] = here, there
    lines = [
        *_HEAD,
        "",
        "| | " + " | ".join(titles) + " |",
        "|" + "---|" * (len(names) + 1),
        *(f"| **{METHODS[a].__name__}** | " + " | ".join(cell.get((a, b), "") for b in names) + " |" for a in names),
        "",
        "## Why this order",
        "",
        *(f"- **{number[reason]}** {reason}" for reason in orders),
        "",
        "## Why not",
        "",
        *(f"- **{number[reason]}** {reason}" for reason in reasons),
        "",
    ]
    return "\n".join(lines)


_HEAD = """# Which methods go together

A chain of two methods, `lamina.Chain(row, column)`, for every pair in the box. This table is made by trying them: every
pair that is not refused has trained five rounds on a small model with a top-k uplink. It is written by
`python tests/composition.py > docs/methods/composition.md`, and a test compares it with what the code does.

- **✓** both orders work and give the same model (to rounding) in the settings tried here, those of `tests/cases.py`;
- **✓ ↔** both orders work, and the order changes the result: the methods' own pages say which one is meant;
- **←** works with the row's method *before* the column's; **→** with the row's method *after* it; the letter says why;
- **R** refused at construction with that reason.

In Python `method=lamina.Chain(lamina.SSFL(0.4), lamina.FedLAMA(phi=4))`; on the command line a list, and the settings
of its members by their numbers (the quotes are for the shell); in a file a table each, from first to last:

```
lamina run quickstart "method=[ssfl,fedlama]" method.0.density=0.4 method.1.phi=4
```

```toml
[[method]]
name = "ssfl"
density = 0.4

[[method]]
name = "fedlama"
phi = 4
```

FedAvg is the neutral element and stands with everything but LocalOnly. Longer chains obey the same rules, pair by pair.
That a chain works does not say that it helps: the combinations we measured are in the recipe `layerwise-combinations`.
""".splitlines()

if __name__ == "__main__":
    sys.stdout.write(table())
