"""Checkpoints of flash-linear-attention, loaded without it, on any device: five of its models.

`AutoModelForCausalLM.from_pretrained(folder)` reads their config.json as a FwpConfig; their weights are renamed by
loading.py. What `save_pretrained` then writes is a checkpoint of this package. The model types are theirs: they are
registered here only while nothing else has registered them. Names and formulas: flash-linear-attention 0.6.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ACTIVATIONS = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}
FEATURE_MAPS = {"identity": "identity", "elu": "elu1", "relu": "relu"}

# Fields that mean the same here, under this name.
SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# Their defaults, which a config.json may leave out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "conv_size": 4,
    "use_short_conv": True,
    "allow_neg_eigval": False,
    "attn": None,
    "attnres_block_size": None,
    "conv_bias": False,
}
# What a model type may ask for that no layer here computes: field -> the value that is understood.
ONLY: dict[str, Any] = {"attn": None, "attnres_block_size": None, "conv_bias": False}


def _gated_deltanet(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rule": "gated_delta_net",
        "num_attention_heads": c["num_heads"],
        "num_value_heads": c["num_v_heads"],
        "head_dim": c["head_dim"],
        "expand_v": c["expand_v"],
        "output_gate": ACTIVATIONS[c["output_gate_activation"]] if c["use_gate"] else "none",
        **_convolution(c),
    }


def _delta_net(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rule": "delta_net",
        "rule_options": {"use_beta": c["use_beta"]},
        "num_attention_heads": c["num_heads"],
        "head_dim": round(c["hidden_size"] * c["expand_k"]) // c["num_heads"],
        "expand_v": c["expand_v"] / c["expand_k"],
        "output_gate": "silu" if c["use_gate"] else "none",
        "feature_map": "silu",
        "qk_norm": "l2",
        **_convolution(c),
    }


def _gated_deltaproduct(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rule": "delta_product",
        "rule_options": {"num_householder": c["num_householder"], "forget_gate": c["use_forget_gate"]},
        "num_attention_heads": c["num_heads"],
        "head_dim": c["head_dim"],
        "expand_v": c["expand_v"],
        "output_gate": "silu" if c.get("use_gate", c["use_output_gate"]) else "none",
        **_convolution(c),
    }


def _kda(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rule": "kimi_delta",
        "rule_options": {"lower_bound": c["lower_bound"]},
        "num_attention_heads": c["num_heads"],
        "num_value_heads": c["num_v_heads"],
        "head_dim": c["head_dim"],
        "expand_v": c["expand_v"],
        "output_gate": "low_rank_sigmoid_bias",
        **_convolution(c),
    }


def _linear_attn(c: Mapping[str, Any]) -> dict[str, Any]:
    size = round(c["hidden_size"] * c["expand_k"]) // c["num_heads"]
    return {
        "rule": "linear_attention",
        "rule_options": {"normalize": False},
        "num_attention_heads": c["num_heads"],
        "num_key_value_heads": c["num_kv_heads"],
        "head_dim": size,
        "expand_v": c["expand_v"] / c["expand_k"],
        "feature_map": FEATURE_MAPS[c["feature_map"]],
        "qk_norm": "none",
        "conv_size": 0,
        "output_gate": "none",
        "output_norm": True,
        "scale": size**-0.5,
    }


def _convolution(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "conv_size": c["conv_size"] if c["use_short_conv"] else 0,
        "allow_neg_eigval": c["allow_neg_eigval"],
        "beta_bias": False,
        "output_norm": True,
    }


Translation = Callable[[Mapping[str, Any]], dict[str, Any]]
# Model type -> (what it becomes, its own defaults, the only values of some fields that are understood).
MODEL_TYPES: dict[str, tuple[Translation, dict[str, Any], dict[str, Any]]] = {
    "gated_deltanet": (
        _gated_deltanet,
        {
            "num_hidden_layers": 21,
            "num_heads": 6,
            "num_v_heads": None,
            "head_dim": 256,
            "expand_v": 2.0,
            "use_gate": True,
            "output_gate_activation": "swish",
        },
        {},
    ),
    "delta_net": (
        _delta_net,
        {
            "num_hidden_layers": 24,
            "num_heads": 16,
            "expand_k": 1.0,
            "expand_v": 1.0,
            "use_gate": False,
            "use_beta": True,
            "qk_norm": "l2",
            "qk_activation": "silu",
        },
        {"qk_norm": "l2", "qk_activation": "silu"},
    ),
    "gated_deltaproduct": (
        _gated_deltaproduct,
        {
            "num_hidden_layers": 21,
            "num_heads": 6,
            "head_dim": 256,
            "expand_v": 2.0,
            "use_output_gate": True,
            "use_forget_gate": False,
            "num_householder": 1,
        },
        {},
    ),
    "kda": (
        _kda,
        {
            "num_hidden_layers": 24,
            "num_heads": 16,
            "num_v_heads": None,
            "head_dim": 128,
            "expand_v": 1.0,
            "lower_bound": None,
        },
        {},
    ),
    "linear_attn": (
        _linear_attn,
        {
            "num_hidden_layers": 24,
            "num_heads": 4,
            "num_kv_heads": None,
            "expand_k": 1.0,
            "expand_v": 1.0,
            "feature_map": "elementwise_product",
            "norm_q": False,
            "norm_k": False,
            "norm_feature_map": False,
            "elementwise_affine": True,
        },
        {"norm_q": False, "norm_k": False, "norm_feature_map": False, "elementwise_affine": True},
    ),
}


def translated(model_type: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of FwpConfig for a config.json of flash-linear-attention.

    Raises:
        ValueError: the checkpoint uses something that no layer here computes; it names the field.
    """
    translation, defaults, only = MODEL_TYPES[model_type]
    c = DEFAULTS | defaults | dict(given)
    for name, understood in (ONLY | only).items():
        if c[name] != understood:
            raise ValueError(
                f"this {model_type} checkpoint has {name}={c[name]!r}, which hf_fwp does not compute (only "
                f"{understood!r}); load it with flash-linear-attention"
            )
    if model_type == "linear_attn" and c["feature_map"] not in FEATURE_MAPS:
        raise ValueError(
            f"this linear_attn checkpoint has feature_map={c['feature_map']!r}, which hf_fwp does not compute (only "
            f"{', '.join(FEATURE_MAPS)}); load it with flash-linear-attention"
        )
    width = c["intermediate_size"]
    if width is None:
        width = -(-int(c["hidden_size"] * c["hidden_ratio"] * 2 / 3) // 256) * 256
    act = ACTIVATIONS.get(c["hidden_act"], c["hidden_act"])
    same = {name: c[name] for name in SAME if name in c}
    return same | {"intermediate_size": width, "hidden_act": act, "mlp_type": "swiglu"} | translation(c)


class Checkpoint(PreTrainedConfig):
    """Reads a config.json of flash-linear-attention; what comes out is a FwpConfig."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from ..configuration import FwpConfig

        unused = kwargs.pop("return_unused_kwargs", False)
        config = FwpConfig(**translated(cls.model_type, config_dict))
        fields = {name: kwargs.pop(name) for name in list(kwargs) if hasattr(config, name)}
        for name, value in fields.items():
            setattr(config, name, value)
        return (config, kwargs) if unused else config


def register_checkpoints() -> None:
    """Let AutoConfig read the model types that nothing else reads."""
    for model_type in MODEL_TYPES:
        if model_type not in CONFIG_MAPPING:
            AutoConfig.register(model_type, type(model_type, (Checkpoint,), {"model_type": model_type}))
