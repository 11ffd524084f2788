"""What a server and its nodes must have in common beside lamina itself: all that decides what a client says.

Letters carry a hash of it. A node with another one says what it has, and its clients are refused with both named: their
messages could be read and be wrong all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import xxhash

from lamina import wire
from lamina.federation import Federation

LONGEST = 500  # characters of one of them
MOST = 32  # of them

Terms: TypeAlias = Mapping[str, str]


def terms_of(fed: Federation) -> dict[str, str]:
    """In words. Engines, stores and faults may differ, and so may the examples."""
    params, buffers = (wire.schema_of(tree) for tree in fed.initial)
    forms = json.dumps([[n, *spec.shape, str(spec.dtype)] for tree in (params, buffers) for n, spec in tree.items()])
    numel = sum(spec.numel for spec in params.values())
    said: dict[str, Any] = {
        "model": f"{len(params)} tensors, {numel:,} parameters, {xxhash.xxh3_64_hexdigest(forms.encode())}",
        "method": fed.method,
        "uplink": fed.uplink,
        "downlink": fed.downlink,
        "local": fed.local,
        "loss": fed.loss,
        "weights": fed.weights,
        "buffers": fed.buffers,
        "cohort": f"{fed.cohort} of {len(fed.data)}",
        "moments": fed.setup.moments,
        "secure": fed.secure,
        "seed": fed.seed,
    }
    if fed.frozen:
        said["frozen"] = fed.frozen
    return {key: _words(x) for key, x in said.items()}


def _words(x: object) -> str:
    """The same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", x if isinstance(x, str) else repr(x))[:LONGEST]


def stamp(terms: Terms) -> str:
    """A hash of them."""
    return str(xxhash.xxh3_64_hexdigest(json.dumps(sorted(terms.items())).encode()))


def differences(here: Terms, there: Terms) -> str:
    """Both named."""
    other = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    return "; ".join(f"{key} {there.get(key, 'unknown')} at its node, {here.get(key, 'unknown')} here" for key in other)
