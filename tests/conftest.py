"""What every test starts from: one thread, fixed seeds and repeatable property tests."""

import os

# The problems here are tiny, and on a busy machine threads that wait for each other make the suite
# ten times slower. Before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random

import hypothesis
import numpy as np
import pytest
import torch

# The same examples on every run: a red build is then red for everyone. To look for new ones,
# HYPOTHESIS_PROFILE=default.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seed():
    """A test's random numbers must not depend on the tests that ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
