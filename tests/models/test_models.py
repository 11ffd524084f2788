import pytest
import torch
from torch import nn

import lamina.models
from lamina.models import MODELS


def test_every_model_is_exported_under_its_name():
    assert all(getattr(lamina.models, name) is make and make.__name__ == name for name, make in MODELS.items())
    assert set(lamina.models.__all__) == {*MODELS, "MODELS", "Field", "receptive_fields", "Frozen", "lora", "merged"}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_works_without_arguments_and_has_a_docstring(name):
    with torch.device("meta"):
        model = MODELS[name]()
    assert isinstance(model, nn.Module)
    assert MODELS[name].__doc__


@pytest.mark.parametrize("name", ["cnn", "resnet20", "vgg11", "char_lstm"])
def test_weights_are_a_function_of_torchs_seed(name):
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(next(iter(MODELS[name]().parameters())))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
