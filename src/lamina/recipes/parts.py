"""Data and models that only recipes need, by `entry` like a user's own.

Released code often trains on a part of a set, in another normalisation than usual, or starts from Keras's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import lamina.data
from lamina.data import ClientData
from lamina.data.transform import Images
from lamina.errors import expect
from lamina.models import cnn, mlp

PLAIN = "position"  # client i holds the i-th run of examples in the order of the set


def first(
    dataset: str = "cifar10",
    clients: int = 10,
    per_client: int = 600,
    partition: str = PLAIN,
    augment: bool = False,
    seed: int = 0,
) -> ClientData:
    """The first clients * per_client training images of a set, pixels in [0, 1] and not standardised.

    Args:
        dataset: "cifar10", "mnist" or "fashion_mnist".
        clients: how many.
        per_client: images of each, on average.
        partition: a rule of `lamina.data.PARTITIONS`, or "position": client i holds the i-th `per_client` of them.
        augment: in training, crop at random after padding by 4 and mirror.
        seed: of the split.
    """
    whole = lamina.data.load(dataset, clients=1, partition="iid")
    n = clients * per_client
    x, y, test = whole.x, whole.y, whole.test
    assert isinstance(x, Tensor)  # these sets hold images and labels
    assert isinstance(y, Tensor)
    expect(
        clients >= 1 and per_client >= 1 and n <= len(x),
        f"clients={clients}, per_client={per_client}: expected 1 to {len(x)} images in all",
        where="data",
    )
    look = Images((0.0,) * x.shape[3], (1.0,) * x.shape[3], crop=4 if augment else 0, flip=augment)
    if partition != PLAIN:
        return ClientData.from_dataset(
            (x[:n], y[:n]), test, clients=clients, partition=partition, seed=seed, transform=look, name=dataset
        )
    groups = {str(i): torch.arange(i * per_client, (i + 1) * per_client) for i in range(clients)}
    return ClientData.from_index(x[:n], y[:n], groups, test=test, transform=look, name=dataset, partition=PLAIN)


def speeches(clients: int = 10, least: int = 248, most: int | None = None, length: int = 100) -> ClientData:
    """Shakespeare as sequences with a target behind every character: x, y = int64 [length], y one character on.

    Args:
        clients: the first so many roles, in the order of the set, that have enough.
        least: sequences that a role must have in training.
        most: of these, how many it holds; None: all.
        length: characters of a sequence; neighbours share none.
    """
    plays = lamina.data.shakespeare()
    tests = plays.client_tests or {}
    train: dict[str, tuple[Tensor, Tensor]] = {}
    own = []
    for role, name in enumerate(plays.names):
        if len(train) == clients:
            break
        said, heard = plays.y, tests.get(name)
        assert isinstance(said, Tensor)  # characters: at stride 1 the targets of a role are its text
        mine = _sequences(said[plays.indices_of(role)], length)
        if heard is not None and len(mine[0]) >= least:
            assert isinstance(heard[1], Tensor)
            train[name] = (mine[0][:most], mine[1][:most])
            own.append(_sequences(heard[1], length))
    expect(len(train) == clients, f"clients={clients}: {len(train)} roles have {least} sequences", where="data")
    x, y = (torch.cat(parts) for parts in zip(*own, strict=True))
    return ClientData.from_clients(train, test=(x, y), name="shakespeare")


def _sequences(text: Tensor, length: int) -> tuple[Tensor, Tensor]:  # [n] -> twice [n // (length + 1), length]
    rows = text[: len(text) // (length + 1) * (length + 1)].view(-1, length + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def linear_fc(widths: Sequence[int] = (784, 4069, 4069, 4069, 10)) -> nn.Module:
    """FLARE's FC: linear layers without activations, from Keras's weights (Glorot uniform, zero biases)."""
    return _glorot(mlp(widths, activation="none"), nn.init.xavier_uniform_)


def flare_cnn(channels: Sequence[int] = (32, 64), dense: int = 512) -> nn.Module:
    """FLARE's CNN, with logits for its softmax of a softmax, from Keras's weights (Glorot normal, zero biases)."""
    return _glorot(cnn(channels=channels, dense=(dense,)), nn.init.xavier_normal_)


def _glorot(model: nn.Module, weights: Callable[[Tensor], Tensor]) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weights(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
