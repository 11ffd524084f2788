"""Local-only training by hand: one weight w, half the squared distance to the target, so the gradient is w - target."""

import torch
from torch import nn

import lamina


def test_clients_go_on_from_their_own_weights_and_nothing_is_uploaded():
    """Targets 2 and 6, lr 1/2, one step a round: 1 and 3, then 3/2 and 9/2; the global weight stays 0."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    clients = {str(y): (torch.ones(1, 1).double(), torch.full((1, 1), y).double()) for y in (2, 6)}
    fed = lamina.Federation(
        model,
        lamina.ClientData.from_clients(clients),
        method=lamina.LocalOnly(),
        local=lamina.LocalSGD(lr=0.5, batch_size=None),
        loss=lambda output, target: ((output - target) ** 2).mean() / 2,
        engine="loop",
    )
    own = []
    for state, record in fed.run(2):
        own.append([state.clients.get(i).row.method.own["weight"].item() for i in range(2)])
        assert state.params["weight"].item() == 0
        assert not record.layers["weight"].uploaded
        assert record.layers["weight"].bytes_up == 0
    assert own == [[1, 3], [1.5, 4.5]]
