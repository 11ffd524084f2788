"""lamina: layer-wise, communication-efficient federated learning, measured in bytes that really travel."""

from lamina import data, models, wire
from lamina.client import LocalSGD
from lamina.data.client_data import ClientData
from lamina.errors import ConfigError, DataError, LaminaError, RunError, StorageError, WireError
from lamina.federation import Federation, State, run
from lamina.layers import Layer
from lamina.method import Chain, Method, Plan, Task, Work
from lamina.methods import (
    METHODS,
    ErrorFeedback,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedLAMA,
    FedProx,
    FedYogi,
    LocalOnly,
    Scaffold,
)
from lamina.record import ClientRecord, LayerRecord, RoundRecord, Traffic
from lamina.tree import Message, Params

__version__ = "0.1.0"

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
