"""EF21, Richtarik et al. 2021, on updates: the server keeps every client's g_i and steps by their mean."""

import copy

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


def ef21(model, clients, *, density, rounds, lr, momentum=0.0, batch_size=32, epochs=1, participants=None,
         weights="examples", seed=0):  # fmt: skip
    """`weights` has no say: all clients count alike."""
    assert weights in ("examples", "uniform")
    x = {name: w.detach().clone() for name, w in model.named_parameters()}
    g = [{name: torch.zeros_like(w) for name, w in x.items()} for _ in clients]
    history = []
    for t in range(rounds):
        for i in cohort(seed, t, len(clients), participants):
            data, labels = clients[i]
            local = copy.deepcopy(model)
            local.load_state_dict(x)
            sgd = torch.optim.SGD(local.parameters(), lr=lr, momentum=momentum)
            for batch in batches(len(data), seed, t, i, batch_size, epochs):
                sgd.zero_grad()
                cross_entropy(local(data[batch]), labels[batch]).backward()
                sgd.step()
            for name, w in local.named_parameters():
                difference = (w.detach() - x[name] - g[i][name]).flatten()
                k = max(1, round(density * len(difference)))
                largest = torch.argsort(-difference.abs(), stable=True)[:k]
                c = torch.zeros_like(difference)
                c[largest] = difference[largest]
                g[i][name] = g[i][name] + c.view_as(w)
        x = {name: w + sum(g_i[name] for g_i in g) / len(clients) for name, w in x.items()}
        history.append(x)
    return history
