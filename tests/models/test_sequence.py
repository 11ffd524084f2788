import pytest
import torch

from lamina.errors import ConfigError
from lamina.models import char_gru, char_lstm


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_leafs_lstm_has_819920_parameters_with_80_symbols():
    assert size(char_lstm()) == 819_920


def test_flares_gru_has_4048470_parameters():
    with torch.device("meta"):
        assert size(char_gru()) == 4_048_470


def test_char_lstm_predicts_the_next_character():
    model = char_lstm(vocab=30, hidden=16)
    logits = model(torch.randint(30, (3, 80)))
    torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2, 3])).backward()
    assert logits.shape == (3, 30)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_step_gives_logits_as_cross_entropy_takes_them():
    model = char_gru(vocab=30, embed=8, hidden=16)
    x = torch.randint(30, (3, 20))
    torch.nn.functional.cross_entropy(model(x), x).backward()
    assert model(x).shape == (3, 30, 20)


def test_the_last_step_is_the_same_with_and_without_every_step():
    torch.manual_seed(0)
    last = char_lstm(vocab=30, hidden=16)
    every = char_lstm(vocab=30, hidden=16, every_step=True)
    every.load_state_dict(last.state_dict())
    x = torch.randint(30, (3, 20))
    torch.testing.assert_close(every(x)[:, :, -1], last(x))


@pytest.mark.parametrize("knobs", [{"vocab": 0}, {"embed": 0}, {"hidden": 2.5}, {"layers": 0}])
def test_char_models_refuse_impossible_knobs(knobs):
    with pytest.raises(ConfigError, match="expected an integer >= 1"):
        char_lstm(**knobs)
