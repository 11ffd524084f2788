"""FedNova, Wang et al. 2020: x+ = x - tau_eff sum_i p_i eta G_i a_i / ||a_i||_1, tau_eff = sum_i p_i ||a_i||_1.

G_i holds the gradients of the local steps, a_i how often each of them got into the local update: it is built step by
step here, from the recursion of the momentum buffer, not from its closed form.
"""

import copy

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


def fednova(model, clients, *, rounds, lr, momentum=0.0, weight_decay=0.0, clip=None, batch_size=32, epochs=1,
            steps=None, participants=None, weights="examples", seed=0):  # fmt: skip
    x = [w.detach().clone() for w in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    history = []
    for t in range(rounds):
        active = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in active]
        directions, lengths = [], []
        for i in active:
            data, labels = clients[i]
            local = copy.deepcopy(model)
            y = list(local.parameters())
            with torch.no_grad():
                for y_l, x_l in zip(y, x, strict=True):
                    y_l.copy_(x_l)
            gradients = []  # G_i, one column per step
            a = []
            for batch in batches(len(data), seed, t, i, batch_size, epochs, steps):
                g = torch.autograd.grad(cross_entropy(local(data[batch]), labels[batch]), y)
                norm = sum((g_l**2).sum() for g_l in g).sqrt()
                if clip and norm > clip:
                    g = [g_l * (clip / norm) for g_l in g]
                g = [g_l + weight_decay * y_l.detach() for g_l, y_l in zip(g, y, strict=True)]
                gradients.append(g)
                a = [momentum ** (len(a) - k) + a_k for k, a_k in enumerate(a)] + [1.0]
                with torch.no_grad():  # this step: every gradient so far, by the age of its share in the buffer
                    for j, y_l in enumerate(y):
                        age = len(gradients) - 1
                        y_l -= lr * sum(momentum ** (age - k) * g_k[j] for k, g_k in enumerate(gradients))
            d = [sum(a_k * g_k[j] for a_k, g_k in zip(a, gradients, strict=True)) / sum(a) for j in range(len(x))]
            directions.append(d)
            lengths.append(sum(a))
        p = [n / sum(sizes) for n in sizes]
        tau_eff = sum(p_i * length for p_i, length in zip(p, lengths, strict=True))
        x = [
            x_l - tau_eff * sum(p_i * lr * d[j] for p_i, d in zip(p, directions, strict=True))
            for j, x_l in enumerate(x)
        ]
        history.append(dict(zip(names, x, strict=True)))
    return history
