"""What every test shares: one thread (the machine is shared, and results do not depend on it) and a fixed seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _steady():
    torch.set_num_threads(1)
    torch.manual_seed(0)
