"""Law: clients that are elsewhere, of which only bytes come, give the bits and the ledger of `loop`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import cases
import network
from lamina import RoundRecord

TWO = ((0, 3), (1, 2, 4))
ALONE = ((0,), (1,), (2,), (3,), (4,))  # so that every client must read its plan itself

pytestmark = pytest.mark.filterwarnings("ignore:personal models are with clients:UserWarning")


def seen(record: RoundRecord) -> RoundRecord:
    """What of a record both have: personal models are not tested over a network, and what clients keep back stays with
    them."""
    layers = {name: layer._replace(residual_norm=None) for name, layer in record.layers.items()}
    return replace(cases.untimed(record), personal_accuracy=None, layers=layers)


def agree(make: Any, homes: Any, rounds: int = 3) -> None:
    local, records = cases.finish(make(examples=network.shared()), rounds)
    fed, streets = network.connected(make, homes)
    pairs = list(fed.run(rounds))
    state = pairs[-1][0]
    expected = cases.everything(local)
    found = cases.everything(state) | {"rows": network.rows(state, streets.nodes)}
    assert found == expected
    assert [seen(record) for _, record in pairs] == [seen(record) for record in records]
    probed = len(network.shared()) if fed.method.has("probe") else 0
    assert streets.letters == probed + sum(len(record.cohort) for record in records)  # nobody was sent anything twice
    assert streets.down > state.bytes_down
    assert streets.up > state.bytes_up


@pytest.mark.parametrize("name", cases.ALL)
def test_a_network_changes_nothing(name: str) -> None:
    agree(lambda **options: cases.case(name, **options), ALONE if "stc" in name else TWO, 4)


@pytest.mark.parametrize(
    "name", cases.the_rest_slowly([name for name in cases.ALL if "stc" not in name], cases.SENT_LOSSLESS)
)
def test_a_network_changes_nothing_where_distances_go_down(name: str) -> None:
    agree(lambda **options: cases.case(name, downlink=cases.LOSSLESS, **options), ALONE, 4)
