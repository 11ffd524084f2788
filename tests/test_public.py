"""The public surface, pinned: a script that works today works tomorrow. Extend it here, knowingly."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import lamina

NAMES = [
    "FedDST", "MagnitudePruning", "RandomMask", "SSFL",
    "Advice", "Chain", "ClientData", "ClientRecord", "ConfigError", "DGC", "DP", "DataError", "EF21", "ErrorFeedback",
    "FLARE", "FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedDyn", "FedLAMA", "FedLUAR", "FedNova", "FedProx",
    "FedYogi", "Federation", "LIPS", "LaminaError", "Layer", "LayerRecord", "LocalOnly", "LocalSGD", "METHODS",
    "Message", "Method", "Params", "Personal", "Plan", "RoundRecord", "Run", "RunError", "STC", "Scaffold", "State",
    "SecureSum", "StorageError", "Task", "Traffic", "WireError", "Work", "data", "guidelines", "models", "observe",
    "run",
    "wire",
]  # fmt: skip

ARGUMENTS: dict[Any, str] = {
    lamina.Federation: "model data method uplink downlink local cohort weights buffers loss metrics aggregate seed "
    "engine workers diagnostics accuracy_before through_bytes store faults "
    "availability network privacy secure",
    lamina.DP: "clip noise delta noise_seed",
    lamina.SecureSum: "bits threshold limit",
    lamina.Federation.run: "self rounds state evaluate_every",
    lamina.Federation.fit: "self rounds out options",
    lamina.Federation.evaluate: "self state engine",
    lamina.Federation.module: "self state",
    lamina.run: "fed state rounds evaluate_every",
    lamina.LocalSGD: "lr momentum weight_decay batch_size epochs steps schedule clip precision",
    lamina.ClientData.from_clients: "clients test client_tests transform name test_share seed label_names",
    lamina.ClientData.from_dataset: ("train test clients partition seed transform name columns test_share label_names"),
    lamina.FedAvg: "",
    lamina.FedProx: "mu",
    lamina.Scaffold: "approximate",
    lamina.STC: "",
    lamina.FedAvgM: "lr momentum",
    lamina.FedAdagrad: "lr eps",
    lamina.FedAdam: "lr b1 b2 eps",
    lamina.FedYogi: "lr b1 b2 eps",
    lamina.ErrorFeedback: "",
    lamina.EF21: "",
    lamina.DGC: "momentum",
    lamina.FLARE: "tau decay percentile steps",
    lamina.FedLAMA: "phi warmup",
    lamina.FedLUAR: "recycle choose replay refresh_on_lr_drop",
    lamina.FedNova: "",
    lamina.SSFL: "density score allow_empty",
    lamina.RandomMask: "density layout",
    lamina.FedDST: "density every ratio layout until",
    lamina.MagnitudePruning: "density start end every scope",
    lamina.LocalOnly: "",
    lamina.LIPS: "density every rounds score layers norm_sync",
    lamina.Personal: "layers",
    lamina.FedDyn: "alpha",
    lamina.Chain: "methods",
    lamina.wire.Dense: "values",
    lamina.wire.TopK: "density scope values keep",
    lamina.wire.RandomK: "density values",
    lamina.wire.encode: "tree codec mask reference key scalars context",
    lamina.wire.decode: "blob like mask reference key max_bytes",
    lamina.wire.read: "blob like mask reference key max_bytes",
    lamina.models.mlp: "widths activation bias",
    lamina.guidelines: "model example deep field narrow uneven",
    lamina.observe.divergence: "records layers",
    lamina.observe.inertia: "records",
    lamina.observe.accuracy_gap: "records",
    lamina.observe.traffic: "records",
    lamina.observe.divergence_std_of: "weights",
}

DEFAULTS: dict[Any, dict[str, Any]] = {
    lamina.LocalSGD: {
        "lr": 0.1,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "batch_size": 32,
        "epochs": 1,
        "precision": "fp32",
    },
    lamina.DP: {"delta": 1e-5, "noise_seed": "run"},
    lamina.SecureSum: {"bits": 32, "threshold": 0.6, "limit": 16.0},
    lamina.FedProx: {"mu": 0.01},
    lamina.FedAvgM: {"lr": 1.0, "momentum": 0.9},
    lamina.FedAdagrad: {"lr": 1e-2, "eps": 1e-3},
    lamina.FedAdam: {"lr": 1e-2, "b1": 0.9, "b2": 0.99, "eps": 1e-3},
    lamina.FedLAMA: {"phi": 2, "warmup": 0},
    lamina.DGC: {"momentum": 0.9},
    lamina.FLARE: {"tau": 0.5, "decay": 1.05, "percentile": 50.0, "steps": 1},
    lamina.LIPS: {
        "density": 0.5, "every": 5, "rounds": 300, "score": "saliency", "layers": "auto", "norm_sync": "global",
    },
    lamina.SSFL: {"density": 0.5, "score": "saliency", "allow_empty": False},
    lamina.RandomMask: {"density": 0.2, "layout": "erk"},
    lamina.FedDST: {"density": 0.2, "every": 10, "ratio": 0.01, "layout": "erk", "until": 200},
    lamina.MagnitudePruning: {"density": 0.2, "start": 0, "end": 100, "every": 10, "scope": "layer"},
    lamina.Personal: {"layers": "norm"},
    lamina.FedDyn: {"alpha": 0.01},
    lamina.FedLUAR: {"recycle": 1, "choose": "inverse", "replay": True, "refresh_on_lr_drop": False},
    lamina.guidelines: {"deep": 8, "field": 1.0, "narrow": 1.0, "uneven": 2.0},
    lamina.wire.Dense: {"values": "fp32"},
    lamina.wire.TopK: {"scope": "layer", "values": "fp32", "keep": "exact"},
    lamina.Federation: {
        "cohort": "all", "weights": "examples", "buffers": "average", "loss": "cross_entropy", "aggregate": "mean",
        "seed": 0, "engine": "auto", "workers": None,
    },
}  # fmt: skip

RECORD = [
    "round", "cohort", "in_sync", "bytes_up", "bytes_down", "seconds", "layers", "traffic", "clients", "train_loss",
    "lr", "accuracy", "loss", "personal_accuracy", "accuracy_before", "metrics", "events", "fedavg_up", "fedavg_down",
    "network_seconds", "epsilon",
]  # fmt: skip
LAYER = [
    "uploaded", "interval", "bytes_up", "bytes_down", "update_norm", "divergence", "divergence_std", "alignment",
    "discrepancy", "inertia", "inertia_l2", "inertia_cosine", "density",
    "residual_norm", "mask_churn", "clipped",
]  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert sorted(lamina.__all__) == sorted(NAMES)
    assert all(hasattr(lamina, name) for name in NAMES)


def test_the_hooks_of_a_method_are_these() -> None:
    hooks = [name for name, x in vars(lamina.Method).items() if inspect.isfunction(x) and not name.startswith("_")]
    assert (
        " ".join(hooks) == "bind init init_client probe setup plan begin correct report settle step absorb observe has"
    )


@pytest.mark.parametrize("what", ARGUMENTS, ids=lambda x: x.__qualname__)
def test_arguments_keep_their_names_and_order(what: Any) -> None:
    assert list(inspect.signature(what).parameters) == ARGUMENTS[what].split()


@pytest.mark.parametrize("what", DEFAULTS, ids=lambda x: x.__qualname__)
def test_arguments_keep_their_defaults(what: Any) -> None:
    found = {name: p.default for name, p in inspect.signature(what).parameters.items()}
    assert {name: found[name] for name in DEFAULTS[what]} == DEFAULTS[what]


def test_records_keep_their_columns() -> None:
    assert list(lamina.RoundRecord.__dataclass_fields__) == RECORD
    assert list(lamina.LayerRecord._fields) == LAYER
    assert lamina.Layer._fields == ("name", "kind", "role", "shape")
    assert lamina.Traffic._fields == ("phase", "direction", "layer", "bytes")


def test_methods_are_found_by_name() -> None:
    assert {name: cls.__name__.lower() for name, cls in lamina.METHODS.items()} == {n: n for n in lamina.METHODS}
    assert all(getattr(lamina, cls.__name__) is cls for cls in lamina.METHODS.values())


def test_there_is_a_version() -> None:
    assert lamina.__version__.count(".") == 2
