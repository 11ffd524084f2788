"""Peak memory of a run against the number of clients.

    python benchmarks/memory.py [--rounds 5]

The same 60,000 images of Fashion-MNIST are split over more and more clients, 10 of which train per round (W1's model,
engine "processes"). Printed is the peak resident memory of the parent and of the largest worker, in MiB.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

COUNTS = (100, 1000, 6000)


def one(clients: int, rounds: int) -> None:
    import lamina

    data = lamina.data.fashion_mnist(clients=clients, partition="iid")
    local = lamina.LocalSGD(lr=0.02, batch_size=32, steps=2)
    fed = lamina.Federation(lamina.models.cnn, data, cohort=10, local=local, engine="processes", workers=2)
    for _ in fed.run(rounds, evaluate_every=rounds):
        pass
    parent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"| {clients:,} | {parent:.0f} | {worker:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)  # one measurement, in a process of its own
    arguments = parser.parse_args()
    if arguments.clients:
        one(arguments.clients, arguments.rounds)
        return
    print("| clients | parent, MiB | largest worker, MiB |\n|---|---|---|", flush=True)
    for clients in COUNTS:
        command = [sys.executable, __file__, "--clients", str(clients), "--rounds", str(arguments.rounds)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
