"""Published methods, one per file. Each imports only method, tree, layers and random (and errors)."""

from __future__ import annotations

from typing import Any

from lamina.method import FedAvg, Method
from lamina.methods.error_feedback import ErrorFeedback
from lamina.methods.fedlama import FedLAMA
from lamina.methods.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from lamina.methods.fedprox import FedProx
from lamina.methods.local_only import LocalOnly
from lamina.methods.scaffold import Scaffold

METHODS: dict[str, type[Method[Any, Any]]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "errorfeedback": ErrorFeedback,
    "fedlama": FedLAMA,
    "localonly": LocalOnly,
}

__all__ = [
    "METHODS",
    "ErrorFeedback",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedLAMA",
    "FedProx",
    "FedYogi",
    "LocalOnly",
    "Scaffold",
]
