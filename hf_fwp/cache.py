"""The cache of one fast-weight layer: its named states, how many tokens it has seen, and how to take tokens back.

A recurrent state cannot be cut like a list of keys. While past recording is on, the layer keeps the states at the
last crop and the inputs since then; `crop(-n)` returns to those states and leaves all but the last n inputs to be
replayed by the next forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionLayer,
    QuantizedCache,
)
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

from .packing import NEVER

LAYER_TYPE = "fast_weight"
EMPTY = {"time": NEVER}  # what a state holds before the first token, where that is not zero

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MixerInputs:
    """What one forward of a mixer reads: hidden states, which tokens are real, rotations, when the tokens are observed.

    Dimension 1 counts the tokens."""

    hidden_BTD: Tensor
    mask_BT: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    times_BT: Tensor | None = None

    def change(self, each: Transform) -> MixerInputs:
        """Every tensor with a batch of its own changed by `each`; a rotation shared by the batch stays shared."""
        batch = self.hidden_BTD.shape[0]
        rotary = self.rotary
        if rotary is not None and rotary[0].shape[0] == batch:
            rotary = (each(rotary[0]), each(rotary[1]))
        mask_BT, times_BT = (None if x is None else each(x) for x in (self.mask_BT, self.times_BT))
        return MixerInputs(each(self.hidden_BTD), mask_BT, rotary, times_BT)

    def with_own_rotary(self) -> MixerInputs:
        """The same with a rotation for each row."""
        if self.rotary is None:
            return self
        cos, sin = (x.expand(self.hidden_BTD.shape[0], -1, -1) for x in self.rotary)
        return replace(self, rotary=(cos, sin))

    def in_one_row(self) -> MixerInputs:
        """[B, T, ...] as one packed row [1, B * T, ...]."""
        return self.with_own_rotary().change(lambda x: x.reshape(1, -1, *x.shape[2:]))

    def first(self, length: int) -> MixerInputs:
        """The first `length` tokens."""
        rotary = None if self.rotary is None else (self.rotary[0][:, :length], self.rotary[1][:, :length])
        mask_BT, times_BT = (None if x is None else x[:, :length] for x in (self.mask_BT, self.times_BT))
        return MixerInputs(self.hidden_BTD[:, :length], mask_BT, rotary, times_BT)

    def __len__(self) -> int:
        return self.hidden_BTD.shape[1]


class FastWeightCacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """States by name (`state`, `q_conv`, ...), each with the batch as its first dimension.

    The layer of transformers keeps one state beside one of a convolution, counts no tokens and neither repeats nor
    selects rows (huggingface/transformers#40827); its `crop` keeps the state (huggingface/transformers#49036).
    """

    _layer_type = LAYER_TYPE
    is_sliding = False
    # False gives silently wrong tokens when a static cache mixes these layers with attention layers (no public issue
    # found)
    is_compileable = True
    supports_early_init = False  # shapes do not follow from those of keys and values (huggingface/transformers#46439)

    def __init__(self, max_cache_len: int | None = None, **kwargs: Any) -> None:
        LinearAttentionLayer.__init__(self)
        self.keys = self.values = None
        self.is_initialized = False
        self.max_cache_len = max_cache_len
        self.states: dict[str, Tensor] = {}
        # a tensor when static: a compiled decode step must not be specialised on the number of tokens
        self.seen: int | Tensor = 0 if max_cache_len is None else torch.zeros((), dtype=torch.long)
        self._forget_past()

    def _forget_past(self) -> None:
        self._origin: dict[str, Tensor] = {}
        self._recorded: list[MixerInputs] = []
        self._replay: list[MixerInputs] = []

    # what a mixer calls

    def take_replay(self) -> list[MixerInputs]:
        """Inputs the states have not seen since a crop; the caller runs them and hands the result to `rebase`."""
        pending, self._replay = self._replay, []
        return pending

    def rebase(self, states: dict[str, Tensor]) -> None:
        """States after a replay: the new point to which a crop returns."""
        self.states = states

    def advance(self, states: dict[str, Tensor], inputs: MixerInputs) -> None:
        """Store the states after `inputs`."""
        if self.record_past:
            if not self._recorded:
                self._origin = self.states
            self._recorded.append(inputs)
            self.states = states
        else:
            self._forget_past()
            self._store(states)
        self._count(inputs.hidden_BTD)

    def _store(self, states: dict[str, Tensor]) -> None:
        static = self.max_cache_len is not None
        for name, state in states.items():
            kept = self.states.get(name)
            if kept is state:
                continue
            if static and kept is not None and kept.shape == state.shape and not torch.is_grad_enabled():
                kept.copy_(state)
                continue
            self.states[name] = state
            if static and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(state)

    def _count(self, hidden_BTD: Tensor) -> None:
        if not self.is_initialized:
            self.device, self.dtype = hidden_BTD.device, hidden_BTD.dtype
            self.is_initialized = True
            if isinstance(self.seen, Tensor):
                self.seen = self.seen.to(hidden_BTD.device)
        self.has_previous_state[0] = True
        if isinstance(self.seen, Tensor):
            self.seen.add_(hidden_BTD.shape[1])
        else:
            self.seen += hidden_BTD.shape[1]

    @property
    def updates_in_place(self) -> bool:
        """Whether a decode step may overwrite the states: not while an older one may be asked for again."""
        if self.record_past or not self.states or torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return True
        return not any(state.is_inference() for state in self.states.values())

    # what transformers calls

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: states take their shape from the first forward."""

    def update(self, key_states: Tensor | None, value_states: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if key_states is None and value_states is None:
            return None, None
        raise ValueError("a fast-weight layer keeps states, not keys and values; only its own mixer can write to it")

    def get_seq_length(self) -> Any:
        """An int, or a tensor when the cache is static, as in transformers' own layers."""
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.max_cache_len is not None:
            return self.max_cache_len, 0
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        if not self.states:
            raise AttributeError("batch_size is known after the first forward")
        return next(iter(self.states.values())).shape[0]

    @property
    def is_croppable(self) -> bool:
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens; a positive number is the length to keep."""
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(int(self.seen) - tokens_to_remove, 0)
        if removed and not self.record_past:
            raise RuntimeError(
                "call `activate_past_recording` before the tokens that `crop` is to remove; on a new cache, after "
                "the first forward of a converted model"
            )
        past = self._replay or self._recorded
        recorded = sum(len(inputs) for inputs in past)
        if removed > recorded:
            raise RuntimeError(f"cannot remove {removed} tokens: {recorded} were recorded since the last crop")
        if removed:
            self.states = self._origin if self._recorded else self.states
            self._replay = _keep_first(past, recorded - removed)
            self.seen -= removed
        self._origin, self._recorded = {}, []

    def reset(self) -> None:
        for name, state in self.states.items():
            state.fill_(EMPTY.get(name, 0))
        self._forget_past()
        self.has_previous_state[0] = False
        if isinstance(self.seen, Tensor):
            self.seen.zero_()
        else:
            self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _change(self, each: Transform) -> None:
        self.states = {name: each(state) for name, state in self.states.items()}
        self._origin = {name: each(state) for name, state in self._origin.items()}
        self._recorded = [inputs.change(each) for inputs in self._recorded]
        self._replay = [inputs.change(each) for inputs in self._replay]


def current_padding(config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
    """The 2-D mask of the current tokens, for `generate` with a cache of fixed size; also when there is one token.

    transformers' own function for recurrent layers gave none once there was a state (huggingface/transformers#47086).
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -inputs_embeds.shape[1] :].contiguous()


STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = FastWeightCacheLayer
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[LAYER_TYPE] = current_padding


def _keep_first(chunks: list[MixerInputs], length: int) -> list[MixerInputs]:
    kept = []
    for inputs in chunks:
        if length > 0:
            kept.append(inputs.first(min(length, len(inputs))))
        length -= len(inputs)
    return kept


def fast_weight_layer(cache: Cache, layer_idx: int) -> FastWeightCacheLayer:
    """The cache layer of mixer `layer_idx`, put in place when the cache was made without knowledge of fast weights."""
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, FastWeightCacheLayer):
        return layer
    if isinstance(cache, QuantizedCache):
        raise ValueError(
            "fast-weight layers cannot use a quantised cache: their state does not grow, so there is nothing to gain; "
            "leave out cache_implementation='quantized'"
        )
    if isinstance(layer, CacheLayerMixin) and layer.is_initialized and layer.get_seq_length() > 0:
        raise ValueError(
            f"layer {layer_idx} of the cache holds a {type(layer).__name__} already in use; start from a fresh cache "
            "(prefix tuning fills one with keys and values, which fast weights do not read: use LoRA or soft prompts)"
        )
    limits = [getattr(other, "max_cache_len", None) for other in cache.layers]
    # a sliding layer's limit is its window; before 5.23 a full mask takes its size from the first layer that is no such
    # (huggingface/transformers#48510)
    longest = max((limit for limit in limits if limit is not None), default=None)
    installed = FastWeightCacheLayer(max_cache_len=None if limits[layer_idx] is None else longest)
    installed.record_past = any(getattr(other, "record_past", False) for other in cache.layers)
    cache.layers[layer_idx] = installed
    return installed


def install_fast_weight_layers(cache: Cache, layer_indices: Iterable[int]) -> Cache:
    """Give every mixer named in `layer_indices` its cache layer; needed before past recording is switched on."""
    for layer_idx in layer_indices:
        fast_weight_layer(cache, layer_idx)
    return cache
