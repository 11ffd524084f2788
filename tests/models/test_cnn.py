import pytest
import torch

from lamina.errors import ConfigError
from lamina.models import cnn, cnn1d, femnist_cnn, lenet5, pfl_cnn


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_cnn_has_184586_parameters_as_it_stands():
    assert size(cnn()) == 184_586


def test_femnist_cnn_has_6603710_parameters_in_fedlamas_four_kernels():
    with torch.device("meta"):
        model = femnist_cnn()
    kernels = [parameter.numel() for parameter in model.parameters() if parameter.ndim > 1]
    assert kernels == [800, 51_200, 6_422_528, 126_976]
    assert size(model) == 6_603_710
    assert round(100 * kernels[2] / sum(kernels), 2) == 97.29
    assert round(100 * kernels[2] / size(model), 2) == 97.26


def test_flares_cnn_has_582026_parameters():
    assert size(cnn(dense=(512,))) == 582_026


def test_pfl_cnn_has_1626442_parameters_and_its_dropouts():
    model = pfl_cnn()
    assert size(model) == 1_626_442
    assert [module.p for module in model if isinstance(module, torch.nn.Dropout)] == [0.25, 0.5]
    assert size(cnn(3, kernel=3, size=32, pool="last")) == 1_626_442


@pytest.mark.parametrize(("knobs", "parameters"), [((1, 10, 28), 61_706), ((1, 10, 32), 61_706), ((3, 10, 32), 62_006)])
def test_lenet5_has_the_classic_number_of_parameters(knobs, parameters):
    assert size(lenet5(*knobs)) == parameters


def test_lenet5_of_1998_has_tanh_and_average_pooling():
    names = {type(module).__name__ for module in lenet5(activation="tanh", pooling="avg")}
    assert names == {"Conv2d", "Tanh", "AvgPool2d", "Flatten", "Linear"}


def test_cnn1d_has_274342_parameters_on_hapt_windows():
    assert size(cnn1d()) == 274_342


@pytest.mark.parametrize(
    ("model", "shape", "classes"),
    [
        (cnn, (1, 28, 28), 10),
        (pfl_cnn, (3, 32, 32), 10),
        (femnist_cnn, (1, 28, 28), 62),
        (lenet5, (1, 28, 28), 10),
        (cnn1d, (6, 128), 6),
        (lambda: cnn(channels=(4,), dense=(), padding="same"), (1, 28, 28), 10),
    ],
)
def test_forward_and_backward(model, shape, classes):
    net = model()
    x = torch.randn(2, *shape)
    if len(shape) == 3:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    output = net(x)
    output.square().sum().backward()
    assert output.shape == (2, classes)
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize(
    "knobs",
    [
        {"in_channels": 0},
        {"num_classes": True},
        {"channels": ()},
        {"channels": (32, 0)},
        {"kernel": 0},
        {"kernel": 4, "padding": "same"},
        {"dense": "128"},
        {"padding": "full"},
        {"pool": "none"},
        {"dropout": (0.0, 1.0)},
        {"dropout": 0.5},
    ],
)
def test_cnn_refuses_impossible_knobs(knobs):
    with pytest.raises(ConfigError, match="expected"):
        cnn(**knobs)


def test_cnn_refuses_an_image_that_its_convolutions_use_up():
    with pytest.raises(ConfigError, match="nothing is left"):
        cnn(size=12)
    with pytest.raises(ConfigError, match="length=4"):
        cnn1d(length=4, padding="valid")


def test_an_error_says_value_range_and_remedy():
    with pytest.raises(ConfigError, match=r'padding="same"') as error:
        cnn(padding="smae")
    assert str(error.value) == (
        'E101  padding=\'smae\': expected one of "valid", "same"  [padding]\n      set padding="same"'
    )
