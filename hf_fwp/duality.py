"""A linear layer trained by gradient descent is attention over what it was trained on.

    y = Wx + b,   W = W_0 - Σ_i η_i ∂L/∂y_i x_iᵀ
    y = W_0 x + b_0 + Σ_i (x_i·x) e_i,   e_i = -η_i ∂L/∂y_i          with a bias x_i·x + 1 in the place of x_i·x

The inputs x_i of the layer during training are the keys, the errors e_i the values, the input of today is the query,
and nothing is normalised. `dual_form` records both while an optimiser trains.

Irie, Csordás, Schmidhuber 2022 (arXiv 2202.05798).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DualForm:
    """What a linear layer was at the start, and the training patterns it has seen since: memory(x) is layer(x)."""

    def __init__(self, layer: nn.Linear) -> None:
        self.weight = layer.weight.detach().clone()
        self.bias = None if layer.bias is None else layer.bias.detach().clone()
        self._inputs: list[Tensor] = []
        self._errors: list[Tensor] = []

    @property
    def inputs(self) -> Tensor:
        """x_i, [N, in], in the order of training."""
        return torch.cat([self.weight.new_zeros(0, self.weight.shape[1]), *self._inputs])

    @property
    def errors(self) -> Tensor:
        """e_i, [N, out]."""
        return torch.cat([self.weight.new_zeros(0, self.weight.shape[0]), *self._errors])

    def attention(self, x: Tensor) -> Tensor:
        """How much each training pattern counts for x [..., in]: [..., N], not normalised."""
        scores = x @ self.inputs.mT
        return scores if self.bias is None else scores + 1

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output for x [..., in], from the training patterns."""
        return F.linear(x, self.weight, self.bias) + self.attention(x) @ self.errors

    def add(self, x: Tensor, error: Tensor) -> None:
        """Remember patterns x [..., in] with their errors [..., out]."""
        self._inputs.append(x.flatten(0, -2))
        self._errors.append(error.flatten(0, -2))


@contextmanager
def dual_form(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> Iterator[DualForm]:
    """Record the training of `layer`: every backward pass until a step of `optimizer` belongs to that step.

    Raises ValueError unless the optimiser is torch.optim.SGD without momentum and weight decay and trains the layer.
    """
    groups = [_group_of(parameter, optimizer) for parameter in layer.parameters()]
    if any(group is not groups[0] for group in groups):
        raise ValueError("weight and bias of the layer have different settings in the optimizer; put them in one group")
    memory, seen = DualForm(layer), []

    def forwarded(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:
            x = given[0].detach().clone()
            out.register_hook(lambda gradient: seen.append((x, gradient.detach())))

    def stepping(*_: Any) -> None:
        for x, gradient in seen:
            memory.add(x, -groups[0]["lr"] * gradient)
        seen.clear()

    hooks = [layer.register_forward_hook(forwarded), optimizer.register_step_pre_hook(stepping)]
    try:
        yield memory
    finally:
        for hook in hooks:
            hook.remove()


def _group_of(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(parameter is trained for trained in group["params"]):
            if isinstance(optimizer, torch.optim.SGD) and not group["momentum"] and not group["weight_decay"]:
                return group
            raise ValueError(
                f"the dual form holds for plain gradient descent, not for this {type(optimizer).__name__}; "
                "use torch.optim.SGD without momentum and weight_decay"
            )
    raise ValueError("the optimizer does not train this layer; give it the layer's parameters")
