import inspect
import pickle
from itertools import cycle, product

import pytest
import torch
from torch import nn

from lamina.errors import ConfigError
from lamina.models import (
    MODELS,
    receptive_fields,
    resnet6,
    resnet8,
    resnet10,
    resnet18,
    resnet20,
    resnet32,
    resnet50,
    resnet56,
    resnet101,
    wrn28_10,
)
from lamina.models.norm import group_count
from lamina.models.resnet import BasicBlock, Bottleneck

VARIANTS = [name for name in MODELS if name.startswith(("resnet", "wrn"))]
DEEPEST = ("resnet101", "resnet152")  # seconds each, and made of the same blocks as resnet50


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(make, *args, **knobs):
    with torch.device("meta"):
        return make(*args, **knobs)


def test_resnet20_has_272474_parameters_with_projections_where_the_width_changes():
    model = on_meta(resnet20)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert size(model) == 272_474
    assert len(norms) == 21
    assert sum(norm.running_mean.numel() + norm.running_var.numel() for norm in norms) == 1_568
    assert sum(parameter.ndim > 1 for parameter in model.parameters()) == 22


def test_resnet20_has_272762_parameters_with_a_projection_in_every_stage():
    model = on_meta(resnet20, shortcut="stage")
    kernels = [parameter.numel() for parameter in model.parameters() if parameter.ndim > 1]
    statistics = sum(b.numel() for name, b in model.named_buffers() if "running" in name)
    assert (len(kernels), sum(kernels), size(model), size(model) + statistics) == (23, 271_152, 272_762, 274_362)


def test_resnet20_has_269722_parameters_with_identity_shortcuts_and_without_any():
    assert size(on_meta(resnet20, shortcut="identity")) == 269_722
    assert size(on_meta(resnet20, residual=False)) == 269_722


def test_resnet20_by_stage_is_464_14016_51648_205696_650():
    model = on_meta(resnet20)
    assert size(model.conv1) + size(model.norm1) == 464
    assert [size(model.layer1), size(model.layer2), size(model.layer3), size(model.fc)] == [
        14_016,
        51_648,
        205_696,
        650,
    ]


@pytest.mark.parametrize(("make", "parameters"), [(resnet32, 466_906), (resnet56, 855_770), (resnet101, 42_512_970)])
def test_deeper_resnets(make, parameters):
    assert size(on_meta(make)) == parameters


@pytest.mark.parametrize("shortcut", ["projection", "stage"])
def test_wrn28_10_has_36539124_parameters_in_29_kernels(shortcut):
    model = on_meta(wrn28_10, shortcut=shortcut)
    assert size(model) == 36_539_124
    assert sum(parameter.ndim > 1 for parameter in model.parameters()) == 29
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.3}


@pytest.mark.parametrize(
    ("make", "classes", "parameters", "prunable"),
    [
        (resnet6, 10, 314_954, 5),
        (resnet8, 10, 1_235_274, 8),
        (resnet8, 100, 1_258_404, 8),
        (resnet10, 200, 5_008_392, 11),
    ],
)
def test_lips_resnets(make, classes, parameters, prunable):
    model = on_meta(make, classes)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert size(model) == parameters
    assert len(convolutions) - 1 == prunable
    assert convolutions[0].kernel_size == (7, 7)
    if make is resnet8:
        assert sum(conv.weight.numel() for conv in convolutions[1:]) == 1_220_608


@pytest.mark.parametrize(
    ("make", "weights", "layers", "others"), [(resnet18, 11_164_352, 21, 9_610), (resnet50, 23_467_712, 54, 53_130)]
)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_ssfl_resnets(make, weights, layers, others, norm):
    model = on_meta(make, norm=norm)
    prunable = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert (sum(prunable), len(prunable), size(model) - sum(prunable)) == (weights, layers, others)


def test_the_imagenet_resnet50_has_25557032_parameters():
    assert size(on_meta(resnet50, 1000, stem="7x7")) == 25_557_032


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("shortcut", ["projection", "stage", "identity"])
@pytest.mark.parametrize("make", [resnet8, resnet50])
def test_forward_and_backward_in_channels_last_with_every_norm_and_shortcut(make, shortcut, norm):
    model = make(5, width=4, norm=norm, shortcut=shortcut).to(memory_format=torch.channels_last)
    output = model(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    output.square().sum().backward()
    assert output.shape == (2, 5)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("stem", "norm", "shortcut", "residual"),
    [
        ("3x3", "batch", "projection", False),
        ("3x3", "group", "stage", True),
        ("7x7", "none", "identity", True),
    ],
)
def test_every_variant_takes_every_knob(name, stem, norm, shortcut, residual):
    model = on_meta(
        MODELS[name],
        7,
        width=8,
        stem=stem,
        norm=norm,
        groups=4,
        shortcut=shortcut,
        receptive_field=40,
        in_channels=1,
        residual=residual,
        zero_init=norm == "group",
        stem_width=6,
        dropout=0.1,
    )
    assert model(torch.empty(2, 1, 64, 64, device="meta")).shape == (2, 7)


COMBINATIONS = list(product(("batch", "group", "none"), (True, False), (None, 40)))  # norm, residual, receptive field


def placed(name, how):
    """Channels per stage: doubling, all at their mean, or reversed."""
    stages = sum(child.startswith("layer") for child, _ in on_meta(MODELS[name], width=1).named_children())
    normal = tuple(8 * 2**stage for stage in range(stages))
    mean = round(sum(normal) / stages)
    return {"normal": normal, "mean": (mean,) * stages, "anti": normal[::-1]}[how]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in DEEPEST else n for n in VARIANTS])
@pytest.mark.parametrize("stem", ["3x3", pytest.param("7x7", marks=pytest.mark.slow)])
def test_width_placement_stem_norm_field_and_residual_are_orthogonal_on_every_variant(name, stem):
    placements = cycle(placed(name, how) for how in ("normal", "mean", "anti"))
    for widths, norm, residual, limit in zip(placements, *zip(*COMBINATIONS, strict=True), strict=False):
        knobs = {"stem": stem, "norm": norm, "residual": residual, "receptive_field": limit}
        model = on_meta(MODELS[name], 7, width=widths, stem_width=8, **knobs)
        assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)
        stages = [child for part, child in model.named_children() if part.startswith("layer")]
        assert tuple(stage[0].conv1.out_channels for stage in stages) == widths
        assert model.conv1.kernel_size == ((3, 3) if stem == "3x3" else (7, 7))
        assert any(isinstance(m, nn.MaxPool2d) for m in model) == (stem == "7x7")
        norms = {type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)}
        assert norms == {"batch": {nn.BatchNorm2d}, "group": {nn.GroupNorm}, "none": set()}[norm]
        blocks = [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]
        assert all((block.shortcut is not None) == residual for block in blocks)
        if (norm, residual) == ("batch", True):
            largest = max(field.rf for field in receptive_fields(model, (3, 64, 64)).values())
            assert limit is None or largest <= limit


@pytest.mark.parametrize("name", ["resnet10", "resnet20", "resnet50"])
@pytest.mark.parametrize("how", ["mean", "anti"])
@pytest.mark.parametrize("shortcut", ["projection", "stage", "identity"])
def test_placed_widths_train(name, how, shortcut):
    model = MODELS[name](3, width=tuple(w // 4 for w in placed(name, how)), shortcut=shortcut, norm="group")
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_functions_signature_shows_its_own_defaults():
    assert inspect.signature(resnet20).parameters["width"].default == 16
    assert inspect.signature(resnet8).parameters["stem"].default == "7x7"
    assert inspect.signature(wrn28_10).parameters["num_classes"].default == 100


def test_a_named_resnet_can_be_pickled():
    assert pickle.loads(pickle.dumps(resnet20)) is resnet20


def test_initialisation_is_he_normal_by_fan_out_and_a_function_of_the_seed():
    torch.manual_seed(3)
    one = resnet20(width=32)
    torch.manual_seed(3)
    two = resnet20(width=32)
    weight = one.layer3[2].conv2.weight  # 128 kernels of 3x3
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.01)


def test_without_norm_the_convolutions_have_biases_that_start_at_zero():
    model = resnet20(norm="none")
    biases = [module.bias for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(biases) == 21
    assert all(bias is not None and not bias.any() for bias in biases)


@pytest.mark.parametrize("make", [resnet8, resnet50])
def test_zero_init_makes_every_block_start_as_its_shortcut(make):
    model = make(width=4, stem="3x3", zero_init=True).eval()
    block = next(m for m in model.layer1.modules() if isinstance(m, BasicBlock | Bottleneck))
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut(x).relu())


def test_an_identity_shortcut_subsamples_and_adds_zero_channels():
    model = resnet20(shortcut="identity")
    x = torch.randn(2, 16, 8, 8)
    y = model.layer2[0].shortcut(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert y.shape == (2, 32, 4, 4)
    assert not y[:, 16:].any()


def test_a_plain_net_has_no_shortcuts():
    model = resnet20(residual=False)
    assert all(block.shortcut is None for block in model.modules() if isinstance(block, BasicBlock))


def test_widths_may_be_placed_along_the_depth():
    model = on_meta(resnet10, width=(256, 128, 64, 32), shortcut="identity")
    assert [model.layer1[0].conv1.out_channels, model.fc.in_features] == [256, 32]


@pytest.mark.parametrize(
    ("channels", "groups", "count"),
    [
        (64, 32, 32),
        (128, 32, 32),
        (2048, 32, 32),
        (16, 32, 8),
        (32, 32, 16),
        (48, 32, 24),
        (120, 32, 30),
        (7, 32, 1),
        (1, 8, 1),
    ],
)
def test_groups_divide_the_channels_and_hold_two_or_more(channels, groups, count):
    assert group_count(channels, groups) == count


@pytest.mark.parametrize("stem", ["3x3", "7x7"])
@pytest.mark.parametrize("make", [resnet8, resnet18, resnet20, resnet50])
@pytest.mark.parametrize("limit", [11, 20, 43, 99, 10_000])
def test_receptive_field_is_the_largest_that_stays_within_the_limit_block_by_block(make, stem, limit):
    plain = receptive_fields(on_meta(make, stem=stem), (3, 64, 64))
    model = on_meta(make, stem=stem, receptive_field=limit)
    fields = receptive_fields(model, (3, 64, 64))
    assert max(field.rf for field in fields.values()) <= limit
    assert [field.jump for field in fields.values()] == [field.jump for field in plain.values()]
    ends = {}  # block -> receptive field behind it, as defined
    for name, field in plain.items():
        if name.startswith("layer"):
            block = name.rsplit(".conv", 1)[0].removesuffix(".shortcut")
            ends[block] = max(ends.get(block, 0), field.rf)
    for block, end in ends.items():
        kernels = {
            module.kernel_size for module in model.get_submodule(block).modules() if isinstance(module, nn.Conv2d)
        }
        assert ((3, 3) in kernels) == (end <= limit)


@pytest.mark.parametrize(
    ("knobs", "remedy"),
    [
        ({"stem": "5x5"}, "set stem="),
        ({"norm": "layer"}, "set norm="),
        ({"shortcut": "option-b"}, "set shortcut="),
        ({"num_classes": 0}, "1 or more"),
        ({"width": 0}, "1 or more"),
        ({"width": 16.0}, "1 or more"),
        ({"width": (16, 32)}, "give 3 widths"),
        ({"groups": 0}, "1 or more"),
        ({"in_channels": True}, "1 or more"),
        ({"stem_width": 0}, "1 or more"),
        ({"receptive_field": 2}, "3x3 stem alone sees 3"),
        ({"receptive_field": 10, "stem": "7x7"}, "7x7 stem alone sees 11"),
        ({"dropout": 1.0}, "0 for none"),
        ({"zero_init": True, "norm": "none"}, "zero_init=False"),
        ({"zero_init": True, "residual": False}, "zero_init=False"),
    ],
)
def test_impossible_knobs_are_refused_with_range_and_remedy(knobs, remedy):
    with pytest.raises(ConfigError, match="expected") as error:
        resnet20(**knobs)
    assert remedy in str(error.value)
