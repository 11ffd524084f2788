"""Residual networks of the CIFAR and of the ImageNet layout, as one family with knobs.

`conv1` and `norm1`, then `layer1`, `layer2`, ... of blocks, global average pooling and `fc`. Widths double and maps
halve from stage to stage. Every name below takes every knob of `Variant`.

| call | parameters | |
|---|---|---|
| resnet20() | 272,474 | projections where the width changes |
| resnet20(shortcut="stage") | 272,762 | FedLAMA's, FedLUAR's: also in the first block of stage 1; 23 weight tensors |
| resnet20(shortcut="identity"), resnet20(residual=False) | 269,722 | He et al.'s option A; the plain net |
| wrn28_10(shortcut="stage") | 36,539,124 | FedLAMA's and FedLUAR's WRN-28-10, 100 classes, 29 weight tensors |
| resnet6(10), resnet8(10), resnet8(100) | 314,954, 1,235,274, 1,258,404 | LIPS, 7x7 stem |
| resnet10(200) | 5,008,392 | LIPS, Tiny-ImageNet; "ResNet-9" in the code of the deeper-models paper |
| resnet18(norm="group") | 11,173,962 | SSFL: 11,164,352 in 21 weight tensors + 9,610 |
| resnet50(norm="group") | 23,520,842 | SSFL: 23,467,712 in 54 weight tensors + 53,130 |

Bottlenecks have their stride in the 3x3 convolution. Convolutions start from He's normal initialisation (fan out).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from lamina.errors import expect
from lamina.models.knobs import one_of, share, whole, wholes
from lamina.models.norm import Norm, normalise

Stem = Literal["3x3", "7x7"]
Shortcut = Literal["projection", "stage", "identity"]

STEM_FIELD = {"3x3": (3, 1), "7x7": (11, 4)}  # receptive field and total stride behind the stem, its pooling included


class Variant(Protocol):
    """A named residual network: the knobs, the same for all of them."""

    def __call__(
        self,
        num_classes: int = ...,
        *,
        width: int | Sequence[int] = ...,
        stem: Stem = ...,
        norm: Norm = "batch",
        groups: int = 32,
        shortcut: Shortcut = "projection",
        receptive_field: int | None = None,
        in_channels: int = 3,
        residual: bool = True,
        zero_init: bool = False,
        stem_width: int | None = None,
        dropout: float = ...,
    ) -> nn.Sequential:
        """Fresh weights from torch's global generator.

        Args:
            num_classes: outputs.
            width: channels of stage 1 (they double from stage to stage), or the channels of every stage; a bottleneck
                gives out four times as many.
            stem: "3x3" at full resolution, or "7x7" with stride 2 and 3x3 max pooling.
            norm: "none" leaves it out and gives the convolutions biases.
            groups: at most so many groups for norm="group": the largest divisor of the channels that leaves two or
                more channels to a group (8 groups for 16 channels, 16 for 32, 32 for 64, 128, ...).
            shortcut: 1x1 convolution and norm where the shape changes ("projection"), in the first block of every
                stage ("stage"), or none: subsampling and zeros for the new channels ("identity").
            receptive_field: largest receptive field allowed, in pixels: from the first block on that would see more,
                3x3 convolutions are 1x1. None: as defined.
            in_channels: channels of the input [B, in_channels, H, W].
            residual: False leaves out the shortcuts: a plain network.
            zero_init: the last norm of every block starts at zero, so that the block starts as its shortcut.
            stem_width: channels of the stem; as in stage 1 unless told.
            dropout: share dropped between the last two convolutions of a block.
        """
        ...


class _Parts(NamedTuple):
    """What blocks are made of."""

    norm: Norm
    groups: int
    shortcut: Shortcut
    residual: bool
    dropout: float

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=self.norm == "none")

    def normalise(self, channels: int) -> nn.Module:
        return normalise(self.norm, channels, self.groups)

    def drop(self) -> nn.Module:
        return nn.Dropout(self.dropout) if self.dropout else nn.Identity()

    def bypass(self, inputs: int, outputs: int, stride: int, first: bool) -> nn.Module | None:
        """The shortcut of a block; None in a plain network."""
        changes = stride != 1 or inputs != outputs
        if not self.residual:
            return None
        if (self.shortcut == "stage" and first) or (self.shortcut == "projection" and changes):
            conv, norm = self.conv(inputs, outputs, 1, stride), self.normalise(outputs)
            return nn.Sequential(OrderedDict(conv=conv, norm=norm))
        return _Identity(stride, outputs - inputs) if changes else nn.Identity()


class _Identity(nn.Module):
    """He et al.'s option A: every stride-th pixel, and zeros (or a cut) for the change of channels."""

    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.subsample = nn.AvgPool2d(1, stride)
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.subsample(x), (0, 0, 0, 0, 0, self.more))


class BasicBlock(nn.Module):
    """conv - norm - relu - conv - norm, plus the shortcut, relu."""

    expansion = 1

    def __init__(self, parts: _Parts, inputs: int, width: int, stride: int, kernel: int, first: bool) -> None:
        super().__init__()
        self.conv1 = parts.conv(inputs, width, kernel, stride)
        self.norm1 = parts.normalise(width)
        self.dropout = parts.drop()
        self.conv2 = parts.conv(width, width, kernel)
        self.norm2 = parts.normalise(width)
        self.shortcut = parts.bypass(inputs, width, stride, first)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(self.dropout(y)))
        return F.relu(y if self.shortcut is None else y + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the width, plus the shortcut, relu."""

    expansion = 4

    def __init__(self, parts: _Parts, inputs: int, width: int, stride: int, kernel: int, first: bool) -> None:
        super().__init__()
        self.conv1 = parts.conv(inputs, width, 1)
        self.norm1 = parts.normalise(width)
        self.conv2 = parts.conv(width, width, kernel, stride)
        self.norm2 = parts.normalise(width)
        self.dropout = parts.drop()
        self.conv3 = parts.conv(width, 4 * width, 1)
        self.norm3 = parts.normalise(4 * width)
        self.shortcut = parts.bypass(inputs, 4 * width, stride, first)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        y = self.norm3(self.conv3(self.dropout(y)))
        return F.relu(y if self.shortcut is None else y + self.shortcut(x), inplace=True)


def _variant(
    name: str,
    blocks: tuple[int, ...],
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
    *,
    width: int = 64,
    stem: Stem = "3x3",
    num_classes: int = 10,
    stem_width: int | None = None,
    dropout: float = 0.0,
) -> Variant:
    """The function that makes `name`: so many blocks per stage, and its own defaults for some knobs."""

    def make(
        num_classes: int = num_classes,
        *,
        width: int | Sequence[int] = width,
        stem: Stem = stem,
        norm: Norm = "batch",
        groups: int = 32,
        shortcut: Shortcut = "projection",
        receptive_field: int | None = None,
        in_channels: int = 3,
        residual: bool = True,
        zero_init: bool = False,
        stem_width: int | None = stem_width,
        dropout: float = dropout,
    ) -> nn.Sequential:
        one_of("stem", stem, get_args(Stem))
        one_of("norm", norm, get_args(Norm))
        one_of("shortcut", shortcut, get_args(Shortcut))
        whole("num_classes", num_classes)
        whole("in_channels", in_channels)
        whole("groups", groups)
        share("dropout", dropout)
        widths = _widths(width, len(blocks))
        inputs = widths[0] if stem_width is None else whole("stem_width", stem_width)
        expect(
            not zero_init or (residual and norm != "none"),
            "zero_init=True: expected residual=True and a norm whose scale can start at zero",
            where="zero_init",
            remedy="leave zero_init=False here",
        )
        field, jump = STEM_FIELD[stem]
        limit = None if receptive_field is None else _limit(receptive_field, stem)

        parts = _Parts(norm, groups, shortcut, residual, dropout)
        model: OrderedDict[str, nn.Module] = OrderedDict()
        side, stride = (3, 1) if stem == "3x3" else (7, 2)
        model["conv1"], model["norm1"] = parts.conv(in_channels, inputs, side, stride), parts.normalise(inputs)
        model["relu"] = nn.ReLU(inplace=True)
        if stem == "7x7":
            model["maxpool"] = nn.MaxPool2d(3, 2, padding=1)

        kernel = 3
        for s, (count, channels) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for b in range(count):
                stride = 2 if s > 0 and b == 0 else 1
                # a 3x3 convolution adds 2 * jump; a basic block has one before its stride and one behind
                reach = field + 2 * jump * (1 + stride if block is BasicBlock else 1)
                if limit is not None and reach > limit:
                    kernel = 1  # from here to the end
                if kernel == 3:
                    field = reach
                jump *= stride
                stage.append(block(parts, inputs, channels, stride, kernel, first=b == 0))
                inputs = channels * block.expansion
            model[f"layer{s + 1}"] = nn.Sequential(*stage)
        model["pool"], model["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        model["fc"] = nn.Linear(inputs, num_classes)
        return _initialise(nn.Sequential(model), zero_init)

    kind = "bottlenecks" if block is Bottleneck else "basic blocks"
    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{name}: stages of {', '.join(map(str, blocks))} {kind}. Knobs: see `lamina.models.resnet.Variant`."
    return make


def _widths(width: int | Sequence[int], stages: int) -> tuple[int, ...]:
    if not isinstance(width, Sequence):
        return tuple(whole("width", width) * 2**stage for stage in range(stages))
    widths = wholes("width", width)
    expect(
        len(widths) == stages,
        f"width={width!r}: expected one integer, or {stages} (one per stage)",
        where="width",
        remedy=f"give {stages} widths, or the first alone",
    )
    return widths


def _limit(receptive_field: int, stem: Stem) -> int:
    least = STEM_FIELD[stem][0]
    remedy = f"set it to {least} or more (the {stem} stem alone sees {least} pixels)"
    return whole("receptive_field", receptive_field, least, remedy if stem == "3x3" else remedy + ', or stem="3x3"')


def _initialise(model: nn.Sequential, zero_init: bool) -> nn.Sequential:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif zero_init and isinstance(module, BasicBlock | Bottleneck):
            last = module.norm2 if isinstance(module, BasicBlock) else module.norm3
            nn.init.zeros_(last.get_parameter("weight"))
    return model


# LIPS: 64 channels behind a 7x7 stem, doubling
resnet6 = _variant("resnet6", (1, 1), stem="7x7")
resnet8 = _variant("resnet8", (1, 1, 1), stem="7x7")
resnet10 = _variant("resnet10", (1, 1, 1, 1), stem="7x7")
# CIFAR: He et al. 2016, section 4.2; Zagoruyko & Komodakis 2016 (here with the ReLU after the sum, as FedLAMA has it)
resnet20 = _variant("resnet20", (3, 3, 3), width=16)
resnet32 = _variant("resnet32", (5, 5, 5), width=16)
resnet56 = _variant("resnet56", (9, 9, 9), width=16)
wrn28_10 = _variant("wrn28_10", (4, 4, 4), width=160, num_classes=100, stem_width=16, dropout=0.3)
# ImageNet: He et al. 2016, table 1
resnet18 = _variant("resnet18", (2, 2, 2, 2))
resnet34 = _variant("resnet34", (3, 4, 6, 3))
resnet50 = _variant("resnet50", (3, 4, 6, 3), Bottleneck)
resnet101 = _variant("resnet101", (3, 4, 23, 3), Bottleneck)
resnet152 = _variant("resnet152", (3, 8, 36, 3), Bottleneck)
