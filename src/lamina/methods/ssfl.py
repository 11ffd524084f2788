"""SSFL: one sparse subnetwork for all, chosen once by the clients' mean saliency before training.

Ohib et al., *SSFL: Salient Sparse Federated Learning* (arXiv 2405.09037, TMLR).

    once, client:   s_i = |g * w|                 # g: gradient of one minibatch at the initial model w
    once, server:   s = sum p_i s_i;   mask = s >= the floor(density * d)-th largest of all d entries of s
                    w <- w * mask
    every step:     g <- g * mask                 # so nothing outside the mask ever moves

The threshold is one for the whole model; the first and the last layer compete as any other. Entries that tie with it
are kept, so a few more than floor(density * d) may stay. Masked are the weights of convolutions, Linear and recurrent
layers and of attention's input projection (three Linear layers in one tensor); never biases, norm parameters or
embeddings.

Differs from the released code: saliency is averaged with the federation's weights p_i (the paper's n_k / n; theirs is
uniform) over the clients that answer, on a batch without augmentation (theirs augments), in evaluation mode as there;
a threshold of 0, which would keep everything, and a mask that empties a layer are errors (theirs go on); the mask
stands as bits and its bytes are counted, in both directions (theirs counts non-zero uploaded values); momentum,
clipping and rounds are the experiment's own.
With others: the mask never changes, so layers may wait (FedLAMA), be recycled (FedLUAR) or be stored (error feedback,
server moments): whatever others keep stays 0 outside it. Sparse uplinks choose among kept entries.
Cost: before round 0 the initial model to every client and one value per maskable weight back (phase "probe"); the mask,
one bit per entry, with a client's first plan; afterwards kept values only, both ways. The server keeps the mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch

from lamina.errors import ConfigError, expect
from lamina.method import Task
from lamina.methods.masking import Masked, Server, drawn, expect_density, partial, prunable, split
from lamina.random import generator
from lamina.tree import Message, Params, cut, top_fraction

SCORES = ("saliency", "random", "random_layerwise")


def salient(scores: Params, keep: int) -> Params:
    """Everything at or above the `keep`-th largest of all scores.

    Raises:
        ConfigError: E117 when that is 0.
    """
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    threshold = torch.kthvalue(flat, flat.numel() - keep + 1).values
    positive = int((flat > 0).sum())
    expect(
        bool(threshold > 0),
        f"SSFL: to keep {keep} of {flat.numel()} weights, some with saliency |gradient * weight| = 0 would be chosen: "
        f"only {positive} have more, and all of the others are equal",
        code="E117",
        where="method.density",
        remedy=f"use a density of at most {positive / flat.numel():.6g}, a larger local.batch_size, weights that are "
        "not initialised to 0, or score='random'",
    )
    return {name: s >= threshold for name, s in scores.items()}


@dataclass(frozen=True)
class SSFL(Masked):
    """Args:
    density: share of the maskable weights that is kept, in (0, 1]; 1 is FedAvg under a mask of everything.
    score: "saliency"; "random" = one random mask of the same count over the whole model; "random_layerwise" = the same
        share, floor(density * numel), of every layer. The random ones ask the clients nothing.
    allow_empty: go on when a layer keeps no entry at all, so that its output is its bias.
    """

    density: float = 0.5
    score: Literal["saliency", "random", "random_layerwise"] = "saliency"
    allow_empty: bool = False

    masks = "fixed"

    def __post_init__(self) -> None:
        expect_density(self.density)
        fine = self.score in SCORES
        expect(fine, f"score={self.score!r}: expected one of {', '.join(SCORES)}", where="method.score")
        fine = isinstance(self.allow_empty, bool)
        expect(fine, f"allow_empty={self.allow_empty!r}: expected true or false", where="method.allow_empty")

    def bind(self, task: Task) -> Self:
        bound = super().bind(task)
        d = sum(layer.numel for layer in prunable(task.layers))
        expect(
            math.floor(self.density * d) >= 1,
            f"density={self.density} keeps none of the model's {d} maskable weights",
            code="E117",
            where="method.density",
            remedy=f"use a density of at least {1 / d:.3g}",
        )
        return bound

    def has(self, hook: str) -> bool:
        return super().has(hook) and (hook != "probe" or self.score == "saliency")

    def probe(self, params: Params, grads: Params) -> Message:
        if self.score != "saliency":
            return {}
        return {"saliency": {x.name: (grads[x.name] * params[x.name]).abs() for x in prunable(self.task.layers)}}

    def setup(self, server: Server, params: Params, mean: Message) -> tuple[Params, Server]:
        mask = {} if self.density == 1 else partial(self._mask(params, mean))
        empty = {name: m.numel() for name, m in mask.items() if not bool(m.any())}
        if empty and not self.allow_empty:
            names = ", ".join(f"{name} ({numel} entries)" for name, numel in empty.items())
            raise ConfigError(
                f"{self!r}: the mask keeps nothing of {names}, so nothing could pass there",
                code="E117",
                where="method.density",
                remedy="use a higher density, or allow_empty=True to train without",
            )
        return cut(params, mask), Server(mask)

    def _mask(self, params: Params, mean: Message) -> Params:
        layers = prunable(self.task.layers)
        source = generator(self.task.seed, "mask")
        if self.score == "random_layerwise":
            return drawn(layers, {x.name: math.floor(self.density * x.numel) for x in layers}, source)
        keep = math.floor(self.density * sum(x.numel for x in layers))
        if self.score == "saliency":
            return salient(mean["saliency"], keep)
        scores = torch.rand(sum(x.numel for x in layers), generator=source, dtype=torch.float64)
        return split(top_fraction(scores, keep), {x.name: params[x.name] for x in layers})
