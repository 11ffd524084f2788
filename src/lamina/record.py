"""What one round leaves for a person to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class LayerRecord(NamedTuple):
    """One trainable parameter in one round. What does not apply is None.

    E is the weighted mean over the accepted messages, u the update as the server decoded it.
    """

    uploaded: bool
    interval: int  # rounds between two aggregations, as the method has it
    bytes_up: int
    bytes_down: int
    update_norm: float | None = None  # |Eu|
    divergence: float | None = None  # sqrt(E|u-Eu|^2 / |Eu|^2)
    divergence_std: float | None = None  # sqrt(m E|u-Eu|^2 / (m numel - 1)), m messages
    alignment: float | None = None  # |Eu|^2 / E|u|^2
    discrepancy: float | None = None  # E|u-Eu|^2 per parameter and local step since the last aggregation
    inertia: float | None = None  # |w(t) - w(2)| / |w(2)| of the global model
    inertia_l2: float | None = None  # |w(t) - w(2)|
    inertia_cosine: float | None = None  # w(t) . w(2) / (|w(t)| |w(2)|)
    density: float | None = None  # share of entries that travelled
    residual_norm: float | None = None  # sqrt(E|r|^2) of what clients keep back for later rounds; None elsewhere
    mask_churn: float | None = None  # share of the entries kept by the mask that it did not keep a round before
    clipped: float | None = None  # share of the accepted messages in which `faults.norm` cut it; None without a bound


class Traffic(NamedTuple):
    """Bytes of one layer in one direction, over all clients of the round.

    `layer` is a parameter, or ``_shared`` (headers), ``_buffers``, ``_moments``, ``_<tree>`` for a method's own tree.
    """

    phase: str  # "round" | "probe"
    direction: str  # "up" | "down"
    layer: str
    bytes: int


class ClientRecord(NamedTuple):
    client: int  # position in ClientData
    name: str
    examples: int
    steps: int
    loss: float  # mean training loss
    bytes_up: int
    bytes_down: int
    refused: str | None  # code of the reason its message was not used


@dataclass(frozen=True)
class RoundRecord:
    """One round. `bytes_up` and `bytes_down` are the sums of `traffic`, to the byte."""

    round: int
    cohort: tuple[int, ...]
    in_sync: bool  # False: some layers wait, the global model holds their last aggregated values
    bytes_up: int
    bytes_down: int
    seconds: float
    layers: dict[str, LayerRecord]
    traffic: tuple[Traffic, ...]
    clients: tuple[ClientRecord, ...]
    train_loss: float  # mean over the accepted clients
    lr: float
    accuracy: float | None = None  # of the global model on the test set; None where not evaluated
    loss: float | None = None
    personal_accuracy: float | None = None  # mean over the clients' own test sets
    accuracy_before: float | None = None  # mean over the clients' models before aggregation, on the test set
    metrics: dict[str, float | None] = field(default_factory=dict)
    events: tuple[dict[str, str], ...] = ()
    fedavg_up: int = 0  # what FedAvg with fp32 would have sent in this round
    fedavg_down: int = 0
    network_seconds: float | None = None  # on the virtual network, if there is one
    epsilon: float | None = None  # of all rounds until here, at privacy.delta; None where nothing can be said
