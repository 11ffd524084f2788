import pytest
import torch
from torch import nn

from lamina.errors import ConfigError
from lamina.models import (
    char_lstm,
    cnn,
    cnn1d,
    lenet5,
    mlp,
    receptive_fields,
    resnet8,
    resnet10,
    resnet18,
    resnet20,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    vgg11,
)


@pytest.mark.parametrize(
    ("make", "standard", "small"),
    [
        (resnet10, 195, 49),
        (resnet18, 435, 109),
        (resnet34, 899, 225),
        (resnet50, 427, 107),
        (resnet101, 971, 243),
        (resnet152, 1451, 363),
    ],
)
def test_receptive_field_and_stride_of_the_last_convolution(make, standard, small):
    with torch.device("meta"):
        for stem, expected in (("7x7", (standard, 32)), ("3x3", (small, 8))):
            fields = receptive_fields(make(stem=stem), (3, 64, 64))
            assert max(fields.values()) == expected


@pytest.mark.parametrize("shortcut", ["projection", "stage", "identity"])
def test_resnet20_sees_3_15_37_81_pixels_stage_by_stage(shortcut):
    fields = receptive_fields(resnet20(shortcut=shortcut), (3, 32, 32))
    names = ["conv1.weight", "layer1.2.conv2.weight", "layer2.2.conv2.weight", "layer3.2.conv2.weight"]
    assert [fields[name] for name in names] == [(3, 1), (15, 1), (37, 2), (81, 4)]


def test_a_projection_sees_what_its_block_is_given():
    fields = receptive_fields(resnet20(), (3, 32, 32))
    assert fields["layer3.0.shortcut.conv.weight"] == (37, 4)


def test_pooling_between_convolutions_counts():
    # conv 5: 5; pool 2: 6, stride 2; conv 5: 6 + 4 * 2
    assert receptive_fields(cnn(), (1, 28, 28)) == {"conv1.weight": (5, 1), "conv2.weight": (14, 2)}
    assert receptive_fields(cnn1d(), (6, 128)) == {"conv1.weight": (5, 1), "conv2.weight": (14, 2)}


def test_dilation_and_average_pooling_count():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, dilation=4), nn.AvgPool2d(3, 2), nn.Conv2d(1, 1, 3))
    assert receptive_fields(model, (1, 32, 32)) == {"0.weight": (9, 1), "2.weight": (15, 2)}


def blocks_of(model):
    """(kernel, stride) of the convolutions of every block, first to last, by name."""
    for part, child in model.named_children():
        if part.startswith("layer"):
            for b, block in enumerate(child):
                convs = [(n, m) for n, m in block.named_children() if isinstance(m, nn.Conv2d)]
                yield [(f"{part}.{b}.{n}.weight", m.kernel_size[0], m.stride[0]) for n, m in convs]


@pytest.mark.parametrize("stem", ["3x3", "7x7"])
@pytest.mark.parametrize("make", [resnet10, resnet18, resnet34, resnet50, resnet101, resnet152])
def test_every_layer_of_a_resnet_has_the_field_of_the_recurrence(make, stem):
    """rf += (kernel - 1) * jump, jump *= stride, from (3, 1), or (7, 2) and (11, 4) behind the pooling."""
    with torch.device("meta"):
        model = make(stem=stem)
    fields = receptive_fields(model, (3, 64, 64))
    assert fields.pop("conv1.weight") == ((3, 1) if stem == "3x3" else (7, 2))
    rf, jump = (3, 1) if stem == "3x3" else (11, 4)
    for block in blocks_of(model):
        for name, kernel, stride in block:
            rf, jump = rf + (kernel - 1) * jump, jump * stride
            assert fields.pop(name) == (rf, jump)
    assert all("shortcut" in name for name in fields)


def test_a_transposed_convolution_brings_neighbours_closer():
    """conv 3, stride 2: 3, jump 2; transposed 4, stride 2: an output meets 2 inputs, 3 + 2, jump 1; conv 3: 7."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.ConvTranspose2d(2, 2, 4, 2), nn.Conv2d(2, 1, 3))
    assert receptive_fields(model, (1, 16, 16)) == {"0.weight": (3, 2), "1.weight": (5, 1), "2.weight": (7, 1)}


def test_behind_global_pooling_every_position_sees_all_of_the_map():
    """Squeeze and excitation: behind the gate a position sees all of the 8x8 map: 3 + 7."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gate, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            x = self.first(x)
            return self.last(x * self.gate(nn.functional.adaptive_avg_pool2d(x, 1)).sigmoid())

    fields = receptive_fields(Gate(), (1, 8, 8))
    assert fields == {"first.weight": (3, 1), "gate.weight": (10, 1), "last.weight": (10, 1)}


def test_a_model_that_looks_at_values_is_followed_too():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 5)

        def forward(self, x):
            return self.conv(x) if float(x.sum()) == 0 else x

    assert receptive_fields(Looks(), (1, 8, 8)) == {"conv.weight": (5, 1)}


def test_a_model_that_fails_on_the_size_says_so():
    with pytest.raises(ConfigError, match="cannot be followed on the example") as error:
        receptive_fields(nn.Sequential(nn.Conv2d(3, 4, 3)), (1, 8, 8))
    assert error.value.code == "E121"


def test_models_without_convolutions_have_none():
    assert receptive_fields(mlp((784, 10)), (1, 28, 28)) == {}
    assert receptive_fields(char_lstm(hidden=8), (80, 1)) == {}


@pytest.mark.parametrize(
    ("make", "knobs"),
    [
        (resnet8, {"norm": "none", "width": 4}),
        (resnet20, {"norm": "none", "width": 4}),
        (vgg11, {"norm": "none", "width": 4}),
        (lenet5, {"in_channels": 3, "size": 256}),
    ],
)
def test_the_gradient_of_the_centre_reaches_exactly_so_many_pixels(make, knobs):
    model = make(**knobs).double()
    last, (rf, _) = max(receptive_fields(model, (3, 256, 256)).items(), key=lambda item: item[1])
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):  # positive weights: no path cancels another, every ReLU is open
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        elif isinstance(module, nn.MaxPool2d):  # the same window, all of it
            setattr(model, name, nn.AvgPool2d(module.kernel_size, module.stride, module.padding))
    maps = []
    model.get_submodule(last.removesuffix(".weight")).register_forward_hook(lambda *call: maps.append(call[2].clone()))
    image = torch.ones(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    model(image)
    centre = maps[0].shape[-1] // 2
    (gradient,) = torch.autograd.grad(maps[0][0, 0, centre, centre], image)
    touched = gradient[0, 0].nonzero()
    assert (touched.amax(0) - touched.amin(0) + 1).tolist() == [rf, rf]


def test_the_model_is_left_as_it_was():
    model = resnet20()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    receptive_fields(model, (3, 32, 32))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())


@pytest.mark.parametrize("input_size", [(3,), (3, 0, 32), (3, 32.0)])
def test_an_impossible_input_size_is_refused(input_size):
    with pytest.raises(ConfigError, match="expected channels"):
        receptive_fields(resnet20(), input_size)
