"""OwnWeights: the projections and learned tensors that some rules have beside queries, keys, values and rates.

What a rule has is data in `Rule.own`; nothing here knows a rule. Legend: rules/base.py; S states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .options import MixerOptions


class OwnWeights(nn.Module):
    """x [B,T,D] -> the rule's own inputs {name: [B,T,S,width]}; `weights()` gives its learned tensors [S, ...]."""

    def __init__(self, options: MixerOptions) -> None:
        super().__init__()
        self.states = options.num_states
        self.scales = options.time_scales
        self.own = options.own()
        for name, width in self.own.projections.items():
            linear = nn.Linear(options.hidden_size, self.states * width, bias=options.qkv_bias)
            setattr(self, f"{name}_proj", linear)
        for name, weight in self.own.weights.items():
            self.register_parameter(name, nn.Parameter(torch.empty(self.states, *weight.shape)))
        self.init_weights()

    def init_weights(self) -> None:
        """Learned tensors start as the rule says; projections as every Linear of the model."""
        for name, weight in self.own.weights.items():
            init.copy_(getattr(self, name), weight.draw(self.states, *weight.shape))

    def weights(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.own.weights}

    def forward(self, x_BTD: Tensor) -> dict[str, Tensor]:
        inputs = {
            name: getattr(self, f"{name}_proj")(x_BTD).unflatten(-1, (self.states, width))
            for name, width in self.own.projections.items()
        }
        if self.own.hidden:
            x_BTHK = x_BTD.unflatten(-1, (self.states // self.scales, -1))
            inputs["x"] = x_BTHK.repeat(1, 1, self.scales, 1)
        return inputs
