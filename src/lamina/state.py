"""What a run is between two rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lamina.books import Observed
from lamina.downlink import Change, Version
from lamina.metrics import Number
from lamina.norms import Known
from lamina.privacy.dp import Spent
from lamina.store import ClientStore
from lamina.tree import Params, sha256


class Evaluation(NamedTuple):
    """What a state is worth. None where it does not apply: no test set, targets that are no class labels, a metric that
    is undefined."""

    accuracy: float | None
    loss: float | None
    metrics: dict[str, Number]
    personal_accuracy: float | None


class Initial(NamedTuple):
    """The model before round 0."""

    params: Params
    buffers: Params


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on. A checkpoint is exactly one of these."""

    params: Params
    buffers: Params
    server: Any
    clients: ClientStore
    round: int = 0  # rounds done, and the index of the next one
    bytes_up: int = 0
    bytes_down: int = 0
    observed: Observed = field(default_factory=lambda: Observed({}, {}))
    change: Change | None = None  # the last step, where it is what travels down
    past: tuple[Version, ...] = ()  # parameters sent before, newest first, where their distance to new ones travels
    norms: Known = field(default_factory=dict)  # lengths of the layers' updates, where `faults.norm` bounds them
    resting: Mapping[int, int] = field(default_factory=dict)  # client that gave no answer -> round until which it rests
    spent: Spent = ()  # what `privacy` has cost; None: some round was made without it

    def sha256(self) -> str:
        """Fingerprint of the global model: names, shapes and bytes of its parameters and buffers."""
        return sha256({**self.params, **self.buffers})
