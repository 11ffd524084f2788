"""lamina: layer-wise, communication-efficient federated learning, measured in bytes that really travel."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina import data, models, observe, wire
    from lamina.advice import Advice, guidelines
    from lamina.data.client_data import ClientData
    from lamina.errors import ConfigError, DataError, LaminaError, RunError, StorageError, WireError
    from lamina.federation import Federation, run
    from lamina.layers import Layer
    from lamina.method import Chain, FedAvg, Method, Plan, Task, Work
    from lamina.methods import METHODS
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
    from lamina.privacy import DP, SecureSum
    from lamina.record import ClientRecord, LayerRecord, RoundRecord, Traffic
    from lamina.runs import Run
    from lamina.state import State
    from lamina.training import LocalSGD
    from lamina.tree import Message, Params

__version__ = "0.1.0"

# Home of every public name. They are imported when first used, so that `lamina --help` does not wait for torch.
_HOMES = {
    "advice": ("Advice", "guidelines"),
    "training": ("LocalSGD",),
    "data.client_data": ("ClientData",),
    "errors": ("ConfigError", "DataError", "LaminaError", "RunError", "StorageError", "WireError"),
    "federation": ("Federation", "run"),
    "layers": ("Layer",),
    "method": ("Chain", "FedAvg", "Method", "Plan", "Task", "Work"),
    "methods": (
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
    ),
    "privacy": ("DP", "SecureSum"),
    "record": ("ClientRecord", "LayerRecord", "RoundRecord", "Traffic"),
    "runs": ("Run",),
    "state": ("State",),
    "tree": ("Message", "Params"),
}
_MODULES = ("data", "models", "observe", "wire")

__all__ = [
    "DGC",
    "DP",
    "EF21",
    "FLARE",
    "LIPS",
    "METHODS",
    "SSFL",
    "STC",
    "Advice",
    "Chain",
    "ClientData",
    "ClientRecord",
    "ConfigError",
    "DataError",
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
    "Federation",
    "LaminaError",
    "Layer",
    "LayerRecord",
    "LocalOnly",
    "LocalSGD",
    "MagnitudePruning",
    "Message",
    "Method",
    "Params",
    "Personal",
    "Plan",
    "RandomMask",
    "RoundRecord",
    "Run",
    "RunError",
    "Scaffold",
    "SecureSum",
    "State",
    "StorageError",
    "Task",
    "Traffic",
    "WireError",
    "Work",
    "data",
    "guidelines",
    "models",
    "observe",
    "run",
    "wire",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"lamina.{name}")
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'lamina' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lamina.{home}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
