"""The field `fwp` of a converted model's config: which layers hold fast weights, and with which options.

fwp = {"layers": [0, 1, 3],                        # indices of the converted layers
       "rule": "gated_delta_net", "qk_norm": "l2",   # options of every converted layer
       "per_layer": {"3": {"rope_heads": "none"}}}   # what single layers have different
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..options import MIXER_DEFAULTS, MixerOptions, complete_rule_options, find_rule, refuse_unknown, rule_default
from .rotary import layer_rotates
from .table import find_host

DEFAULT_RULE = "gated_delta_net"
# The bare rule between the teacher's own projections: a random convolution, gate or norm would undo what was copied.
GRAFT_DEFAULTS: dict[str, Any] = {
    "rope_heads": "all",
    "beta_bias": True,  # without it no constant beta per head can be set
    "conv_size": MIXER_DEFAULTS["conv_size"],
    "output_gate": MIXER_DEFAULTS["output_gate"],
    "output_norm": MIXER_DEFAULTS["output_norm"],
}
GEOMETRY = frozenset({"hidden_size", "num_attention_heads", "num_key_value_heads", "num_value_heads", "head_dim"})
OPTIONS = frozenset(option.name for option in fields(MixerOptions)) - GEOMETRY


def converted_layers(config: Any) -> tuple[int, ...]:
    """Indices of the layers that hold fast weights."""
    return tuple((config.fwp or {}).get("layers", ()))


def mixer_options(config: Any, layer_idx: int) -> MixerOptions:
    """The options of one converted layer: the host's shapes, then `fwp`, then what `per_layer` says."""
    fwp = config.fwp or {}
    said = {key: value for key, value in fwp.items() if key in OPTIONS}
    said |= fwp.get("per_layer", {}).get(str(layer_idx), {})
    options = graft_defaults(said.get("rule", DEFAULT_RULE))
    for option, source in find_host(config).mixer.items():
        options[option] = getattr(config, source) if isinstance(source, str) else source
        if callable(source):
            options[option] = source(config)
    options |= said
    if not layer_rotates(config, layer_idx):
        if not isinstance(options["rope_heads"], str) and any(options["rope_heads"]):
            raise ValueError(
                f"layer {layer_idx} of {config.model_type!r} has no rotary positions, so none of its heads can rotate "
                f"(rope_heads is {options['rope_heads']}); leave rope_heads out for this layer"
            )
        options["rope_heads"] = "none"  # "all": those that rotate in the teacher
    alibi = find_host(config).alibi
    if options.get("window") and (getattr(config, alibi) if isinstance(alibi, str) else alibi):
        raise ValueError(
            f"the attention of {config.model_type!r} has a linear bias (ALiBi), which a window beside fast weights has "
            "not; leave the option window out"
        )
    return MixerOptions.from_dict(options)


def check_fwp(config: Any) -> None:
    """Refuse an `fwp` field that no model could be built from."""
    fwp = config.fwp or {}
    refuse_unknown("field of fwp", fwp, OPTIONS | {"layers", "per_layer"})
    layers = check_layers(fwp.get("layers", ()), num_layers=config.num_hidden_layers)
    for key, options in fwp.get("per_layer", {}).items():
        if not str(key).isdigit() or int(key) not in layers:
            raise ValueError(
                f"fwp['per_layer'] has options for layer {key!r}, which is not one of the layers {layers}; leave "
                "them out, or add it to the layers"
            )
        refuse_unknown(f"field of fwp['per_layer'][{str(key)!r}]", options, OPTIONS)
    for layer_idx in layers:
        mixer_options(config, layer_idx)


def check_layers(layers: Iterable[int], *, num_layers: int) -> list[int]:
    """The layers in order, each once; an index that the model does not have is refused."""
    layers = list(layers)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise ValueError(
                f"there is no layer {layer!r} to convert; the model has {num_layers} layers, 0 to {num_layers - 1}"
            )
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers {layers} names a layer twice; give each index once")
    return sorted(layers)


def graft_defaults(rule: str) -> dict[str, Any]:
    """The options of a mixer of this rule inside a host, where nothing else is said."""
    options = {option: rule_default(rule, option) for option in MIXER_DEFAULTS if option in OPTIONS}
    if options["feature_map"] == "silu":  # the activation after a short convolution, of which there is none
        options["feature_map"] = "identity"
    once = {find_rule(rule).writes: 1} if find_rule(rule).writes else None  # the teacher has one key per token
    rule_options = complete_rule_options(rule, once)
    options |= GRAFT_DEFAULTS
    options["beta_bias"] &= "beta" in find_rule(rule).inputs_with(rule_options)
    return {"rule": rule, "rule_options": rule_options, **options}


def written_out(layers: Iterable[int], fwp: Mapping[str, Any] | None) -> dict[str, Any]:
    """`fwp` as it is saved: with every default written out, so that later defaults cannot change a saved model."""
    given = copy.deepcopy(dict(fwp or {}))
    given.pop("layers", None)
    per_layer = {str(key): dict(options) for key, options in given.pop("per_layer", {}).items()}
    for key, options in per_layer.items():
        if "rule" in options:  # the common defaults belong to another rule
            per_layer[key] = {**graft_defaults(options["rule"]), **given, **options}
    common = {**graft_defaults(given.get("rule", DEFAULT_RULE)), **given}
    return {"layers": sorted(layers), **common, "per_layer": per_layer}
