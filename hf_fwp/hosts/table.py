"""The pretrained families whose attention can be replaced: a row per family, read from top to bottom."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "fwp_"

HEADS: dict[str, str] = {
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}

Source = str | bool | Callable[[Any], Any]


def _head_size(config: Any) -> int:
    # not every config of these families says it
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# mixer option <- the host's config attribute (a name), a constant (True, False), or a function of the config
WIDTHS: dict[str, Source] = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "initializer_range": "initializer_range",
}
GROUPED: dict[str, Source] = {**WIDTHS, "num_key_value_heads": "num_key_value_heads", "head_dim": _head_size}
SHAPES: dict[str, Source] = {**GROUPED, "norm_eps": "rms_norm_eps"}
BIASED: dict[str, Source] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
OLMO: dict[str, Source] = {**SHAPES, **BIASED, "head_norm": lambda _: "joint"}


@dataclass(frozen=True)
class Host:
    """What a family calls its parts, and what its attention implies for the mixer that takes its place."""

    name: str  # transformers' model_type
    title: str  # LlamaConfig = title + Config, LlamaForCausalLM = title + a key of HEADS
    mixer: Mapping[str, Source] = field(default_factory=dict)
    attention: str = "self_attn"  # the attribute of a block that is replaced
    blocks: str = "layers"  # where the base model lists the blocks
    last: tuple[str, ...] = ("norm",)  # where the base model holds what follows its blocks
    projections: str = "separate"  # the weight map, a key of hf_fwp.conversion.families.WEIGHT_MAPS
    heads: tuple[str, ...] = tuple(HEADS)
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    module: str = ""  # the modeling file, where it is not transformers.models.{name}.modeling_{name}
    classes: Mapping[str, str] = field(default_factory=dict)  # key of HEADS -> class, where it is not title + key
    rotates: bool | str = True  # rotary positions: yes, no, or the config's attribute, for all layers or one per layer
    alibi: bool | str = False  # a linear bias of the scores in place of positions: yes, no, or the config's attribute
    rotary: str = "halves"  # the form of cos and sin, a key of hf_fwp.hosts.rotary.FORMS
    adds_residual: bool = False  # the attention is given the residual stream, and adds it itself
    masked_positions: bool = False  # positions are counted in the padding mask
    closed: bool = False  # blocks take no further arguments

    @property
    def model_type(self) -> str:
        """The model type of the converted family."""
        return PREFIX + self.name

    @property
    def modeling(self) -> str:
        """The module that holds the family's model classes."""
        return self.module or f"transformers.models.{self.name}.modeling_{self.name}"

    def class_name(self, head: str) -> str:
        """What the family calls its class with this head, a key of HEADS."""
        return self.classes.get(head, self.title + head)


def without(*heads: str) -> tuple[str, ...]:
    """The heads of a family that lacks some."""
    return tuple(head for head in HEADS if head not in heads)


LANGUAGE = ("Model", "ForCausalLM")
TOKENS, QUESTIONS = "ForTokenClassification", "ForQuestionAnswering"
FUSED_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "query_key_value")


def _falcon_keys(config: Any) -> int:
    if config.new_decoder_architecture or not config.multi_query:
        return config.num_kv_heads
    return 1


HOSTS: dict[str, Host] = {
    host.name: host
    for host in (
        Host("llama", "Llama", {**SHAPES, **BIASED}),
        Host("mistral", "Mistral", SHAPES),
        Host("qwen2", "Qwen2", {**SHAPES, "qkv_bias": True}),
        Host("qwen3", "Qwen3", {**SHAPES, **BIASED, "head_norm": True}),
        Host("qwen3_moe", "Qwen3Moe", {**SHAPES, **BIASED, "head_norm": True}),
        Host("mixtral", "Mixtral", SHAPES),
        Host("gemma2", "Gemma2", {**SHAPES, **BIASED}, heads=without(QUESTIONS)),
        Host(
            "gemma3_text",
            "Gemma3Text",
            {**SHAPES, **BIASED, "head_norm": True},
            projections="gemma3",
            heads=without(QUESTIONS, TOKENS),
            module="transformers.models.gemma3.modeling_gemma3",
            classes={"ForCausalLM": "Gemma3ForCausalLM"},
        ),
        Host("olmo2", "Olmo2", OLMO, projections="olmo", heads=without(QUESTIONS, TOKENS)),
        Host("olmo3", "Olmo3", OLMO, projections="olmo", heads=without(QUESTIONS, TOKENS)),
        Host("smollm3", "SmolLM3", {**SHAPES, **BIASED}, rotates="no_rope_layers"),
        Host("granite", "Granite", {**SHAPES, **BIASED}, heads=LANGUAGE),
        Host(
            "starcoder2",
            "Starcoder2",
            {**GROUPED, "qkv_bias": "use_bias", "o_bias": "use_bias"},
            heads=without(QUESTIONS),
        ),
        Host("stablelm", "StableLm", {**GROUPED, "qkv_bias": "use_qkv_bias"}, heads=without(QUESTIONS), closed=True),
        Host(
            "cohere",
            "Cohere",
            {
                **GROUPED,
                **BIASED,
                "norm_eps": "layer_norm_eps",
                "head_norm": lambda config: config.use_qk_norm and "layer",
            },
            projections="cohere",
            heads=LANGUAGE,
            rotary="pairs",
        ),
        Host(
            "gpt_oss",
            "GptOss",
            {**SHAPES, **BIASED},
            projections="gpt_oss",
            heads=without(QUESTIONS),
            rotary="half_width",
        ),
        Host(
            "phi3",
            "Phi3",
            SHAPES,
            projections="phi3",
            heads=without(QUESTIONS),
            lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
        ),
        Host(
            "gpt2",
            "GPT2",
            {**WIDTHS, "norm_eps": "layer_norm_epsilon", "qkv_bias": True, "o_bias": True},
            attention="attn",
            blocks="h",
            last=("ln_f",),
            projections="conv1d",
            lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "c_attn"),
            classes={"ForCausalLM": "GPT2LMHeadModel"},
            rotates=False,
        ),
        Host(
            "opt",
            "OPT",
            {**WIDTHS, "initializer_range": "init_std", "qkv_bias": "enable_bias", "o_bias": "enable_bias"},
            blocks="decoder.layers",
            last=("decoder.final_layer_norm", "decoder.project_out"),
            projections="opt",
            heads=without(TOKENS),
            lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
            rotates=False,
            masked_positions=True,
        ),
        Host(
            "gpt_neox",
            "GPTNeoX",
            {**WIDTHS, **BIASED, "norm_eps": "layer_norm_eps"},
            attention="attention",
            last=("final_layer_norm",),
            projections="query_key_value",
            lora_targets=FUSED_TARGETS,
        ),
        Host(
            "falcon",
            "Falcon",
            {**WIDTHS, "num_key_value_heads": _falcon_keys, "qkv_bias": "bias", "o_bias": "bias"},
            attention="self_attention",
            blocks="h",
            last=("ln_f",),
            projections="query_key_value",
            lora_targets=FUSED_TARGETS,
            rotates="rotary",
            alibi="alibi",
            masked_positions=True,
            closed=True,
        ),
        Host(
            "bloom",
            "Bloom",
            {**WIDTHS, "norm_eps": "layer_norm_epsilon", "qkv_bias": True, "o_bias": True},
            attention="self_attention",
            blocks="h",
            last=("ln_f",),
            projections="query_key_value",
            lora_targets=FUSED_TARGETS,
            rotates=False,
            alibi=True,
            masked_positions=True,
            closed=True,
            adds_residual=True,
        ),
    )
}
# what a config calls the layers of its language model that read what is encoded elsewhere, a text or an image
CROSS_ATTENTION = ("add_cross_attention", "cross_attention_layers", "cross_layer_interval")
OF_THE_PACKAGE = tuple(HOSTS)  # register_family adds others


def register_family(host: Host) -> None:
    """Let `convert` and the Auto classes know a family that is not in the table; call it before loading a model of it.

    Raises ValueError where the name is taken by another row. A family with fused projections also needs a weight map:
    `hf_fwp.conversion.families.WEIGHT_MAPS[host.projections] = {...}`.
    """
    from .graft import register_host  # not on import: graft needs the table

    if HOSTS.get(host.name, host) != host:
        raise ValueError(f"the family {host.name!r} is in the table already; give the row another name")
    HOSTS[host.name] = host
    register_host(host)


def has_cross_attention(config: Any) -> bool:
    """Whether layers of this language model read what is encoded elsewhere."""
    return any(getattr(config, name, None) for name in CROSS_ATTENTION)


def find_host(config: Any) -> Host:
    """The row for a teacher's (or a converted model's) config, or an error that says why there is none."""
    name = config.model_type
    row = HOSTS.get(name) or HOSTS.get(name.removeprefix(PREFIX))
    if row is not None and not has_cross_attention(config):
        return row
    families = ", ".join(HOSTS)
    encodes = getattr(config, "is_encoder_decoder", False)
    if encodes or has_cross_attention(config.get_text_config()):
        kind = "an encoder-decoder" if encodes else "a model with cross-attention"
        raise ValueError(
            f"{name!r} is {kind}: its cross-attention reads an encoder's output, which a causal fast "
            f"weight cannot replace; give a decoder-only model of one of the families {families}"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"{name!r} uses multi-head latent attention (kv_lora_rank={config.kv_lora_rank}): it has no keys and "
            f"values per head that a fast weight could take over; give a model of one of the families {families}"
        )
    text = config.get_text_config()
    if text is not config:
        known = getattr(text, "model_type", None)
        raise ValueError(
            f"{name!r} is a composite model, whose language part is {known!r}; what can be converted is the language "
            f"part alone (hf_fwp.conversion.composite.language_part), of one of the families {families}"
        )
    close = difflib.get_close_matches(name, HOSTS, n=1)
    hint = f" (the closest is {close[0]!r})" if close else ""
    raise ValueError(
        f"unknown model family {name!r}; the families whose attention can be replaced are {families}{hint}. "
        "To add one, give its row to hf_fwp.hosts.register_family (examples/register_family.py) or write it in "
        "hf_fwp/hosts/table.py, and a weight map in conversion/families/ if its projections are not separate q_proj, "
        "k_proj, v_proj and o_proj"
    )
