"""The models: one class for every update rule and for any mix of rules and attention over the layers."""

from __future__ import annotations

import functools
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
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .block import NORMS, FwpAttention, FwpBlock
from .cache import LAYER_TYPE
from .configuration import ATTENTION_LAYERS, FwpConfig
from .cross_entropy import causal_loss
from .generation import FastWeightGeneration
from .heads import TimedQuestionAnswering, TimedTokenClassification
from .inputs import check_ids, check_times, check_values, last_real, look_up
from .layer import FastWeightLayer, backends_of, init_mixer_weights, layers_of
from .loading import RenamedLoading
from .packing import packed_batch, positions_in_segments, valid_tokens
from .registration import register_models_of

logger = logging.get_logger(__name__)

Masks = dict[str, Tensor | None]
MASK_MAKERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class FwpPreTrainedModel(RenamedLoading, PreTrainedModel):  # pyright: ignore[reportIncompatibleVariableOverride] as there
    """What every head shares with the base model."""

    config: FwpConfig
    config_class = FwpConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FwpBlock"]  # noqa: RUF012 transformers declares it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 transformers declares it
    # in bf16 half-lives of many tokens all round to the same value
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias"}  # noqa: RUF012 transformers declares it
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": FwpBlock, "attentions": FwpAttention}  # noqa: RUF012 transformers declares it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_mixer_weights(module)

    @property
    def _input_embed_layer(self) -> str:
        """The name under which transformers finds what reads the inputs."""
        return "embed_tokens" if self.config.input_size is None else "embed_values"

    @property
    def hf_fwp_layers(self) -> dict[int, FastWeightLayer]:
        """The mixers by the index of their layer."""
        return layers_of(self)

    @property
    def hf_fwp_backend(self) -> dict[int, str | None]:
        """The backend that each mixer's last forward ran."""
        return backends_of(self)


class FwpModel(FwpPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: FwpConfig) -> None:
        super().__init__(config)
        if config.input_size is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        else:
            self.embed_values = nn.Linear(config.input_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.position_embedding == "rope":
            self.rotary_emb = LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType] reads no more than ours has
        self.layers = nn.ModuleList([FwpBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        norm = NORMS[config.norm_type]
        self.norm = norm(config.hidden_size, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.looks_ahead = config.looks_ahead
        self.takes_times = any(layer.options.takes_times for layer in layers_of(self).values())
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
        times: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        h_BTD = self._embedded(input_ids, inputs_embeds)
        batch, length, _ = h_BTD.shape
        if times is not None:
            check_times(times, batch=batch, length=length, asked=self.takes_times)
        mask_BT = self._padding(attention_mask, batch=batch, length=length, cache=past_key_values)
        cu_seqlens = packed_batch(
            batch=batch,
            length=length,
            padded=mask_BT is not None,
            cached=past_key_values is not None,
            position_ids=position_ids,
            **kwargs,
        )
        if use_cache and past_key_values is None and cu_seqlens is None and not self.looks_ahead:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._positions(h_BTD, attention_mask, past_key_values, cu_seqlens)
        if mask_BT is not None:
            # padded embeddings may be NaN, and 0 * NaN would reach real tokens through the attention layers
            h_BTD = torch.where(mask_BT[..., None], h_BTD, 0)
        if self.config.input_size is not None:
            h_BTD = self.embed_values(h_BTD)
        mask_positions = position_ids
        if cu_seqlens is not None:
            # transformers' masks see sequences in position_ids alone, without a mask (huggingface/transformers#46634)
            attention_mask, mask_positions = None, self._positions(h_BTD, None, None, cu_seqlens)
        masks = self._masks(h_BTD, attention_mask, mask_BT, past_key_values, mask_positions)
        rotary = self.rotary_emb(h_BTD, position_ids) if self.config.position_embedding == "rope" else None
        h_BTD = self.dropout(h_BTD + self._position_embedding(position_ids, like=h_BTD))
        for kind, block in zip(self.config.layer_types, self.layers, strict=True):
            h_BTD = block(
                h_BTD,
                attention_mask=masks[kind],
                position_embeddings=rotary,
                past_key_values=past_key_values,
                cu_seqlens=cu_seqlens,
                position_ids=position_ids,
                times=times,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h_BTD), past_key_values=past_key_values)

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Embedded tokens, or real values as they are given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        read = "hidden_size" if self.config.input_size is None else "input_size"
        if inputs_embeds is not None:
            check_values(inputs_embeds, getattr(self.config, read), called=read)
            return inputs_embeds
        if self.config.input_size is not None:
            raise ValueError(
                f"this model reads real values, not tokens: give inputs_embeds [B, T, {self.config.input_size}]"
            )
        assert input_ids is not None
        check_ids(input_ids)
        return look_up(self.embed_tokens, input_ids, of="input_ids", limit="vocab_size", count=self.config.vocab_size)

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
            count = self.config.max_position_embeddings
            limit = "max_position_embeddings"
            return look_up(self.embed_positions, position_ids, of="position_ids", limit=limit, count=count)
        if kind != "sinusoidal":
            return 0.0
        half = like.shape[-1] // 2
        frequency = 10000 ** (-torch.arange(half, device=like.device) / half)
        angle_BTF = position_ids[..., None] * frequency
        return torch.cat([angle_BTF.sin(), angle_BTF.cos()], dim=-1).to(like.dtype)


class FwpForCausalLM(FastWeightGeneration, FwpPreTrainedModel, GenerationMixin):
    """Next-token prediction."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 transformers declares it

    def __init__(self, config: FwpConfig) -> None:
        super().__init__(config)
        if not config.predicts_tokens:
            raise ValueError(
                "this configuration cannot predict tokens: it reads real values (input_size), or a layer reads later "
                "tokens (control and solver of continuous_fwp); take FwpForSequenceClassification, or input_size=None, "
                "control 'ode' and solver 'euler'"
            )
        self.model = FwpModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
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
        times: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            times=times,
            **kwargs,
        )
        loss, logits = None, None
        if labels is not None and self._loss_without_logits(logits_to_keep):
            loss = causal_loss(outputs.last_hidden_state, self.lm_head, labels, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if labels is not None and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss_without_logits(self, logits_to_keep: int | Tensor) -> bool:
        """Whether the chunked loss was asked for and is this model's loss; what adapters or shards changed is not."""
        if not (self.config.chunked_loss and self.training):
            return False
        plain = type(self.lm_head) is nn.Linear and type(self.lm_head.weight) is nn.Parameter
        if plain and self.loss_function is ForCausalLMLoss and isinstance(logits_to_keep, int) and not logits_to_keep:
            return True
        if not torch.compiler.is_compiling():
            logger.warning_once(
                "chunked_loss is ignored: it needs the model's own lm_head and loss, all tokens, and no adapter or "
                "shard of lm_head"
            )
        return False


class FwpForSequenceClassification(GenericForSequenceClassification, FwpPreTrainedModel):
    """A score for the last real token of each sequence.

    A series is given as `inputs_embeds`, with `times` [B, T] where its observations are irregular, and `attention_mask`
    where rows differ in length: transformers' head would read their last position (huggingface/transformers#16372).
    """

    # the loss is the mean of the batch: Trainer has to divide it by the batches that it accumulates
    accepts_loss_kwargs = False

    def __init__(self, config: FwpConfig) -> None:
        FwpPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 2
        self.model = FwpModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        times: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        kwargs |= {"position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache}
        kwargs |= {"attention_mask": attention_mask, "times": times}
        if input_ids is not None:
            return super().forward(input_ids, labels=labels, **kwargs)
        outputs = self.model(inputs_embeds=inputs_embeds, **kwargs)
        hidden_BTD = outputs.last_hidden_state
        logits = self.score(hidden_BTD[torch.arange(len(hidden_BTD)), last_real(attention_mask, hidden_BTD)])
        judged = {"logits": logits, "pooled_logits": logits, "labels": labels, "config": self.config}
        loss = None if labels is None else self.loss_function(**judged)
        rest = {name: outputs[name] for name in ("past_key_values", "hidden_states", "attentions") if name in outputs}
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, **rest)


class FwpForTokenClassification(TimedTokenClassification, FwpPreTrainedModel):
    """A score for every token."""

    def __init__(self, config: FwpConfig) -> None:
        FwpPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 2
        self.model = FwpModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class FwpForQuestionAnswering(TimedQuestionAnswering, FwpPreTrainedModel):
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
    register_models_of(FwpConfig, MODELS, LORA_TARGETS)
