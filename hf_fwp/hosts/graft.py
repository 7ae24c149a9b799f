"""Model classes of a family with fast weights in place of attention, made from the family's own classes.

`FwpLlamaConfig` is `LlamaConfig` with one more field, `fwp`; `FwpLlamaForCausalLM` is `LlamaForCausalLM` with the
attention of the layers named there replaced. Weights' names, tied weights, generation and heads are inherited.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..cache import install_fast_weight_layers
from ..generation import FastWeightGeneration
from ..layer import FastWeightLayer, backends_of, init_mixer_weights, layers_of
from ..loading import AlignedLoading
from ..packing import packed_batch, positions_in_segments, valid_tokens
from .options import check_fwp, check_layers, converted_layers, mixer_options, written_out
from .table import HEADS, HOSTS, find_host

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as Config
else:
    Config = object

MODULE = __package__  # where the generated classes say they live, and where pickle finds them
FLOAT32 = ("A_log", "dt_bias")  # half-lives of many tokens round to the same value in bf16
PADDING = "fast_weight"  # key of the 2-D mask beside the host's own masks


class FastWeightAttention(FastWeightLayer):
    """A mixer called the way a host calls its attention: the padding mask travels beside the host's own mask."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        mask, segments = kwargs.pop("fast_weight_inputs", (attention_mask, cu_seqlens))
        return super().forward(hidden_states, mask, position_embeddings, past_key_values, segments, **kwargs)

    def mixed_reads(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        mask, segments = kwargs.pop("fast_weight_inputs", (attention_mask, cu_seqlens))
        return super().mixed_reads(hidden_states, mask, position_embeddings, past_key_values, segments, **kwargs)


class GraftedConfig(Config):
    """Adds the field `fwp`, checked. The model classes are registered when the first config exists: they need the
    family's modeling file, and `import hf_fwp` must stay light."""

    host_name: ClassVar[str]
    fwp: dict[str, Any] | None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            if name.startswith("fwp"):
                raise ValueError(f"unknown field {name!r}; did you mean 'fwp'?")
        super().__post_init__(**kwargs)
        self.fwp = {"layers": [], **(self.fwp or {})}
        check_fwp(self)
        register_models(self.host_name)


class Grafted(AlignedLoading):
    """What all generated classes of a family share."""

    @property
    def hf_fwp_layers(self) -> dict[int, FastWeightLayer]:
        """The mixers by the index of their layer."""
        return layers_of(self)

    @property
    def hf_fwp_backend(self) -> dict[int, str | None]:
        """The backend that each mixer's last forward ran."""
        return backends_of(self)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_mixer_weights(module)


class GraftedModel(Grafted):
    """The family's base model with the attention of the converted layers replaced."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        host = HOSTS[config.host_name]
        blocks = getattr(self, host.blocks)
        for layer_idx in converted_layers(config):
            setattr(blocks[layer_idx], host.attention, FastWeightAttention(mixer_options(config, layer_idx), layer_idx))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        layers = converted_layers(self.config)
        tokens = input_ids if input_ids is not None else inputs_embeds
        segments = None
        if layers and tokens is not None:
            batch, length = tokens.shape[:2]
            attention_mask, padding = split_masks(attention_mask)
            if padding is not None and padding.ndim == 2:
                padding = valid_tokens(padding, batch=batch, length=length)
            segments = packed_batch(
                batch=batch,
                length=length,
                padded=padding is not None,
                cached=past_key_values is not None,
                position_ids=position_ids,
                **kwargs,
            )
            kwargs["fast_weight_inputs"] = (padding, segments)
            if segments is not None:
                # the attention that stays sees sequences only in position_ids, and only without a mask
                attention_mask = None
                position_ids = positions_in_segments(segments, total=batch * length).view(batch, length)
        use_cache = segments is None and (self.config.use_cache if use_cache is None else use_cache)
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            install_fast_weight_layers(past_key_values, layers)
        if layers and tokens is not None and len(layers) == self.config.num_hidden_layers:
            # no layer reads the host's [T, T] mask; a 4-D mask is taken as it is, so this one saves building it
            attention_mask = tokens.new_ones(1, 1, 1, 1)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class GraftedHead(FastWeightGeneration, Grafted):
    """A head of the family on the base model with fast weights."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        base_class = host_classes(config.host_name)["Model"]
        if not isinstance(self.base_model, base_class):
            setattr(self, self.base_model_prefix, base_class(config))
            self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        head: Any = cls
        base: Any = host_classes(head.config_class.host_name)["Model"]
        if head.base_model_prefix != base.base_model_prefix:
            # the question-answering heads of llama and qwen3 call the base model otherwise than all other heads do, and
            # would start from random weights (transformers issue 30381)
            places = {rf"^{base.base_model_prefix}\.": f"{head.base_model_prefix}."}
            kwargs.setdefault("key_mapping", places)
        return super().from_pretrained(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            install_fast_weight_layers(cache, converted_layers(self.config))

    def create_masks_for_generate(
        self, config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        """The host's masks for a cache of fixed size, and beside them the padding of the current tokens."""
        masks = create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs)
        if attention_mask is None or not converted_layers(config):
            return masks
        padding = {PADDING: attention_mask[:, -inputs_embeds.shape[1] :]}
        return {**masks, **padding} if isinstance(masks, dict) else {"": masks, **padding}


def split_masks(mask: Tensor | dict[str, Tensor | None] | None) -> tuple[Any, Tensor | None]:
    """(what the host reads, what tells padding) from one mask, masks by layer type, or `create_masks_for_generate`."""
    if not isinstance(mask, dict):
        return mask, mask
    masks = dict(mask)
    padding = masks.pop(PADDING) if PADDING in masks else next((m for m in masks.values() if m is not None), None)
    return masks.get("", masks), padding


@functools.cache
def host_config(name: str) -> type:
    """`FwpLlamaConfig` for 'llama'."""
    host = HOSTS[name]
    base = getattr(transformers, f"{host.title}Config")
    body = {
        "__module__": MODULE,
        "__doc__": f"{base.__name__} of a model with fast weights in the layers named in `fwp`.",
        "__annotations__": {"fwp": dict | None},
        "fwp": None,
        "model_type": host.model_type,
        "host_name": name,
    }
    return strict(type(f"Fwp{host.title}Config", (GraftedConfig, base), body))


@functools.cache
def host_classes(name: str) -> dict[str, type]:
    """The generated model classes of a family: head -> class, `Model` is the base."""
    host = HOSTS[name]
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    classes = {}
    for head in host.heads:
        base = getattr(modeling, host.title + head)
        kind = GraftedModel if head == "Model" else GraftedHead
        body = {
            "__module__": MODULE,
            "__doc__": f"{base.__name__} with fast weights in place of the attention of some layers.",
            "config_class": host_config(name),
            "_keep_in_fp32_modules_strict": {*FLOAT32, *(base._keep_in_fp32_modules_strict or ())},
        }
        classes[head] = type(f"Fwp{host.title}{head}", (kind, base), body)
    return classes


def register_hosts() -> None:
    """Make AutoConfig know every converted family."""
    for name, host in HOSTS.items():
        AutoConfig.register(host.model_type, host_config(name), exist_ok=True)


@functools.cache
def register_models(name: str) -> None:
    """Make the Auto classes and peft know the model classes of one family."""
    from peft.utils import constants  # 0.2 s: only once a converted model is really used

    host = HOSTS[name]
    for head, model_class in host_classes(name).items():
        getattr(transformers, HEADS[head]).register(host_config(name), model_class, exist_ok=True)
        if head == "ForCausalLM":
            # Trainer shifts the labels of a smoothed loss for the classes named here (transformers issues 17960, 27161)
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[host.model_type] = model_class.__name__
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[host.model_type] = list(host.lora_targets)


def student_config(teacher_config: Any, *, layers: Iterable[int], fwp: Mapping[str, Any] | None = None) -> Any:
    """The teacher's config with fast weights in `layers`; `fwp` holds mixer options, `per_layer` options included."""
    host = find_host(teacher_config)
    if teacher_config.model_type != host.name:
        raise ValueError(f"the teacher is a converted model already ({teacher_config.model_type!r}); give the original")
    layers = check_layers(layers, num_layers=teacher_config.num_hidden_layers)
    inherited = teacher_config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map", "quantization_config", "fwp"):
        inherited.pop(name, None)
    config = host_config(host.name)(**inherited, fwp=written_out(layers, fwp))
    config._attn_implementation = teacher_config._attn_implementation
    return config
