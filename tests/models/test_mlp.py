import pytest
import torch

from lamina.errors import ConfigError
from lamina.models import mlp


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("widths", "activation", "parameters"),
    [
        ((784, 64, 10), "relu", 50_890),
        ((784, 3072, 2816, 10), "relu", 11_093_258),
        ((784, 4069, 4069, 4069, 10), "none", 36_356_525),
    ],
)
def test_mlp_has_the_published_number_of_parameters(widths, activation, parameters):
    with torch.device("meta"):
        assert size(mlp(widths, activation)) == parameters


def test_mlp_flattens_images_first():
    model = mlp((784, 64, 10))
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(model(x), model(x.flatten(1)))


def test_mlp_has_no_activation_behind_the_last_layer():
    assert list(dict(mlp((4, 3, 2)).named_children())) == ["flatten", "fc1", "relu1", "fc2"]


def test_mlp_without_activation_is_linear():
    model = mlp((6, 5, 4, 3), activation="none", bias=False)
    x, y = torch.randn(2, 1, 6, dtype=torch.float64)
    model.double()
    torch.testing.assert_close(model(x + y), model(x) + model(y))


@pytest.mark.parametrize("knobs", [{"widths": (784,)}, {"widths": (784, 0)}, {"widths": 784}, {"activation": "gelu"}])
def test_mlp_refuses_impossible_knobs(knobs):
    with pytest.raises(ConfigError, match="expected"):
        mlp(**knobs)
