"""FwpConfig: one configuration for every update rule and any mix of rules and attention over the layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .auto_map import WithAutoMap
from .cache import LAYER_TYPE
from .options import (
    MIXER_DEFAULTS,
    RESOLVED,
    MixerOptions,
    complete_rule_options,
    did_you_mean,
    refuse_unknown,
    rule_default,
)
from .presets import PRESETS
from .rules import RULES

if TYPE_CHECKING:
    Config = PreTrainedConfig
    # resolved at construction, so whoever reads a config never meets None
    Size = int
    Name = str
    Heads = str | tuple[bool, ...]
else:
    Config = object
    Size = int | None
    Name = str | None
    Heads = str | list[bool] | None

KEY_SCALE = "head_dim**-0.5"
ATTENTION_LAYERS = ("full_attention", "sliding_attention")
CHOICES = {
    "mlp_type": ("swiglu", "mlp"),
    "norm_type": ("rms", "layer"),
    "norm_placement": ("pre", "post", "idsia_pre", "residual", "none"),
    "position_embedding": ("none", "rope", "learned", "sinusoidal"),
}
COUNTS = (
    "vocab_size",
    "input_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "sliding_window",
)
# Keywords that are no fields but that transformers reads or writes in a config.
TRANSFORMERS_KEYWORDS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "partial_rotary_factor",
        "per_layer_config",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
    }
)


@strict
class FwpConfig(WithAutoMap, PreTrainedConfig):
    """A language model of fast weight programmers; every field left at None is resolved here and saved.

    `rule` is one name or a list with one per layer, `full_attention` and `sliding_attention` included. The mixer fields
    (feature_map ... expand_v) are one value or a list with one per layer; None takes the default of the layer's rule.
    `rule_options` belongs to the rule; where several rules are mixed it maps each rule's name to its options.
    With `input_size` the inputs are real-valued, `inputs_embeds` [B, T, input_size], in the place of tokens.
    `output_scale` may be "head_dim**-0.5"; `final_norm` is True unless the norms stand behind the sub-layers ("post").
    With `chunked_loss`, training computes the loss without [B, T, vocabulary] logits: outputs then hold no logits.
    """

    model_type = "fwp"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_heads": "num_attention_heads"}

    vocab_size: int = 32000
    input_size: int | None = None
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: Size = RESOLVED
    num_value_heads: Size = RESOLVED
    head_dim: Size = RESOLVED
    expand_v: float | list | None = None
    intermediate_size: Size = RESOLVED
    hidden_act: Name = RESOLVED
    mlp_type: str = "swiglu"
    use_bias: bool = False
    norm_type: str = "rms"
    norm_eps: float = 1e-6
    norm_placement: str = "pre"
    final_norm: bool | None = None
    lm_head_bias: bool = False
    rule: str | list[str] = "gated_delta_net"
    rule_options: dict | None = None
    feature_map: str | list | None = None
    qk_norm: str | list | None = None
    conv_size: int | list | None = None
    beta_bias: bool | list | None = None
    output_gate: str | list | None = None
    output_norm: bool | list | None = None
    output_scale: float | str | list | None = None
    scale: float | list | None = None
    allow_neg_eigval: bool | list | None = None
    position_embedding: Name = RESOLVED
    rope_parameters: dict | None = None
    rope_heads: Heads = RESOLVED
    max_position_embeddings: int = 2048
    value_skip: int = 0
    time_scales: int = 1
    sliding_window: int | None = None
    dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    backend: str | None = None
    chunked_loss: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_attention_heads = kwargs.pop("num_heads", self.num_attention_heads)
        self._refuse_unknown_keywords(kwargs)
        self._check_choices()
        self._check_numbers()
        self._resolve_shapes()
        self._resolve_block()
        self._resolve_positions()
        self._resolve_mixers()
        super().__post_init__(**kwargs)
        for layer_idx in self.fast_weight_layers:
            self.mixer_options(layer_idx)
        from .modeling import register_models  # light: the model classes are loaded when the first config exists

        register_models()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> FwpConfig:
        """The architecture of a paper, for instance "schlag2021-deltanet", with some fields changed."""
        refuse_unknown("preset", [name], PRESETS)
        return cls(**{**PRESETS[name].fields, **overrides})

    @property
    def rules(self) -> list[str]:
        """The rule or kind of attention of each layer."""
        return [self.rule] * self.num_hidden_layers if isinstance(self.rule, str) else self.rule

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer as transformers' caches and masks know it. Derived from `rule`, never saved: a Trainer
        that resumes reads the checkpoint's config with the base class, which refuses kinds that it does not know (no
        public issue found)."""
        return [rule if rule in ATTENTION_LAYERS else LAYER_TYPE for rule in self.rules]

    @property
    def fast_weight_layers(self) -> list[int]:
        """Indices of the layers whose mixer has fast weights."""
        return [layer_idx for layer_idx, rule in enumerate(self.rules) if rule not in ATTENTION_LAYERS]

    @property
    def update_rules(self) -> list[str]:
        """The rules of the layers with fast weights, each once."""
        return list(dict.fromkeys(rule for rule in self.rules if rule not in ATTENTION_LAYERS))

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model can predict the next token: it reads tokens, and none of its layers reads later ones."""
        return self.input_size is None and not self.looks_ahead

    @property
    def looks_ahead(self) -> bool:
        """Whether a layer reads later tokens too."""
        return any(self.mixer_options(layer_idx).looks_ahead for layer_idx in self.fast_weight_layers)

    def mixer_options(self, layer_idx: int) -> MixerOptions:
        """The options of the mixer of one fast-weight layer."""
        chosen = {name: self._of_layer(name, layer_idx) for name in MIXER_DEFAULTS}
        expand_v = chosen.pop("expand_v")
        rule = self.rules[layer_idx]
        options = self.rule_options or {}
        return MixerOptions(
            rule=rule,
            rule_options=options if len(self.update_rules) == 1 else options.get(rule, {}),
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            num_value_heads=self.num_value_heads,
            head_dim=self.head_dim,
            value_head_dim=self._value_head_dim(expand_v),
            qkv_bias=self.use_bias,
            o_bias=self.use_bias,
            norm_eps=self.norm_eps,
            rope_heads=self.rope_heads,
            value_skip=self.value_skip,
            time_scales=self.time_scales,
            state_heads="grouped",
            backend=self.backend,
            initializer_range=self.initializer_range,
            **chosen,
        )

    def _value_head_dim(self, expand_v: float) -> int:
        size = round(self.head_dim * expand_v)
        if size < 1 or abs(size - self.head_dim * expand_v) > 1e-3:
            raise ValueError(
                f"expand_v is {expand_v} and head_dim {self.head_dim}: values of size {self.head_dim * expand_v:g} per "
                "head; choose them so that the product is a whole number of at least 1"
            )
        return size

    def validate_layer_type(self) -> None:
        """Layer types are derived from `rule`, which is checked when it is set."""

    def _of_layer(self, name: str, layer_idx: int) -> Any:
        value = getattr(self, name)
        return value[layer_idx] if isinstance(value, list) else value

    def _refuse_unknown_keywords(self, kwargs: Mapping[str, Any]) -> None:
        if "layer_types" in kwargs:
            raise ValueError("layer_types is derived; give rule a list with one name per layer instead")
        allowed = {field.name for field in fields(self)} | TRANSFORMERS_KEYWORDS | {"num_heads"}
        for name in kwargs:
            if name not in allowed and not name.startswith("_"):
                raise ValueError(f"FwpConfig has no field {name!r}{did_you_mean(name, allowed)}")

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) is not None:
                refuse_unknown(name, [getattr(self, name)], allowed)
        known = [*RULES, *ATTENTION_LAYERS]
        for rule in self.rules:
            if rule not in known:
                raise ValueError(
                    f"unknown update rule {rule!r}{did_you_mean(rule, known)}; the rules are {', '.join(known)}"
                )
        if len(self.rules) != self.num_hidden_layers:
            raise ValueError(
                f"rule names {len(self.rules)} layers, num_hidden_layers is {self.num_hidden_layers}; make them equal"
            )

    def _check_numbers(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie between 0 and 1")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be above 0, for instance 1e-6")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range is {self.initializer_range}; it must be 0 or more")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}, not one of the ids of vocab_size {self.vocab_size}; "
                "give the tokenizer's, or None"
            )
        if self.hidden_act is not None:
            from transformers.activations import ACT2FN  # not on `import hf_fwp`

            refuse_unknown("hidden_act", [self.hidden_act], ACT2FN)

    def _resolve_shapes(self) -> None:
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; change one of them or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_value_heads is None:
            self.num_value_heads = self.num_key_value_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}; every group of query heads shares one key"
            )
        if self.hidden_act is None:
            self.hidden_act = "silu" if self.mlp_type == "swiglu" else "relu"
        if self.intermediate_size is None:
            two_thirds = -(-8 * self.hidden_size // (3 * 64)) * 64
            self.intermediate_size = two_thirds if self.mlp_type == "swiglu" else 4 * self.hidden_size

    def _resolve_block(self) -> None:
        if self.final_norm is None:
            self.final_norm = self.norm_placement != "post"
        if isinstance(self.output_scale, str):
            if self.output_scale != KEY_SCALE:
                raise ValueError(f"output_scale is {self.output_scale!r}; give a number or {KEY_SCALE!r}")
            self.output_scale = self.head_dim**-0.5

    def _resolve_positions(self) -> None:
        attends = any(rule in ATTENTION_LAYERS for rule in self.rules)
        if self.position_embedding is None:
            self.position_embedding = "rope" if attends else "none"
        rope = self.position_embedding == "rope"
        for kind, name in (("rope", "head_dim"), ("sinusoidal", "hidden_size")):
            if self.position_embedding == kind and getattr(self, name) % 2:
                raise ValueError(
                    f"{name} {getattr(self, name)} is odd, but position_embedding={kind!r} turns pairs; "
                    "make it even, or choose another position_embedding"
                )
        if self.rope_heads is None:
            self.rope_heads = "all" if rope and not attends else "none"
        rotates = self.rope_heads == "all" if isinstance(self.rope_heads, str) else any(self.rope_heads)
        if rotates and not rope:
            raise ValueError(
                f"rope_heads is {self.rope_heads!r} but position_embedding is {self.position_embedding!r}; "
                "set position_embedding='rope'"
            )
        if "sliding_attention" in self.rules and self.sliding_window is None:
            raise ValueError("a layer is sliding_attention but sliding_window is None; give the window's length")
        if "sliding_attention" not in self.rules and self.sliding_window is not None:
            warnings.warn("sliding_window is ignored: no layer is sliding_attention", stacklevel=5)
        if self.rope_parameters is not None and not rope:
            self.rope_parameters = None

    def _resolve_mixers(self) -> None:
        rules = self.rules
        for name in MIXER_DEFAULTS:
            value = getattr(self, name)
            if isinstance(value, list):
                if len(value) != len(rules):
                    raise ValueError(f"{name} lists {len(value)} values for {len(rules)} layers; give one per layer")
                continue
            if value is None:
                per_layer = [None if rule in ATTENTION_LAYERS else rule_default(rule, name) for rule in rules]
                used = [per_layer[layer_idx] for layer_idx in self.fast_weight_layers]
                same = all(default == used[0] for default in used)
                setattr(self, name, (used[0] if used else None) if same else per_layer)
        fast = self.update_rules
        given = self.rule_options or {}
        if len(fast) == 1:
            self.rule_options = complete_rule_options(fast[0], given)
        else:
            refuse_unknown("rule in rule_options (rules are mixed: options are given per rule)", given, fast)
            self.rule_options = {rule: complete_rule_options(rule, given.get(rule)) for rule in fast}
