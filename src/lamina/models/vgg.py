"""VGG networks for 32x32 images (larger ones are averaged to one position before the classifier).

3x3 convolutions with biases, 2x2 max pooling behind each stage, `fc` on 512 features.

| call | parameters | |
|---|---|---|
| vgg11() | 9,231,114 | Simonyan & Zisserman's A with BatchNorm and one linear layer |
| vgg11(layout="lips") | 3,918,858 | LIPS's "vgg11_bn": five convolutions |
| vgg11(layout="flare", norm="none", dense=(4096, 4096), dropout=0.5) | 28,144,010 | FLARE: see `layout` |
| vgg16(norm="none", dense=(4096, 4096)), vgg19(...) | 33,638,218, 38,947,914 | FLARE's larger ones |
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from lamina.models.knobs import one_of, share, whole, wholes
from lamina.models.norm import Norm, normalise

Layout = Literal["vgg", "lips", "flare"]

MULTIPLES = (1, 2, 4, 8, 8)  # channels of the five stages, in widths


class VGG(nn.Sequential):
    """What the functions below make."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels behind every convolution."""
        return tuple(module.out_channels for module in self if isinstance(module, nn.Conv2d))


def vgg11(
    num_classes: int = 10,
    *,
    layout: Layout = "vgg",
    width: int = 64,
    norm: Norm = "batch",
    groups: int = 32,
    dense: Sequence[int] = (),
    dropout: float = 0.0,
    in_channels: int = 3,
) -> VGG:
    """Eight convolutions (1, 1, 2, 2, 2 per stage) and the classifier.

    Args:
        num_classes: outputs.
        layout: "lips" has one convolution per stage; "flare" leaves out the ReLU (and norm) between two convolutions
            of a stage, as FLARE's released code does.
        width: channels of stage 1; the others have 2, 4, 8 and 8 times as many.
        norm: behind every convolution.
        groups: see `norm.group_count`.
        dense: hidden linear layers before the classifier, each with ReLU.
        dropout: share dropped after each of them.
        in_channels: channels of the input [B, in_channels, H, W], H and W >= 32.
    """
    one_of("layout", layout, get_args(Layout))
    counts = (1, 1, 1, 1, 1) if layout == "lips" else (1, 1, 2, 2, 2)
    return _vgg(counts, num_classes, width, norm, groups, dense, dropout, in_channels, paired=layout == "flare")


def vgg16(
    num_classes: int = 10,
    *,
    width: int = 64,
    norm: Norm = "batch",
    groups: int = 32,
    dense: Sequence[int] = (),
    dropout: float = 0.0,
    in_channels: int = 3,
) -> VGG:
    """Thirteen convolutions (2, 2, 3, 3, 3 per stage); arguments as in `vgg11`."""
    return _vgg((2, 2, 3, 3, 3), num_classes, width, norm, groups, dense, dropout, in_channels)


def vgg19(
    num_classes: int = 10,
    *,
    width: int = 64,
    norm: Norm = "batch",
    groups: int = 32,
    dense: Sequence[int] = (),
    dropout: float = 0.0,
    in_channels: int = 3,
) -> VGG:
    """Sixteen convolutions (2, 2, 4, 4, 4 per stage); arguments as in `vgg11`."""
    return _vgg((2, 2, 4, 4, 4), num_classes, width, norm, groups, dense, dropout, in_channels)


def _vgg(
    counts: Sequence[int],
    num_classes: int,
    width: int,
    norm: Norm,
    groups: int,
    dense: Sequence[int],
    dropout: float,
    in_channels: int,
    paired: bool = False,
) -> VGG:
    one_of("norm", norm, get_args(Norm))
    whole("num_classes", num_classes)
    whole("width", width)
    whole("groups", groups)
    whole("in_channels", in_channels)
    share("dropout", dropout)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs, i = in_channels, 0
    for stage, (count, multiple) in enumerate(zip(counts, MULTIPLES, strict=True), start=1):
        outputs = multiple * width
        for last in [False] * (count - 1) + [True]:
            i += 1
            conv = nn.Conv2d(inputs, outputs, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers[f"conv{i}"] = conv
            if last or not paired:
                if norm != "none":
                    layers[f"norm{i}"] = normalise(norm, outputs, groups)
                layers[f"relu{i}"] = nn.ReLU()
            inputs = outputs
        layers[f"maxpool{stage}"] = nn.MaxPool2d(2)
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    for i, outputs in enumerate(wholes("dense", dense), start=1):
        layers[f"fc{i}"] = nn.Linear(inputs, outputs)
        layers[f"fc_relu{i}"] = nn.ReLU()
        if dropout:
            layers[f"fc_drop{i}"] = nn.Dropout(dropout)
        inputs = outputs
    layers["fc"] = nn.Linear(inputs, num_classes)
    return VGG(layers)
