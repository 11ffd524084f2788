"""The same with a model and data for `lamina run mine.toml`; on its own it trains as before."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lamina

table = np.genfromtxt(Path(__file__).parent / "clinics.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
columns = [table["age"], table["pressure"], table["glucose"], table["smoker"] == "yes"]
x = torch.tensor(np.stack(columns, axis=1), dtype=torch.float32)
x = (x - x.mean(0)) / x.std(0)
y = torch.tensor(table["ill"] == "yes", dtype=torch.int64)
train, test = TensorDataset(x[:480], y[:480]), TensorDataset(x[480:], y[480:])


def network():
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


def model(cfg):
    return network()


def data(cfg):
    clinics = {"clinic": table["clinic"][:480]}
    return lamina.ClientData.from_dataset(train, test, partition="column:clinic", columns=clinics)


def main():
    torch.manual_seed(0)
    model = network()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        for inputs, labels in DataLoader(train, batch_size=32, shuffle=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimiser.step()
    inputs, labels = test.tensors
    print(f"accuracy {(model(inputs).argmax(1) == labels).float().mean():.3f}")


if __name__ == "__main__":
    main()
