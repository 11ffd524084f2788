"""The digits of scikit-learn: 1,797 images of 8 x 8 pixels in 10 classes, nothing to fetch."""

from __future__ import annotations

import torch

from lamina.data.client_data import ClientData
from lamina.data.transform import Images
from lamina.errors import DataError
from lamina.random import generator


def digits(clients: int = 10, partition: str = "dirichlet:0.5", seed: int = 0) -> ClientData:
    """scikit-learn's `load_digits` (the test part of the UCI set of Alpaydin and Kaynak), as ClientData.

    Pixels are uint8 [n, 8, 8, 1]: the 17 grey levels 0..16 times 15, so up to 240. The transform normalises them by the
    mean and standard deviation of all images. The test set is a fifth of every class, always the same: 355 images; the
    other 1,442 are split.

    Raises:
        DataError: E219 without scikit-learn.
        ConfigError: an impossible partition.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed",
            code="E219",
            where="digits",
            remedy="pip install 'lamina[demo]', or another data set",
        ) from error
    images, labels = (torch.from_numpy(part) for part in (load_digits().images, load_digits().target))
    x, y = (images * 15).to(torch.uint8)[..., None], labels.to(torch.int64)
    chosen = torch.zeros(len(y), dtype=torch.bool)
    draws = generator(0, "digits-test")
    for label in range(10):
        own = (y == label).nonzero().view(-1)
        chosen[own[torch.randperm(len(own), generator=draws)[: len(own) // 5]]] = True
    return ClientData.from_dataset(
        (x[~chosen], y[~chosen]),
        (x[chosen], y[chosen]),
        clients=clients,
        partition=partition,
        seed=seed,
        transform=Images(mean=(0.2873,), std=(0.3540,)),
        name="digits",
    )
