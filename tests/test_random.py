"""Addressed randomness: a stream is a function of its address and of nothing else."""

from __future__ import annotations

import hashlib

import torch

from lamina.random import address, generator

PINNED = 895556546108803651  # a published run would change if this did


def test_an_address_is_the_first_63_bits_of_a_sha256() -> None:
    digest = hashlib.sha256(b"lamina:7:order:3:12").digest()
    assert address(7, "order", 3, 12) == int.from_bytes(digest[:8], "little") // 2
    assert address(7, "order", 3, 12) == PINNED
    assert 0 <= address(2**70, "order") < 2**63


def test_addresses_differ_in_every_part() -> None:
    parts = [(s, p, r, c) for s in range(3) for p in ("order", "augment") for r in range(3) for c in range(3)]
    assert len({address(*part) for part in parts}) == len(parts)


def test_a_generator_starts_at_its_address_every_time() -> None:
    first, second = (torch.rand(5, generator=generator(1, "order", 2, 3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.rand(5, generator=generator(1, "order", 3, 2)))


def test_generators_leave_the_global_one_alone() -> None:
    before = torch.default_generator.get_state()
    torch.rand(5, generator=generator(1, "order"))
    assert torch.equal(torch.default_generator.get_state(), before)
