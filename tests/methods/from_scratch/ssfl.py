"""SSFL: before training every client scores |gradient * weight| on one minibatch; the mean's largest entries are kept.

Training is of w * mask with autograd through the product, so the mask acts in the forward pass. Settings score="random"
and "random_layerwise" are the paper's ablations.
"""

import copy
import math

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort, generator


def saliency(model, x, y, names):
    model = copy.deepcopy(model).eval()
    for w in model.parameters():
        w.grad = None
    cross_entropy(model(x), y).backward()
    tensors = dict(model.named_parameters())
    return torch.cat([(tensors[name].grad * tensors[name].detach()).abs().flatten() for name in names])


def ssfl(model, clients, *, density, rounds, lr, momentum=0.0, weight_decay=0.0, batch_size=32, epochs=1,
         participants=None, weights="examples", seed=0, score="saliency"):  # fmt: skip
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.LSTM)
    owners = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    names = [f"{name}.{leaf}" for name, m in owners for leaf, _ in m.named_parameters() if leaf.startswith("weight")]
    tensors = dict(model.named_parameters())
    d = sum(tensors[name].numel() for name in names)

    if score == "saliency":
        scores, total = torch.zeros(d, dtype=tensors[names[0]].dtype), 0
        for i, (x, y) in enumerate(clients):
            first = torch.randperm(len(x), generator=generator(seed, "probe", 0, i))[:batch_size]
            n = len(x) if weights == "examples" else 1
            scores += n * saliency(model, x[first], y[first], names)
            total += n
        scores /= total
        flat = scores >= scores.sort(descending=True).values[math.floor(density * d) - 1]
    else:
        source = generator(seed, "mask")
        flat = torch.zeros(d, dtype=torch.bool)
        parts = [d] if score == "random" else [tensors[name].numel() for name in names]
        start = 0
        for n in parts:
            drawn = torch.rand(n, generator=source, dtype=torch.float64)
            flat[start + drawn.argsort(descending=True)[: math.floor(density * n)]] = True
            start += n
    mask, start = {}, 0
    for name in names:
        n = tensors[name].numel()
        mask[name] = flat[start : start + n].view_as(tensors[name])
        start += n

    server = {name: w.detach().clone() for name, w in tensors.items()}
    for name in names:
        server[name][~mask[name]] = 0
    history = []
    for t in range(rounds):
        active = cohort(seed, t, len(clients), participants)
        size = [len(clients[i][0]) if weights == "examples" else 1 for i in active]
        new = {name: torch.zeros_like(w) for name, w in server.items()}
        for i, n in zip(active, size, strict=True):
            x, y = clients[i]
            local = {name: w.clone().requires_grad_() for name, w in server.items()}
            sgd = torch.optim.SGD(local.values(), lr=lr, momentum=momentum, weight_decay=weight_decay)
            for batch in batches(len(x), seed, t, i, batch_size, epochs):
                sgd.zero_grad()
                dressed = {name: w * mask[name] if name in mask else w for name, w in local.items()}
                cross_entropy(functional_call(model, dressed, (x[batch],)), y[batch]).backward()
                sgd.step()
            for name, w in local.items():
                new[name] += n / sum(size) * w.detach()
        server = new
        history.append({name: w.clone() for name, w in server.items()})
    return history
