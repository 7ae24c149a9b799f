"""One of our models as a checkpoint of flash-linear-attention: the way back of fla.py, and held to it.

What is written is read again by fla.py before any file exists: where the model that comes out is not the one that went
in, that library has no such model, and the option that differs is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration import FwpConfig
from ..options import MIXER_DEFAULTS, MixerOptions
from .fla import FEATURE_MAPS, SAME, translated


def _gated_deltanet(c: FwpConfig, o: MixerOptions) -> dict[str, Any]:
    gate = "sigmoid" if o.output_gate == "sigmoid" else "swish"
    heads = {"num_heads": o.num_attention_heads, "num_v_heads": o.num_value_heads, "head_dim": o.head_dim}
    return heads | {"use_gate": o.output_gate != "none", "output_gate_activation": gate}


def _delta_net(c: FwpConfig, o: MixerOptions) -> dict[str, Any]:
    width = o.num_attention_heads / c.hidden_size
    return {
        "num_heads": o.num_attention_heads,
        "expand_k": o.head_dim * width,
        "expand_v": o.value_head_dim * width,
        "use_gate": o.output_gate != "none",
        "use_beta": o.rule_options["use_beta"],
    }


def _gated_deltaproduct(c: FwpConfig, o: MixerOptions) -> dict[str, Any]:
    return {
        "num_heads": o.num_attention_heads,
        "head_dim": o.head_dim,
        "use_output_gate": o.output_gate != "none",
        "use_forget_gate": o.rule_options["forget_gate"],
        "num_householder": o.rule_options["num_householder"],
    }


def _kda(c: FwpConfig, o: MixerOptions) -> dict[str, Any]:
    bound = o.rule_options["lower_bound"]
    heads = {"num_heads": o.num_attention_heads, "num_v_heads": o.num_value_heads, "head_dim": o.head_dim}
    return heads | {"lower_bound": bound, "safe_gate": bound is not None}


def _linear_attn(c: FwpConfig, o: MixerOptions) -> dict[str, Any]:
    width = o.num_attention_heads / c.hidden_size
    theirs = {ours: theirs for theirs, ours in FEATURE_MAPS.items()}
    return {
        "num_heads": o.num_attention_heads,
        "num_kv_heads": o.num_key_value_heads,
        "expand_k": o.head_dim * width,
        "expand_v": o.value_head_dim * width,
        "feature_map": theirs.get(o.feature_map, "identity"),
    }


Translation = Callable[[FwpConfig, MixerOptions], dict[str, Any]]
# Rule -> (their model type, their class, their own fields).
MODEL_TYPES: dict[str, tuple[str, str, Translation]] = {
    "linear_attention": ("linear_attn", "LinearAttentionForCausalLM", _linear_attn),
    "delta_net": ("delta_net", "DeltaNetForCausalLM", _delta_net),
    "gated_delta_net": ("gated_deltanet", "GatedDeltaNetForCausalLM", _gated_deltanet),
    "delta_product": ("gated_deltaproduct", "GatedDeltaProductForCausalLM", _gated_deltaproduct),
    "kimi_delta": ("kda", "KDAForCausalLM", _kda),
}
# Pattern in our names -> theirs: the way back of loading.RENAMED and loading.DECAYS.
NAMES = {
    r"^model\.embed_tokens\.": "model.embeddings.",
    r"\.mixer_norm\.": ".attn_norm.",
    r"\.mixer\.gates\.f_down\.": ".attn.f_proj.0.",
    r"\.mixer\.gates\.f_up\.": ".attn.f_proj.1.",
    r"\.mixer\.(gates\.)?": ".attn.",
}
# Fields that change no output, and those that `mixer_options` tells of every layer.
NOT_COMPARED = {"rule", "backend", "chunked_loss", "use_cache", "rope_parameters", "rule_options", *MIXER_DEFAULTS}

INSTEAD = "publish it as it is (hf-fwp push)"


def write(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and safetensors files as that library reads them.

    Raises:
        ValueError: that library has no such model; it names the option.
    """
    config = their_config(model.config)
    weights = their_weights(model, config["model_type"])
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def check(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that `write` would refuse; its weights are not looked at."""
    their_config(model.config)


def their_config(config: Any) -> dict[str, Any]:
    """config.json of flash-linear-attention for one of ours."""
    if not isinstance(config, FwpConfig):
        raise ValueError(
            f"format='fla' writes models of type 'fwp', not {config.model_type!r}: the blocks of a converted model are "
            f"its family's, which flash-linear-attention does not have; {INSTEAD}"
        )
    kinds = sorted(set(config.rules))
    if len(kinds) > 1 or kinds[0] not in MODEL_TYPES:
        raise ValueError(
            f"flash-linear-attention has no model with rule={', '.join(kinds)}; format='fla' writes models of one rule "
            f"in every layer: {', '.join(MODEL_TYPES)}"
        )
    name, architecture, translation = MODEL_TYPES[kinds[0]]
    options = config.mixer_options(0)
    theirs = {field: getattr(config, field) for field in SAME}
    theirs |= {"intermediate_size": config.intermediate_size, "hidden_act": "swish"}
    theirs |= {"use_short_conv": options.conv_size > 0, "conv_size": options.conv_size or 4}
    theirs |= {"expand_v": options.value_head_dim / options.head_dim, "allow_neg_eigval": options.allow_neg_eigval}
    theirs |= translation(config, options)
    try:
        again = FwpConfig(**translated(name, theirs))
    except ValueError as fault:
        raise ValueError(f"flash-linear-attention's {name} has no such model ({fault}); {INSTEAD}") from fault
    _check_the_same(name, config, again)
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    return {"architectures": [architecture], "model_type": name, "dtype": dtype} | theirs


def _check_the_same(name: str, ours: FwpConfig, again: FwpConfig) -> None:
    """Refuse what came out as another model."""
    for field in set(FwpConfig.__annotations__) - NOT_COMPARED:
        if getattr(ours, field, None) != getattr(again, field, None):
            _refuse(name, field, getattr(ours, field), getattr(again, field))
    for layer_idx in ours.fast_weight_layers:
        wanted, got = (_plain(config.mixer_options(layer_idx)) for config in (ours, again))
        for option in wanted:
            if wanted[option] != got[option]:
                _refuse(name, option, wanted[option], got[option])


def _plain(options: MixerOptions) -> Mapping[str, Any]:
    """Options as they act: a default said in full, and a gate that lacks a bias as one whose bias is zero."""
    told = asdict(options)
    told["scale"] = options.head_dim**-0.5 if options.scale is None else options.scale
    told["output_gate"] = options.output_gate.removesuffix("_bias")
    return {option: value for option, value in told.items() if option not in {"backend", "initializer_range"}}


def _refuse(name: str, option: str, wanted: Any, got: Any) -> None:
    raise ValueError(
        f"flash-linear-attention's {name} has no {option}={wanted!r}, only {got!r}; train the model with that, "
        f"or {INSTEAD}"
    )


def their_weights(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """The weights under their names; a bias that only they have is zero."""
    found: dict[str, Tensor] = {}
    for ours, weight in model.state_dict().items():
        for pattern, replacement in NAMES.items():
            ours = re.sub(pattern, replacement, ours)
        found[ours] = weight.contiguous()
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    if name == "linear_attn":
        return {key.replace(".attn.o_norm.", ".attn.norm."): weight for key, weight in found.items()}
    ups = [key for key in found if key.endswith(".attn.g_proj.1.weight")]
    return {key.replace("weight", "bias"): found[key].new_zeros(found[key].shape[0]) for key in ups} | found
