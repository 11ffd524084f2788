"""A model is tried on a real batch before anything is trained."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
from lamina import ClientData, ConfigError, DataError, Federation


def refused(model: Any, code: str, *words: str, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Federation(model, cases.data(), engine="loop", **options)
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)
    return caught.value


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def test_a_model_that_fails_on_a_batch_names_the_module_and_the_shapes() -> None:
    model = named(flatten=nn.Flatten(), first=nn.Linear(64, 9), second=nn.Linear(8, 4))
    error = refused(model, "E121", "second", "8x9", "8x1x8x8", "shapes cannot be multiplied")
    assert error.where == "Sequential.second"
    assert error.remedy


def test_a_linear_that_receives_another_number_of_features_is_told_which() -> None:
    """8 x 8 pixels are 64 features, the layer has 48; the second one receives the 9 that the first gives."""
    first = named(flatten=nn.Flatten(), first=nn.Linear(48, 4))
    assert "give Sequential.first in_features=64 (it has 48), or the data" in str(refused(first, "E121").remedy)
    second = named(flatten=nn.Flatten(), first=nn.Linear(64, 9), second=nn.Linear(8, 4))
    assert "Sequential.second in_features=9 (it has 8)" in str(refused(second, "E121").remedy)


def test_a_linear_that_receives_pictures_is_told_to_flatten_them_where_that_fits() -> None:
    """[n, 1, 8, 8] has 64 numbers per example; its last dimension, 8, is not what the layer lacks."""
    remedy = str(refused(named(fc=nn.Linear(64, 4)), "E121").remedy)
    assert "put nn.Flatten() before Sequential.fc, which takes 64 numbers" in remedy
    assert "in_features=" not in remedy


def test_a_failure_beside_a_linear_names_no_number() -> None:
    """Of another layer's shape; and of the model itself, after a Linear that took what it got."""
    other = named(flatten=nn.Flatten(), norm=nn.BatchNorm1d(63), fc=nn.Linear(64, 4))

    class After(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) + torch.zeros(3)

    for model in (other, After()):
        assert str(refused(model, "E121").remedy).startswith("make the model accept these shapes, or the data")


def test_a_nested_module_is_named_with_its_path() -> None:
    model = named(flatten=nn.Flatten(), block=named(inner=nn.Linear(63, 4)))
    assert refused(model, "E121").where == "Sequential.block.inner"


def test_a_failure_of_the_models_own_forward_names_the_model() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.fc(x.flatten(1))
            raise RuntimeError("after the layer")

    assert refused(Broken(), "E121", "after the layer").where == "Broken"


def test_a_loss_that_fails_is_named() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("no such loss")

    assert refused(cases.small, "E121", "ArithmeticError: no such loss", loss=loss).where == "loss"


def test_fewer_outputs_than_classes_are_told_with_both_numbers() -> None:
    model = named(flatten=nn.Flatten(), fc=nn.Linear(64, 3))
    assert refused(model, "E121", "3 outputs, the data 4 classes").where == "model"


@pytest.mark.parametrize("loss", [lambda o, y: (o**2).sum(1), lambda o, y: 3.0])
def test_a_loss_that_is_no_scalar_tensor_is_refused(loss: Any) -> None:
    assert refused(cases.small, "E121", "expected a scalar tensor", loss=loss).where == "loss"


def test_a_loss_that_does_not_depend_on_the_model_is_refused() -> None:
    refused(cases.small, "E121", "loss", loss=lambda o, y: torch.zeros(()))


def test_an_uninitialised_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: lazy modules are a new feature
        model = named(flatten=nn.Flatten(), lazy=nn.LazyLinear(4))
    refused(model, "E111", "lazy.weight", "run one batch through it first")


def test_a_model_without_trainable_parameters_is_refused() -> None:
    refused(nn.Flatten(), "E111", "no trainable parameter")
    frozen = cases.small()
    frozen.requires_grad_(False)
    refused(frozen, "E111", "no trainable parameter")


def test_a_transform_that_does_not_fit_the_data_is_refused() -> None:
    from lamina.data.transform import Images

    x, y = cases.data().x, cases.data().y
    data = ClientData.from_clients({"a": (x, y)}, transform=Images((0.5,), (0.5,)))
    with pytest.raises(DataError) as caught:
        Federation(cases.odd, data, engine="loop")
    assert caught.value.code == "E215"


class Views(nn.Module):
    """Flattens with `view`, which NHWC activations do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.fc = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(len(x), -1))


def test_a_model_that_cannot_take_nhwc_memory_is_given_ordinary_memory() -> None:
    fed = Federation(Views, cases.data(), engine="loop")
    assert not fed._trainer.channels_last
    cases.states(fed, 1)


def test_convolutions_get_nhwc_memory_and_others_do_not() -> None:
    fed = cases.federation()
    assert fed._trainer.channels_last
    assert fed._trainer.params["conv.weight"].stride() == (9, 1, 3, 1)
    assert not cases.federation(model="small")._trainer.channels_last


def test_memory_layout_is_not_seen_outside() -> None:
    fed = cases.federation()
    state = cases.states(fed, 1)[-1]
    assert all(x.is_contiguous() for x in (*fed.initial.params.values(), *state.params.values()))


def test_trying_the_model_leaves_its_buffers_and_the_random_numbers_alone() -> None:
    before = torch.default_generator.get_state()
    fed = cases.federation()
    assert fed.initial.buffers["seen"].item() == 0
    assert fed.initial.buffers["norm.running_mean"].abs().sum() == 0
    assert torch.equal(torch.default_generator.get_state(), before)


def test_the_initial_weights_do_not_depend_on_the_engine_or_the_data() -> None:
    other = ClientData.from_clients({"a": (torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2]))})
    a, b = Federation(cases.odd, cases.data(), seed=7), Federation(cases.odd, other, seed=7, engine="loop")
    assert cases.bits(a.initial.params) == cases.bits(b.initial.params)
