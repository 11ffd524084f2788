"""Sums inside an operation depend on the number of threads, and comparisons with plain loops are to rounding."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
