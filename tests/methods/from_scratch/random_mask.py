"""FedAvg under one random mask, with the densities of RigL's Erdos-Renyi-kernel layout or the same for all layers."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort, generator


def erk(shapes, density):
    """Entries per layer: c * sum(shape), at most all; c by bisection so that the total is right."""
    sizes = [shape.numel() for shape in shapes]

    def total(c):
        return sum(min(n, c * sum(shape)) for n, shape in zip(sizes, shapes, strict=True))

    low, high = 0.0, float(max(sizes))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) < density * sum(sizes) else (low, middle)
    return [min(n, round(high * sum(shape))) for n, shape in zip(sizes, shapes, strict=True)]


def random_mask(model, clients, *, density, layout, rounds, lr, momentum=0.0, weight_decay=0.0, batch_size=32,
                epochs=1, participants=None, weights="examples", seed=0):  # fmt: skip
    model = copy.deepcopy(model)
    layers = [module.weight for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    shapes = [w.shape for w in layers]
    kept = erk(shapes, density) if layout == "erk" else [round(density * shape.numel()) for shape in shapes]
    source = generator(seed, "mask")
    masks = []
    for w, k in zip(layers, kept, strict=True):
        order = torch.rand(w.shape, generator=source, dtype=torch.float64).flatten().argsort(descending=True)
        flat = torch.zeros(w.numel(), dtype=w.dtype)
        flat[order[:k]] = 1
        masks.append(flat.view_as(w))
        w.data.mul_(masks[-1])
    server = copy.deepcopy(model.state_dict())
    history = []
    for t in range(rounds):
        chosen = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in chosen]
        locals_ = []
        for i in chosen:
            x, y = clients[i]
            model.load_state_dict(server)
            sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
            for batch in batches(len(x), seed, t, i, batch_size, epochs):
                sgd.zero_grad()
                cross_entropy(model(x[batch]), y[batch]).backward()
                sgd.step()
                for w, m in zip(layers, masks, strict=True):
                    w.data.mul_(m)  # after the step, as the released code of FedDST does
            locals_.append(copy.deepcopy(model.state_dict()))
        server = {
            name: sum(n / sum(sizes) * local[name] for n, local in zip(sizes, locals_, strict=True)) for name in server
        }
        history.append(dict(server))
    return history
