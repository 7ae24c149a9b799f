"""What every update rule of a model was given while it read a text: the rule can then be run again and looked into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..layer import FastWeightLayer, layers_of
from ..rules import Rule

States = dict[str, Tensor]


@dataclass(frozen=True)
class Recording:
    """One layer's rule and its inputs for one text. R reads; T tokens."""

    rule: Rule
    tokens: States
    """What each token brought, by name: [1, T, ...] in float32."""
    constants: dict[str, Any]
    """What stays the same from token to token."""
    out_TRV: Tensor
    """What was read."""
    mixed_TRV: Tensor
    """The same after the layer's norm and gate: what goes into the output projection."""

    def run(self, tokens: States, states: States | None = None) -> tuple[Tensor, States]:
        """The rule over any tokens of this kind: reads [B, T, R, V] and the states after them."""
        return self.rule.apply(**tokens, **self.constants, states=states, mask=None, cu_seqlens=None)


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[int, Recording]]:
    """While this lasts, a forward of one text without a cache fills the dictionary, by the index of the layer."""
    found: dict[int, Recording] = {}
    layers = layers_of(model)
    rules = {layer_idx: layer.rule for layer_idx, layer in layers.items()}
    hooks = [_listen(layer, layer_idx, found) for layer_idx, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for layer_idx, layer in layers.items():
            layer.rule = rules[layer_idx]


def _listen(layer: FastWeightLayer, layer_idx: int, found: dict[int, Recording]) -> Any:
    """Stand between a layer and its rule, and before its output projection."""
    rule, seen = layer.rule, {}

    def apply(*, states: Any, mask: Any, cu_seqlens: Any, in_place: bool, ran: list[str], **given: Any) -> Any:
        out, after = rule.apply(**given, states=states, mask=mask, cu_seqlens=cu_seqlens, in_place=in_place, ran=ran)
        seen.update(given=given, out=out)
        return out, after

    def mixed(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given, out = seen.pop("given"), seen.pop("out")[0].float()
        tokens = {name: _plain(x) for name, x in given.items() if isinstance(x, Tensor)}
        constants = {name: _plain(x) for name, x in given.items() if not isinstance(x, Tensor)}
        # after the reads of fast weights stands what is read of a window
        reads = inputs[0][0, :, : out[0].numel()].detach().float().view(out.shape)
        found[layer_idx] = Recording(rule, tokens, constants, out, reads)

    # a rule of kernels would be given what its rates are computed from
    layer.rule = replace(rule, apply=apply, raw_gates=False)
    return layer.o_proj.register_forward_pre_hook(mixed)


def _plain(x: Any) -> Any:
    """Tensors, also those in a dictionary, in float32 and without a history."""
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    return x.detach().float() if isinstance(x, Tensor) and x.is_floating_point() else x
