"""Sparse ternary compression, Sattler et al. 2020, Algorithm 2: the k largest of a tensor as sign times their mean
magnitude, on both ways, with a residual at every client and one at the server."""

import copy

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


def ternary(x, density):
    flat = x.flatten()
    k = max(1, round(density * len(flat)))
    largest = torch.argsort(-flat.abs(), stable=True)[:k]
    mu = flat[largest].float().abs().double().mean()  # it travels as one float32
    code = torch.zeros_like(flat)
    code[largest] = (mu * torch.where(flat[largest] < 0, -1.0, 1.0)).to(torch.float32).to(flat.dtype)
    return code.view_as(x)


def stc(model, clients, *, density, density_down, rounds, lr, momentum=0.0, batch_size=32, epochs=1, participants=None,
        weights="examples", seed=0):  # fmt: skip
    x = {name: w.detach().clone() for name, w in model.named_parameters()}
    of_client = [{name: torch.zeros_like(w) for name, w in x.items()} for _ in clients]
    of_server = {name: torch.zeros_like(w) for name, w in x.items()}
    history = []
    for t in range(rounds):
        sampled = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in sampled]
        change = {name: torch.zeros_like(w) for name, w in x.items()}
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
                accumulated = w.detach() - x[name] + of_client[i][name]
                sent = ternary(accumulated, density)
                of_client[i][name] = accumulated - sent
                change[name] += n / sum(sizes) * sent
        for name in x:
            accumulated = change[name] + of_server[name]
            sent = ternary(accumulated, density_down)
            of_server[name] = accumulated - sent
            x[name] = x[name] + sent
        history.append(dict(x))
    return history
