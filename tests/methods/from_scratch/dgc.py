"""DGC, Lin et al. 2018, on updates: momentum correction and momentum factor masking; no clipping, no warm-up."""

import copy

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


def dgc(model, clients, *, density, correction, rounds, lr, momentum=0.0, batch_size=32, epochs=1, participants=None,
        weights="examples", seed=0):  # fmt: skip
    x = [w.detach().clone() for w in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    v = [[torch.zeros(w.numel(), dtype=w.dtype) for w in x] for _ in clients]
    e = [[torch.zeros(w.numel(), dtype=w.dtype) for w in x] for _ in clients]
    history = []
    for t in range(rounds):
        sampled = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in sampled]
        step = [torch.zeros_like(w) for w in x]
        for i, n in zip(sampled, sizes, strict=True):
            data, labels = clients[i]
            local = copy.deepcopy(model)
            local.load_state_dict(dict(zip(names, x, strict=True)))
            sgd = torch.optim.SGD(local.parameters(), lr=lr, momentum=momentum)
            for batch in batches(len(data), seed, t, i, batch_size, epochs):
                sgd.zero_grad()
                cross_entropy(local(data[batch]), labels[batch]).backward()
                sgd.step()
            for j, w in enumerate(local.parameters()):
                u = (w.detach() - x[j]).flatten()
                v[i][j] = correction * v[i][j] + u
                e[i][j] = e[i][j] + v[i][j]
                k = max(1, round(density * len(u)))
                chosen = torch.argsort(-e[i][j].abs(), stable=True)[:k]
                step[j].view(-1)[chosen] += n / sum(sizes) * e[i][j][chosen]
                e[i][j][chosen] = 0
                v[i][j][chosen] = 0
        x = [w + d for w, d in zip(x, step, strict=True)]
        history.append(dict(zip(names, x, strict=True)))
    return history
