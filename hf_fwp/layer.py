"""FastWeightLayer: the token mixer. A slow network programs a fast one, and reads it.

    q, k, v = W_q x, W_k x, W_v x            then short convolution, head norm, rotation, feature map, q/k norm
    beta    = sigmoid(W_b x)                 (twice that with allow_neg_eigval)
    g       = -exp(A) softplus(W_a x + d)    log-decay, Yang et al. 2024
    S_t, o_t = rule(S_{t-1}; q_t, k_t, v_t, beta_t, g_t)
    y       = W_o [gate * norm(o)] + W_skip [v_t, ..., v_{t-n+1}]

Head order of everything that belongs to states: (time scale, head), the scale outermost. Shape legend: rules/base.py;
S states (time scales x heads), R reads, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache

from .cache import FastWeightCacheLayer, MixerInputs, fast_weight_layer
from .companions import ShortConvolution, gate_projection, gated
from .decoding import can_decode, decode, serves
from .features import HEAD_NORMS, QK_NORMS, Favor, IdentityLinear, feature_size, make_feature_map
from .options import MixerOptions, find_rule
from .own import OwnWeights
from .packing import Window, packed_segments, push_left, take, valid_tokens
from .rotation import choose_heads, rotate
from .rules.base import Gates
from .rules.gating import Decay, Rate, scaled, start_rates, start_steps, value_of
from .slow_net import SlowLstm, make_slow_net
from .window import WindowAttention

States = dict[str, Tensor]
# The modules of a mixer that do not start as a plain Linear.
PARTS = (OwnWeights, ShortConvolution, SlowLstm, Favor, IdentityLinear, WindowAttention)


class FastWeightLayer(nn.Module):
    """One mixer of any rule. `forward` has the signature of a transformers attention module."""

    def __init__(self, options: MixerOptions, layer_idx: int) -> None:
        super().__init__()
        self.options = options
        self.layer_idx = layer_idx
        self.rule = find_rule(options.rule)
        self.inputs = self.rule.inputs_with(options.rule_options)
        self.writes = int(options.rule_options.get(self.rule.writes, 1))
        self.heads = (options.num_attention_heads, options.num_key_value_heads, options.num_value_heads)
        query, key, value = self.heads
        hidden, K, V = options.hidden_size, options.head_dim, options.value_head_dim
        self.slow_net = make_slow_net(options, takes_beta="beta" in self.inputs)
        if self.rule.qkv and self.slow_net is None:
            self.q_proj = nn.Linear(hidden, query * K, bias=options.qkv_bias)
            self.k_proj = nn.Linear(hidden, self.writes * key * K, bias=options.qkv_bias)
            self.v_proj = nn.Linear(hidden, self.writes * value * V, bias=options.qkv_bias)
        self.own = OwnWeights(options) if options.has_own else None
        self.window = WindowAttention(options) if options.window else None
        self.o_proj = nn.Linear(options.output_width, hidden, bias=options.o_bias)
        self.gates = self._make_gates()
        if self.projects("beta") and self.slow_net is None:
            self.b_proj = nn.Linear(hidden, self.writes * options.num_states, bias=options.beta_bias)
        if self.projects("g"):
            self.a_proj = nn.Linear(hidden, options.num_states, bias=False)
            # float32 under any default dtype: in bf16 half-lives of many tokens all round to the same value
            self.A_log = nn.Parameter(torch.empty(options.num_states, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.empty(options.num_states, dtype=torch.float32))
        silu = options.feature_map == "silu"
        # nothing stands between a convolution and the feature map: they are one pass
        at_once = silu and not (options.head_norm or options.state_bias or any(options.rotates))
        if options.conv_size:
            self.q_conv1d = ShortConvolution(query * K, options.conv_size, at_once)
            self.k_conv1d = ShortConvolution(self.writes * key * K, options.conv_size, at_once)
            self.v_conv1d = ShortConvolution(self.writes * value * V, options.conv_size, silu)
        if options.head_norm:
            self.q_norm = HEAD_NORMS[options.head_norm](query, K, options.norm_eps)
            self.k_norm = HEAD_NORMS[options.head_norm](key, K, options.norm_eps)
        self.backend_ran: str | None = None
        self.fused = serves(options)
        self.feature_map = make_feature_map("identity" if at_once and options.conv_size else options.feature_map, K)
        if options.output_norm:
            self.o_norm = nn.RMSNorm(V, eps=options.norm_eps)
        if options.output_gate != "none":
            self.g_proj = gate_projection(options.output_gate, hidden, reads=options.num_reads, value_size=V)
        if options.state_bias:
            self.q_bias = nn.Parameter(torch.zeros(options.num_reads, K))
            self.k_bias = nn.Parameter(torch.zeros(options.num_states, K))
        if options.value_skip:
            self.skip_proj = nn.Linear(options.value_skip * self.writes * value * V, hidden, bias=False)
        self.init_weights()

    def _make_gates(self) -> Gates | None:
        """The module for the inputs that belong to this rule alone."""
        if self.rule.gates is None:
            return None
        o = self.options
        sizes = {"key_size": feature_size(o.feature_map, o.head_dim), "value_size": o.value_head_dim}
        return self.rule.gates(o.hidden_size, states=o.num_states, **sizes, options=o.rule_options)

    def projects(self, name: str) -> bool:
        """Whether the layer itself computes this input of the rule."""
        return name in self.inputs and (self.gates is None or name not in self.gates.gives)

    def init_weights(self) -> None:
        """Biases of states at zero; decay rates and time constants spread over heads as in Yang et al. 2024."""
        if self.options.state_bias:
            init.zeros_(self.q_bias)
            init.zeros_(self.k_bias)
        if self.gates is not None:
            for name, value in self.gates.initial().items():
                init.copy_(self.gates.get_parameter(name), value)
        if self.projects("g"):
            init.copy_(self.A_log, start_rates(self.A_log))
            init.copy_(self.dt_bias, start_steps(self.dt_bias))

    def extra_repr(self) -> str:
        return f"rule={self.options.rule}, layer_idx={self.layer_idx}"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        times: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(output [B, T, D], None). Masked positions give 0; `kwargs` may carry `cu_seq_lens_q` or `seq_idx`."""
        inputs = self._inputs(hidden_states, attention_mask, position_embeddings, past_key_values, times)
        reads = self._reads(inputs, past_key_values, cu_seqlens, kwargs)
        width = self.o_proj.in_features
        out_BTD = self.o_proj(reads[..., :width])
        if self.options.value_skip:
            out_BTD = out_BTD + self.skip_proj(reads[..., width:])
        if self.options.o_bias and inputs.mask_BT is not None:
            out_BTD = out_BTD.masked_fill(~inputs.mask_BT[..., None], 0)
        return out_BTD, None

    def mixed_reads(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The input of o_proj, [B, T, reads * V], and after it that of skip_proj, the last `value_skip` values."""
        inputs = self._inputs(hidden_states, attention_mask, position_embeddings, past_key_values)
        return self._reads(inputs, past_key_values, cu_seqlens, kwargs)

    def standard_rotary(self, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """cos and sin, given in the form of the model around this layer, as `rotate` reads them."""
        return rotary

    def _inputs(
        self,
        hidden_BTD: Tensor,
        attention_mask: Any,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        times_BT: Tensor | None = None,
    ) -> MixerInputs:
        batch, length, _ = hidden_BTD.shape
        past = 0 if cache is None else fast_weight_layer(cache, self.layer_idx).seen
        if isinstance(attention_mask, dict):
            attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
        mask_BT = valid_tokens(attention_mask, batch=batch, length=length, past=past)
        if not self.options.needs_rotary:
            rotary = None
        elif rotary is None:
            raise ValueError(
                f"layer {self.layer_idx} rotates queries and keys (rope_heads) but was given no position_embeddings; "
                "set rope_heads='none' or use a model with rotary embeddings"
            )
        return MixerInputs(hidden_BTD, mask_BT, rotary, times_BT if self.options.takes_times else None)

    def _reads(
        self, inputs: MixerInputs, cache: Cache | None, cu_seqlens: Tensor | None, signals: dict[str, Any]
    ) -> Tensor:
        if cu_seqlens is None and cache is None and inputs.mask_BT is None:
            batch, length, _ = inputs.hidden_BTD.shape
            cu_seqlens = packed_segments(
                batch=batch,
                length=length,
                cu_seq_lens_q=signals.get("cu_seq_lens_q"),
                seq_idx=signals.get("seq_idx"),
            )
        if cache is None:
            return self._mix(inputs, {}, cu_seqlens=cu_seqlens)[0]
        if cu_seqlens is not None:
            raise ValueError("a packed batch (cu_seqlens) cannot use a cache; give one sequence per row, or no cache")
        return self._continue(inputs, fast_weight_layer(cache, self.layer_idx))

    def _continue(self, inputs: MixerInputs, cached: FastWeightCacheLayer) -> Tensor:
        states = cached.states
        for replayed in cached.take_replay():
            states = self._mix(replayed, states)[1]
            cached.rebase(states)
        in_place = len(inputs) == 1 and cached.updates_in_place
        if in_place and can_decode(self, inputs, states):
            reads = decode(self, inputs, states)
            self._ran("fused step")
        else:
            reads, states = self._mix(inputs, states, in_place=in_place)
        cached.advance(states, inputs)
        return reads

    def _mix(
        self, inputs: MixerInputs, states: States, *, cu_seqlens: Tensor | None = None, in_place: bool = False
    ) -> tuple[Tensor, States]:
        """Reads of these tokens and the states after them; what looks back sees only real tokens, side by side."""
        batch, length, _ = inputs.hidden_BTD.shape
        tokens = inputs
        if inputs.mask_BT is not None:
            # where, not a product: padded positions may hold NaN
            hidden_BTD = torch.where(inputs.mask_BT[..., None], inputs.hidden_BTD, 0)
            tokens = MixerInputs(hidden_BTD, inputs.mask_BT, inputs.rotary, inputs.times_BT)
        if cu_seqlens is not None:
            tokens = tokens.in_one_row()
        back_BT = None
        if tokens.mask_BT is not None and self._looks_back and length > 1:
            order_BT, back_BT = push_left(tokens.mask_BT)
            tokens = tokens.with_own_rotary().change(lambda x: take(x, order_BT))
        reads, states = self._mix_together(tokens, states, cu_seqlens=cu_seqlens, in_place=in_place)
        if back_BT is not None:
            reads = take(reads, back_BT)
        reads = reads.view(batch, length, -1)
        if inputs.mask_BT is not None:
            reads = reads.masked_fill(~inputs.mask_BT[..., None], 0)
        return reads, states

    @property
    def _looks_back(self) -> bool:
        o = self.options
        return o.conv_size > 1 or o.value_skip > 1 or self.slow_net is not None or self.window is not None

    def _mix_together(
        self, tokens: MixerInputs, states: States, *, cu_seqlens: Tensor | None, in_place: bool
    ) -> tuple[Tensor, States]:
        x_BTD, options = tokens.hidden_BTD, self.options
        window = Window.of(tokens.mask_BT, cu_seqlens, total=len(tokens))
        projected, new_states = self._projected(tokens, states, cu_seqlens)
        inputs: dict[str, Any] = {}
        if self.rule.qkv:
            inputs, kept = self._queries_keys_values(projected, tokens, window, states)
            new_states |= kept
        near, taps = inputs.pop("near", None), []
        if options.value_skip:
            taps, new_states["skip"] = window.taps(inputs.pop("skip"), options.value_skip, states.get("skip"))
        if self.own is not None:
            inputs |= self.own.of(x_BTD)
        if tokens.times_BT is not None:
            first, last_B = options.rule_options["time_step"], states.get("time")
            inputs["dt"], new_states["time"] = window.elapsed(tokens.times_BT, last_B, first=first, like=inputs["b"])
        ran: list[str] = []
        out_BTRV, rule_states = self.rule.apply(
            **inputs,
            **self._rates(x_BTD, projected.get("b"), raw=self.rule.raw_gates),
            states={name: state for name, state in states.items() if name not in new_states} or None,
            mask=tokens.mask_BT,
            cu_seqlens=cu_seqlens,
            scale=options.scale,
            backend=options.backend,
            options=options.rule_options,
            qk_l2norm=options.qk_norm == "l2",
            in_place=in_place,
            ran=ran,
        )
        self._ran(ran[-1])
        reads = self._gated(out_BTRV.to(x_BTD.dtype), x_BTD)
        if self.window is not None:
            reads = self.window.join(reads, *near)
        return torch.cat([reads, *taps], dim=-1) if taps else reads, {**new_states, **rule_states}

    def _ran(self, backend: str) -> None:
        if not torch.compiler.is_compiling():
            self.backend_ran = backend

    def _projected(self, tokens: MixerInputs, states: States, cu_seqlens: Tensor | None) -> tuple[States, States]:
        """The slow network's outputs by the letter, and what it keeps."""
        x_BTD = tokens.hidden_BTD
        if self.slow_net is not None:
            parts, kept = self.slow_net(x_BTD, states, mask_BT=tokens.mask_BT, cu_seqlens=cu_seqlens)
            return dict(zip("qkvb"[: len(parts)], parts, strict=True)), kept
        return {name: getattr(self, f"{name}_proj")(x_BTD) for name in ("q", "k", "v") if self.rule.qkv}, {}

    def _queries_keys_values(
        self, projected: States, tokens: MixerInputs, window: Window, states: States
    ) -> tuple[dict[str, Any], States]:
        """The rule's q, k and v, with `skip` the values of a direct path, and what the convolutions keep."""
        new_states: States = {}
        if self.options.conv_size:
            for name in ("q", "k", "v"):
                key, convolution = f"{name}_conv", getattr(self, f"{name}_conv1d")
                projected[name], new_states[key] = convolution(projected[name], window, states.get(key))
        q_BTC, k_BTC, v_BTC = (projected[name] for name in ("q", "k", "v"))
        given: dict[str, Any] = {}
        if self.window is not None:
            heads = (*self._heads(q_BTC, k_BTC), v_BTC.unflatten(-1, (-1, self.options.value_head_dim)))
            *given["near"], kept = self.window(tokens, *heads, window, states)
            new_states |= kept
        if isinstance(self.feature_map, Favor):
            self.feature_map.advance()
        if self.options.feature_map == "silu" and not self.options.conv_size:
            # the activation of the whole modern shell (Yang et al. 2024), values included
            v_BTC = F.silu(v_BTC)
        rotary = tokens.rotary if any(self.options.rotates) else None
        given["q"], given["k"], given["v"] = self._written(q_BTC, k_BTC, v_BTC, rotary)
        return given | ({"skip": v_BTC} if self.options.value_skip else {}), new_states

    def _written(
        self, q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as the rule takes them: k and v are [B, T, S, writes, size] where a token writes several times."""
        keys, values = k_BTC.chunk(self.writes, dim=-1), v_BTC.chunk(self.writes, dim=-1)
        q, k = self._features(q_BTC, keys[0], rotary)
        if not self.rule.writes:
            return q, k, self._values_of_states(v_BTC)
        k = torch.stack([k, *(self._features(q_BTC, key, rotary)[1] for key in keys[1:])], dim=3)
        return q, k, torch.stack([self._values_of_states(value) for value in values], dim=3)

    def _heads(self, q_BTC: Tensor, k_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys head by head, normed where the layer has such a norm."""
        q, k = (x_BTC.unflatten(-1, (-1, self.options.head_dim)) for x_BTC in (q_BTC, k_BTC))
        return (self.q_norm(q), self.k_norm(k)) if self.options.head_norm else (q, k)

    def _features(self, q_BTC: Tensor, k_BTC: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Queries and keys as the rule takes them: each state's own, rotated or not."""
        q, k = self._heads(q_BTC, k_BTC)
        rotates = self.options.rotates
        if self.options.state_bias:
            # the bias belongs to a state and is not rotated: it has to be added before features and norm
            q, k = self._of_states((q, k), None if rotary is None else (rotate(q, *rotary), rotate(k, *rotary)))
            return self._mapped(q + self.q_bias, k + self.k_bias)
        plain = None if all(rotates) else self._mapped(q, k)
        rotated = None if rotary is None else self._mapped(rotate(q, *rotary), rotate(k, *rotary))
        if self.options.time_scales == 1 and (plain is None or rotated is None):
            return plain or rotated  # type: ignore[return-value]
        return self._of_states(plain, rotated)

    def _of_states(
        self, plain: tuple[Tensor, Tensor] | None, rotated: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Queries for each read, keys for each state: of the head it belongs to, rotated or not."""
        scales, rotates = self.options.time_scales, self.options.rotates
        reads_per_state = self.options.num_reads // self.options.num_states
        queries = [turned for turned in rotates for _ in range(reads_per_state)]
        (q, k), (q_turned, k_turned) = ((None, None) if x is None else x for x in (plain, rotated))
        return choose_heads(q, q_turned, queries, scales), choose_heads(k, k_turned, rotates, scales)

    def _mapped(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.feature_map(q, k)
        if self.options.qk_norm == "l2":  # the rule does it
            return q, k
        norm = QK_NORMS[self.options.qk_norm]
        return norm(q), norm(k)

    def _values_of_states(self, v_BTC: Tensor) -> Tensor:
        v = v_BTC.unflatten(-1, (-1, self.options.value_head_dim))
        v = v.repeat_interleave(self.options.heads_of_states // v.shape[2], dim=2)
        return v.repeat(1, 1, self.options.time_scales, 1)

    def _rates(self, x_BTD: Tensor, b_BTS: Tensor | None = None, *, raw: bool = False) -> dict[str, Any]:
        """beta (of its raw value, where given) and g in float32 (float64 for float64 inputs), for the rules that take
        them, and the rule's own; with `raw` what beta and g are computed from, for a kernel that does it."""
        rates: dict[str, Any] = {} if self.gates is None else self.gates.of(x_BTD)
        reach = 2.0 if self.options.allow_neg_eigval else 1.0
        rates |= {name: scaled(rates[name], reach) for name in ("beta", "erase") if name in rates}
        if self.projects("beta"):
            raw_BTS: Tensor = self.b_proj(x_BTD) if b_BTS is None else b_BTS
            rates["beta"] = Rate(raw_BTS.unflatten(-1, (self.writes, -1)).mT if self.rule.writes else raw_BTS, reach)
        if self.projects("g"):
            rates["g"] = Decay(self.a_proj(x_BTD), self.A_log, self.dt_bias)
        return rates if raw else {name: value_of(rate) for name, rate in rates.items()}

    def _gated(self, out_BTRV: Tensor, x_BTD: Tensor) -> Tensor:
        if self.options.output_scale != 1:
            out_BTRV = out_BTRV * self.options.output_scale
        gate = None if self.options.output_gate == "none" else self.g_proj(x_BTD)
        return gated(out_BTRV, self.o_norm if self.options.output_norm else None, gate, self.options.output_gate)


def layers_of(model: nn.Module) -> dict[int, FastWeightLayer]:
    """The mixers of a model by the index of their layer."""
    return {module.layer_idx: module for module in model.modules() if isinstance(module, FastWeightLayer)}


def backends_of(model: nn.Module) -> dict[int, str | None]:
    """The backend that each mixer's last forward ran, by the index of its layer; None before the first."""
    return {layer_idx: layer.backend_ran for layer_idx, layer in layers_of(model).items()}


def init_mixer_weights(module: nn.Module) -> None:
    """The part of `_init_weights` that concerns mixers: what does not start as a plain Linear."""
    if isinstance(module, (FastWeightLayer, *PARTS)):
        module.init_weights()
