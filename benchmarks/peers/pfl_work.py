"""pfl-research on one of the works of benchmarks/speed.py: `python pfl_work.py WORK.npz WORK ROUNDS [FIRST]`.

Prints seconds per round as JSON in the last line: whole central iterations (local training, all-reduce, central
update), after one iteration that is not reported (pfl evaluates in its first one). No evaluation in the others.

pfl's FederatedAveraging on its SimulatedBackend under `torchrun`, one process of one torch thread per core; the data of
all clients resident in every process, cut into batches once; clients dealt to the processes by their number of steps
(pfl's `user_id_to_weight`).

Needs `pip install -c constraints.txt "pfl[pytorch]" torch` in an environment of its own.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from common import MODELS, Task, arguments, cores, load, report, rounds
from torch import Tensor, nn

try:
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.internal.ops import get_ops
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel
except ImportError as error:
    sys.exit(f'pfl_work.py: {error}; pip install -c constraints.txt "pfl[pytorch]" torch')


class Trained(nn.Module):
    """A model as pfl takes it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        with torch.no_grad():
            return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}


class Client(Dataset):
    """pfl's data set of one user; with `steps`, one pass has as many batches, going on from the start."""

    def __init__(self, task: Task, client: int):
        indices = task.clients[client]
        super().__init__((task.x[indices], task.y[indices]), user_id=client)
        self.steps = task.steps

    def iter(self, batch_size: int | None) -> Iterable[Any]:
        batches = super().iter(batch_size)
        return batches if self.steps is None else itertools.islice(itertools.cycle(batches), self.steps)


class InOrder(Client):
    """The same with batches that are given."""

    def __init__(self, task: Task, client: int, round: int):
        super().__init__(task, client)
        self.batches = [(task.x[i], task.y[i]) for i in task.given[round, client]]

    def iter(self, batch_size: int | None) -> Iterable[Any]:
        return iter(self.batches)


class Stopwatch(TrainingProcessCallback):
    """Times of the ends of central iterations."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_central_iteration(self, *args: Any, **kwargs: Any) -> tuple[bool, Metrics]:
        self.ends.append(time.perf_counter())
        return False, Metrics()


def launch() -> None:
    """This process becomes torchrun, on the loopback interface."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "PFL_PYTORCH_DEVICE": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={cores()}"]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


def main() -> None:
    path, name, count, first = arguments()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        launch()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    task = load(path)
    cohorts = rounds(task, first, count)
    clients = [] if task.given else [Client(task, client) for client in range(len(task.clients))]
    stopwatch = Stopwatch()

    def user(client: int) -> Dataset:
        return InOrder(task, client, first - 1 + len(stopwatch.ends)) if task.given else clients[client]

    order: Iterator[int] = itertools.cycle(itertools.chain(*cohorts))  # pfl draws ahead
    weights = {client: task.count(client) for client in range(len(task.clients))}
    data = FederatedDataset(user, partial(next, order), weights)
    module = Trained(task.start(MODELS[name]()))
    central = torch.optim.SGD(module.parameters(), lr=1.0)
    model = PyTorchModel(module, partial(torch.optim.SGD, momentum=task.momentum), central)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=len(cohorts),
            evaluation_frequency=10**9,
            train_cohort_size=len(cohorts[0]),
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data, [WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=1 if task.steps else task.epochs,
            local_learning_rate=task.lr,
            local_batch_size=task.batch_size,
        ),
        NNEvalHyperParams(local_batch_size=task.batch_size),
        [stopwatch],
        send_metrics_to_platform=False,
    )
    if get_ops().distributed.global_rank == 0:
        report(np.diff(stopwatch.ends).tolist(), task.accuracy(module.model))


if __name__ == "__main__":
    main()
