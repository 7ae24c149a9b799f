"""OwnWeights: the projections and learned tensors that some rules have beside queries, keys, values and rates.

What a rule has is data in `Rule.own`; nothing here knows a rule. Legend: rules/base.py; S states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .options import MixerOptions


class OwnWeights(nn.Module):
    """x [B,T,D] -> the rule's inputs {name: [B,T,S,width]} and, as "weights", its learned tensors {name: [S, ...]}."""

    def __init__(self, options: MixerOptions) -> None:
        super().__init__()
        self.states = options.num_states
        self.scales = options.time_scales
        own = options.own()
        self.options, self.hidden = options, own.hidden
        self.projections, self.learned = dict(own.projections), tuple(own.weights)
        for name, width in self.projections.items():
            linear = nn.Linear(options.hidden_size, self.states * width, bias=options.qkv_bias)
            setattr(self, f"{name}_proj", linear)
        for name, weight in own.weights.items():
            self.register_parameter(name, nn.Parameter(torch.empty(self.states, *weight.shape)))
        self.init_weights()

    def init_weights(self) -> None:
        """Learned tensors start as the rule says; projections as every Linear of the model."""
        for name, weight in self.options.own().weights.items():
            init.copy_(getattr(self, name), weight.draw(self.states, *weight.shape))

    def of(self, x_BTD: Tensor) -> dict[str, Any]:
        """What forward gives, with the learned tensors in "weights" alone."""
        found = self(x_BTD)
        weights = {name: found.pop(name) for name in self.learned}
        return {"weights": weights, **found} if weights else found

    def forward(self, x_BTD: Tensor) -> dict[str, Any]:
        # the weights leave through here: a model kept on the disk has them only while a module's forward runs
        # (huggingface/accelerate#3542), and DeepSpeed keeps whole what a module's output names
        found: dict[str, Any] = {name: getattr(self, name) for name in self.learned}
        for name, width in self.projections.items():
            found[name] = getattr(self, f"{name}_proj")(x_BTD).unflatten(-1, (self.states, width))
        if self.hidden:
            x_BTHK = x_BTD.unflatten(-1, (self.states // self.scales, -1))
            found["x"] = x_BTHK.repeat(1, 1, self.scales, 1)
        return found
