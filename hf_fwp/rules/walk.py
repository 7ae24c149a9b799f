"""A loop over time whose backward keeps the states every C steps and runs each segment of C steps again.

With T steps it keeps T/C states and, while one segment is worked on, what autograd records of C steps: with C = √T
both grow as √T. What is kept beside that are the inputs.
"""

from __future__ import annotations

import math
import sys
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
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

    def written(self) -> tuple[str, list[float]]:
        """What an operator can take: a text and the constants that are numbers with a fraction, which may change in a
        compiled graph. The step is a function of a module, all other constants are literals."""
        numbers = {name: x for name, x in self.constants.items() if isinstance(x, float)}
        names = [",".join(x) for x in (self.inputs, self.weights, self.states, numbers)]
        others = ",".join([f"{name!r}:{x!r}" for name, x in self.constants.items() if name not in numbers])
        return ";".join([self.step.__module__, self.step.__name__, *names, others]), list(numbers.values())

    @staticmethod
    def read(text: str, numbers: Sequence[float]) -> Loop:
        module, name, *names, others = text.split(";", 6)
        inputs, weights, states, of_numbers = (tuple(x.split(",")) if x else () for x in names)
        constants = literal_eval(f"{{{others}}}") | dict(zip(of_numbers, numbers, strict=True))
        return Loop(getattr(sys.modules[module], name), inputs, weights, states, constants)

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


def walk_forward(
    loop: Loop, mask_BT: Tensor | None, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(outputs, states after the last step, states before every segment)."""
    length = tensors[0].shape[1]
    states, outs, kept = loop.split(tensors)[2], [], []
    for start in range(0, length, segment_length(length)):
        span = slice(start, start + segment_length(length))
        kept += states
        part = None if mask_BT is None else mask_BT[:, span]
        out, *states = loop.run(part, *loop.part(tensors, span, tuple(states)))
        outs.append(out)
    # an output must not be an input: a state that a step never replaces
    states = [x.clone() if any(x is given for given in tensors) else x for x in states]
    return torch.cat(outs, dim=1), states, kept


def walk_backward(
    loop: Loop,
    mask_BT: Tensor | None,
    given: tuple[Tensor, ...],
    kept: Sequence[Tensor],
    grads: tuple[Tensor, ...],
    gradients: Callable[..., tuple[Tensor, ...]],
) -> list[Tensor]:
    """Gradients of inputs, weights and the states before, from those of the outputs and the states after. `given` are
    inputs and weights; `gradients` finds those of one segment."""
    inputs, weights, _ = loop.split(given)
    length, count = inputs[0].shape[1], len(loop.states)
    segment = segment_length(length)
    grad_inputs = [torch.empty_like(x) for x in inputs]
    grad_weights = [torch.zeros_like(x) for x in weights]
    grad_out, *after = grads
    for number in reversed(range(-(-length // segment))):
        span = slice(number * segment, (number + 1) * segment)
        states = tuple(kept[number * count : (number + 1) * count])
        part = None if mask_BT is None else mask_BT[:, span]
        found = gradients(loop, part, loop.part(given, span, states), (grad_out[:, span], *after))
        of_inputs, of_weights, of_states = loop.split(found)
        for whole, piece in zip(grad_inputs, of_inputs, strict=True):
            whole[:, span] = piece
        for total, piece in zip(grad_weights, of_weights, strict=True):
            total += piece
        after = list(of_states)
    return [*grad_inputs, *grad_weights, *after]


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loop: Loop, mask_BT: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        out, states, kept = walk_forward(loop, mask_BT, tensors)
        ctx.loop = loop
        ctx.save_for_backward(mask_BT, *tensors[: len(tensors) - len(states)], *kept)
        return out, *states

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] torch passes one gradient for each output
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        loop: Loop = ctx.loop
        mask_BT, *saved = ctx.saved_tensors
        count = len(loop.inputs) + len(loop.weights)
        return None, None, *walk_backward(loop, mask_BT, tuple(saved[:count]), saved[count:], grads, _gradients)


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
        if torch.compiler.is_dynamo_compiling():
            out, *final = walked(list(tensors), mask, *loop.written())
        else:
            out, *final = _Walk.apply(loop, mask, *tensors) if recorded else loop.run(mask, *tensors)
    return out, dict(zip(loop.states, final, strict=True))


# torch.compile would unroll the loop over time, for every length anew. It sees an operator, which cannot record what
# autograd needs, and walks through the sequence once more in the backward.


@torch.library.custom_op("hf_fwp::walked", mutates_args=())
def walked(tensors: list[Tensor], mask: Tensor | None, loop: str, numbers: list[float]) -> list[Tensor]:
    """[outputs, states after the last step...]"""
    with torch.autocast(tensors[0].device.type, enabled=False):
        out, states, _ = walk_forward(Loop.read(loop, numbers), mask, tuple(tensors))
    return [out, *states]


@walked.register_fake
def _(tensors, mask, loop, numbers):
    read, length = Loop.read(loop, numbers), tensors[0].shape[1]
    out, *states = read.run(None, *read.part(tuple(tensors), slice(0, 1), read.split(tuple(tensors))[2]))
    return [out.new_empty(out.shape[0], length, *out.shape[2:]), *(torch.empty_like(x) for x in states)]


@torch.library.custom_op("hf_fwp::walked_backward", mutates_args=())
def walked_backward(
    grads: list[Tensor], tensors: list[Tensor], mask: Tensor | None, loop: str, numbers: list[float]
) -> list[Tensor]:
    """Gradients of all tensors."""
    read, given = Loop.read(loop, numbers), tuple(tensors)
    count = len(given) - len(read.states)
    with torch.autocast(given[0].device.type, enabled=False):
        kept = walk_forward(read, mask, given)[2]
        return walk_backward(read, mask, given[:count], kept, tuple(grads), _gradients_inside)


@walked_backward.register_fake
def _(grads, tensors, mask, loop, numbers):
    return [torch.empty_like(x) for x in tensors]


def _gradients_inside(
    loop: Loop, mask_BT: Tensor | None, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """`_gradients` where autograd is off, as it is in an operator."""
    return torch.func.vjp(lambda *given: loop.run(mask_BT, *given), *tensors)[1](grads)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, mask, *ctx.loop = inputs
    ctx.save_for_backward(mask, *tensors)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor], None, None, list[None] | None]:
    mask, *tensors = ctx.saved_tensors
    loop, numbers = ctx.loop
    # torch takes an empty list for one of tensors, which wants a list of gradients
    return walked_backward(grads, tensors, mask, loop, numbers), None, None, None if numbers else []


walked.register_autograd(_backward, setup_context=_keep_for_backward)
