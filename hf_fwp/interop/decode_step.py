"""One token of a model as a function without memory: states go in, states come out.

    logits [B, V], states' = step(input_ids [B, 1], position_ids [B, 1], states)

A fast-weight layer has the states of its rule and of its convolutions, a softmax layer its keys and values
[B, heads, T, size], which grow by one. `torch.export` takes the step as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..cache import FastWeightCacheLayer
from ..layer import layers_of

States = dict[str, Tensor]
# What a rule may be asked to run by, and what one token of it can be exported from.
EXPORTABLE = (None, "step", "reference")
KEYS, VALUES = "keys", "values"


class DecodeStep(nn.Module):
    """`forward(input_ids, position_ids, *states)` returns (logits, *states); `names` tells the states' order.

    Raises:
        ValueError: a layer of the model has no step that can be exported; it says which, and what to do.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        refuse_what_cannot_be_exported(model)
        self.model = model
        self.initial = initial_states(model)
        self.names = list(self.initial)

    def forward(self, input_ids: Tensor, position_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        cache = cache_of(self.model, dict(zip(self.names, states, strict=True)))
        found = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        after = states_of(cache)
        return (found.logits[:, -1], *(after[name] for name in self.names))

    def example(self, *, batch: int = 2, past: int = 3) -> tuple[Tensor, ...]:
        """Inputs to trace with: states of `batch` rows, softmax layers with `past` tokens."""
        ids = torch.zeros(batch, 1, dtype=torch.long, device=next(self.model.parameters()).device)
        rows = []
        for state in self.initial.values():
            state = state.expand(batch, *state.shape[1:]).contiguous()
            rows.append(state.new_zeros(*state.shape[:2], past, state.shape[3]) if grows(state) else state)
        return (ids, torch.full_like(ids, past), *rows)

    def program(self) -> torch.export.ExportedProgram:
        """The step as torch.export has it, for any number of rows, and of tokens in the softmax layers."""
        batch, past = torch.export.Dim("batch"), torch.export.Dim("past")
        inputs = self.example()
        shapes = [{0: batch}, {0: batch}]
        shapes += [{0: batch, 2: past} if grows(state) else {0: batch} for state in self.initial.values()]
        dynamic = {"input_ids": shapes[0], "position_ids": shapes[1], "states": tuple(shapes[2:])}
        # asserted when it runs: of grouped keys it cannot see that min(8 + 8T, 16 + 16T) is 8 + 8T
        late: Any = {"prefer_deferred_runtime_asserts_over_guards": True}
        with torch.no_grad():
            return torch.export.export(self, inputs, dynamic_shapes=dynamic, strict=False, **late)


def grows(state: Tensor) -> bool:
    """Whether this is the keys or values of a softmax layer, which start empty."""
    return state.ndim == 4 and state.shape[2] == 0


def refuse_what_cannot_be_exported(model: PreTrainedModel) -> None:
    mixers = layers_of(model)
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no fast-weight layers; give a model of this package")
    for layer_idx, mixer in mixers.items():
        if mixer.options.backend not in EXPORTABLE:
            raise ValueError(
                f"layer {layer_idx} is set to backend={mixer.options.backend!r}, which cannot be exported; load the "
                "model with backend=None"
            )


def initial_states(model: PreTrainedModel) -> States:
    """The states before the first token, for one row: what one padded token leaves as it was."""
    device = next(model.parameters()).device
    none = torch.zeros(1, 1, dtype=torch.long, device=device)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=none, attention_mask=none, past_key_values=cache, use_cache=True)
    for layer_idx, layer in enumerate(cache.layers):
        if type(layer) not in (FastWeightCacheLayer, DynamicLayer):
            raise ValueError(
                f"layer {layer_idx} keeps a {type(layer).__name__} (a window of keys and values), which cannot be "
                "exported; beside fast weights only full attention can: convert that layer too, or stay in PyTorch"
            )
    found = states_of(cache)
    return {name: state[:, :, :0] if name.endswith((KEYS, VALUES)) else state.clone() for name, state in found.items()}


def states_of(cache: Cache) -> States:
    """Every state by the number of its layer and its name."""
    found: States = {}
    for layer_idx, layer in enumerate(cache.layers):
        kept: Any = layer
        own = kept.states if isinstance(layer, FastWeightCacheLayer) else {KEYS: kept.keys, VALUES: kept.values}
        found |= {f"layer.{layer_idx}.{name}": own[name] for name in sorted(own)}
    return found


def cache_of(model: PreTrainedModel, states: States) -> Cache:
    """A cache that holds these states."""
    cache = DynamicCache(config=model.config)
    past: Any = next((x.shape[2] for name, x in states.items() if name.endswith(f".{KEYS}")), 0)
    mixers = layers_of(model)
    for layer_idx in range(len(cache.layers)):
        start = f"layer.{layer_idx}."
        own = {name.removeprefix(start): x for name, x in states.items() if name.startswith(start)}
        if layer_idx in mixers:
            layer: Any = FastWeightCacheLayer()
            # a step may write into the states of its cache, but not into the caller's
            layer.states, layer.seen = {name: x.clone() for name, x in own.items()}, past
        else:
            layer = DynamicLayer()
            layer.lazy_initialization(own[KEYS], own[VALUES])
            layer.keys, layer.values = own[KEYS], own[VALUES]
        cache.layers[layer_idx] = layer
    return cache
