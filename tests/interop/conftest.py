"""A process that has not imported flash-linear-attention, wherever a test needs one."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_fwp.interop import fla

OURS = {model_type: CONFIG_MAPPING[model_type] for model_type in fla.MODEL_TYPES}


@pytest.fixture
def fla_not_imported(monkeypatch):
    """transformers' hybrids import that library where it is installed, and its classes take their model types then."""
    for model_type, config_class in OURS.items():
        monkeypatch.setitem(CONFIG_MAPPING._extra_content, model_type, config_class)
