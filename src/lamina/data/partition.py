"""Partitions: rules that split one data set into clients.

    split("dirichlet:0.5", labels, clients=100, seed=0, n=50_000)  ->  100 vectors of indices

Every example belongs to exactly one client, and every client's indices ascend. A split is a function of the rule, the
labels, the number of clients and the seed. All draws come from one numpy RandomState over a Philox generator whose key
is the address of (seed, "partition"): numpy has promised never to change these streams (NEP 19), so a split does not
depend on the version of torch or numpy. (torch offers gamma draws with a generator in a private function only, and has
no such promise.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.errors import ConfigError, expect, meant
from lamina.random import address

PARTITIONS: dict[str, str] = {
    "iid": "equal sizes, examples at random",
    "dirichlet:a": "each class in proportions ~ Dir(a) over clients, unequal sizes, at least 10 examples each",
    "dirichlet:a:balanced": "one label prior ~ Dir(a) per client, equal sizes",
    "pathological:k": "k classes per client, in shards as equal as possible",
    "quantity:b": "sizes ~ Dir(b), examples at random, at least 10 each",
    "column:NAME": "one client per value of a column",
}

MINIMUM = 10  # examples per client in the partitions of unequal sizes, when there are that many
REDRAWS = 50  # before clients are topped up
BLOCK = 4096  # draws made at once

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def split(spec: str, labels: Tensor | None, clients: int, seed: int, n: int) -> list[Tensor]:
    """The indices of each client, int64, ascending.

    Args:
        spec: a rule of `PARTITIONS`, e.g. "dirichlet:0.5"; `column:NAME` belongs to `ClientData.from_dataset`.
        labels: int [n]; None when there are none (then only `iid` and `quantity:b` are possible).
        clients: how many, 1 to n.
        seed: of all draws.
        n: number of examples.

    Raises:
        ConfigError: an unknown rule or an impossible value.
    """
    rule, *values = spec.split(":")
    where = f"partition {spec!r}"
    if rule == "column":
        raise ConfigError(
            f"{spec} needs a column of values",
            where=where,
            remedy="ClientData.from_dataset(..., clients=None, columns={name: values})",
        )
    form = next((known for known in PARTITIONS if known.split(":")[0] == rule), None)
    if form is None:
        close = meant(rule, [known.split(":")[0] for known in PARTITIONS])
        message = f"unknown partition {spec!r}" + (f": {close}" if close else "")
        raise ConfigError(message, where=where, remedy=f"known: {', '.join(PARTITIONS)}")
    balanced = rule == "dirichlet" and len(values) == 2
    if balanced and values[1] != "balanced":
        raise ConfigError(f"{values[1]!r}: did you mean 'balanced'?", where=where, remedy="dirichlet:a:balanced")
    expected = form.count(":") + balanced
    expect(
        len(values) == expected, f"{spec!r}: expected the form {form!r}", where=where, remedy=f"e.g. {_example(form)}"
    )
    expect(
        isinstance(clients, int) and 1 <= clients <= n,
        f"clients={clients}: expected 1 <= clients <= {n}, the number of examples",
        where=where,
        remedy="every client needs at least one example",
    )
    draws = np.random.RandomState(np.random.Philox(key=address(seed, "partition")))
    if rule == "iid":
        parts: Sequence[Ints] = np.array_split(draws.permutation(n), clients)
    elif rule == "quantity":
        parts = _quantity(_number(values[0], float, "b", where), clients, n, draws)
    else:
        if labels is None:
            raise ConfigError(
                f"{rule} needs labels: y is no vector of integers",
                where=where,
                remedy="iid, quantity:b or column:NAME need none",
            )
        expect(labels.shape == (n,), f"labels of shape {list(labels.shape)} for {n} examples", where=where)
        classes = np.unique(labels.cpu().numpy(), return_inverse=True)[1].reshape(-1)  # 0..C-1, none of them empty
        if rule == "pathological":
            parts = _pathological(_number(values[0], int, "k", where), classes, clients, draws, where)
        elif balanced:
            parts = _dirichlet_balanced(_number(values[0], float, "a", where), classes, clients, draws)
        else:
            parts = _dirichlet(_number(values[0], float, "a", where), classes, clients, draws)
    return [torch.from_numpy(np.sort(part).astype(np.int64)) for part in parts]


def hold_out(groups: Mapping[str, Tensor], share: float, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Training and test examples of each client: its own order, a share of them drawn at random for the test.

    Every client keeps at least one to train on; where its share rounds to nothing, it has none in the test.

    Raises:
        ConfigError: no client has so many examples that one is left for the test.
    """
    expect(0 < share < 1, f"test_share={share}: expected 0 < test_share < 1", remedy="0.2 is a fifth of each client's")
    draws = np.random.RandomState(np.random.Philox(key=address(seed, "test share")))
    train, test = {}, {}
    for name, held in groups.items():
        tested = np.zeros(len(held), np.bool_)
        tested[draws.permutation(len(held))[: min(round(share * len(held)), len(held) - 1)]] = True
        chosen = torch.from_numpy(tested)
        train[name], test[name] = held[~chosen], held[chosen]
    expect(
        any(len(part) for part in test.values()),
        f"test_share={share}: no client has enough examples for one to be held out",
        remedy="a larger share, fewer clients, or a test set of its own",
    )
    return train, test


def _quantity(b: float, clients: int, n: int, draws: np.random.RandomState) -> list[Ints]:
    """Sizes ~ Dir(b), redrawn up to 50 times until the smallest has the minimum, then topped up."""
    minimum = min(MINIMUM, n // clients)
    for _ in range(REDRAWS):
        cuts = _cuts(_dirichlet_rows(b, 1, clients, draws)[0], n)
        if np.diff(cuts).min() >= minimum:
            break
    order = draws.permutation(n)
    return _topped_up(np.split(order, cuts[1:-1]), minimum, draws)


def _dirichlet(a: float, classes: Ints, clients: int, draws: np.random.RandomState) -> list[Ints]:
    """Class by class: proportions ~ Dir(a) over the clients that hold fewer than n / clients examples so far.

    This is FedML's rule, which FedLAMA's code uses: a client that has its fair share gets nothing of further classes.
    It repeats until the smallest client has 10 examples; here up to 50 times, after which the last draw is topped up: a
    client with too few gets, one after the other, examples drawn at random from the client that is largest at that
    moment. With fewer than 10 * clients examples the minimum is n // clients.
    """
    n, counts = len(classes), np.bincount(classes)
    minimum = min(MINIMUM, n // clients)
    for _ in range(REDRAWS):
        sizes = np.zeros(clients, dtype=np.int64)
        cuts = []
        for count, gammas in zip(counts, _gammas(a, len(counts), clients, draws), strict=True):
            open_ = sizes * clients < n  # never nobody: together they hold less than n
            cuts.append(_cuts(_normalised((gammas * open_)[None], draws, open_)[0], count))
            sizes += np.diff(cuts[-1])
        if sizes.min() >= minimum:
            break
    shards = [np.split(draws.permutation(np.flatnonzero(classes == c)), cut[1:-1]) for c, cut in enumerate(cuts)]
    return _topped_up([np.concatenate(own) for own in zip(*shards, strict=True)], minimum, draws)


def _dirichlet_balanced(a: float, classes: Ints, clients: int, draws: np.random.RandomState) -> list[Ints]:
    """One label prior ~ Dir(a) per client; sizes differ by at most one.

    The n places of the clients are filled in random order. Each place draws a class from its client's prior, restricted
    to the classes that still have examples (when the prior has no mass on those: in proportion to what is left), and an
    example of that class at random, without replacement.
    """
    n, left = len(classes), np.bincount(classes)
    prior = _dirichlet_rows(a, clients, len(left), draws)  # [N, C]
    sizes = np.full(clients, n // clients) + (np.arange(clients) < n % clients)
    client = draws.permutation(np.repeat(np.arange(clients), sizes))
    chance = draws.random_sample(n)
    drawn = np.empty(n, dtype=np.int64)
    place = 0
    while place < n:
        end = min(place + BLOCK, n)
        weight = prior[client[place:end]] * (left > 0)  # [b, C]
        weight[weight.max(1) == 0] = left
        total = weight.cumsum(1)
        threshold = np.minimum(chance[place:end] * total[:, -1], np.nextafter(total[:, -1], 0))
        chosen = (total <= threshold[:, None]).sum(1)
        # Up to the first place where a class runs out, the draws stand; from there on they are made again without it.
        over = (_rank(chosen) >= left[chosen]).nonzero()[0]
        stand = int(over[0]) if len(over) else end - place
        drawn[place : place + stand] = chosen[:stand]
        left = left - np.bincount(chosen[:stand], minlength=len(left))
        place += stand
    examples = np.empty(n, dtype=np.int64)
    shuffled = draws.permutation(n)
    examples[np.argsort(drawn, kind="stable")] = shuffled[np.argsort(classes[shuffled], kind="stable")]
    return np.split(examples[np.argsort(client, kind="stable")], np.cumsum(sizes)[:-1])


def _pathological(k: int, classes: Ints, clients: int, draws: np.random.RandomState, where: str) -> list[Ints]:
    """Each client holds exactly k classes. A class is cut into shards of equal size (to one example), one per holder.

    The clients * k shards are dealt to the classes so that they become as equal as possible over all classes; which
    client holds which classes is drawn at random, in proportion to the shards that are left.
    """
    counts = np.bincount(classes)
    expect(k <= len(counts), f"k={k}: expected 1 <= k <= {len(counts)}, the number of classes", where=where)
    expect(
        clients * k >= len(counts),
        f"{clients} clients with k={k} classes each cannot hold all {len(counts)} classes",
        where=where,
        remedy=f"k >= {-(-len(counts) // clients)}, or more clients",
    )
    most = np.minimum(counts, clients)
    expect(
        clients * k <= int(most.sum()),
        f"{clients} clients with k={k} need {clients * k} shards: the classes have examples for {int(most.sum())}",
        where=where,
        remedy="a smaller k, or fewer clients",
    )
    shards = np.ones(len(counts), dtype=np.int64)
    largest = [(-float(count), c) for c, count in enumerate(counts) if most[c] > 1]
    heapq.heapify(largest)
    for _ in range(clients * k - len(counts)):
        _, c = heapq.heappop(largest)
        shards[c] += 1
        if shards[c] < most[c]:
            heapq.heappush(largest, (-counts[c] / shards[c], c))
    cut = [np.array_split(draws.permutation(np.flatnonzero(classes == c)), shards[c]) for c in range(len(counts))]
    left, parts = shards.copy(), []
    for others in range(clients - 1, -1, -1):
        # A class with more shards than clients to come must be taken now. There are never more than k of those.
        with np.errstate(divide="ignore"):
            key = np.log(draws.random_sample(len(counts))) / left
        key[left == 0] = -np.inf
        key[left > others] = np.inf
        own = np.argsort(-key, kind="stable")[:k]
        left[own] -= 1
        parts.append(np.concatenate([cut[c][left[c]] for c in own]))
    return [parts[i] for i in draws.permutation(clients)]


def _topped_up(parts: list[Ints], minimum: int, draws: np.random.RandomState) -> list[Ints]:
    """Moves random examples, one at a time, from the client that is largest to those below the minimum, in order."""
    poor = [i for i, part in enumerate(parts) if len(part) < minimum]
    if not poor:
        return parts
    held = [part.tolist() for part in parts]
    largest = [(-len(part), i) for i, part in enumerate(held) if len(part) > minimum]
    heapq.heapify(largest)
    for i in poor:
        while len(held[i]) < minimum:
            size, giver = heapq.heappop(largest)
            held[i].append(held[giver].pop(draws.randint(-size, dtype=np.int64)))
            heapq.heappush(largest, (size + 1, giver))
    return [np.array(part, dtype=np.int64) for part in held]


def _gammas(a: float, rows: int, columns: int, draws: np.random.RandomState) -> Floats:
    return draws.standard_gamma(a, size=(rows, columns))


def _dirichlet_rows(a: float, rows: int, columns: int, draws: np.random.RandomState) -> Floats:
    return _normalised(_gammas(a, rows, columns, draws), draws, np.ones(columns, dtype=bool))


def _normalised(gammas: Floats, draws: np.random.RandomState, open_: NDArray[np.bool_]) -> Floats:
    """Rows that sum to 1. A row of zeros (tiny a) gives all to one of the open columns: the limit a -> 0."""
    largest = gammas.max(1)
    for row in np.flatnonzero(largest == 0):
        columns = np.flatnonzero(open_)
        gammas[row, columns[draws.randint(len(columns), dtype=np.int64)]] = largest[row] = 1
    scaled = gammas / largest[:, None]  # their sum is finite whatever a is
    return np.asarray(scaled / scaled.sum(1, keepdims=True))


def _cuts(shares: Floats, n: int) -> Ints:
    """Where to cut n examples into these shares: ascending from 0 to n."""
    cuts = np.concatenate([[0.0], np.cumsum(shares)])
    return np.asarray(np.rint(cuts / cuts[-1] * n), dtype=np.int64)


def _rank(values: Ints) -> Ints:
    """How many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values)
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def _number(text: str, kind: Callable[[str], Any], name: str, where: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    wanted = "a whole number >= 1" if kind is int else "a finite number > 0"
    expect(0 < value < math.inf, f"{name}={text}: expected {wanted}", where=where, remedy=f"e.g. {_example(where)}")
    return value


def _example(form: str) -> str:
    examples = {"dirichlet": "dirichlet:0.5", "pathological": "pathological:2", "quantity": "quantity:1.0"}
    return next((example for rule, example in examples.items() if rule in form), "iid")
