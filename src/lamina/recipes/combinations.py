"""The combinations of layer-wise methods that we stand behind, against FedAvg at one small setting."""

from __future__ import annotations

from typing import Any

from lamina.recipes.recipe import Claim, Recipe, Variant, both, cheaper, higher

OURS = "ours: no paper has this combination"


def _arms(recycle: int, rounds: int) -> dict[str, dict[str, Any]]:
    ssfl = {"name": "ssfl", "density": 0.2, "allow_empty": True}
    fedlama = {"name": "fedlama", "phi": 4}
    fedadam = {"name": "fedadam", "lr": 0.01}
    lips = {"name": "lips", "density": 0.5, "every": 5, "rounds": rounds}
    flare = {"name": "flare", "tau": 0.05, "decay": 1.05}
    tenth = {"name": "topk", "density": 0.1}
    return {
        "FedAvg": {},
        "FedLAMA": {"method": fedlama},
        "SSFL + FedLAMA": {"method": [ssfl, fedlama]},
        "SSFL + FLARE": {"method": [ssfl, flare], "uplink": tenth},
        "LIPS + FedLAMA": {"method": [lips, fedlama]},
        "EF + FedLAMA": {"method": ["errorfeedback", fedlama], "uplink": tenth},
        "FedLUAR + FedAdam": {"method": [{"name": "fedluar", "recycle": recycle}, fedadam]},
        "SSFL + FedLAMA + FedAdam, int8": {"method": [ssfl, fedlama, fedadam], "uplink": "int8", "downlink": "int8"},
    }


def _claims() -> tuple[Claim, ...]:
    shares = {
        "SSFL + FedLAMA": 0.25,
        "SSFL + FLARE": 0.15,
        "LIPS + FedLAMA": 0.7,
        "EF + FedLAMA": 0.15,
        "FedLUAR + FedAdam": 0.8,
        "SSFL + FedLAMA + FedAdam, int8": 0.15,
    }
    return tuple(
        Claim(
            f"{label} stays within 5 points of FedAvg at no more than {100 * share:.0f} % of its uplink.",
            OURS,
            both(higher(label, "FedAvg", within=0.05), cheaper(label, share)),
        )
        for label, share in shares.items()
    )


def _base(
    model: dict[str, Any], clients: int, cohort: int, rounds: int, every: int, partition: str, lr: float
) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "evaluate_every": every,
        "cohort": cohort,
        "weights": "examples",
        "buffers": "average",
        "model": {**model, "shortcut": "stage"},
        "data": {"name": "cifar10", "clients": clients, "partition": partition, "augment": True},
        "method": "fedavg",
        "local": {
            "lr": lr,
            "momentum": 0.9,
            "weight_decay": 2e-4,
            "batch_size": 32,
            "steps": 12,
            "schedule": f"step:{rounds // 2},{3 * rounds // 4}:0.1",
        },
    }


CIFAR10 = Recipe(
    name="layerwise-combinations",
    title="Combinations of layer-wise methods against FedAvg, CIFAR-10",
    paper="none: the methods are those of the other recipes",
    arxiv=None,
    source="ours; clients and model as in the FedLAMA recipe",
    compares="six chains of methods and FedAvg: accuracy and bytes",
    dataset="cifar10",
    published=Variant(
        base=_base({"name": "resnet20"}, 128, 32, 500, 20, "dirichlet:0.5", 0.1),
        arms=_arms(recycle=10, rounds=500),
        claims=_claims(),
        floor=0.60,
        why="well below what FedAvg reaches in longer runs with alpha = 0.5",
        size="8 arms, 49 million examples: estimated 17 hours on 2 cores",
    ),
    scaled=Variant(
        base=_base({"name": "resnet8", "width": 16, "stem": "3x3"}, 16, 4, 120, 20, "dirichlet:0.5", 0.1),
        arms=_arms(recycle=5, rounds=120),
        claims=_claims(),
        floor=0.35,
        why="a first run of FedAvg alone, seed 0, reached 41.80 %",
        size="8 arms, 1.5 million examples: about 12 minutes on 2 cores",
        scaled="ResNet-8 for ResNet-20, 16 clients for 128, of which 4 (25 %) a round, 120 rounds for 500",
    ),
)
