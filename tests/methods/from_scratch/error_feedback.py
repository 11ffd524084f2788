"""Top-k of every tensor with error feedback: u = update + residual; send top_k(u); the residual is the rest."""

import copy

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


def error_feedback(model, clients, *, density, rounds, lr, momentum=0.0, batch_size=32, epochs=1, participants=None,
                   weights="examples", seed=0):  # fmt: skip
    x = {name: w.detach().clone() for name, w in model.named_parameters()}
    residual = [{name: torch.zeros_like(w) for name, w in x.items()} for _ in clients]
    history = []
    for t in range(rounds):
        sampled = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in sampled]
        mean = {name: torch.zeros_like(w) for name, w in x.items()}
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
                u = (w.detach() - x[name] + residual[i][name]).flatten()
                k = max(1, round(density * len(u)))
                largest = torch.argsort(-u.abs(), stable=True)[:k]
                sent = torch.zeros_like(u)
                sent[largest] = u[largest]
                residual[i][name] = (u - sent).view_as(w)
                mean[name] += n / sum(sizes) * sent.view_as(w)
        x = {name: w + mean[name] for name, w in x.items()}
        history.append(x)
    return history
