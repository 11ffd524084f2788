"""Small convolutional networks: convolutions with 2x2 max pooling, then dense layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from lamina.errors import expect
from lamina.models.knobs import one_of, share, whole, wholes

Padding = Literal["valid", "same"]
Pool = Literal["each", "last"]


def cnn(
    in_channels: int = 1,
    num_classes: int = 10,
    channels: Sequence[int] = (32, 64),
    kernel: int = 5,
    dense: Sequence[int] = (128,),
    padding: Padding = "valid",
    size: int = 28,
    pool: Pool = "each",
    dropout: tuple[float, float] = (0.0, 0.0),
) -> nn.Sequential:
    """`conv1`, `conv2`, ... with ReLU and pooling, `fc1`, ... with ReLU, and the classifier as the last `fc`.

    | knobs | parameters | |
    |---|---|---|
    | as they stand | 184,586 | benchmarks W1, W2 |
    | num_classes=62, padding="same", dense=(2048,) | 6,603,710 | FEMNIST CNN of FedLAMA and FedLUAR (`femnist_cnn`) |
    | dense=(512,) | 582,026 | FLARE's CNN (its released code applies softmax twice; this one gives logits) |
    | in_channels=3, kernel=3, size=32, pool="last" | 1,626,442 | pfl-research's CIFAR-10 benchmark (`pfl_cnn`) |

    Args:
        in_channels: channels of the input [B, in_channels, size, size].
        num_classes: outputs.
        channels: kernels of each convolution.
        kernel: side of every kernel.
        dense: widths of the hidden dense layers.
        padding: "same" keeps the size in a convolution (odd kernels only), "valid" has none.
        size: side of the input.
        pool: 2x2 max pooling after each convolution, or once after the last.
        dropout: shares dropped after the last pooling and after every hidden dense layer.
    """
    one_of("pool", pool, get_args(Pool))
    count = len(wholes("channels", channels, fewest=1))
    pools = [pool == "each" or i == count - 1 for i in range(count)]
    pads = [_pad(padding, kernel)] * count
    return _network(2, in_channels, num_classes, channels, kernel, pads, pools, dense, size, dropout)


def femnist_cnn(num_classes: int = 62) -> nn.Sequential:
    """The FEMNIST CNN of FedLAMA and FedLUAR: 6,603,710 parameters, 97.26 % of them in the kernel of `fc1`."""
    return cnn(num_classes=num_classes, dense=(2048,), padding="same")


def pfl_cnn(num_classes: int = 10, dropout: tuple[float, float] = (0.25, 0.5)) -> nn.Sequential:
    """pfl-research's CIFAR-10 benchmark CNN: 1,626,442 parameters, Glorot-uniform weights, its two dropouts."""
    model = cnn(3, num_classes, kernel=3, size=32, pool="last", dropout=dropout)
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


def lenet5(
    in_channels: int = 1,
    num_classes: int = 10,
    size: int = 28,
    activation: Literal["relu", "tanh"] = "relu",
    pooling: Literal["max", "avg"] = "max",
) -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998) with full connections: 5x5x6, 5x5x16, 120, 84.

    61,706 parameters for 1x28x28 (padded to 32 as in 1998) and for 1x32x32; 62,006 for 3x32x32.
    `activation="tanh", pooling="avg"` is closest to the original, the defaults are what is used today.

    Args:
        in_channels: channels of the input [B, in_channels, size, size].
        num_classes: outputs.
        size: side of the input, 28 or 32.
        activation: behind every layer but the last.
        pooling: after each convolution.
    """
    one_of("activation", activation, ("relu", "tanh"))
    one_of("pooling", pooling, ("max", "avg"))
    pads = [2 if size == 28 else 0, 0]
    dense = (120, 84)
    return _network(
        2, in_channels, num_classes, (6, 16), 5, pads, [True, True], dense, size, (0.0, 0.0), activation, pooling
    )


def cnn1d(
    in_channels: int = 6,
    num_classes: int = 6,
    channels: Sequence[int] = (32, 64),
    kernel: int = 5,
    dense: Sequence[int] = (128,),
    padding: Padding = "same",
    length: int = 128,
    dropout: tuple[float, float] = (0.0, 0.0),
) -> nn.Sequential:
    """`cnn` over time, for windows [B, in_channels, length]: 274,342 parameters as it stands (HAPT, 6 activities).

    Args:
        length: of a window; all others as in `cnn`.
    """
    count = len(wholes("channels", channels, fewest=1))
    pads = [_pad(padding, kernel)] * count
    return _network(
        1, in_channels, num_classes, channels, kernel, pads, [True] * count, dense, length, dropout, side="length"
    )


def _pad(padding: str, kernel: int) -> int:
    one_of("padding", padding, get_args(Padding))
    whole("kernel", kernel)
    if padding == "valid":
        return 0
    expect(
        kernel % 2 == 1,
        f'kernel={kernel}: expected an odd kernel with padding="same"',
        where="kernel",
        remedy=f'set kernel={kernel + 1} or padding="valid"',
    )
    return kernel // 2


def _network(
    dims: int,
    in_channels: int,
    num_classes: int,
    channels: Sequence[int],
    kernel: int,
    pads: Sequence[int],
    pools: Sequence[bool],
    dense: Sequence[int],
    size: int,
    dropout: tuple[float, float],
    activation: str = "relu",
    pooling: str = "max",
    side: str = "size",
) -> nn.Sequential:
    """Convolutions over `dims` axes, then dense layers."""
    whole("in_channels", in_channels)
    whole("num_classes", num_classes)
    whole(side, size)
    dense = wholes("dense", dense)
    expect(
        isinstance(dropout, Sequence) and len(dropout) == 2,
        f"dropout={dropout!r}: expected two shares, behind the convolutions and behind the dense layers",
        where="dropout",
        remedy="e.g. dropout=[0.25, 0.5]; [0, 0] for none",
    )
    for i, dropped in enumerate(dropout):
        share(f"dropout[{i}]", dropped)
    conv: type[nn.Module] = nn.Conv2d if dims == 2 else nn.Conv1d
    pool: type[nn.Module] = nn.AvgPool2d if pooling == "avg" else nn.MaxPool2d if dims == 2 else nn.MaxPool1d
    act: type[nn.Module] = nn.ReLU if activation == "relu" else nn.Tanh

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs, left = in_channels, size
    for i, (outputs, pad, pooled) in enumerate(zip(channels, pads, pools, strict=True), start=1):
        layers[f"conv{i}"] = conv(inputs, outputs, kernel, padding=pad)
        inputs, left = outputs, left + 2 * pad - kernel + 1
        steps = {f"act{i}": act()}
        if pooled:
            steps[f"pool{i}"] = pool(2)
            left //= 2
        if pooling == "max":  # a rising activation and a maximum commute: the same values from a quarter of the work
            steps = dict(reversed(steps.items()))
        layers.update(steps)
        expect(
            left >= 1,
            f"{side}={size}: nothing is left of it after conv{i} (kernel {kernel}) and its pooling",
            where=side,
            remedy=f'make {side} larger, the kernel smaller, or use fewer channels or padding="same"',
        )
    if dropout[0]:
        layers["drop"] = nn.Dropout(dropout[0])
    layers["flatten"] = nn.Flatten()
    inputs *= left**dims
    for i, outputs in enumerate(dense, start=1):
        layers[f"fc{i}"] = nn.Linear(inputs, outputs)
        layers[f"fc_act{i}"] = act()
        if dropout[1]:
            layers[f"fc_drop{i}"] = nn.Dropout(dropout[1])
        inputs = outputs
    layers[f"fc{len(dense) + 1}"] = nn.Linear(inputs, num_classes)
    return nn.Sequential(layers)
