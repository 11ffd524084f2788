"""Normalisation layers behind one knob."""

from __future__ import annotations

from typing import Literal

from torch import nn

Norm = Literal["batch", "group", "none"]


def normalise(norm: Norm, channels: int, groups: int = 32) -> nn.Module:
    """The layer that follows a convolution with `channels` outputs; "none" is the identity."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(group_count(channels, groups), channels)
    return nn.Identity()


def group_count(channels: int, groups: int = 32) -> int:
    """The largest divisor of `channels` that is at most `groups` and leaves two or more channels to a group.

    With groups=32: 32 from 64 channels on where 32 divides them, 8 for 16 channels, 16 for 32.
    """
    return max(count for count in range(1, min(groups, max(1, channels // 2)) + 1) if channels % count == 0)
