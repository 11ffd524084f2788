"""The fuzz targets (`make fuzz`) for a moment: their corpus, and a few hundred mutations of it."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
sys.path.insert(0, str(FUZZ))

import targets  # noqa: E402


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    """The targets have memory traced from their first input on; other tests are not to find it so."""
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_target_keeps_its_promises(name):
    run, pool = targets.TARGETS[name], targets.seeds(name)
    outcomes = {outcome if isinstance(outcome, str) else "decoded" for outcome in map(run, pool)}
    rng = random.Random(0)
    for _ in range(1000):
        run(targets.mutated(rng, pool))
    assert outcomes >= {"decoded", "E340", "E345", "E347", *["E349"] * (name == "whole")}


@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_corpus_is_small(name):
    path = FUZZ / "corpus" / f"{name}.txt"
    assert path.stat().st_size < 1 << 15
    assert all(len(bytes.fromhex(line)) <= targets.LONGEST for line in path.read_text().split())


def test_a_promise_that_is_broken_is_noticed(monkeypatch):
    """Positions that are not those of the slow decoder, an error that is none of ours, too much memory or time."""
    real = targets.index.read

    def shifted(*args):
        found = real(*args)
        return found._replace(positions=found.positions + 1)

    def broken(*args):
        raise IndexError("of numpy")

    def greedy(*args):
        bytearray(1 << 22)
        return real(*args)

    def idle(*args):
        sum(range(4_000_000))
        return real(*args)

    some = next(data for data in targets.seeds("index") if targets.index_section(data))
    for act, error, said in (
        (shifted, AssertionError, "slow"),
        (broken, IndexError, "of numpy"),
        (greedy, AssertionError, "bytes allocated"),
        (idle, AssertionError, "ms"),
    ):
        monkeypatch.setattr(targets.index, "read", act)
        with pytest.raises(error, match=said):
            targets.index_section(some)
