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

# The blocks of the algorithmic tasks. The language models of the same paper have norm_placement="idsia_pre" and, for
# the delta net, the recurrent delta net, the delta RNN v2 and the delta LSTM v2 to v4, output_scale=head_dim**-0.5.
_IDSIA: dict[str, Any] = {**_TRANSFORMER_2017, "norm_placement": "pre", "position_embedding": "none"}

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
    # DeltaNet whose transitions reach eigenvalue -1 (arXiv 2411.12537).
    "grazzi2024-deltanet": {
        **_MODERN,
        "rule": "delta_net",
        "output_gate": "none",
        "expand_v": 1.0,
        "allow_neg_eigval": True,
    },
    # Linear transformer of the code execution and ListOps study: no normaliser, no positions (arXiv 2106.06295).
    "irie2021-linear-transformer": {
        **_IDSIA,
        "rule": "linear_attention",
        "rule_options": {"normalize": False},
        "feature_map": "elu1",
        "qk_norm": "none",
    },
    # Delta net of the same study.
    "irie2021-deltanet": {**_IDSIA, "rule": "delta_net", "feature_map": "elu1", "qk_norm": "sum"},
    # DeltaProduct with two Householder factors and a forget gate, and without one (arXiv 2502.10297).
    "siems2025-gated-deltaproduct": {
        **_MODERN,
        "rule": "delta_product",
        "rule_options": {"num_householder": 2, "forget_gate": True},
        "output_gate": "silu",
        "expand_v": 1.0,
        "allow_neg_eigval": True,
    },
    "siems2025-deltaproduct": {
        **_MODERN,
        "rule": "delta_product",
        "rule_options": {"num_householder": 2, "forget_gate": False},
        "output_gate": "none",
        "expand_v": 1.0,
        "allow_neg_eigval": True,
    },
    # The recurrent layers of Kimi Linear (arXiv 2510.26692).
    "kimi2025-delta": {**_MODERN, "rule": "kimi_delta", "output_gate": "low_rank_sigmoid", "expand_v": 1.0},
    # Gated DeltaNet-2 (arXiv 2605.22791).
    "gated-deltanet-2": {**_MODERN, "rule": "gated_delta_net_2", "output_gate": "low_rank_sigmoid", "expand_v": 1.0},
    # Comba (arXiv 2506.02475).
    "comba2025": {**_MODERN, "rule": "comba", "output_gate": "silu", "expand_v": 1.0},
    # Preconditioned delta rule (arXiv 2604.21100).
    "precond2026-delta": {**_MODERN, "rule": "precond_delta", "output_gate": "silu", "expand_v": 1.0},
    # Recurrent fast weight programmers (arXiv 2106.06295).
    "irie2021-recurrent-delta-net": {**_IDSIA, "rule": "recurrent_delta_net"},
    "irie2021-delta-rnn": {**_IDSIA, "rule": "delta_rnn", "feature_map": "elu1", "qk_norm": "sum"},
    "irie2021-delta-rnn-v1": {
        **_IDSIA,
        "rule": "delta_rnn",
        "rule_options": {"variant": "v1"},
        "feature_map": "softmax",
        "qk_norm": "none",
    },
    "irie2021-delta-lstm": {**_IDSIA, "rule": "delta_lstm"},
    "irie2021-delta-mlp": {**_IDSIA, "rule": "delta_mlp"},
    "irie2021-delta-delta": {**_IDSIA, "rule": "delta_delta"},
    # Self-referential weight matrices (arXiv 2202.05780); few-shot learning, and formal languages (arXiv 2310.16076).
    "irie2022-srwm": {**_IDSIA, "rule": "srwm", "norm_placement": "residual"},
    "irie2023-srwm": {
        **_IDSIA,
        "rule": "srwm",
        "norm_placement": "residual",
        "rule_options": {"query_init": 0.01, "beta_init": -1.0},
    },
    # Learning rules in continuous time on tokens (arXiv 2206.01649).
    "irie2022-continuous": {**_IDSIA, "rule": "continuous_fwp"},
}
