"""Architectures named after the papers they come from; the sizes are left to FwpConfig's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """The fields of FwpConfig that make a published architecture."""

    about: str
    """What it is, and where it was published."""
    fields: Mapping[str, Any]


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

# The block of the algorithmic tasks of Irie et al. 2021, which PyTorch's own start values belong to: no norm at the
# end, a bias in the output layer.
_TASK: dict[str, Any] = {
    **_TRANSFORMER_2017,
    "norm_placement": "pre",
    "position_embedding": "none",
    "final_norm": False,
    "lm_head_bias": True,
}
# The block of the language models of the same authors; most of their rules scale their reads too.
_LANGUAGE: dict[str, Any] = {**_TRANSFORMER_2017, "norm_placement": "idsia_pre", "position_embedding": "none"}
_SCALED: dict[str, Any] = {**_LANGUAGE, "output_scale": "head_dim**-0.5"}
# Self-referential weights: the norm stands on the residual branch, or nowhere before the mixer.
_NORMED_RESIDUAL: dict[str, Any] = {**_TASK, "norm_placement": "residual"}
_PLAIN_RESIDUAL: dict[str, Any] = {**_TASK, "norm_placement": "none"}

_ELU1: dict[str, Any] = {"feature_map": "elu1", "qk_norm": "none"}
_ELU1_SUM: dict[str, Any] = {"feature_map": "elu1", "qk_norm": "sum"}
_SOFTMAX: dict[str, Any] = {"feature_map": "softmax", "qk_norm": "none"}
_DPFP_SUM: dict[str, Any] = {"feature_map": "dpfp", "qk_norm": "sum", "beta_bias": False}


def _additive(normalize: bool, **rest: Any) -> dict[str, Any]:
    return {"rule": "linear_attention", "rule_options": {"normalize": normalize}, **rest}


PRESETS: dict[str, Preset] = {
    # before 2020
    "schmidhuber1991-from-to": Preset(
        "FROM and TO units address the connection that changes (FKI-147-91; Neural Computation 4(1), 1992)",
        {**_TASK, "rule": "fwp_1991", "rule_options": {"interface": "from_to", "activation": "tanh"}},
    ),
    "schmidhuber1991-full": Preset(
        "one output of the slow network for every fast weight (FKI-147-91)",
        {**_TASK, "rule": "fwp_1991", "rule_options": {"interface": "full"}},
    ),
    "schmidhuber1993-self-referencing": Preset(
        "a recurrent network that changes its own weights (ICANN 1993)", {**_TASK, "rule": "fwp_1993"}
    ),
    "oja1982": Preset(
        "Oja's rule in the modern layer (J. Math. Biology 15)",
        {**_MODERN, "rule": "oja", "output_gate": "none", "expand_v": 1.0},
    ),
    "ba2016": Preset(
        "fast weights that attend to the recent past (arXiv 1610.06258)", {**_TASK, "rule": "ba_fast_weights"}
    ),
    "schlag2020-fast-weight-memory": Preset(
        "an LSTM with a fast weight memory, as for question answering (arXiv 2011.07831)",
        {**_TASK, "rule": "fast_weight_memory"},
    ),
    "schlag2020-fast-weight-memory-lm": Preset(
        "the same as a language model: writes are not scaled, the first query is squashed",
        {**_TASK, "rule": "fast_weight_memory", "rule_options": {"write_scale": 1.0, "tanh_query": True}},
    ),
    # additive
    "katharopoulos2020": Preset(
        "linear transformer: elu + 1, normalised reads (arXiv 2006.16236)",
        {**_TRANSFORMER_2017, **_additive(True, **_ELU1)},
    ),
    "choromanski2020-performer": Preset(
        "Performer: positive random features of the softmax kernel, drawn once (arXiv 2009.14794)",
        {**_TRANSFORMER_2017, **_additive(True, feature_map="favor:64,prescale=1", qk_norm="none")},
    ),
    "zhang2024-hedgehog": Preset(
        "a learned feature map of both signs that imitates softmax (arXiv 2402.04347)",
        {**_TRANSFORMER_2017, **_additive(True, feature_map="hedgehog", qk_norm="none")},
    ),
    "schlag2021-dpfp": Preset(
        "additive fast weights with DPFP features, normalised reads (arXiv 2102.11174)",
        {**_TRANSFORMER_2017, **_additive(True, feature_map="dpfp", qk_norm="none")},
    ),
    "irie2021-linear-transformer": Preset(
        "linear transformer of the code execution and ListOps study: no normaliser (arXiv 2106.06295)",
        {**_TASK, **_additive(False, **_ELU1)},
    ),
    "irie2021-linear-transformer-lm": Preset(
        "linear transformer of the language models of the same paper", {**_SCALED, **_additive(True, **_ELU1)}
    ),
    # the delta rule
    "schlag2021-deltanet": Preset(
        "delta rule with DPFP features whose sum is 1 (arXiv 2102.11174)",
        {**_TRANSFORMER_2017, **_DPFP_SUM, "rule": "delta_net", "output_scale": "head_dim**-0.5"},
    ),
    "schlag2021-deltanet-favor": Preset(
        "the same with random features, drawn anew at every step of training",
        {
            **_TRANSFORMER_2017,
            **_DPFP_SUM,
            "rule": "delta_net",
            "output_scale": "head_dim**-0.5",
            "feature_map": "favor:64,redraw=1",
        },
    ),
    "schlag2021-deltanet-normalized": Preset(
        "the same with attention normalisation of what is read and of what is removed",
        {**_TRANSFORMER_2017, **_DPFP_SUM, "rule": "delta_net", "rule_options": {"normalize": "full"}},
    ),
    "schlag2021-deltanet-normalized-output": Preset(
        "the same with attention normalisation of what is read",
        {**_TRANSFORMER_2017, **_DPFP_SUM, "rule": "delta_net", "rule_options": {"normalize": "output"}},
    ),
    "irie2021-deltanet": Preset(
        "delta net of the code execution and ListOps study (arXiv 2106.06295)",
        {**_TASK, **_ELU1_SUM, "rule": "delta_net"},
    ),
    "irie2021-deltanet-lm": Preset(
        "delta net of the language models of the same paper", {**_SCALED, **_ELU1_SUM, "rule": "delta_net"}
    ),
    "irie2021-lstm-deltanet": Preset(
        "delta net programmed by an LSTM, from the code of the same paper",
        {**_TASK, **_ELU1_SUM, "rule": "delta_net", "rule_options": {"slow_net": "lstm"}},
    ),
    "yang2024-deltanet": Preset(
        "DeltaNet parallel over time (arXiv 2406.06484)",
        {**_MODERN, "rule": "delta_net", "output_gate": "none", "expand_v": 1.0},
    ),
    "grazzi2024-deltanet": Preset(
        "DeltaNet whose transitions reach the eigenvalue -1 (arXiv 2411.12537)",
        {**_MODERN, "rule": "delta_net", "output_gate": "none", "expand_v": 1.0, "allow_neg_eigval": True},
    ),
    "yang2024-gated-deltanet": Preset(
        "Gated DeltaNet (arXiv 2412.06464)",
        {**_MODERN, "rule": "gated_delta_net", "output_gate": "silu", "expand_v": 2.0},
    ),
    "siems2025-gated-deltaproduct": Preset(
        "DeltaProduct with two Householder factors and a forget gate (arXiv 2502.10297)",
        {
            **_MODERN,
            "rule": "delta_product",
            "rule_options": {"num_householder": 2, "forget_gate": True},
            "output_gate": "silu",
            "expand_v": 1.0,
            "allow_neg_eigval": True,
        },
    ),
    "siems2025-deltaproduct": Preset(
        "DeltaProduct with two Householder factors (arXiv 2502.10297)",
        {
            **_MODERN,
            "rule": "delta_product",
            "rule_options": {"num_householder": 2, "forget_gate": False},
            "output_gate": "none",
            "expand_v": 1.0,
            "allow_neg_eigval": True,
        },
    ),
    "kimi2025-delta": Preset(
        "the recurrent layers of Kimi Linear (arXiv 2510.26692)",
        {**_MODERN, "rule": "kimi_delta", "output_gate": "low_rank_sigmoid", "expand_v": 1.0},
    ),
    "gated-deltanet-2": Preset(
        "Gated DeltaNet-2 (arXiv 2605.22791)",
        {**_MODERN, "rule": "gated_delta_net_2", "output_gate": "low_rank_sigmoid", "expand_v": 1.0},
    ),
    "comba2025": Preset(
        "Comba (arXiv 2506.02475)", {**_MODERN, "rule": "comba", "output_gate": "silu", "expand_v": 1.0}
    ),
    "precond2026-delta": Preset(
        "preconditioned delta rule (arXiv 2604.21100)",
        {**_MODERN, "rule": "precond_delta", "output_gate": "silu", "expand_v": 1.0},
    ),
    # beyond linear recurrence (arXiv 2106.06295): the tasks' blocks, and those of the language models
    "irie2021-recurrent-delta-net": Preset(
        "recurrent delta net (arXiv 2106.06295)", {**_TASK, "rule": "recurrent_delta_net"}
    ),
    "irie2021-recurrent-delta-net-lm": Preset(
        "recurrent delta net as a language model", {**_SCALED, "rule": "recurrent_delta_net"}
    ),
    "irie2021-delta-rnn": Preset("delta RNN (arXiv 2106.06295)", {**_TASK, **_ELU1_SUM, "rule": "delta_rnn"}),
    "irie2021-delta-rnn-lm": Preset("delta RNN as a language model", {**_SCALED, **_ELU1_SUM, "rule": "delta_rnn"}),
    "irie2021-delta-rnn-v1": Preset(
        "the first variant of the delta RNN, squashed by a softmax",
        {**_TASK, **_SOFTMAX, "rule": "delta_rnn", "rule_options": {"variant": "v1"}},
    ),
    "irie2021-delta-lstm": Preset("delta LSTM (arXiv 2106.06295)", {**_TASK, "rule": "delta_lstm"}),
    "irie2021-delta-lstm-lm": Preset("delta LSTM as a language model", {**_SCALED, "rule": "delta_lstm"}),
    **{
        f"irie2021-delta-lstm-{variant}": Preset(
            f"variant {variant[1]} of the delta LSTM",
            {**_TASK, "rule": "delta_lstm", "rule_options": {"variant": variant}},
        )
        for variant in ("v1", "v2", "v3")
    },
    "irie2021-delta-mlp": Preset("delta MLP (arXiv 2106.06295)", {**_TASK, "rule": "delta_mlp"}),
    "irie2021-delta-mlp-lm": Preset("delta MLP as a language model", {**_LANGUAGE, "rule": "delta_mlp"}),
    "irie2021-delta-delta": Preset("delta-delta net (arXiv 2106.06295)", {**_TASK, "rule": "delta_delta"}),
    "irie2021-delta-delta-lm": Preset("delta-delta net as a language model", {**_LANGUAGE, "rule": "delta_delta"}),
    # self-reference
    "irie2022-srwm": Preset(
        "self-referential weight matrix for few-shot learning (arXiv 2202.05780)", {**_NORMED_RESIDUAL, "rule": "srwm"}
    ),
    "irie2022-srwm-rl": Preset(
        "the same for reinforcement learning: softmax of the input, no norm before it",
        {**_PLAIN_RESIDUAL, "rule": "srwm", "rule_options": {"input_softmax": True}},
    ),
    "irie2022-self-modifying": Preset(
        "a delta net programmed by a self-referential weight matrix (arXiv 2202.05780, the code for "
        "reinforcement learning)",
        {**_PLAIN_RESIDUAL, "rule": "self_modifying_delta", "rule_options": {"input_softmax": True}},
    ),
    "irie2023-srwm": Preset(
        "self-referential weight matrix for formal languages (arXiv 2310.16076)",
        {**_NORMED_RESIDUAL, "rule": "srwm", "rule_options": {"query_init": 0.01, "beta_init": -1.0}},
    ),
    # continuous time
    "irie2022-continuous": Preset(
        "learning rules in continuous time, on tokens (arXiv 2206.01649)", {**_TASK, "rule": "continuous_fwp"}
    ),
}
