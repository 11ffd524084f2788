"""Hypothesis draws the same examples every time, so that a red test is red for everybody; HYPOTHESIS_PROFILE=search
draws new ones, and `nightly` many (`make nightly`)."""

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.register_profile("nightly", max_examples=100_000, deadline=None, print_blob=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
