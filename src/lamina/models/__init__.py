"""Models of the published experiments, with width, stem, norm and receptive-field knobs.

Every function returns a module with fresh weights, drawn from torch's global generator: seed it first, or let the
Federation do so.
"""

from collections.abc import Callable

from torch import nn

from lamina.models.cnn import cnn, cnn1d, femnist_cnn, lenet5, pfl_cnn
from lamina.models.lora import Frozen, lora, merged
from lamina.models.mlp import mlp
from lamina.models.receptive_field import Field, receptive_fields
from lamina.models.resnet import (
    resnet6,
    resnet8,
    resnet10,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet50,
    resnet56,
    resnet101,
    resnet152,
    wrn28_10,
)
from lamina.models.sequence import char_gru, char_lstm
from lamina.models.vgg import vgg11, vgg16, vgg19

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "femnist_cnn": femnist_cnn,
    "pfl_cnn": pfl_cnn,
    "lenet5": lenet5,
    "cnn1d": cnn1d,
    "resnet6": resnet6,
    "resnet8": resnet8,
    "resnet10": resnet10,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "wrn28_10": wrn28_10,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "char_lstm": char_lstm,
    "char_gru": char_gru,
}

__all__ = [
    "MODELS",
    "Field",
    "Frozen",
    "char_gru",
    "char_lstm",
    "cnn",
    "cnn1d",
    "femnist_cnn",
    "lenet5",
    "lora",
    "merged",
    "mlp",
    "pfl_cnn",
    "receptive_fields",
    "resnet6",
    "resnet8",
    "resnet10",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet152",
    "vgg11",
    "vgg16",
    "vgg19",
    "wrn28_10",
]
