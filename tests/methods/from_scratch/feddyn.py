"""FedDyn, Acar et al. 2021, Algorithm 1: clients minimise L_k(w) - <h_k, w> + alpha/2 ||w - x||^2, as autograd has it.

The server's h is kept as in the paper: h <- h - alpha/N * sum over P of (w_k - x), x <- mean of w_k - h / alpha. Means
are uniform, whatever `weights` says.
"""

import copy
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from from_scratch.addresses import batches, cohort


class Round(NamedTuple):
    server: dict
    h: torch.Tensor  # all parameters in one vector
    slopes: dict  # client -> h_k, likewise


def feddyn(model, clients, *, alpha, rounds, lr, momentum=0.0, weight_decay=0.0, batch_size=32, epochs=1,
           participants=None, weights="examples", seed=0):  # fmt: skip
    x = parameters_to_vector(model.parameters()).detach().clone()
    h = torch.zeros_like(x)
    slopes = {}
    history = []
    for t in range(rounds):
        active = cohort(seed, t, len(clients), participants)
        ends = []
        for k in active:
            data, labels = clients[k]
            local = copy.deepcopy(model)
            vector_to_parameters(x.clone(), local.parameters())
            optimiser = torch.optim.SGD(local.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
            h_k = slopes.get(k, torch.zeros_like(x))
            for batch in batches(len(data), seed, t, k, batch_size, epochs):
                w = parameters_to_vector(local.parameters())
                objective = (
                    cross_entropy(local(data[batch]), labels[batch]) - h_k @ w + alpha / 2 * ((w - x) ** 2).sum()
                )
                optimiser.zero_grad()
                objective.backward()
                optimiser.step()
            end = parameters_to_vector(local.parameters()).detach().clone()
            slopes[k] = h_k - alpha * (end - x)
            ends.append(end)
        h = h - alpha / len(clients) * sum(end - x for end in ends)
        x = sum(ends) / len(ends) - h / alpha
        made = copy.deepcopy(model)
        vector_to_parameters(x.clone(), made.parameters())
        history.append(Round(made.state_dict(), h, dict(slopes)))
    return history
