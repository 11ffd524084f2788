"""One decoder a file: from the raw files of a data set to its arrays, and where those files are to be had."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lamina.data.fetch import Spec
from lamina.data.sets.cifar import CIFAR10, CIFAR100
from lamina.data.sets.covertype import COVERTYPE
from lamina.data.sets.hapt import HAPT
from lamina.data.sets.idx import FASHION_MNIST, MNIST
from lamina.data.sets.shakespeare import SHAKESPEARE

SPECS: Mapping[str, Spec] = MappingProxyType(
    {spec.name: spec for spec in (CIFAR10, CIFAR100, FASHION_MNIST, MNIST, SHAKESPEARE, HAPT, COVERTYPE)}
)
