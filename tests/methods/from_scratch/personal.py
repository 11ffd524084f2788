"""FedBN (Li et al. 2021), FedPer (Arivazhagan et al. 2019): every client has a model, and shares some of its tensors.

`own`: names of the tensors that are not: parameters, or buffers such as BatchNorm statistics.
"""

import copy
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


class Round(NamedTuple):
    server: dict  # state dict; personal tensors as they were made
    clients: list  # state dicts of all clients; shared tensors as the client last saw them


def personal(model, clients, *, own, rounds, lr, momentum=0.0, batch_size=32, epochs=1, participants=None,
             weights="examples", seed=0):  # fmt: skip
    models = [copy.deepcopy(model).train() for _ in clients]
    server = copy.deepcopy(model.state_dict())
    history = []
    for t in range(rounds):
        active = cohort(seed, t, len(clients), participants)
        shared = [name for name in server if name not in own]
        for i in active:
            models[i].load_state_dict({name: server[name] for name in shared}, strict=False)
            data, labels = clients[i]
            optimiser = torch.optim.SGD(models[i].parameters(), lr=lr, momentum=momentum)
            for batch in batches(len(data), seed, t, i, batch_size, epochs):
                optimiser.zero_grad()
                cross_entropy(models[i](data[batch]), labels[batch]).backward()
                optimiser.step()
        for name in shared:
            theirs = [
                (len(clients[i][0]) if weights == "examples" else 1, models[i].state_dict()[name]) for i in active
            ]
            if server[name].is_floating_point():
                server[name] = sum(n * x for n, x in theirs) / sum(n for n, _ in theirs)
            else:
                server[name] = max(x for _, x in theirs).clone()
        history.append(Round(dict(server), [copy.deepcopy(m.state_dict()) for m in models]))
    return history
