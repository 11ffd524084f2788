"""Every pair of methods: what is refused says why, what is not trains, and the document shows what the code does."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import cases
import composition
from lamina import METHODS, Chain, ConfigError, FedLAMA, FedLUAR

DOCUMENT = Path(__file__).parent.parent / "docs" / "methods" / "composition.md"
NAMES = [name for name in METHODS if name != "fedavg"]


def test_the_document_shows_what_the_code_does() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == composition.table(), "run tests/composition.py > the document"


@pytest.mark.parametrize("pair", composition.pairs(), ids=lambda p: f"{p.first}, {p.second}")
def test_every_pair_that_is_allowed_learns_something_finite(pair: composition.Pair) -> None:
    if pair.kind == "refused":
        assert pair.reason
        return
    order = (pair.second, pair.first) if pair.kind == "second" else (pair.first, pair.second)
    state = composition.run(*order)
    start = cases.federation().initial.params
    assert all(torch.isfinite(x).all() for x in state.params.values())
    assert any(not torch.equal(x, start[name]) for name, x in state.params.items()) or "localonly" in order


@pytest.mark.filterwarnings("ignore:.* plans 5 rounds, this run has 2:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_fedavg_is_the_neutral_element(name: str) -> None:
    make, options = cases.METHODS[name], cases.OPTIONS.get(name, {})
    if make().alone:
        with pytest.raises(ConfigError, match="it shares nothing"):
            Chain(make(), cases.METHODS["fedavg"]())
        return
    alone, first, last = (
        cases.learned(cases.states(cases.federation(method, **options), 2)[-1])["sha256"]
        for method in (make(), Chain(cases.METHODS["fedavg"](), make()), Chain(make(), cases.METHODS["fedavg"]()))
    )
    assert alone == first == last


def test_waiting_and_recycling_are_refused_with_the_reason() -> None:
    for order in itertools.permutations((FedLAMA(phi=2), FedLUAR(recycle=1))):
        with pytest.raises(ConfigError, match="one that waits keeps training, one that is recycled replays") as refused:
            Chain(*order)
        assert refused.value.code == "E115"
