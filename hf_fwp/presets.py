"""Architectures named after the papers they come from; the sizes are left to FwpConfig's defaults."""

from __future__ import annotations

from typing import Any

_TRANSFORMER_2017: dict[str, Any] = {
    "norm_type": "layer",
    "norm_eps": 1e-5,
    "mlp_type": "mlp",
    "hidden_act": "relu",
    "conv_size": 0,
    "output_gate": "none",
    "output_norm": False,
    "expand_v": 1.0,
    "scale": 1.0,
    "position_embedding": "sinusoidal",
}

_MODERN: dict[str, Any] = {
    "norm_type": "rms",
    "mlp_type": "swiglu",
    "feature_map": "silu",
    "qk_norm": "l2",
    "conv_size": 4,
    "output_norm": True,
    "position_embedding": "none",
}

PRESETS: dict[str, dict[str, Any]] = {
    # Linear transformer (arXiv 2006.16236): elu + 1, normalised reads.
    "katharopoulos2020": {
        **_TRANSFORMER_2017,
        "rule": "linear_attention",
        "rule_options": {"normalize": True},
        "feature_map": "elu1",
        "qk_norm": "none",
    },
    # Delta rule with DPFP features whose sum is 1 (arXiv 2102.11174).
    "schlag2021-deltanet": {
        **_TRANSFORMER_2017,
        "rule": "delta_net",
        "feature_map": "dpfp",
        "qk_norm": "sum",
        "beta_bias": False,
    },
    # DeltaNet parallel over time (arXiv 2406.06484).
    "yang2024-deltanet": {**_MODERN, "rule": "delta_net", "output_gate": "none", "expand_v": 1.0},
    # Gated DeltaNet (arXiv 2412.06464).
    "yang2024-gated-deltanet": {**_MODERN, "rule": "gated_delta_net", "output_gate": "silu", "expand_v": 2.0},
}
