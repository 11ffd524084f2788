"""The embedded digits."""

from __future__ import annotations

import sys

import pytest
import torch

from lamina.data.digits import digits
from lamina.errors import DataError


def test_digits_are_all_there_once():
    data = digits()
    assert (len(data), data.name, data.partition, data.classes) == (10, "digits", "dirichlet:0.5", 10)
    assert len(data.indices) + len(data.test[1]) == 1797
    assert (data.x.dtype, tuple(data.x.shape)) == (torch.uint8, (1442, 8, 8, 1))
    assert int(data.x.max()) == 240
    assert bool((data.x % 15 == 0).all())


def test_the_test_set_is_a_fifth_of_every_class_and_does_not_depend_on_the_split():
    one, other = digits(), digits(clients=5, partition="iid", seed=7)
    assert torch.equal(one.test[0], other.test[0])
    total = torch.bincount(one.y) + torch.bincount(one.test[1])
    assert torch.equal(torch.bincount(one.test[1]), total // 5)
    assert one.split_sha256 != other.split_sha256


def test_digits_reach_the_model_normalised():
    data = digits()
    out = data.transform(data.x, None)
    assert out.shape == (1442, 1, 8, 8)
    assert abs(float(out.mean())) < 0.02
    assert abs(float(out.std()) - 1) < 0.02


def test_a_missing_scikit_learn_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"(?s)E219.*pip install 'lamina\[demo\]'"):
        digits()
