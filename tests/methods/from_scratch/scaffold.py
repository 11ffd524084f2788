"""SCAFFOLD, Karimireddy et al. 2020, Algorithm 1 with option II and a global step size of 1."""

import copy

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


def scaffold(model, clients, *, rounds, lr, momentum=0.0, batch_size=32, epochs=1, participants=None,
             weights="examples", seed=0):  # fmt: skip
    x = [w.detach().clone() for w in model.parameters()]
    c = [torch.zeros_like(w) for w in x]
    c_i = [[torch.zeros_like(w) for w in x] for _ in clients]
    names = [name for name, _ in model.named_parameters()]
    history = []
    for t in range(rounds):
        sampled = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in sampled]
        delta_y, delta_c = [], []
        for i in sampled:
            data, labels = clients[i]
            local = copy.deepcopy(model)
            y = list(local.parameters())
            velocity = [torch.zeros_like(w) for w in x]
            with torch.no_grad():
                for y_l, x_l in zip(y, x, strict=True):
                    y_l.copy_(x_l)
            order = batches(len(data), seed, t, i, batch_size, epochs)
            for batch in order:
                g = torch.autograd.grad(cross_entropy(local(data[batch]), labels[batch]), y)
                with torch.no_grad():
                    for y_l, g_l, c_il, c_l, v_l in zip(y, g, c_i[i], c, velocity, strict=True):
                        v_l.copy_(momentum * v_l + g_l - c_il + c_l)
                        y_l -= lr * v_l
            with torch.no_grad():
                c_plus = [
                    c_il - c_l + (x_l - y_l) / (len(order) * lr)
                    for c_il, c_l, x_l, y_l in zip(c_i[i], c, x, y, strict=True)
                ]
                delta_y.append([y_l - x_l for y_l, x_l in zip(y, x, strict=True)])
                delta_c.append([new - old for new, old in zip(c_plus, c_i[i], strict=True)])
            c_i[i] = c_plus
        for j in range(len(x)):
            x[j] = x[j] + sum(n * d[j] for n, d in zip(sizes, delta_y, strict=True)) / sum(sizes)
            c[j] = c[j] + sum(d[j] for d in delta_c) / len(clients)  # |S|/N times the mean over S
        history.append(dict(zip(names, x, strict=True)))
    return history
