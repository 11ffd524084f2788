"""Layers of ResNet-20 with GroupNorm, forward and backward, in either memory layout: `python benchmarks/layouts.py`."""

from __future__ import annotations

import time

import torch
from torch import nn

from lamina.engine.allocator import keep_memory

BATCH = 32
LAYERS = ((16, 32), (32, 16), (64, 8))  # channels, height
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def typical(layer: nn.Module, x: torch.Tensor, g: torch.Tensor, times: int = 60) -> float:
    """Milliseconds of a forward and backward pass: the median."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        torch.autograd.grad(layer(x), (x, *layer.parameters()), g)
        taken.append(time.perf_counter() - began)
    return 1e3 * sorted(taken)[times // 2]


def main() -> None:
    keep_memory()
    torch.set_num_threads(1)
    print("| batch x channels x height x width | layout | convolution, ms | GroupNorm, ms |\n|---|---|---|---|")
    for channels, height in LAYERS:
        for name, layout in LAYOUTS.items():
            shape = (BATCH, channels, height, height)
            x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
            g = torch.randn(shape).contiguous(memory_format=layout)
            layers = (
                nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=layout),
                nn.GroupNorm(channels // 2, channels),
            )
            cells = [typical(layer, x, g) for layer in layers]
            print(f"| {' x '.join(map(str, shape))} | {name} | {cells[0]:.2f} | {cells[1]:.2f} |")


if __name__ == "__main__":
    main()
