"""Data of a federation: ClientData, how to split, what happens to a batch, and the real data sets in the box."""

from __future__ import annotations

from lamina.data.catalogue import (
    DATASETS,
    DatasetInfo,
    cached,
    cifar10,
    cifar100,
    covertype,
    download,
    fashion_mnist,
    hapt,
    load,
    mnist,
    shakespeare,
)
from lamina.data.client_data import ClientData
from lamina.data.digits import digits
from lamina.data.fetch import cache_folder
from lamina.data.partition import PARTITIONS

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "ClientData",
    "DatasetInfo",
    "cache_folder",
    "cached",
    "cifar10",
    "cifar100",
    "covertype",
    "digits",
    "download",
    "fashion_mnist",
    "hapt",
    "load",
    "mnist",
    "shakespeare",
]
