"""Every test that takes `name` runs for every kind of model; one that takes `model` gets it in float64."""

import pytest
from every_model import MODELS, every_model


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return every_model(name)
