"""Hypothesis draws the same examples every time, so that a red test is red for everybody; HYPOTHESIS_PROFILE=search
draws new ones."""

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
