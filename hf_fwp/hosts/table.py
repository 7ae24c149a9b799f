"""The pretrained families whose attention can be replaced: a row per family, read from top to bottom."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "fwp_"

HEADS: dict[str, str] = {
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}

# mixer option <- the host's config attribute (a name), or a constant (True, False)
SHAPES: dict[str, str | bool] = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "initializer_range": "initializer_range",
    "norm_eps": "rms_norm_eps",
}


@dataclass(frozen=True)
class Host:
    """What a family calls its parts, and what its attention implies for the mixer that takes its place."""

    name: str  # transformers' model_type, which is also the name of its folder there
    title: str  # LlamaForCausalLM = title + a key of HEADS
    mixer: Mapping[str, str | bool] = field(default_factory=dict)
    attention: str = "self_attn"  # the attribute of a block that is replaced
    blocks: str = "layers"  # the attribute of the base model that lists the blocks
    projections: str = "separate"  # the weight map, a key of hf_fwp.conversion.families.WEIGHT_MAPS
    heads: tuple[str, ...] = tuple(HEADS)
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    @property
    def model_type(self) -> str:
        """The model type of the converted family."""
        return PREFIX + self.name


HOSTS: dict[str, Host] = {
    host.name: host
    for host in (
        Host("llama", "Llama", {**SHAPES, "qkv_bias": "attention_bias", "o_bias": "attention_bias"}),
        Host("mistral", "Mistral", SHAPES),
        Host("qwen2", "Qwen2", {**SHAPES, "qkv_bias": True}),
        Host("qwen3", "Qwen3", {**SHAPES, "qkv_bias": "attention_bias", "o_bias": "attention_bias", "head_norm": True}),
    )
}


def find_host(config: Any) -> Host:
    """The row for a teacher's (or a converted model's) config, or an error that says why there is none."""
    name = config.model_type
    if name in HOSTS:
        return HOSTS[name]
    if name.removeprefix(PREFIX) in HOSTS:
        return HOSTS[name.removeprefix(PREFIX)]
    families = ", ".join(HOSTS)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name!r} is an encoder-decoder: its cross-attention reads the encoder's output, which a causal fast "
            f"weight cannot replace; give a decoder-only model of one of the families {families}"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"{name!r} uses multi-head latent attention (kv_lora_rank={config.kv_lora_rank}): it has no keys and "
            f"values per head that a fast weight could take over; give a model of one of the families {families}"
        )
    close = difflib.get_close_matches(name, HOSTS, n=1)
    hint = f" (the closest is {close[0]!r})" if close else ""
    raise ValueError(
        f"unknown model family {name!r}; the families whose attention can be replaced are {families}{hint}. "
        "To add one, write its row in hf_fwp/hosts/table.py, and a weight map in conversion/families/ if its "
        "projections are not separate q_proj, k_proj, v_proj and o_proj"
    )
