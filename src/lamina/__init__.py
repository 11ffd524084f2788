"""lamina: layer-wise, communication-efficient federated learning, measured in bytes that really travel."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina import data, models, wire
    from lamina.client import LocalSGD
    from lamina.data.client_data import ClientData
    from lamina.errors import ConfigError, DataError, LaminaError, RunError, StorageError, WireError
    from lamina.federation import Federation, State, run
    from lamina.layers import Layer
    from lamina.method import Chain, FedAvg, Method, Plan, Task, Work
    from lamina.methods import METHODS
    from lamina.methods.error_feedback import ErrorFeedback
    from lamina.methods.fedlama import FedLAMA
    from lamina.methods.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
    from lamina.methods.fedprox import FedProx
    from lamina.methods.local_only import LocalOnly
    from lamina.methods.scaffold import Scaffold
    from lamina.record import ClientRecord, LayerRecord, RoundRecord, Traffic
    from lamina.runs import Run
    from lamina.tree import Message, Params

__version__ = "0.1.0"

# Home of every public name. They are imported when first used, so that `lamina --help` does not wait for torch.
_HOMES = {
    "client": ("LocalSGD",),
    "data.client_data": ("ClientData",),
    "errors": ("ConfigError", "DataError", "LaminaError", "RunError", "StorageError", "WireError"),
    "federation": ("Federation", "State", "run"),
    "layers": ("Layer",),
    "method": ("Chain", "FedAvg", "Method", "Plan", "Task", "Work"),
    "methods": (
        "METHODS",
        "ErrorFeedback",
        "FedAdagrad",
        "FedAdam",
        "FedAvgM",
        "FedLAMA",
        "FedProx",
        "FedYogi",
        "LocalOnly",
        "Scaffold",
    ),
    "record": ("ClientRecord", "LayerRecord", "RoundRecord", "Traffic"),
    "runs": ("Run",),
    "tree": ("Message", "Params"),
}
_MODULES = ("data", "models", "wire")

__all__ = [
    "METHODS",
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
    "FedLAMA",
    "FedProx",
    "FedYogi",
    "Federation",
    "LaminaError",
    "Layer",
    "LayerRecord",
    "LocalOnly",
    "LocalSGD",
    "Message",
    "Method",
    "Params",
    "Plan",
    "RoundRecord",
    "Run",
    "RunError",
    "Scaffold",
    "State",
    "StorageError",
    "Task",
    "Traffic",
    "WireError",
    "Work",
    "data",
    "models",
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
