"""One block of the model: a token mixer (fast weights or softmax attention), an mlp, and where the norms stand.

pre         h = h + mix(norm(h));              h = h + mlp(norm(h))
post        h = norm(h + mix(h));              h = norm(h + mlp(h))            Vaswani et al. 2017
idsia_pre   h = norm(h);  h = h + mix(h);      h = h + mlp(norm(h))            Irie et al. 2021
residual    h = norm(h) + mix(h);              h = h + mlp(norm(h))            Irie et al. 2022 (SRWM)
none        h = h + mix(h);                    h = h + mlp(norm(h))            the same for reinforcement learning
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .cache import LAYER_TYPE
from .configuration import FwpConfig
from .layer import FastWeightLayer, rotate
from .series import SplineLayer

NORMS: dict[str, Callable[..., nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class FwpMlp(nn.Module):
    """swiglu: W_down (act(W_gate x) * W_up x); mlp: W_down act(W_up x + b) + b."""

    def __init__(self, config: FwpConfig) -> None:
        super().__init__()
        gated = config.mlp_type == "swiglu"
        bias = config.use_bias or not gated
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias) if gated else None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x_BTD)))
        return self.down_proj(self.act(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class FwpAttention(nn.Module):
    """Softmax attention, full or over a sliding window, for the layers of a hybrid that keep it."""

    def __init__(self, config: FwpConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.rules[layer_idx] == "sliding_attention" else None
        query, key = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=config.use_bias)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=config.use_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_embeddings is not None:
            q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        q, k, v = (x_BTHK.transpose(1, 2) for x_BTHK in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        implementation = self.config._attn_implementation or "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class FwpBlock(GradientCheckpointingLayer):
    """A token mixer and an mlp, with norms placed as the config says."""

    def __init__(self, config: FwpConfig, layer_idx: int) -> None:
        super().__init__()
        self.placement = config.norm_placement
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == LAYER_TYPE:
            options = config.mixer_options(layer_idx)
            self.mixer: nn.Module = (SplineLayer if options.looks_ahead else FastWeightLayer)(options, layer_idx)
        else:
            self.mixer = FwpAttention(config, layer_idx)
        self.mlp = FwpMlp(config)
        norm = NORMS[config.norm_type]
        unnormed = config.norm_placement == "none"
        self.mixer_norm = nn.Identity() if unnormed else norm(config.hidden_size, eps=config.norm_eps)
        self.mlp_norm = norm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        times: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        normed = hidden_states if self.placement == "post" else self.mixer_norm(hidden_states)
        h_BTD = hidden_states if self.placement == "residual" else normed
        residual = normed if self.placement in ("idsia_pre", "residual") else hidden_states
        if self.layer_type == LAYER_TYPE:
            kwargs = {"cu_seqlens": cu_seqlens, "times": times}
        if isinstance(self.mixer, SplineLayer):
            # a spline is laid through what stands before the norm, which is taken along the path
            h_BTD = hidden_states
            kwargs["encode"] = nn.Identity() if self.placement == "post" else self.mixer_norm
        mixed, _ = self.mixer(
            h_BTD,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )
        h_BTD = residual + self.dropout(mixed)
        if self.placement == "post":
            h_BTD = self.mixer_norm(h_BTD)
            return self.mlp_norm(h_BTD + self.dropout(self.mlp(h_BTD)))
        return h_BTD + self.dropout(self.mlp(self.mlp_norm(h_BTD)))
