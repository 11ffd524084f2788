"""The same, federated: the table is split by clinic, and FedLAMA trains the model across them."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lamina

table = np.genfromtxt(Path(__file__).parent / "clinics.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
columns = [table["age"], table["pressure"], table["glucose"], table["smoker"] == "yes"]
x = torch.tensor(np.stack(columns, axis=1), dtype=torch.float32)
x = (x - x.mean(0)) / x.std(0)
y = torch.tensor(table["ill"] == "yes", dtype=torch.int64)
train, test = TensorDataset(x[:480], y[:480]), TensorDataset(x[480:], y[480:])


def network():
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


def main():
    clinics = {"clinic": table["clinic"][:480]}
    data = lamina.ClientData.from_dataset(train, test, partition="column:clinic", columns=clinics)
    local = lamina.LocalSGD(lr=0.1, momentum=0.9, batch_size=32, epochs=1)
    fed = lamina.Federation(network, data, method=lamina.FedLAMA(phi=2), local=local, cohort="all", seed=0)
    fed.fit(rounds=20)


if __name__ == "__main__":
    main()
