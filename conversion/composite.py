"""The language model inside a vision-language model, as a model of its own: what a conversion takes as its teacher."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_fwp.hosts import HOSTS


def text_config_of(config: Any) -> Any | None:
    """The config of the language part of a composite model whose family can be converted; None of any other config."""
    if getattr(config, "is_encoder_decoder", False):
        return None
    text = config.get_text_config(decoder=True)
    return text if text is not config and text.model_type in HOSTS else None


def language_part(model: PreTrainedModel) -> PreTrainedModel:
    """A causal language model made of the decoder and the output head of `model`: the same modules, no copies.

    Given tokens alone it answers as the composite model does. Raises ValueError for a decoder of another make.
    """
    text = text_config_of(model.config)
    if text is None:
        raise ValueError(f"{model.config.model_type!r} has no language part of a known family: {', '.join(HOSTS)}")
    decoder: Any = model.get_decoder()
    head: Any = model.get_output_embeddings()
    decoder = getattr(decoder, "base_model", decoder)
    config = copy.deepcopy(text)
    config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    with torch.device("meta"):
        causal: Any = AutoModelForCausalLM.from_config(config)
    if type(causal.base_model) is not type(decoder):
        raise ValueError(
            f"the decoder of {model.config.model_type!r} is a {type(decoder).__name__}, where a language model of the "
            f"family {text.model_type!r} has a {type(causal.base_model).__name__}; give the language model itself"
        )
    setattr(causal, causal.base_model_prefix, decoder)
    causal.set_output_embeddings(head)
    causal.generation_config = model.generation_config
    causal.name_or_path = model.name_or_path
    return causal.train(model.training)
