import pytest
import torch
from torch import nn

from lamina.errors import ConfigError
from lamina.models import vgg11, vgg16, vgg19


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (lambda: vgg11(), 9_231_114),
        (lambda: vgg11(layout="lips"), 3_918_858),
        (lambda: vgg11(layout="flare", norm="none", dense=(4096, 4096), dropout=0.5), 28_144_010),
        (lambda: vgg16(norm="none", dense=(4096, 4096)), 33_638_218),
        (lambda: vgg19(norm="none", dense=(4096, 4096)), 38_947_914),
    ],
)
def test_vgg_has_the_published_number_of_parameters(model, parameters):
    with torch.device("meta"):
        assert size(model()) == parameters


@pytest.mark.parametrize(("layout", "convolutions", "relus"), [("vgg", 8, 8), ("lips", 5, 5), ("flare", 8, 5)])
def test_layouts_of_vgg11(layout, convolutions, relus):
    model = vgg11(layout=layout, width=2)
    assert sum(isinstance(module, nn.Conv2d) for module in model) == convolutions
    assert sum(isinstance(module, nn.ReLU) for module in model) == relus
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model) == relus


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("make", [vgg11, vgg16, vgg19])
def test_forward_and_backward_in_channels_last(make, norm):
    model = make(7, width=4, norm=norm, dense=(16,), dropout=0.1, in_channels=1).to(memory_format=torch.channels_last)
    output = model(torch.randn(2, 1, 32, 32).to(memory_format=torch.channels_last))
    output.square().sum().backward()
    assert output.shape == (2, 7)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_larger_images_need_no_other_classifier():
    assert vgg11(width=4)(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    "knobs", [{"layout": "A"}, {"norm": "layer"}, {"width": 0}, {"groups": 0}, {"dense": (0,)}, {"dropout": 50}]
)
def test_vgg_refuses_impossible_knobs(knobs):
    with pytest.raises(ConfigError, match="expected"):
        vgg11(**knobs)
