"""The published experiments, as data: settings, arms, and what the papers claim of the outcome.

lamina list recipes
lamina reproduce fedlama-cifar10 --scaled --seeds 0,1,2
"""

from __future__ import annotations

from lamina.recipes import combinations, deeper, fedlama, fedluar, flare, lips, ssfl
from lamina.recipes.recipe import Arm, Claim, Extra, Outcome, Recipe, Table, Variant, Verdict

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        fedlama.CIFAR10,
        fedluar.CIFAR10,
        ssfl.CIFAR10,
        lips.CIFAR10,
        flare.MNIST_FC,
        flare.MNIST_CNN,
        flare.SHAKESPEARE_GRU,
        deeper.CIFAR10,
        combinations.CIFAR10,
    )
}

__all__ = ["RECIPES", "Arm", "Claim", "Extra", "Outcome", "Recipe", "Table", "Variant", "Verdict"]
