"""The real data sets in the box: one function each, a table of what they are, and `load` by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from lamina.data.client_data import ClientData
from lamina.data.digits import digits
from lamina.data.fetch import Progress, Spec, Stored, fetch, is_cached
from lamina.data.partition import split
from lamina.data.sets import SPECS
from lamina.data.sets.cifar import LABELS_10, LABELS_100
from lamina.data.sets.covertype import AREA_NAMES, KINDS
from lamina.data.sets.hapt import ACTIVITY_NAMES, LENGTH
from lamina.data.sets.idx import CLOTHES
from lamina.data.sets.shakespeare import NAMES, WINDOW
from lamina.data.transform import Images, Windows
from lamina.errors import ConfigError, expect, meant
from lamina.random import generator


class DatasetInfo(NamedTuple):
    """What a data set is; `clients` says what one client is where the set has clients of its own, else it is None."""

    name: str
    description: str
    download: int  # bytes, of the largest source
    disk: int  # bytes in the cache
    licence: str
    examples: int
    test_examples: int
    classes: int
    sources: tuple[str, ...]
    clients: str | None

    @property
    def natural(self) -> bool:
        """Whether it has clients of its own."""
        return self.clients is not None


def cifar10(
    clients: int = 100,
    partition: str = "dirichlet:0.5",
    seed: int = 0,
    augment: bool = True,
    *,
    folder: str | Path | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> ClientData:
    """CIFAR-10: 50,000 + 10,000 colour photographs of 32 x 32 pixels in 10 classes (Krizhevsky 2009).

    Args:
        clients: how many.
        partition: the rule of the split, such as iid or dirichlet:0.5 (`lamina list partitions`).
        seed: of the split.
        augment: in training, crop at random after padding by 4 and mirror.
        folder: holds the raw files; see `lamina.data.fetch`.
        verify: compare the sums of what is in the cache.
        progress: called as (name, stage, done, total).

    Raises:
        ConfigError: an impossible partition.
        DataError: E220, the set cannot be had; E219, Pillow is missing.
        StorageError: E401, it cannot be stored.
    """
    look = Images((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), crop=4 if augment else 0, flip=augment)
    return _images("cifar10", look, 10, clients, partition, seed, folder, verify, progress)


def cifar100(
    clients: int = 100,
    partition: str = "dirichlet:0.5",
    seed: int = 0,
    augment: bool = True,
    *,
    folder: str | Path | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> ClientData:
    """CIFAR-100: as `cifar10`, with 100 classes; from its own site or a folder alone, no registry has it."""
    look = Images((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), crop=4 if augment else 0, flip=augment)
    return _images("cifar100", look, 100, clients, partition, seed, folder, verify, progress)


def fashion_mnist(
    clients: int = 100,
    partition: str = "dirichlet:0.5",
    seed: int = 0,
    *,
    folder: str | Path | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> ClientData:
    """Fashion-MNIST: 60,000 + 10,000 grey pictures of clothes, 28 x 28, in 10 classes (Xiao et al. 2017).

    Arguments and errors as `cifar10`.
    """
    look = Images((0.2860,), (0.3530,))
    return _images("fashion_mnist", look, 10, clients, partition, seed, folder, verify, progress)


def mnist(
    clients: int = 100,
    partition: str = "dirichlet:0.5",
    seed: int = 0,
    *,
    folder: str | Path | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> ClientData:
    """MNIST: 60,000 + 10,000 handwritten digits, 28 x 28, in 10 classes (LeCun et al. 1998).

    Arguments and errors as `cifar10`.
    """
    look = Images((0.1307,), (0.3081,))
    return _images("mnist", look, 10, clients, partition, seed, folder, verify, progress)


def shakespeare(
    clients: int | None = None,
    seed: int = 0,
    *,
    stride: int = 1,
    folder: str | Path | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> ClientData:
    """The next character after 80, one client per role of the plays: 1,136 roles.

    x = start offsets into one text (the transform `Windows` cuts the 80 characters out), y = the character behind the
    window, an index into `lamina.data.sets.shakespeare.ALPHABET` (90, of which the plays need the first 87). The test
    set is the last fifth of each role's characters; its windows lie wholly inside, so roles of fewer than 405
    characters have no test of their own. A role's first windows are filled up with 0 on the left.

    Args:
        clients: this many roles, drawn by `seed`; None: all.
        seed: of that draw.
        stride: take every stride-th window of a role, in training and test. 1 gives 3.4 million training examples.
        folder: as in `cifar10`.
        verify: as in `cifar10`.
        progress: as in `cifar10`.

    Raises:
        ConfigError: an impossible number of clients or stride.
        DataError, StorageError: as in `cifar10`.
    """
    everyone = SPECS["shakespeare"].forms["starts"].shape[0] - 1
    expect(
        clients is None or (isinstance(clients, int) and 1 <= clients <= everyone),
        f"clients={clients}: expected 1 <= clients <= {everyone}, or None for all roles",
        where="shakespeare",
    )
    expect(isinstance(stride, int) and stride >= 1, f"stride={stride}: expected a number >= 1", where="shakespeare")
    arrays = fetch(SPECS["shakespeare"], folder=folder, verify=verify, progress=progress).arrays
    text, starts = arrays["text"], arrays["starts"]
    names = bytes(arrays["names"]).decode().split("\n")
    chosen = list(range(everyone))
    if clients is not None:
        chosen = sorted(torch.randperm(everyone, generator=generator(seed, "roles"))[:clients].tolist())
    train, test = [], []
    for role in chosen:
        begin, length = int(starts[role]), int(starts[role + 1] - starts[role]) - WINDOW
        cut = length - length // 5  # the first character of the test part
        train.append(np.arange(begin, begin + cut, stride, dtype=np.int32))
        # the character at `begin + WINDOW + i` is the i-th of the role, and the one behind window `begin + i`
        test.append(np.arange(begin + cut + WINDOW, begin + max(length, cut + WINDOW), stride, dtype=np.int32))
    x, test_x = np.concatenate(train), np.concatenate(test)
    y, test_y = (text[starts_of + WINDOW].astype(np.int64) for starts_of in (x, test_x))
    ends, test_ends = np.cumsum([len(part) for part in train]), np.cumsum([len(part) for part in test])
    every = np.arange(len(x))
    groups, own = {}, {}
    for place, role in enumerate(chosen):
        groups[names[role]] = every[ends[place] - len(train[place]) : ends[place]]
        if len(test[place]):
            part = slice(int(test_ends[place]) - len(test[place]), int(test_ends[place]))
            own[names[role]] = (test_x[part], test_y[part])  # views: nothing is copied
    return ClientData.from_index(
        x,
        y,
        groups,
        test=(test_x, test_y) if len(test_x) else None,
        client_tests=own,
        transform=Windows(torch.from_numpy(np.array(text)), WINDOW),
        name="shakespeare",
        partition="by role",
        label_names=NAMES,
    )


def hapt(*, folder: str | Path | None = None, verify: bool = False, progress: Progress | None = None) -> ClientData:
    """Six activities from a phone's accelerometer and gyroscope, one client per person: 30 (Reyes-Ortiz et al. 2016).

    x = float32 [6, 128] in g and rad/s: 2.56 s at 50 Hz, half of which overlaps the next window; y: 0 walking, 1 up and
    2 down stairs, 3 sitting, 4 standing, 5 laying. The test set is the last fifth in time of each person's windows of
    each activity (the last fifth of all would hold hardly any sitting or standing: the sessions end with walking);
    training windows that overlap one of them are dropped. Arguments and errors as `cifar10`.
    """
    arrays = fetch(SPECS["hapt"], folder=folder, verify=verify, progress=progress).arrays
    person, place, activity = (np.array(arrays[name]) for name in ("person", "place", "y"))
    groups, tests = {}, {}
    for who in np.unique(person).tolist():
        held = np.flatnonzero(person == who)  # in time
        kinds = [held[activity[held] == kind] for kind in np.unique(activity[held])]
        test = np.sort(np.concatenate([kind[len(kind) - len(kind) // 5 :] for kind in kinds]))
        train = np.setdiff1d(held, test)
        apart = np.abs(place[train, None, 1] - place[None, test, 1]) >= LENGTH
        apart |= place[train, None, 0] != place[None, test, 0]
        groups[f"person-{who:02d}"], tests[f"person-{who:02d}"] = train[apart.all(1)], test
    every = np.concatenate(list(tests.values()))
    test_x, test_y = arrays["x"][every], arrays["y"][every]
    ends = np.cumsum([len(test) for test in tests.values()]).tolist()
    own = {
        name: (test_x[end - len(test) : end], test_y[end - len(test) : end])
        for (name, test), end in zip(tests.items(), ends, strict=True)
    }
    return ClientData.from_index(
        arrays["x"],
        arrays["y"],
        groups,
        test=(test_x, test_y),
        client_tests=own,
        name="hapt",
        partition="by person",
        label_names=ACTIVITY_NAMES,
    )


def covertype(
    by: Literal["area", "soil"] = "area",
    *,
    folder: str | Path | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> ClientData:
    """Seven kinds of forest from 54 columns, one client per wilderness area (4) or soil type (40) (Blackard 1998).

    x = float32 [54]: ten numbers, standardised over the whole table, then the area (4) and the soil (40) as 0 or 1. The
    test set is a fifth of all rows, drawn once with seed 0.

    Args:
        by: what a client is.
        folder: as in `cifar10`.
        verify: as in `cifar10`.
        progress: as in `cifar10`.

    Raises:
        ConfigError: another `by`.
        DataError, StorageError: as in `cifar10`.
    """
    expect(by in ("area", "soil"), f"by={by!r}: expected 'area' or 'soil'", where="covertype")
    arrays = fetch(SPECS["covertype"], folder=folder, verify=verify, progress=progress).arrays
    value, n = np.array(arrays[by]), len(arrays["y"])
    names = AREA_NAMES if by == "area" else tuple(f"soil-{i:02d}" for i in range(1, 41))
    tested = np.zeros(n, np.bool_)
    tested[torch.randperm(n, generator=generator(0, "covertype-test"))[: n // 5].numpy()] = True
    groups = {name: np.flatnonzero((value == i) & ~tested) for i, name in enumerate(names)}
    test = np.flatnonzero(tested)
    return ClientData.from_index(
        arrays["x"],
        arrays["y"],
        groups,
        test=(arrays["x"][test], arrays["y"][test]),
        name="covertype",
        partition=f"by {by}",
        label_names=KINDS,
    )


_LABELS = {"cifar10": LABELS_10, "cifar100": LABELS_100, "fashion_mnist": CLOTHES}  # mnist's are numbers


def _images(
    name: str,
    look: Images,
    classes: int,
    clients: int,
    partition: str,
    seed: int,
    folder: str | Path | None,
    verify: bool,
    progress: Progress | None,
) -> ClientData:
    spec = SPECS[name]
    if not is_cached(spec):  # a slip of the pen shows before anything is fetched
        n = spec.forms["train_y"].shape[0]
        split(partition, torch.arange(n) % classes, clients, seed, n)
    arrays = fetch(spec, folder=folder, verify=verify, progress=progress).arrays
    return ClientData.from_dataset(
        (arrays["train_x"], arrays["train_y"]),
        (arrays["test_x"], arrays["test_y"]),
        clients=clients,
        partition=partition,
        seed=seed,
        transform=look,
        name=name,
        label_names=_LABELS.get(name),
    )


def _info(
    name: str, description: str, licence: str, examples: int, test: int, classes: int, clients: str | None = None
) -> DatasetInfo:
    spec = SPECS[name]
    sources = tuple(source.title for source in spec.sources)
    return DatasetInfo(name, description, spec.download, spec.bytes, licence, examples, test, classes, sources, clients)


DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            "digits",
            "handwritten digits, 8 x 8 grey pixels; comes with scikit-learn",
            0,
            0,
            "CC BY 4.0",
            1442,
            355,
            10,
            ("Python package scikit-learn",),
            None,
        ),
        _info("fashion_mnist", "pictures of clothes, 28 x 28 grey pixels", "MIT", 60000, 10000, 10),
        _info("mnist", "handwritten digits, 28 x 28 grey pixels", "CC BY-SA 3.0", 60000, 10000, 10),
        _info("cifar10", "photographs, 32 x 32 in colour", "none stated; cite Krizhevsky 2009", 50000, 10000, 10),
        _info("cifar100", "photographs, 32 x 32 in colour", "none stated; cite Krizhevsky 2009", 50000, 10000, 100),
        _info("shakespeare", "the next character of a play", "public domain", 3381985, 766752, 87, "role"),
        _info("hapt", "activities from a phone's sensors, 6 x 128 readings", "CC BY 4.0", 7922, 1923, 6, "person"),
        _info(
            "covertype", "kinds of forest from a table of 54 columns", "CC BY 4.0", 464810, 116202, 7, "area or soil"
        ),
    )
}

_FUNCTIONS: Mapping[str, Callable[..., ClientData]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "shakespeare": shakespeare,
    "hapt": hapt,
    "covertype": covertype,
}


def load(
    name: str, *, clients: int | None = None, partition: str | None = None, seed: int = 0, **options: Any
) -> ClientData:
    """A data set by name, as a configuration gives it.

    Args:
        name: a key of `DATASETS`.
        clients: as the data set's own function takes it; None: its default.
        partition: likewise; None: its default.
        seed: of the split or draw, where there is one.
        options: further arguments of that function.

    Raises:
        ConfigError: an unknown name, or an argument that this data set does not take.
        DataError, StorageError: as the function itself.
    """
    _known(name)
    function = _FUNCTIONS[name]
    takes = inspect.signature(function).parameters
    given = {"clients": clients, "partition": partition, **options}
    given = {key: value for key, value in given.items() if value is not None or key in options}
    if "seed" in takes:
        given["seed"] = seed
    for key in given:
        if key not in takes:
            unit = DATASETS[name].clients
            own = f": its clients are given, one per {unit}" if unit and key in ("clients", "partition") else ""
            raise ConfigError(
                f"{name} takes no {key}{own}", where=key, remedy=f"it takes {', '.join(takes) or 'nothing'}"
            )
    return function(**given)


def download(
    name: str, *, folder: str | Path | None = None, verify: bool = False, progress: Progress | None = None
) -> Stored:
    """Bring a data set into the cache, if it is not there, without making clients of it.

    Raises:
        ConfigError: an unknown name, or digits, which is not fetched.
        DataError, StorageError: as `lamina.data.cifar10`.
    """
    return fetch(_spec(name), folder=folder, verify=verify, progress=progress)


def cached(name: str) -> bool:
    """Whether a data set is in the cache; `digits` never is."""
    _known(name)
    return name in SPECS and is_cached(SPECS[name])


def _known(name: str) -> None:
    if name not in DATASETS:
        hint = meant(name, DATASETS) or f"known: {', '.join(DATASETS)}"
        raise ConfigError(f"unknown data set {name!r}", where="data", remedy=hint)


def _spec(name: str) -> Spec:
    _known(name)
    if name not in SPECS:
        raise ConfigError(
            f"{name} is not fetched: it comes with a package", where="data", remedy=f"lamina.data.{name}() reads it"
        )
    return SPECS[name]
