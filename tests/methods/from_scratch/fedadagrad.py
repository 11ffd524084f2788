"""FedAdagrad, Reddi et al. 2021, Algorithm 2 (beta_1 = 0, as in the paper)."""

import copy

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


def fedadagrad(model, clients, *, rounds, lr, server_lr, tau, momentum=0.0, batch_size=32, epochs=1,
               participants=None, weights="examples", seed=0):  # fmt: skip
    x = {name: w.detach().clone() for name, w in model.named_parameters()}
    v = {name: torch.full_like(w, tau**2) for name, w in x.items()}
    history = []
    for t in range(rounds):
        sampled = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in sampled]
        delta = {name: torch.zeros_like(w) for name, w in x.items()}
        for i, n in zip(sampled, sizes, strict=True):
            data, labels = clients[i]
            local = copy.deepcopy(model)
            local.load_state_dict(x)
            sgd = torch.optim.SGD(local.parameters(), lr=lr, momentum=momentum)
            for batch in batches(len(data), seed, t, i, batch_size, epochs):
                sgd.zero_grad()
                cross_entropy(local(data[batch]), labels[batch]).backward()
                sgd.step()
            for name, w in local.named_parameters():
                delta[name] += n / sum(sizes) * (w.detach() - x[name])
        for name, d in delta.items():
            v[name] = v[name] + d**2
            x[name] = x[name] + server_lr * d / (v[name].sqrt() + tau)
        history.append(dict(x))
    return history
