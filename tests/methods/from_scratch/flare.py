"""FLARE, Greidi and Cohen 2024: the pull is the gradient of an L1 penalty, taken by autograd; top-k by sorting."""

import copy
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


class Round(NamedTuple):
    weights: dict
    residual: list  # A of every client
    pulled: list  # per client: name -> which weights were pulled in this round; None for who was absent
    sent: list  # per client: name -> how many values were sent


def sparsified(u, density, keep):
    """The `keep` entries of a vector, zeros for the others."""
    n, k = len(u), round(density * len(u))
    order = sorted(range(n), key=lambda j: (-abs(u[j].item()), j))
    if keep == "exact":
        chosen = order[: max(1, k)]
    elif k + 1 >= n:
        chosen = order
    else:
        bar = abs(u[order[k + 1]].item())  # the (k + 2)-th largest
        chosen = [j for j in order if abs(u[j].item()) > bar]
    s = torch.zeros_like(u)
    s[chosen] = u[chosen]
    return s, len(chosen)


def flare(model, clients, *, tau, decay, percentile, pulled_steps, density, keep, rounds, lr, momentum=0.0,
          batch_size=32, epochs=1, participants=None, weights="examples", seed=0):  # fmt: skip
    x = {name: w.detach().clone() for name, w in model.named_parameters()}
    residual = [{name: torch.zeros_like(w) for name, w in x.items()} for _ in clients]
    history = []
    for t in range(rounds):
        sampled = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in sampled]
        strength = tau / decay ** (t + 1)
        mean = {name: torch.zeros_like(w) for name, w in x.items()}
        masks, counts = [None] * len(clients), [None] * len(clients)
        for i, n in zip(sampled, sizes, strict=True):
            data, labels = clients[i]
            mask = {}
            for name, a in residual[i].items():
                ascending = sorted(a.abs().flatten().tolist())
                mask[name] = a.abs() > ascending[round(percentile / 100 * (len(ascending) - 1))]
            masks[i], counts[i] = mask, {}
            local = copy.deepcopy(model)
            local.load_state_dict(x)
            sgd = torch.optim.SGD(local.parameters(), lr=lr, momentum=momentum)
            for k, batch in enumerate(batches(len(data), seed, t, i, batch_size, epochs)):
                sgd.zero_grad()
                loss = cross_entropy(local(data[batch]), labels[batch])
                if k < pulled_steps:
                    for name, w in local.named_parameters():
                        loss = loss + strength * (mask[name] * (w - x[name] - residual[i][name]).abs()).sum()
                loss.backward()
                sgd.step()
            for name, w in local.named_parameters():
                u = (w.detach() - x[name] + residual[i][name]).flatten()
                s, counts[i][name] = sparsified(u, density, keep)
                residual[i][name] = (u - s).view_as(w)
                mean[name] += n / sum(sizes) * s.view_as(w)
        x = {name: w + mean[name] for name, w in x.items()}
        history.append(Round(x, [dict(a) for a in residual], masks, counts))
    return history
