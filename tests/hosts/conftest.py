"""Every test that takes `name` or `teacher` runs for every family in the table."""

import pytest
import torch
from teachers import SHAPES, tiny_teacher

from hf_fwp.hosts import HOSTS


@pytest.fixture(params=list(HOSTS))
def name(request):
    return request.param


@pytest.fixture
def teacher(name):
    return tiny_teacher(name)


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(1, SHAPES["vocab_size"], (2, 13))
