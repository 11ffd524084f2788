"""The layer table: one row per trainable parameter, in model order."""

from __future__ import annotations

from torch import nn

import cases
from lamina.layers import Layer, is_matrix, kind_of, layer_table, matrices
from lamina.models import char_lstm, resnet20


def test_rows_are_the_trainable_parameters_in_model_order_and_tied_weights_stand_once() -> None:
    assert layer_table(cases.odd()) == (
        Layer("conv.weight", "conv2d", "weight", (4, 1, 3, 3)),
        Layer("norm.weight", "norm", "weight", (4,)),
        Layer("norm.bias", "norm", "bias", (4,)),
        Layer("first.weight", "linear", "weight", (6, 6)),
        Layer("head.weight", "linear", "weight", (4, 6)),
        Layer("head.bias", "linear", "bias", (4,)),
    )


def test_scheduled_layers_are_weights_of_two_or_more_dimensions() -> None:
    assert [layer.name for layer in matrices(layer_table(cases.odd()))] == [
        "conv.weight",
        "first.weight",
        "head.weight",
    ]
    assert not is_matrix(Layer("norm.weight", "norm", "weight", (4,)))
    assert not is_matrix(Layer("odd.bias", "other", "bias", (4, 4)))
    assert not any(is_matrix(layer) for layer in layer_table(nn.LayerNorm((4, 4))))


def test_kinds_name_the_owner() -> None:
    made = {
        "conv1d": nn.Conv1d(1, 1, 1),
        "conv2d": nn.Conv2d(1, 1, 1),
        "linear": nn.Linear(1, 1),
        "embedding": nn.Embedding(2, 2),
        "lstm": nn.LSTM(1, 1),
        "gru": nn.GRU(1, 1),
        "other": nn.PReLU(),
    }
    assert {kind: kind_of(module) for kind, module in made.items()} == {kind: kind for kind in made}
    assert {kind_of(m) for m in (nn.BatchNorm1d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2))} == {"norm"}


def test_recurrent_weights_are_matrices_and_recurrent_biases_are_not() -> None:
    rows = [layer for layer in layer_table(char_lstm()) if layer.kind == "lstm"]
    assert rows
    assert all(is_matrix(layer) == layer.name.rpartition(".")[2].startswith("weight") for layer in rows)


def test_numel_counts_every_parameter_once() -> None:
    model = resnet20(num_classes=10)
    assert sum(layer.numel for layer in layer_table(model)) == sum(p.numel() for p in model.parameters())
    assert Layer("x", "other", "weight", ()).numel == 1


def test_a_parameter_of_the_model_itself_has_a_row() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(nn.Linear(2, 2).weight.detach())

    assert layer_table(Scale()) == (Layer("factor", "other", "weight", (2, 2)),)
