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

ABOUT: dict[str, str] = {  # what it does for whoever chooses it, in at most 60 characters for `lamina list methods`
    "fedavg": "averages the clients' updates by their examples",
    "fedprox": "pulls local weights towards the global model",
    "scaffold": "cancels the clients' drift with control variates",
    "fedavgm": "adds momentum to the server's step",
    "fedadagrad": "takes the server's step with Adagrad",
    "fedadam": "takes the server's step with Adam",
    "fedyogi": "takes the server's step with Yogi",
    "errorfeedback": "sends later what a lossy uplink left out",
    "ef21": "sends how an update differs from the one remembered",
    "dgc": "sends later what a sparse uplink left out, with momentum",
    "flare": "pulls local weights to where unsent updates would lead",
    "fedlama": "aggregates less often the layers that diverge little",
    "fedluar": "repeats the last update of layers that move little",
    "fednova": "makes up for clients that take different numbers of steps",
    "stc": "sends sparse one-bit codes both up and down",
    "feddyn": "corrects local losses until all clients share a minimum",
    "lips": "starts some rounds from a pruned copy of the model",
    "personal": "keeps chosen layers with each client, shares the rest",
    "ssfl": "trains one sparse subnetwork, chosen before training",
    "randommask": "trains under one random mask that stays as it is",
    "feddst": "trains under a sparse mask that the clients adjust",
    "magnitudepruning": "prunes the smallest weights step by step",
    "localonly": "trains every client alone, as a point of reference",
}

__all__ = [
    "ABOUT",
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
