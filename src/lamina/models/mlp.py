"""Fully connected networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

from torch import nn

from lamina.models.knobs import one_of, wholes

Activation = Literal["relu", "tanh", "none"]


def mlp(widths: Sequence[int] = (784, 64, 10), activation: Activation = "relu", bias: bool = True) -> nn.Sequential:
    """Flatten, then `fc1`, `fc2`, ... with the activation between them.

    | widths | parameters | |
    |---|---|---|
    | (784, 64, 10) | 50,890 | benchmark W2b |
    | (784, 3072, 2816, 10) | 11,093,258 | benchmark W4 |
    | (784, 4069, 4069, 4069, 10), activation="none" | 36,356,525 | FLARE's released FC ("4069" as it stands there) |

    Args:
        widths: entries of one flattened example, hidden widths, classes.
        activation: "none" makes a deep linear network.
        bias: whether every layer has one.
    """
    widths = wholes("widths", widths, fewest=2)
    one_of("activation", activation, get_args(Activation))
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        layers[f"fc{i}"] = nn.Linear(inputs, outputs, bias=bias)
        if activation != "none" and i < len(widths) - 1:
            layers[f"{activation}{i}"] = nn.ReLU() if activation == "relu" else nn.Tanh()
    return nn.Sequential(layers)
