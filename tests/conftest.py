"""Hypothesis draws the same examples every time, so that a red test is red for everybody; HYPOTHESIS_PROFILE=search
draws new ones, and `nightly` many (`make nightly`)."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from lamina.engine import cuda

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.register_profile("nightly", max_examples=100_000, deadline=None, print_blob=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session", autouse=True)
def no_gpu() -> Iterator[None]:
    """So that a test means the same on every machine: `auto` speaks of a GPU. Those that need one say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "available", lambda: False)
        yield
