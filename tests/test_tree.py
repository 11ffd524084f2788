"""Trees: their arithmetic, their order, and states taken apart and put together."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lamina import tree
from lamina.tree import Params, flatten, skeleton, squared_norm, top_fraction, unflatten

A = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(3.0)}
B = {"z": torch.tensor(9.0), "y": torch.tensor(4.0), "x": torch.tensor([10.0, 20.0])}


def plain(a: Params) -> dict[str, object]:
    return {name: x.tolist() for name, x in a.items()}


def test_operations_run_over_the_names_of_the_first_tree_in_its_order() -> None:
    assert plain(tree.add(A, B)) == {"x": [11, 22], "y": 7}
    assert plain(tree.sub(A, B)) == {"x": [-9, -18], "y": -1}
    assert plain(tree.mul(A, B)) == {"x": [10, 40], "y": 12}
    assert plain(tree.scale(A, 2)) == {"x": [2, 4], "y": 6}
    assert plain(tree.tmap(lambda a, b, c: a + b * c, A, B, A)) == {"x": [11, 42], "y": 15}
    assert plain(tree.zeros_like(A)) == {"x": [0, 0], "y": 0}
    assert list(tree.add(A, B)) == ["x", "y"]


def test_select_and_omit_keep_the_order_of_the_tree() -> None:
    assert list(tree.select(B, ["x", "z", "other"])) == ["z", "x"]
    assert list(tree.omit(B, ["y", "other"])) == ["z", "x"]
    assert tree.select(B, ["x"])["x"] is B["x"]


def test_operations_leave_their_arguments_alone() -> None:
    before = plain(A), plain(B)
    for operation in (tree.add, tree.sub, tree.mul):
        operation(A, B)
    tree.scale(A, 3)
    assert (plain(A), plain(B)) == before


@pytest.mark.parametrize("size", [0, 1, 5, (1 << 18) - 1, 1 << 18, (1 << 19) + 3])
def test_squared_norms_are_summed_in_double_precision(size: int) -> None:
    x = torch.arange(size, dtype=torch.float32).remainder(7) / 3
    exact = float((x.double() ** 2).sum())
    assert squared_norm(x) == pytest.approx(exact, rel=1e-12)
    assert squared_norm(x.double()) == pytest.approx(exact, rel=1e-12)
    assert tree.squared_norms({"x": x}) == {"x": squared_norm(x)}


def test_squared_norm_of_three_and_four_is_twenty_five() -> None:
    assert squared_norm(torch.tensor([[3.0], [4.0]])) == 25.0
    assert squared_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]]).t()) == 25.0
    assert squared_norm(torch.full((3,), 1e30)) == pytest.approx(3e60)  # beyond float32


def test_top_fraction_keeps_the_largest_and_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[2.0, 5.0, 2.0], [2.0, 7.0, 1.0]])
    assert top_fraction(scores, 3).tolist() == [[True, True, False], [False, True, False]]
    assert top_fraction(scores, 4).tolist() == [[True, True, True], [False, True, False]]
    assert top_fraction(scores, 0).sum() == 0
    assert top_fraction(scores, 6).all()
    assert top_fraction(scores, 99).all()
    assert top_fraction(torch.zeros(4), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("seed", range(5))
def test_top_fraction_keeps_as_many_as_it_is_told(seed: int) -> None:
    scores = torch.randint(0, 4, (3, 7), generator=torch.Generator().manual_seed(seed)).float()
    for keep in range(22):
        mask = top_fraction(scores, keep)
        assert int(mask.sum()) == keep
        assert keep in (0, 21) or scores[mask].min() >= scores[~mask].max()


# ---- states


class Inner(NamedTuple):
    trees: Params
    rounds: dict[str, int]


class Outer(NamedTuple):
    first: Inner
    nothing: None
    pair: tuple[Tensor, float]


STATE = Outer(Inner({"conv.weight": torch.ones(2), "a/b": torch.zeros(())}, {"fc": 3}), None, (torch.tensor(2), 0.5))


def test_a_state_comes_apart_into_named_leaves() -> None:
    assert list(flatten(STATE)) == [
        "first/trees/conv.weight",
        "first/trees/a/b",
        "first/rounds/fc",
        "pair/0",
        "pair/1",
    ]
    assert flatten(()) == {}
    assert flatten(torch.ones(1)).keys() == {""}


@pytest.mark.parametrize("state", [STATE, (), ((), ()), (Inner({}, {}), ()), None, {"a": {}}, (None, Inner({}, {}))])
def test_a_state_is_put_together_from_its_leaves_and_its_skeleton(state: object) -> None:
    again = unflatten(state, json.loads(json.dumps(skeleton(state))), flatten(state))
    assert again == state or flatten(again) == flatten(state)
    assert type(again) is type(state)
    assert skeleton(again) == skeleton(state)


def test_dictionaries_may_hold_other_names_than_the_value_that_names_the_classes() -> None:
    """A client's waiting layers come and go: the like is `Inner({}, {})`, the stored state has entries."""
    like = Outer(Inner({}, {}), None, (torch.zeros(()), 0.0))
    again = unflatten(like, skeleton(STATE), flatten(STATE))
    assert isinstance(again.first, Inner)
    assert flatten(again).keys() == flatten(STATE).keys()


class Other(NamedTuple):
    buffers: Params
    counts: dict[str, int]


def test_a_state_of_other_fields_is_refused() -> None:
    """Else one method's residual would silently become another one's control."""
    with pytest.raises((ValueError, KeyError, TypeError)):
        unflatten(Other({}, {}), skeleton(Inner({}, {})), {})


def test_a_state_of_another_number_of_fields_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        unflatten((), skeleton(Inner({}, {})), {})
