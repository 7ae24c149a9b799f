"""Every test starts as in a process that has not imported flash-linear-attention."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_fwp.interop import fla

OURS = {model_type: CONFIG_MAPPING[model_type] for model_type in fla.MODEL_TYPES}


@pytest.fixture(autouse=True)
def _its_model_types_are_read_here(monkeypatch):
    """transformers' hybrids import that library where it is installed, and it registers its own classes then."""
    for model_type, config_class in OURS.items():
        monkeypatch.setitem(CONFIG_MAPPING._extra_content, model_type, config_class)
