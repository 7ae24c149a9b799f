"""The models: one class for every update rule and for any mix of rules and attention over the layers.

    pre         h = h + mix(norm(h));              h = h + mlp(norm(h))
    post        h = norm(h + mix(h));              h = norm(h + mlp(h))            Vaswani et al. 2017
    idsia_pre   h = norm(h);  h = h + mix(h);      h = h + mlp(norm(h))            Irie et al. 2021
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import LAYER_TYPE
from .configuration import ATTENTION_LAYERS, FwpConfig
from .layer import FastWeightLayer, init_mixer_weights, layers_of, rotate
from .packing import packed_segments, positions_in_segments, valid_tokens

Masks = dict[str, Tensor | None]
MASK_MAKERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
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
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
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
            self.mixer: nn.Module = FastWeightLayer(config.mixer_options(layer_idx), layer_idx)
        else:
            self.mixer = FwpAttention(config, layer_idx)
        self.mlp = FwpMlp(config)
        norm = NORMS[config.norm_type]
        self.mixer_norm = norm(config.hidden_size, eps=config.norm_eps)
        self.mlp_norm = norm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        h_BTD = hidden_states if self.placement == "post" else self.mixer_norm(hidden_states)
        residual = h_BTD if self.placement == "idsia_pre" else hidden_states
        if self.layer_type == LAYER_TYPE:
            kwargs = {"cu_seqlens": cu_seqlens}
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


class FwpPreTrainedModel(PreTrainedModel):
    """What every head shares with the base model."""

    config: FwpConfig
    config_class = FwpConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FwpBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    # in bf16 half-lives of many tokens all round to the same value
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias"}
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": FwpBlock, "attentions": FwpAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_mixer_weights(module)

    @property
    def hf_fwp_layers(self) -> dict[int, FastWeightLayer]:
        """The mixers by the index of their layer."""
        return layers_of(self)


class FwpModel(FwpPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: FwpConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.position_embedding == "rope":
            self.rotary_emb = LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList([FwpBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        normed = config.norm_placement == "post"
        self.norm = nn.Identity() if normed else NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        h_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = h_BTD.shape
        mask_BT = self._padding(attention_mask, batch=batch, length=length, cache=past_key_values)
        cu_seqlens = None
        if past_key_values is None and mask_BT is None:
            signals = {name: kwargs.get(name) for name in ("cu_seq_lens_q", "seq_idx")}
            cu_seqlens = packed_segments(batch=batch, length=length, position_ids=position_ids, **signals)
        if use_cache and past_key_values is None and cu_seqlens is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._positions(h_BTD, attention_mask, past_key_values, cu_seqlens)
        if mask_BT is not None:
            # padded embeddings may be NaN, and 0 * NaN would reach real tokens through the attention layers
            h_BTD = torch.where(mask_BT[..., None], h_BTD, 0)
        masks = self._masks(h_BTD, attention_mask, mask_BT, past_key_values, position_ids)
        rotary = self.rotary_emb(h_BTD, position_ids) if self.config.position_embedding == "rope" else None
        h_BTD = self.dropout(h_BTD + self._position_embedding(position_ids, like=h_BTD))
        for block in self.layers:
            h_BTD = block(
                h_BTD,
                attention_mask=masks[block.layer_type],
                position_embeddings=rotary,
                past_key_values=past_key_values,
                cu_seqlens=cu_seqlens,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h_BTD), past_key_values=past_key_values)

    def _padding(
        self, attention_mask: Tensor | Masks | None, *, batch: int, length: int, cache: Cache | None
    ) -> Tensor | None:
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(attention_mask, dict):
            attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
        return valid_tokens(attention_mask, batch=batch, length=length, past=past)

    def _positions(
        self,
        h_BTD: Tensor,
        attention_mask: Tensor | Masks | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """Positions count the real tokens of each sequence."""
        batch, length, _ = h_BTD.shape
        if cu_seqlens is not None:
            return positions_in_segments(cu_seqlens, total=batch * length).view(batch, length)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
        past = 0 if cache is None else cache.get_seq_length()
        return (torch.arange(length, device=h_BTD.device) + past)[None]

    def _masks(
        self,
        h_BTD: Tensor,
        attention_mask: Tensor | Masks | None,
        mask_BT: Tensor | None,
        cache: Cache | None,
        position_ids: Tensor,
    ) -> Masks:
        """For each kind of layer the mask it reads; mixers read which tokens are real."""
        masks: Masks = {LAYER_TYPE: mask_BT}
        for kind in ATTENTION_LAYERS:
            if kind not in self.config.layer_types:
                continue
            if isinstance(attention_mask, dict):
                masks[kind] = attention_mask[kind]
                continue
            masks[kind] = MASK_MAKERS[kind](
                config=self.config,
                inputs_embeds=h_BTD,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
            )
        return masks

    def _position_embedding(self, position_ids: Tensor, *, like: Tensor) -> Tensor | float:
        kind = self.config.position_embedding
        if kind == "learned":
            return self.embed_positions(position_ids)
        if kind != "sinusoidal":
            return 0.0
        half = like.shape[-1] // 2
        frequency = 10000 ** (-torch.arange(half, device=like.device) / half)
        angle_BTF = position_ids[..., None] * frequency
        return torch.cat([angle_BTF.sin(), angle_BTF.cos()], dim=-1).to(like.dtype)


class FwpForCausalLM(FwpPreTrainedModel, GenerationMixin):
    """Next-token prediction."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FwpConfig) -> None:
        super().__init__(config)
        self.model = FwpModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "continuous batching pages keys and values, which fast-weight layers do not have; "
            "use generate with a padded batch"
        )

    init_continuous_batching = generate_batch


class FwpForSequenceClassification(GenericForSequenceClassification, FwpPreTrainedModel):
    """A score for the last real token of each sequence."""

    def __init__(self, config: FwpConfig) -> None:
        FwpPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = FwpModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class FwpForTokenClassification(GenericForTokenClassification, FwpPreTrainedModel):
    """A score for every token."""

    def __init__(self, config: FwpConfig) -> None:
        FwpPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = FwpModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class FwpForQuestionAnswering(GenericForQuestionAnswering, FwpPreTrainedModel):
    """Where the answer starts and ends."""

    def __init__(self, config: FwpConfig) -> None:
        FwpPreTrainedModel.__init__(self, config)
        self.model = FwpModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


MODELS = {
    AutoModel: FwpModel,
    AutoModelForCausalLM: FwpForCausalLM,
    AutoModelForSequenceClassification: FwpForSequenceClassification,
    AutoModelForTokenClassification: FwpForTokenClassification,
    AutoModelForQuestionAnswering: FwpForQuestionAnswering,
}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@functools.cache
def register_models() -> None:
    """Make the Auto classes and peft know the models; called when the first FwpConfig exists."""
    from peft.utils import constants  # slow to import, so not on `import hf_fwp`

    for auto_class, model_class in MODELS.items():
        auto_class.register(FwpConfig, model_class, exist_ok=True)
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[FwpConfig.model_type] = LORA_TARGETS
