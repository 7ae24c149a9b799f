"""Everything here runs on a GPU, and is skipped without one. It needs torch, triton, transformers and pytest alone."""

from pathlib import Path

import operators as problems
import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    missing = problems.GPU == "cuda" and not torch.cuda.is_available()
    without = pytest.mark.skipif(missing, reason="no GPU that PyTorch can use")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(without)


@pytest.fixture(autouse=True)
def _full_precision():
    """float32 means float32, in the recurrence too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
