"""Model classes of a family with fast weights in place of attention, made from the family's own classes.

`FwpLlamaConfig` is `LlamaConfig` with one more field, `fwp`; `FwpLlamaForCausalLM` is `LlamaForCausalLM` with the
attention of the layers named there replaced. Weights' names, tied weights, generation and heads are inherited.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache

from ..auto_map import WithAutoMap
from ..cache import install_fast_weight_layers
from ..generation import FastWeightGeneration
from ..layer import FastWeightLayer, backends_of, init_mixer_weights, layers_of
from ..loading import AlignedLoading
from ..options import MixerOptions
from ..packing import packed_batch, packed_segments, positions_in_segments, valid_tokens
from ..registration import register_models_of
from .options import check_fwp, check_layers, converted_layers, mixer_options, written_out
from .rotary import FORMS
from .table import HEADS, HOSTS, Host, find_host

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as Config
else:
    Config = object

FLOAT32 = ("A_log", "dt_bias")  # half-lives of many tokens round to the same value in bf16
PADDING = "fast_weight"  # key of the 2-D mask beside the host's own masks
# heads whose loss is the mean of the batch: Trainer has to divide it by the batches that it accumulates
MEAN_LOSS = ("ForSequenceClassification", "ForTokenClassification")


class FastWeightAttention(FastWeightLayer):
    """A mixer called the way a host calls its attention: the padding mask travels beside the host's own mask."""

    def __init__(self, options: MixerOptions, layer_idx: int, host: Host) -> None:
        super().__init__(options, layer_idx)
        self.host = host

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        out_BTD, _ = super().forward(hidden_states, **self._own(kwargs))
        return (args[0] + out_BTD if self.host.adds_residual and args else out_BTD), None

    def mixed_reads(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().mixed_reads(hidden_states, **self._own(kwargs))

    def standard_rotary(self, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        if rotary is None:
            return None
        cos, sin = (FORMS[self.host.rotary](part) for part in rotary)
        return cos, sin

    def _own(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a mixer among those that the host gives."""
        mask = kwargs.pop("attention_mask", None)
        cache = kwargs.pop("layer_past", None)  # what some families call it
        mask, segments = kwargs.pop("fast_weight_inputs", (mask, kwargs.pop("cu_seqlens", None)))
        rotary = self.standard_rotary(kwargs.pop("position_embeddings", None))
        given = {"attention_mask": mask, "position_embeddings": rotary, "cu_seqlens": segments}
        return {"past_key_values": cache, **kwargs, **given}


class GraftedConfig(WithAutoMap, Config):
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

    @property
    def update_rules(self) -> list[str]:
        """The rules of the converted layers, each once."""
        return list(dict.fromkeys(mixer_options(self, layer_idx).rule for layer_idx in converted_layers(self)))


class Grafted(AlignedLoading):
    """What all generated classes of a family share."""

    family_class: ClassVar[Any]  # what the class is made from

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

    # transformers reads both answers in the source of a class, here this file, and remembers them for subclasses:
    # how experts are computed would hang on which class was asked first (no public issue found)
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.family_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.family_class._can_set_experts_implementation()


class GraftedModel(Grafted):
    """The family's base model with the attention of the converted layers replaced."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        host = HOSTS[config.host_name]
        blocks = blocks_of(self, host)
        for layer_idx in converted_layers(config):
            mixer = FastWeightAttention(mixer_options(config, layer_idx), layer_idx, host)
            setattr(blocks[layer_idx], host.attention, mixer)
        owner = self.get_submodule(host.blocks.rpartition(".")[0])
        if owner is not self:  # a model of its own inside this one, which a head may call past this one
            owner._init_weights = self._init_weights  # type: ignore[assignment]
            owner.register_forward_pre_hook(functools.partial(_prepare, config), with_kwargs=True)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if "." not in HOSTS[self.config.host_name].blocks:
            _, kwargs = _prepare(self.config, self, (), kwargs | {"input_ids": input_ids})
            return super().forward(**kwargs)
        return super().forward(input_ids=input_ids, **kwargs)


def _with_arguments_of(base: Any) -> Callable[..., Any]:
    """GraftedModel.forward with the signature of the family's own: families order their arguments differently."""
    named = inspect.signature(base.forward).parameters.values()
    names = [given.name for given in named if given.kind is given.POSITIONAL_OR_KEYWORD][1:]

    @functools.wraps(base.forward)
    def forward(self: GraftedModel, *args: Any, **kwargs: Any) -> Any:
        return GraftedModel.forward(self, **dict(zip(names[: len(args)], args, strict=True)), **kwargs)

    return forward


def _prepare(
    config: Any, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the module that owns the blocks, with what mixers need: a cache with fast-weight layers in it,
    and padding and the beginnings of packed sequences beside the host's own masks."""
    host, layers, given = HOSTS[config.host_name], converted_layers(config), dict(kwargs)
    cache, padding, segments = given.get("past_key_values"), None, None
    tokens = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
    if layers and tokens is not None:
        batch, length = tokens.shape[:2]
        given["attention_mask"], padding = split_masks(given.get("attention_mask"))
        if padding is not None and padding.ndim == 2:
            padding = valid_tokens(padding, batch=batch, length=length)
        segments = packed_batch(
            batch=batch,
            length=length,
            padded=padding is not None,
            cached=cache is not None,
            **{name: given.get(name) for name in ("position_ids", "cu_seq_lens_q", "seq_idx")},
        )
        if segments is not None:
            # attention that stays sees sequences in position_ids alone, without a mask (huggingface/transformers#46634)
            given["attention_mask"] = None
            given["position_ids"] = positions_in_segments(segments, total=batch * length).view(batch, length)
    wanted = config.use_cache if given.get("use_cache") is None else given["use_cache"]
    given["use_cache"] = wanted and segments is None
    blocks: Any = owner.get_submodule(host.blocks.rpartition(".")[2])
    if given["use_cache"] and cache is None and not (owner.training and blocks[0].gradient_checkpointing):
        cache = given["past_key_values"] = DynamicCache(config=config)
    if cache is not None:
        install_fast_weight_layers(cache, layers)
    if not layers or tokens is None:
        return args, given
    if host.closed:
        refuse_packed(segments, config)
    else:
        given["fast_weight_inputs"] = (padding, segments)
        if len(layers) == config.num_hidden_layers and not host.masked_positions:
            # no layer reads the host's [T, T] mask; a 4-D mask is taken as it is, so this one saves building it
            given["attention_mask"] = tokens.new_ones(1, 1, 1, 1)
    return args, given


class GraftedHead(FastWeightGeneration, Grafted):
    """A head of the family on the base model with fast weights."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        base_class = host_classes(config.host_name)["Model"]
        if not isinstance(self.base_model, base_class):
            setattr(self, self.base_model_prefix, base_class(config))
            self.post_init()
        if HOSTS[config.host_name].closed:  # a hook: generate reads which arguments the family's own forward takes
            self.register_forward_pre_hook(functools.partial(_refuse_packing, config), with_kwargs=True)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        head: Any = cls
        base: Any = host_classes(head.config_class.host_name)["Model"]
        if head.base_model_prefix != base.base_model_prefix:
            # the question-answering heads of llama and qwen3 call the base model otherwise than all other heads do, and
            # would start from random weights (huggingface/transformers#30381)
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

    def masks_of_fixed_size(
        self, config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        """The host's masks for a cache of fixed size, and beside them the padding of the current tokens."""
        if HOSTS[config.host_name].masked_positions:  # the host makes its masks itself, when it has counted positions
            own = getattr(super(FastWeightGeneration, self), "create_masks_for_generate", None)
            given = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
            return attention_mask if own is None else own(**given, **kwargs)
        masks = super().masks_of_fixed_size(config, inputs_embeds, attention_mask, **kwargs)
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


def _refuse_packing(config: Any, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Heads of a closed family may drop what says that a batch is packed."""
    given = {name: kwargs.get(name) for name in ("cu_seq_lens_q", "seq_idx", "position_ids")}
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        given["position_ids"] = None
    tokens = next((x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
    if converted_layers(config) and tokens is not None:
        refuse_packed(packed_segments(batch=tokens.shape[0], length=tokens.shape[1], **given), config)


def refuse_packed(segments: Tensor | None, config: Any) -> None:
    """Blocks of a closed family cannot be told where sequences begin, neither ours nor the family's own."""
    if segments is not None:
        raise ValueError(
            f"the family {config.host_name!r} cannot tell packed sequences apart; give one sequence per row, padded"
        )


def blocks_of(base_model: nn.Module, host: Host) -> nn.ModuleList:
    """The blocks of a family's base model, in order."""
    blocks: Any = base_model.get_submodule(host.blocks)
    return blocks


@functools.cache
def host_config(name: str) -> type:
    """`FwpLlamaConfig` for 'llama'."""
    host = HOSTS[name]
    base = getattr(transformers, f"{host.title}Config", None)
    if base is None:  # a family from outside transformers
        base = getattr(importlib.import_module(host.modeling), host.class_name("Model")).config_class
    body = {
        "__module__": __name__,  # where pickle finds it, by `__getattr__`
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
    modeling = importlib.import_module(host.modeling)
    classes = {}
    for head in host.heads:
        base = getattr(modeling, host.class_name(head))
        kind = GraftedModel if head == "Model" else GraftedHead
        body = {
            "__module__": __name__,  # where pickle finds it, by `__getattr__`
            "__doc__": f"{base.__name__} with fast weights in place of the attention of some layers.",
            "config_class": host_config(name),
            "family_class": base,
            "_keep_in_fp32_modules_strict": {*FLOAT32, *(base._keep_in_fp32_modules_strict or ())},
        }
        if head == "Model":
            body["forward"] = _with_arguments_of(base)
        if head in MEAN_LOSS:
            body["accepts_loss_kwargs"] = False
        classes[head] = type(f"Fwp{base.__name__}", (kind, base), body)
    return classes


def __getattr__(name: str) -> Any:
    """FwpLlamaConfig, FwpLlamaForCausalLM, …: made from the family's own class when first asked for."""
    for host in HOSTS.values():
        if name == f"Fwp{host.title}Config":
            return host_config(host.name)
        for head in host.heads:
            if name == f"Fwp{host.class_name(head)}":
                return host_classes(host.name)[head]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_hosts() -> None:
    """Make AutoConfig know every converted family."""
    for host in HOSTS.values():
        register_host(host)


def register_host(host: Host) -> None:
    """Make AutoConfig know one converted family."""
    AutoConfig.register(host.model_type, host_config(host.name), exist_ok=True)


@functools.cache
def register_models(name: str) -> None:
    """Make the Auto classes and peft know the model classes of one family."""
    host = HOSTS[name]
    models = {getattr(transformers, HEADS[head]): model_class for head, model_class in host_classes(name).items()}
    register_models_of(host_config(name), models, host.lora_targets)


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
