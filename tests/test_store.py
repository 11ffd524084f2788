"""The client store is a value."""

from __future__ import annotations

import torch

from lamina.store import ClientStore, Row, Stored


def stored(x: float, accepted: int = 0) -> Stored:
    return Stored(Row((torch.tensor(x),), {}), {"params/w": 1}, accepted)


def test_a_client_that_never_took_part_has_no_row_and_holds_nothing() -> None:
    assert ClientStore().get(3) == Stored(None, {}, -1)
    assert len(ClientStore()) == 0


def test_updating_makes_a_new_store_and_leaves_the_old_one() -> None:
    old = ClientStore({1: stored(1.0)})
    new = old.updated({4: stored(4.0), 1: stored(2.0)})
    assert (list(old), list(new)) == ([1], [1, 4])
    assert float(old.get(1).row.method[0]) == 1.0
    assert float(new.get(1).row.method[0]) == 2.0


def test_untouched_rows_are_shared() -> None:
    old = ClientStore({1: stored(1.0)})
    assert old.updated({2: stored(2.0)}).get(1) is old.get(1)


def test_clients_come_in_ascending_order() -> None:
    assert list(ClientStore({5: stored(1.0), 2: stored(1.0), 9: stored(1.0)})) == [2, 5, 9]


def test_a_store_does_not_share_the_dictionary_it_was_made_from() -> None:
    rows = {1: stored(1.0)}
    store = ClientStore(rows)
    rows[2] = stored(2.0)
    assert list(store) == [1]
