"""Published methods, one per file. Each imports only method, tree, layers and random (and errors), and the sparse ones
`masking`, which they share."""

from __future__ import annotations

from typing import Any

from lamina.method import FedAvg, Method
from lamina.methods.dgc import DGC
from lamina.methods.ef21 import EF21
from lamina.methods.error_feedback import ErrorFeedback
from lamina.methods.feddst import FedDST
from lamina.methods.feddyn import FedDyn
from lamina.methods.fedlama import FedLAMA
from lamina.methods.fedluar import FedLUAR
from lamina.methods.fednova import FedNova
from lamina.methods.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from lamina.methods.fedprox import FedProx
from lamina.methods.flare import FLARE
from lamina.methods.lips import LIPS
from lamina.methods.local_only import LocalOnly
from lamina.methods.magnitude_pruning import MagnitudePruning
from lamina.methods.personal import Personal
from lamina.methods.random_mask import RandomMask
from lamina.methods.scaffold import Scaffold
from lamina.methods.ssfl import SSFL
from lamina.methods.stc import STC

METHODS: dict[str, type[Method[Any, Any]]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "errorfeedback": ErrorFeedback,
    "ef21": EF21,
    "dgc": DGC,
    "flare": FLARE,
    "fedlama": FedLAMA,
    "fedluar": FedLUAR,
    "fednova": FedNova,
    "stc": STC,
    "feddyn": FedDyn,
    "lips": LIPS,
    "personal": Personal,
    "ssfl": SSFL,
    "randommask": RandomMask,
    "feddst": FedDST,
    "magnitudepruning": MagnitudePruning,
    "localonly": LocalOnly,
}

__all__ = [
    "DGC",
    "EF21",
    "FLARE",
    "LIPS",
    "METHODS",
    "SSFL",
    "STC",
    "ErrorFeedback",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedDST",
    "FedDyn",
    "FedLAMA",
    "FedLUAR",
    "FedNova",
    "FedProx",
    "FedYogi",
    "LocalOnly",
    "MagnitudePruning",
    "Personal",
    "RandomMask",
    "Scaffold",
]
