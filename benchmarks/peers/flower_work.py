"""Flower on one of the works of benchmarks/speed.py: `python flower_work.py WORK.npz WORK ROUNDS [FIRST]`.

Prints seconds per round as JSON in the last line: from the start of FedAvg's configure_train to the end of its
aggregate_train, after one round that is not reported (Ray's actors load the data in it). No evaluation.

Flower's simulation runtime with its stock FedAvg, on Ray with one actor per core, one CPU per client, one torch thread
per actor, and all data resident in every actor. There are as many SuperNodes as clients in a cohort, and a message
says which client it is for: with a SuperNode for every client (Flower scans all of them every 0.1 s) rounds of small
models take longer. The client is a plain loop over index batches: no DataLoader, the model is built once per actor.

Needs `pip install -c constraints.txt "flwr[simulation]" torch` in an environment of its own.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import cache

# Read by flwr and ray when they are imported: nothing leaves this machine.
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # its actors would run at 15 and lose to anything else on the machine
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its name for "more than this machine": 0 keeps it on loopback
}

import torch
from common import MODELS, Task, arguments, cores, load, report, rounds
from torch import nn

try:
    import ray
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
except ImportError as error:
    sys.exit(f'flower_work.py: {error}; pip install -c constraints.txt "flwr[simulation]" torch')

app = ClientApp()


@cache
def prepared(path: str, name: str) -> tuple[Task, nn.Module]:
    """Once per actor."""
    torch.set_num_threads(1)
    return load(path), MODELS[name]()


@app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    task, model = prepared(config["path"], config["name"])
    indices = task.clients[config["client"]]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=task.momentum)
    left = task.count(config["client"])
    while left > 0:
        order = task.given.get((config["round"], config["client"]))
        for batch in order or torch.split(indices[torch.randperm(len(indices))], task.batch_size)[:left]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(task.x[batch]), task.y[batch]).backward()
            optimizer.step()
            left -= 1
    metrics = MetricRecord({"num-examples": len(indices)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


class GivenCohorts(FedAvg):
    """FedAvg that is told whom to train, and takes the time."""

    def __init__(self, path: str, name: str, cohorts: list[list[int]], first: int):
        super().__init__(fraction_evaluate=0.0)
        self.path, self.name, self.cohorts, self.first = path, name, cohorts, first
        self.seconds: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.began = time.perf_counter()
        cohort = self.cohorts[server_round - 1]
        t = self.first + server_round - 2  # of WORK.npz
        return [
            Message(RecordDict({"arrays": arrays, "config": self.config(t, client)}), node, MessageType.TRAIN)
            for client, node in zip(cohort, grid.get_node_ids(), strict=True)
        ]

    def config(self, t: int, client: int) -> ConfigRecord:
        return ConfigRecord({"path": self.path, "name": self.name, "client": client, "round": t})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        failed = [message.error.reason for message in replies if message.has_error()]
        expected = len(self.cohorts[server_round - 1])
        if failed or len(replies) != expected:
            raise RuntimeError(f"round {server_round}: {len(replies)} of {expected} replies, failures: {failed[:1]}")
        result = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self.began)
        return result


def main() -> None:
    path, name, count, first = arguments()
    task = load(path)
    cohorts = rounds(task, first, count)
    strategy = GivenCohorts(path, name, cohorts, first)
    server = ServerApp()
    model = MODELS[name]()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < len(cohorts[0]):  # they register while this is running
            time.sleep(0.05)
        torch.manual_seed(0)
        weights = ArrayRecord(task.start(model).state_dict())
        result = strategy.start(grid, weights, num_rounds=len(cohorts), timeout=1800)
        model.load_state_dict(result.arrays.to_torch_state_dict())

    with tempfile.TemporaryDirectory(prefix="flwr-") as folder:
        os.environ["FLWR_HOME"] = folder
        init = {"num_cpus": cores(), "num_gpus": 0, "_temp_dir": folder}
        backend = {"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        try:
            run_simulation(server, app, num_supernodes=len(cohorts[0]), backend_config=backend)
        finally:
            ray.shutdown()
    if len(strategy.seconds) != len(cohorts):
        sys.exit(f"flower_work.py: {len(strategy.seconds)} of {len(cohorts)} rounds were run")
    report(strategy.seconds[1:], task.accuracy(model))


if __name__ == "__main__":
    import flower_work  # under its own name, so that actors import the ClientApp and keep what it has prepared

    flower_work.main()
