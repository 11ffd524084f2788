"""The weighted mean of messages, by hand."""

from __future__ import annotations

import torch

from lamina.aggregate import Mean


def tensor(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def test_the_mean_is_weighted() -> None:
    mean = Mean(1.0)
    mean.add("update", {"w": tensor(4.0, 8.0)}, 0.25)
    mean.add("update", {"w": tensor(0.0, 4.0)}, 0.75)
    assert mean.result()["update"]["w"].tolist() == [1.0, 5.0]


def test_the_mean_is_over_what_arrived() -> None:
    """0.25 and 0.5 of the weights: (0.25*4 + 0.5*1) / 0.75 = 2."""
    mean = Mean(1.0)
    mean.add("update", {"w": tensor(4.0)}, 0.25)
    mean.add("update", {"w": tensor(1.0)}, 0.5)
    assert mean.result()["update"]["w"].tolist() == [2.0]


def test_each_tensor_is_averaged_over_the_messages_that_hold_it() -> None:
    mean = Mean(1.0)
    mean.add("update", {"w": tensor(4.0), "b": tensor(1.0)}, 0.5)
    mean.add("update", {"w": tensor(2.0)}, 0.5)
    result = mean.result()["update"]
    assert (result["w"].tolist(), result["b"].tolist()) == ([3.0], [1.0])


def test_one_message_of_full_weight_is_its_own_mean_bit_for_bit() -> None:
    x = torch.tensor([0.1, 1e-38, -3e38, 1 / 3])
    mean = Mean(1.0)
    mean.add("update", {"w": x}, 1.0)
    assert torch.equal(mean.result()["update"]["w"], x)


def test_nothing_is_divided_when_all_weights_have_come_in_the_announced_order() -> None:
    """Ten times 0.1 is not 1 in floating point; the sum in order is what is announced, so the division is left out."""
    shares = [0.1] * 10
    full = 0.0
    for p in shares:
        full += p
    mean = Mean(full)
    for p in shares:
        mean.add("update", {"w": tensor(1.0)}, p)
    assert mean.result()["update"]["w"].item() == full != 1.0


def test_integers_take_the_maximum() -> None:
    mean = Mean(1.0)
    for count in (3, 9, 5):
        mean.add("buffers", {"seen": torch.tensor([count, -count])}, 1 / 3)
    result = mean.result()["buffers"]["seen"]
    assert result.tolist() == [9, -3]
    assert result.dtype == torch.int64


def test_flags_are_true_when_one_client_says_so() -> None:
    mean = Mean(1.0)
    for flag in (False, True, False):
        mean.add("buffers", {"started": torch.tensor(flag)}, 1 / 3)
    assert mean.result()["buffers"]["started"].item() is True


def test_messages_are_not_changed_and_not_kept() -> None:
    first, second = tensor(4.0), tensor(8.0)
    counts = torch.tensor(3)
    mean = Mean(1.0)
    mean.add("update", {"w": first}, 0.5)
    mean.add("buffers", {"n": counts}, 0.5)
    first_kept = first.item()
    first.zero_()  # a slot in shared memory that is used again
    counts.zero_()
    mean.add("update", {"w": second}, 0.5)
    assert (first_kept, second.item()) == (4.0, 8.0)
    assert mean.result()["update"]["w"].tolist() == [6.0]
    assert mean.result()["buffers"]["n"].item() == 3


def test_precision_is_that_of_the_messages() -> None:
    mean = Mean(1.0)
    mean.add("update", {"half": torch.tensor([1.0], dtype=torch.bfloat16), "double": tensor(1.0)}, 1.0)
    assert {name: x.dtype for name, x in mean.result()["update"].items()} == {
        "half": torch.bfloat16,
        "double": torch.float64,
    }


def test_a_tree_without_entries_is_still_a_tree() -> None:
    mean = Mean(1.0)
    mean.add("update", {}, 1.0)
    assert mean.result() == {"update": {}}
