"""The options of one fast-weight mixer, shared by FwpConfig and by the `fwp` dict of converted models.

Every option left at None takes the default of its update rule (`RULES[rule].defaults`), so two mixers with equal
options are the same function whether they were built from scratch or put inside a pretrained model.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .features import FEATURES, HEAD_NORMS, QK_NORMS, feature_name, feature_size
from .rules import RULES, Rule
from .rules.base import BACKENDS, Own

OUTPUT_GATES = ("none", "silu", "sigmoid", "sigmoid2", "head_sigmoid", "low_rank_sigmoid", "low_rank_sigmoid_bias")
STATE_HEADS = ("query", "grouped")

# Left at this, an option is resolved at construction, so whoever reads options never meets None.
RESOLVED: Any = None

# What a mixer does where neither its options nor its rule say anything: the bare rule between four projections.
MIXER_DEFAULTS: dict[str, Any] = {
    "feature_map": "identity",
    "qk_norm": "none",
    "conv_size": 0,
    "beta_bias": False,
    "output_gate": "none",
    "output_norm": False,
    "output_scale": 1.0,
    "scale": None,
    "allow_neg_eigval": False,
    "expand_v": 1.0,
}

# Options that act on the layer's q, k and v, with the value at which they do nothing.
WITHOUT_QKV: dict[str, Any] = {
    "feature_map": "identity",
    "qk_norm": "none",
    "conv_size": 0,
    "head_norm": False,
    "rope_heads": "none",
    "state_bias": False,
    "value_skip": 0,
    "window": 0,
}

# Options that count something, and what is said of the least of each.
COUNTS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(
        ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_value_heads", "head_dim"), (1, "at least 1")
    ),
    **dict.fromkeys(("conv_size", "value_skip", "window", "sinks"), (0, "0 (none) or more")),
    "time_scales": (1, "at least 1 (fast weights per head)"),
}


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest allowed name, or nothing."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse_unknown(kind: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise for the first name in `given` that is not allowed, naming the closest one that is."""
    allowed = sorted(allowed)
    for name in given:
        if name not in allowed:
            raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, allowed)}; allowed: {', '.join(allowed)}")


def check_counts(given: Mapping[str, Any]) -> None:
    """Raise for the first option of COUNTS in `given` that is no whole number, or too small a one."""
    for option, (least, told) in COUNTS.items():
        count = given.get(option, least)
        if isinstance(count, bool) or not isinstance(count, int):
            raise ValueError(f"{option} is {count!r}; it must be a whole number, {told}")
        if count < least:
            raise ValueError(f"{option} is {count}; it must be {told}")


def find_rule(name: str) -> Rule:
    """The rule called `name`, or an error that names the closest one."""
    if name not in RULES:
        raise ValueError(f"unknown update rule {name!r}{did_you_mean(name, RULES)}; the rules are {', '.join(RULES)}")
    return RULES[name]


def rule_default(rule: str, option: str) -> Any:
    """What `option` is for `rule` when nobody says otherwise."""
    return find_rule(rule).defaults.get(option, MIXER_DEFAULTS[option])


def complete_rule_options(rule: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The rule's own options with their defaults filled in; an unknown key is refused."""
    allowed = find_rule(rule).options
    refuse_unknown(f"option of the rule {rule!r}", given or {}, allowed)
    return find_rule(rule).resolve_options(given)


@dataclass(frozen=True)
class MixerOptions:
    """What one fast-weight mixer is made of. Options at None are resolved to the rule's defaults.

    Heads: `num_attention_heads` queries, `num_key_value_heads` keys, `num_value_heads` values (None: as many as keys).
    States are kept per query head (`state_heads="query"`) or per value head ("grouped"), `time_scales` of each;
    everything that belongs to states is ordered (scale, head) with the scale outermost. `window` and `sinks`: how many
    of the last and of the first tokens softmax attention reads beside them (window.py).
    """

    rule: str
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int = RESOLVED
    num_value_heads: int = RESOLVED
    head_dim: int = RESOLVED
    value_head_dim: int = RESOLVED
    rule_options: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    o_bias: bool = False
    head_norm: bool | str = False
    norm_eps: float = 1e-6
    feature_map: str = RESOLVED
    qk_norm: str = RESOLVED
    conv_size: int = RESOLVED
    beta_bias: bool = RESOLVED
    output_gate: str = RESOLVED
    output_norm: bool = RESOLVED
    output_scale: float = RESOLVED
    scale: float | None = None
    allow_neg_eigval: bool = RESOLVED
    rope_heads: str | tuple[bool, ...] = "none"
    state_bias: bool = False
    value_skip: int = 0
    time_scales: int = 1
    state_heads: str = "query"
    window: int = 0
    sinks: int = 0
    backend: str | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for option in MIXER_DEFAULTS:
            if option != "expand_v" and getattr(self, option) is None:
                self._set(option, rule_default(self.rule, option))
        self._set("rule_options", complete_rule_options(self.rule, self.rule_options))
        if self.num_key_value_heads is None:
            self._set("num_key_value_heads", self.num_attention_heads)
        if self.num_value_heads is None:
            self._set("num_value_heads", self.num_key_value_heads)
        if self.head_dim is None:
            self._set("head_dim", self.hidden_size // self.num_attention_heads)
        if self.value_head_dim is None:
            self._set("value_head_dim", self.head_dim)
        if not isinstance(self.rope_heads, str):
            self._set("rope_heads", tuple(bool(rotates) for rotates in self.rope_heads))
        if self.has_own:  # such a rule reads one query per state
            self._set("state_heads", "query")
        self._check_choices()
        self._check_sizes()
        self._check_own()
        self._warn_of_ignored()

    def _warn_of_ignored(self) -> None:
        if "beta" in find_rule(self.rule).inputs_with(self.rule_options):
            return
        for name in ("allow_neg_eigval", "beta_bias"):
            if getattr(self, name):
                warnings.warn(f"{name} is ignored: {self.rule} takes no beta from the layer", stacklevel=4)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        choices = {
            "feature_map": (feature_name(str(self.feature_map)), FEATURES),
            "qk_norm": (self.qk_norm, QK_NORMS),
            "output_gate": (self.output_gate, OUTPUT_GATES),
            "state_heads": (self.state_heads, STATE_HEADS),
        }
        for option, (given, allowed) in choices.items():
            refuse_unknown(option, [given], allowed)
        if self.head_norm and self.head_norm not in HEAD_NORMS:
            raise ValueError(f"head_norm is {self.head_norm!r}; it can be False, {', '.join(map(repr, HEAD_NORMS))}")
        if self.backend is not None:
            refuse_unknown("backend", [self.backend], BACKENDS)
        feature_size(self.feature_map, self.head_dim)

    def _check_sizes(self) -> None:
        check_counts(vars(self))
        self._check_window()
        query, key, value = self.num_attention_heads, self.num_key_value_heads, self.num_value_heads
        if query % key or value % key or (query != key and query % value):
            raise ValueError(
                f"{query} query heads, {key} key heads and {value} value heads do not group; query and value heads "
                "must be multiples of the key heads, and more query than key heads also a multiple of the value heads"
            )
        if isinstance(self.rope_heads, str):
            refuse_unknown("rope_heads", [self.rope_heads], ("all", "none"))
        elif len(self.rope_heads) != self.num_states:
            raise ValueError(
                f"rope_heads has {len(self.rope_heads)} entries; it needs one per state: {self.time_scales} time "
                f"scales x {self.heads_of_states} heads = {self.num_states}, or 'all' or 'none'"
            )

    def _check_window(self) -> None:
        if self.sinks and not self.window:
            raise ValueError(f"sinks is {self.sinks} but window is 0: sinks are read beside a window; give both")
        if self.window and self.num_value_heads != self.num_key_value_heads:
            raise ValueError(
                f"window is {self.window}, whose attention needs a value for each key, but there are "
                f"{self.num_key_value_heads} key heads and {self.num_value_heads} value heads; make them equal"
            )
        if self.window and self.rule_options.get(find_rule(self.rule).writes, 1) != 1:
            raise ValueError(
                f"window is {self.window}, but the rule {self.rule} makes several keys of a token "
                f"({find_rule(self.rule).writes}={self.rule_options[find_rule(self.rule).writes]}); set that to 1"
            )

    @property
    def has_own(self) -> bool:
        """Whether the rule has inputs, weights or states of its own."""
        return find_rule(self.rule).own is not None

    def own(self) -> Own:
        """What the rule has beside q, k, v, beta and g at these sizes."""
        make, options = find_rule(self.rule).own, self.rule_options
        if make is None:
            return Own({})
        return make(feature_size(self.feature_map, self.head_dim), self.value_head_dim, options)

    @property
    def takes_times(self) -> bool:
        """Whether the rule asks how much time lies between two tokens."""
        return "dt" in self.own().optional

    @property
    def looks_ahead(self) -> bool:
        """Whether the layer reads later tokens too."""
        asked = find_rule(self.rule).looks_ahead
        return asked is not None and asked(self.rule_options)

    def _check_own(self) -> None:
        key_size = feature_size(self.feature_map, self.head_dim)
        if find_rule(self.rule).square and key_size != self.value_head_dim:
            raise ValueError(
                f"the rule {self.rule} needs values as large as keys, not {self.value_head_dim} for {key_size}; "
                "set expand_v=1"
            )
        heads = self.heads_of_states
        if self.own().hidden and self.hidden_size != heads * self.head_dim:
            raise ValueError(
                f"the rule {self.rule} reads the hidden state split over the heads, so hidden_size must be "
                f"heads x head_dim = {heads} x {self.head_dim} = {heads * self.head_dim}; it is {self.hidden_size}"
            )
        if find_rule(self.rule).qkv:
            return
        for option, without in WITHOUT_QKV.items():
            if getattr(self, option) != without:
                raise ValueError(
                    f"{option} is {getattr(self, option)!r}, but the rule {self.rule} takes no queries, keys and "
                    f"values of the layer that it could act on; set it to {without!r}"
                )

    @property
    def heads_of_states(self) -> int:
        """States per time scale: Hs of the head order (scale, head)."""
        grouped = self.state_heads == "grouped"
        return self.num_value_heads if grouped else max(self.num_attention_heads, self.num_value_heads)

    @property
    def num_states(self) -> int:
        """Rows of everything that belongs to states: b_proj, a_proj, A_log, dt_bias, rope_heads."""
        return self.time_scales * self.heads_of_states

    @property
    def num_reads(self) -> int:
        """Reads of fast weights per token, each of size `value_head_dim`."""
        return self.time_scales * max(self.num_attention_heads, self.num_value_heads)

    @property
    def output_width(self) -> int:
        """How wide o_proj's input is: the reads, and after them what each head reads of the window."""
        return (self.num_reads + (self.num_attention_heads if self.window else 0)) * self.value_head_dim

    @property
    def rotates(self) -> tuple[bool, ...]:
        """For each state, whether its queries and keys are rotated."""
        if isinstance(self.rope_heads, str):
            return (self.rope_heads == "all",) * self.num_states
        return self.rope_heads

    @property
    def needs_rotary(self) -> bool:
        """Whether anything is rotated. A window is wherever heads may be, also where none of the states chose to."""
        return any(self.rotates) or (self.window > 0 and self.rope_heads != "none")

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> MixerOptions:
        """Options from a plain mapping; an unknown key is refused with the closest valid name."""
        refuse_unknown("mixer option", given, [option.name for option in fields(cls)])
        return cls(**given)

    def replace(self, **changes: Any) -> MixerOptions:
        """A copy with some options changed."""
        refuse_unknown("mixer option", changes, [option.name for option in fields(self)])
        return replace(self, **changes)
