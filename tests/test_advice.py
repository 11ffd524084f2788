from __future__ import annotations

import pytest
import torch
from torch import nn

import lamina
from lamina import ConfigError, guidelines
from lamina.advice import ABSTRACT, CODE, FIELD, GUIDELINES, NORM, PLACEMENT, RESIDUAL, WIDER, _needed
from lamina.models import (
    char_gru,
    char_lstm,
    cnn,
    mlp,
    receptive_fields,
    resnet10,
    resnet18,
    resnet20,
    resnet50,
    resnet101,
    vgg16,
)
from lamina.models.trace import follow


def on_meta(make, *args, **knobs):
    with torch.device("meta"):
        return make(*args, **knobs)


def about(advice, guideline):
    return [a for a in advice if a.guideline == guideline]


def layers(advice, guideline):
    return [a.layer for a in about(advice, guideline)]


def deep_mlp(hidden=12, width=16):
    return mlp((64, *[width] * hidden, 10))


# ---- receptive field


@pytest.mark.parametrize(
    ("make", "stem", "size"),
    [(resnet10, "7x7", 64), (resnet18, "3x3", 64), (resnet50, "7x7", 32), (resnet20, "3x3", 32)],
)
def test_kernels_are_named_from_where_one_position_sees_more_than_the_input(make, stem, size):
    model = on_meta(make, stem=stem)
    fields = receptive_fields(model, (3, size, size))
    kernels = {f"{name}.weight": m.kernel_size[0] for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    too_large = [name for name, field in fields.items() if field.rf > size and kernels[name] > 1]
    found = [a for a in about(guidelines(model, (3, size, size)), FIELD) if "this kernel" in a.why]
    assert sorted(a.layer for a in found) == sorted(too_large)
    assert all(f"sees {fields[a.layer].rf} pixels, the input has {size}" in a.why for a in found)
    assert all(a.change.startswith(f"receptive_field={size}:") for a in found)


def test_the_knob_that_is_advised_ends_the_advice():
    model = on_meta(resnet18, receptive_field=32)
    assert not about(guidelines(model, (3, 32, 32)), FIELD)


def test_the_reason_says_how_many_pixels_the_kernel_adds():
    """resnet20: the last 3x3 kernel works at jump 4, so it adds 2 * 4 of its 81 pixels."""
    advice = about(guidelines(on_meta(resnet20), (3, 32, 32)), FIELD)
    why = next(a.why for a in advice if a.layer == "layer3.2.conv2.weight")
    assert why == "one position sees 81 pixels, the input has 32; this kernel of 3 adds 8 of them"


def test_the_field_without_one_downsampling_is_that_of_the_model_without_it():
    """resnet20 without the stride of layer2: 49 pixels; made by hand and measured."""
    changed = on_meta(resnet20)
    changed.layer2[0].conv1.stride = changed.layer2[0].shortcut.conv.stride = (1, 1)
    then = max(field.rf for field in receptive_fields(changed, (3, 32, 32)).values())
    advice = about(guidelines(on_meta(resnet20), (3, 32, 32)), FIELD)
    strides = {a.layer: a.why for a in advice if "its stride" in a.why}
    assert list(strides) == ["layer2.0.conv1.weight", "layer3.0.conv1.weight"]
    assert then == 49
    assert "sees 81 pixels, with stride 1 here 49; the input has 32, the last map 8" in strides["layer2.0.conv1.weight"]


def test_a_7x7_stem_is_to_become_3x3_and_a_stage_is_not():
    advice = about(guidelines(on_meta(resnet10), (3, 64, 64)), FIELD)
    stem = [a for a in advice if a.change.startswith('stem="3x3"')]
    assert [a.layer for a in stem] == ["conv1.weight", "conv1.weight"]  # its stride, and the pooling behind it
    assert ["the pooling behind it" in a.why for a in stem] == [False, True]
    assert "the last map 2" in stem[0].why


def test_pooling_is_named_by_the_convolution_before_it():
    advice = about(guidelines(on_meta(vgg16), (3, 32, 32)), FIELD)
    pools = [a.layer for a in advice if "pooling" in a.why]
    assert pools == ["conv2.weight", "conv4.weight", "conv7.weight", "conv10.weight"]  # behind the fifth nothing grows


def test_the_threshold_is_in_sides_of_the_input():
    model = on_meta(resnet20)  # 81 pixels
    assert about(guidelines(model, (3, 32, 32), field=2.5), FIELD)
    assert not about(guidelines(model, (3, 32, 32), field=2.6), FIELD)
    assert not about(guidelines(model, (3, 96, 96)), FIELD)


# ---- width


def test_the_layers_far_from_the_loss_that_are_not_wider_than_the_mean_are_to_be_wider():
    """Six hidden layers 4, 8, 4, 4, 4, 24: mean 8. With deep=3 the first four of the seven are far from the loss."""
    advice = about(guidelines(mlp((64, 4, 8, 4, 4, 4, 24, 10)), (64,), deep=3), WIDER)
    assert [a.layer for a in advice] == ["fc1.weight", "fc2.weight", "fc3.weight", "fc4.weight"]
    assert "4 wide, 0.50 of the mean 8 of the hidden layers; depth 0 from the input, 6 from the loss" in advice[0].why
    narrow = about(guidelines(mlp((64, 4, 8, 4, 4, 4, 24, 10)), (64,), deep=3, narrow=0.9), WIDER)
    assert [a.layer for a in narrow] == ["fc1.weight", "fc3.weight", "fc4.weight"]


def test_a_resnets_knob_has_all_its_stages():
    advice = about(guidelines(on_meta(resnet20), (3, 32, 32)), WIDER)
    assert all(a.change.startswith("width=(32, 64, 128) instead of (16, 32, 64)") for a in advice)
    assert advice[0].layer == "conv1.weight"
    assert not any(a.layer.startswith("layer3") for a in advice)


def test_the_classifier_is_never_to_be_wider():
    advice = guidelines(deep_mlp(), (64,), deep=1, narrow=100)
    assert "fc13.weight" not in layers(advice, WIDER)


def test_widths_that_double_are_placed_unevenly_and_equal_ones_are_not():
    """resnet10, stages 64, 128, 256, 512: their mean is 240."""
    (advice,) = about(guidelines(on_meta(resnet10, 10), (3, 64, 64)), PLACEMENT)
    assert "width=(240, 240, 240, 240) (equal) or width=(512, 256, 128, 64) (reversed)" in advice.change
    assert "not published" in advice.change
    (anti,) = about(guidelines(on_meta(resnet10, width=(256, 128, 64, 32)), (3, 64, 64)), PLACEMENT)
    assert "next to the input is 256 wide on average, the last 32" in anti.why
    assert not about(guidelines(on_meta(resnet10, width=(120, 120, 120, 120)), (3, 64, 64)), PLACEMENT)


# ---- residual


def test_a_plain_network_is_to_have_residual_connections_where_the_chain_is_long():
    """13 linear layers in a row: behind fc5 there are 8 more, behind fc6 seven."""
    advice = about(guidelines(deep_mlp(), (64,)), RESIDUAL)
    assert [a.layer for a in advice] == ["fc1.weight", "fc2.weight", "fc3.weight", "fc4.weight", "fc5.weight"]
    assert "12 further layers" in advice[0].why


def test_a_resnet_has_them_and_a_plain_one_has_a_knob():
    assert not about(guidelines(on_meta(resnet20), (3, 32, 32)), RESIDUAL)
    advice = about(guidelines(on_meta(resnet20, residual=False), (3, 32, 32)), RESIDUAL)
    assert len(advice) == 20 - 8  # 19 convolutions and fc: the last 8 are near the loss
    assert {a.change for a in advice} == {"residual=True"}


class Around(nn.Module):
    """Twelve layers with something around every one."""

    def __init__(self, around):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(12))
        self.head = nn.Linear(6, 2)
        self.around = around

    def forward(self, x):
        for layer in self.layers:
            x = self.around(x, layer(x))
        return self.head(x)


@pytest.mark.parametrize(
    "around", [lambda x, y: x + y, lambda x, y: y.relu_().add_(x), lambda x, y: torch.cat([x, y], 1)[:, 3:9]]
)
def test_a_sum_or_concatenation_goes_round_a_layer(around):
    assert not about(guidelines(Around(around), (6,)), RESIDUAL)


def test_a_layer_that_nothing_goes_round_is_named():
    found = layers(guidelines(Around(lambda x, y: y), (6,)), RESIDUAL)
    assert found == [f"layers.{i}.weight" for i in range(5)]


def test_a_gate_is_a_short_way_for_the_gradient_but_no_bypass():
    """x * sigmoid(f(x)): the gradient reaches x past f, so no chain is long; but f at zero stops the way forward."""
    seen = follow(Around(lambda x, y: x * y.sigmoid()), torch.zeros(2, 6))
    assert len(_needed(seen.steps, seen.outputs)) == 13
    seen = follow(Around(lambda x, y: x + y.sigmoid()), torch.zeros(2, 6))
    assert _needed(seen.steps, seen.outputs) == {"head.weight"}


# ---- normalisation


def test_every_batch_norm_is_named_and_no_other_norm():
    model = on_meta(resnet20)
    norms = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    advice = about(guidelines(model, (3, 32, 32)), NORM)
    assert [a.layer for a in advice] == norms
    assert all(a.change.startswith('norm="group"') for a in advice)
    assert not about(guidelines(on_meta(resnet20, norm="group"), (3, 32, 32)), NORM)
    assert not about(guidelines(on_meta(resnet20, norm="none"), (3, 32, 32)), NORM)


def test_the_group_norm_for_a_users_model_fits_its_channels():
    model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48, affine=False), nn.BatchNorm2d(48), nn.Flatten())
    advice = about(guidelines(model, (3, 8, 8)), NORM)
    assert [a.layer for a in advice] == ["2.weight", "1"]
    assert "nn.GroupNorm(24, 48)" in advice[0].change


def test_batch_norm_that_keeps_no_statistics_is_not_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    assert guidelines(model, (4,)) == []


# ---- all of it


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (lambda: cnn(), (1, 28, 28)),
        (lambda: mlp((784, 64, 10)), (1, 28, 28)),
        (lambda: char_lstm(hidden=8), torch.zeros(2, 12, dtype=torch.long)),
        (lambda: char_gru(vocab=9, hidden=8, embed=4), torch.zeros(2, 12, dtype=torch.long)),
    ],
)
def test_shallow_models_get_none(model, example):
    assert guidelines(model(), example) == []


def test_a_deep_lstm_is_to_be_wider():
    """Embedding, five layers of two weights, classifier: 12. The embedding is narrower than the mean too."""
    advice = guidelines(char_lstm(vocab=9, hidden=8, layers=5), torch.zeros(2, 6, dtype=torch.long))
    assert layers(advice, WIDER) == ["embed.weight", "rnn.weight_hh_l0"]
    assert [a.change.split(",")[0] for a in advice] == ["embed=16 instead of 8", "hidden=16 instead of 8"]


def test_a_transformer_can_be_followed():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=False)
    advice = guidelines(model, (5, 8))
    assert not about(advice, FIELD)
    assert not about(advice, RESIDUAL)
    narrow = [
        f"layers.0.{name}" for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear2.weight")
    ]
    assert layers(advice, WIDER) == narrow


def test_resnet101_on_tiny_imagenet_hears_of_everything_but_residual_connections():
    advice = guidelines(on_meta(resnet101, 200, stem="7x7"), (3, 64, 64))
    assert {a.guideline for a in advice} == {WIDER, FIELD, PLACEMENT, NORM}
    assert [a.guideline for a in advice] == sorted((a.guideline for a in advice), key=GUIDELINES.index)
    names = {name for name, _ in on_meta(resnet101, 200, stem="7x7").named_parameters()}
    assert all(a.layer in names for a in advice)


def test_only_what_the_abstract_says_is_put_down_to_it_and_nothing_is_promised():
    advice = [*guidelines(on_meta(resnet10), (3, 64, 64)), *guidelines(deep_mlp(), (64,))]
    assert {a.guideline for a in advice} == set(GUIDELINES)
    assert {a.guideline for a in advice if a.source == ABSTRACT} == {WIDER, FIELD}
    assert {a.guideline for a in advice if a.source == CODE} == {PLACEMENT, RESIDUAL, NORM}
    assert not any("%" in text for a in advice for text in a)


def test_a_batch_and_keyword_arguments_serve_as_example():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.skip = deep_mlp(), nn.Linear(64, 10)

        def forward(self, x, other):
            return self.body(x) + self.skip(other)

    x = torch.zeros(3, 64)
    assert guidelines(deep_mlp(), x) == guidelines(deep_mlp(), (64,))
    assert not about(guidelines(Two(), {"x": x, "other": x}), RESIDUAL)  # the other branch stands in


def test_the_model_and_the_random_numbers_are_left_as_they_were():
    model = resnet20(width=2)
    model.layer1[0].conv1.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    guidelines(model, (3, 32, 32))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_name_stays_a_function():
    assert lamina.guidelines is lamina.guidelines is guidelines
    assert callable(lamina.guidelines)


# ---- printed


def test_printed_layers_whose_reasons_differ_in_numbers_alone_are_a_paragraph():
    """13 linear layers, the first five far from the loss: five pieces of advice of each of two kinds."""
    advice = guidelines(deep_mlp(), (64,))
    assert len(advice) == 10
    wider, residual = str(advice).split("\nresidual")
    assert wider.splitlines()[0] == "wider: fc1.weight, fc2.weight, fc3.weight, fc4.weight, fc5.weight"
    assert "16 wide, 1.00 of the mean 16" in wider
    assert "depth 0 to 4 from the input, 8 to 12 from the loss" in wider
    assert "through 8 to 12 further layers" in residual
    assert str(advice).count(ABSTRACT) == 1


def test_printed_many_layers_are_counted_and_the_list_has_each():
    advice = guidelines(on_meta(resnet101, 200, stem="7x7"), (3, 64, 64))
    assert len(about(advice, NORM)) == 104
    said = str(advice)
    assert "normalisation: norm1.weight, layer1.0.norm1.weight, layer1.0.norm2.weight, ... layer4" in said
    assert "... layer4.2.norm3.weight (104 in all)\n  BatchNorm2d over 64 to 2048 channels" in said
    assert len(said.splitlines()) < 40


def test_printed_changes_that_differ_stay_apart():
    """A model of one's own has a group norm per number of channels."""
    model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.Conv2d(48, 32, 3), nn.BatchNorm2d(32))
    said = str(guidelines(model, (3, 8, 8)))
    assert "normalisation: 1.weight\n" in said
    assert "normalisation: 3.weight\n" in said


def test_no_advice_says_so():
    assert str(guidelines(mlp((64, 10)), (64,))) == "none of the guidelines applies"


# ---- bad input


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ((3, 64, 64, 0), "expected a tensor, a dictionary of tensors, or a shape"),
        (64, "expected a tensor"),
        ((), "expected a tensor"),
        ({}, "dictionary of tensors"),
        ({"x": 3}, "dictionary of tensors"),
        ((65,), "cannot be followed on the example \\(2x65, float32\\): RuntimeError"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(example, says):
    with pytest.raises(ConfigError, match=says):
        guidelines(deep_mlp(), example)


def test_a_shape_for_a_model_of_characters_is_refused_with_the_remedy():
    with pytest.raises(ConfigError) as error:
        guidelines(char_lstm(hidden=8), (80,))
    assert error.value.code == "E121"
    assert "one batch of the training data" in str(error.value)


@pytest.mark.parametrize(
    "settings", [{"deep": 0}, {"deep": 2.5}, {"field": 0}, {"field": float("nan")}, {"narrow": -1}, {"uneven": 1}]
)
def test_thresholds_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match="expected a"):
        guidelines(deep_mlp(), (64,), **settings)
