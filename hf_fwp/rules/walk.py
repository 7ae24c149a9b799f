"""A loop over time whose backward keeps the states every C steps and runs each segment of C steps again.

With T steps it keeps T/C states and, while one segment is worked on, what autograd records of C steps: with C = √T
both grow as √T. What is kept beside that are the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import States, keep_valid

SHORTEST = 8


def segment_length(length: int) -> int:
    """C, the steps between two kept states."""
    return max(SHORTEST, math.isqrt(length))


@dataclass(frozen=True)
class Loop:
    """A step, the names of the tensors that it is given in order, and its constants."""

    step: Callable[..., tuple[States, Tensor]]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    states: tuple[str, ...]
    constants: Mapping[str, Any]

    def split(self, tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Inputs, weights and states out of one flat tuple."""
        a, b = len(self.inputs), len(self.inputs) + len(self.weights)
        return tensors[:a], tensors[a:b], tensors[b:]

    def run(self, mask_BT: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(outputs [B, T, ...], states after the last step...)."""
        inputs, weights, states = self.split(tensors)
        given = dict(zip(self.weights, weights, strict=True)) | dict(self.constants)
        carried = dict(zip(self.states, states, strict=True))
        outs = []
        # unbind: the backward of x[:, t] would fill a tensor of T steps for every t
        for t, now in enumerate(zip(*(x.unbind(1) for x in inputs), strict=True)):
            new, out = self.step(carried, **dict(zip(self.inputs, now, strict=True)), **given)
            if mask_BT is not None:
                valid_B = mask_BT[:, t]
                new = {name: keep_valid(x, valid_B, carried[name]) for name, x in new.items()}
                out = keep_valid(out, valid_B)
            carried = new
            outs.append(out)
        return torch.stack(outs, dim=1), *(carried[name] for name in self.states)

    def part(self, tensors: tuple[Tensor, ...], span: slice, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The arguments of `run` for some of the steps."""
        inputs, weights, _ = self.split(tensors)
        return *(x[:, span] for x in inputs), *weights, *states


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loop: Loop, mask_BT: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        length = tensors[0].shape[1]
        states, outs, kept = loop.split(tensors)[2], [], []
        for start in range(0, length, segment_length(length)):
            span = slice(start, start + segment_length(length))
            kept += states
            part = None if mask_BT is None else mask_BT[:, span]
            out, *states = loop.run(part, *loop.part(tensors, span, tuple(states)))
            outs.append(out)
        ctx.loop = loop
        ctx.save_for_backward(mask_BT, *tensors[: len(loop.inputs) + len(loop.weights)], *kept)
        # an output must not be an input: a state that a step never replaces
        states = [x.clone() if any(x is given for given in tensors) else x for x in states]
        return torch.cat(outs, dim=1), *states

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] torch passes one gradient for each output
        ctx: Any, grad_out: Tensor, *grad_states: Tensor
    ) -> tuple[Tensor | None, ...]:
        loop: Loop = ctx.loop
        mask_BT, *tensors = ctx.saved_tensors
        inputs, weights, kept = loop.split(tuple(tensors))
        length, count = inputs[0].shape[1], len(loop.states)
        segment = segment_length(length)
        grad_inputs = [torch.empty_like(x) for x in inputs]
        grad_weights = [torch.zeros_like(x) for x in weights]
        grads = list(grad_states)
        for number in reversed(range(-(-length // segment))):
            span = slice(number * segment, (number + 1) * segment)
            states = kept[number * count : (number + 1) * count]
            part = None if mask_BT is None else mask_BT[:, span]
            found = _gradients(loop, part, loop.part(tuple(tensors), span, states), (grad_out[:, span], *grads))
            of_inputs, of_weights, of_states = loop.split(found)
            for whole, piece in zip(grad_inputs, of_inputs, strict=True):
                whole[:, span] = piece
            for total, piece in zip(grad_weights, of_weights, strict=True):
                total += piece
            grads = list(of_states)
        return None, None, *grad_inputs, *grad_weights, *grads


def _gradients(
    loop: Loop, mask_BT: Tensor | None, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of one segment with respect to everything that it was given."""
    with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        leaves = tuple(x.detach().requires_grad_() for x in tensors)
        results = loop.run(mask_BT, *leaves)
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
    outputs, weights = zip(*used, strict=True)
    found = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return tuple(torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, found, strict=True))


def walk(
    step: Callable[..., tuple[States, Tensor]],
    inputs: Mapping[str, Tensor],
    states: States,
    *,
    weights: Mapping[str, Tensor] | None = None,
    mask: Tensor | None = None,
    **constants: Any,
) -> tuple[Tensor, States]:
    """Run `step` over dimension 1 of every input; inputs at masked positions must be finite."""
    weights = weights or {}
    loop = Loop(step, tuple(inputs), tuple(weights), tuple(states), constants)
    tensors = (*inputs.values(), *weights.values(), *states.values())
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    with torch.autocast(tensors[0].device.type, enabled=False):
        out, *final = _Walk.apply(loop, mask, *tensors) if recorded else loop.run(mask, *tensors)
    return out, dict(zip(loop.states, final, strict=True))
