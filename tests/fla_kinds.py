"""Our models of every kind that flash-linear-attention has too."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_fwp

INSTALL = "pip install --no-deps flash-linear-attention fla-core einops"
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8}
LINEAR: dict[str, Any] = {
    "rule": "linear_attention",
    "rule_options": {"normalize": False},
    "scale": 8**-0.5,
    "output_norm": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "linear, grouped": LINEAR | {"num_key_value_heads": 2, "feature_map": "relu", "expand_v": 0.5},
    "delta": {"rule": "delta_net", "qk_norm": "l2", "feature_map": "silu"},
    "delta, bare": {
        "rule": "delta_net",
        "rule_options": {"use_beta": False},
        "output_gate": "silu",
        "conv_size": 0,
        "head_dim": 16,
        "expand_v": 1.5,
    },
    "gated": {"rule": "gated_delta_net", "num_value_heads": 8, "tie_word_embeddings": True},
    "gated, sigmoid": {"rule": "gated_delta_net", "output_gate": "sigmoid", "conv_size": 3, "norm_eps": 1e-5},
    "product": {"rule": "delta_product", "rule_options": {"num_householder": 3}},
    "product, without decay": {"rule": "delta_product", "rule_options": {"forget_gate": False}, "output_gate": "none"},
    "kimi": {"rule": "kimi_delta", "rule_options": {"lower_bound": -5.0}},
    "kimi, with bias": {"rule": "kimi_delta", "output_gate": "low_rank_sigmoid_bias", "intermediate_size": 96},
}


def model_of(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_fwp.FwpConfig(**SIZES | MODELS[name])).eval()
    for weight in model.parameters():
        if weight.ndim < 2:
            weight.data += torch.rand_like(weight) / 4
    return model
