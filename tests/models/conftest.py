"""Every test that takes `kind` or `model` runs for every rule and for the hybrids."""

import pytest
from tiny_fwp import KINDS, tiny_model


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return tiny_model(kind)
