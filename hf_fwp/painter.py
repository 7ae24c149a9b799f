"""Fast weight painter: a matrix, for instance an image, is the fast weight that a recurrent network writes.

    z_t = LSTM(inputs)_t;   [k; v; b] = W z_t + c  of each channel;   k = softmax(k);   β = sigmoid(b)
    delta   S = k ⊗ v at the first step,  then  S = S + k ⊗ β (v - Sᵀ k)
    oja     S = S + softmax(k - S v) ⊗ β v
    image = Sᵀ

Every step adds a matrix of rank 1, so T steps give rank T at most; nothing is read, the state is what is wanted. The
inputs of the LSTM are made from the latent vector: T short vectors, each enlarged ("steps"), or the latent itself at
every step ("latent").

Irie, Schmidhuber 2022 (arXiv 2210.06184). C channels, M rows and columns, Z size of the latent vector, T steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .learning_rules import LEARNING_RULES

STEP_SIZE, INPUT_SIZE = 8, 128
# The rule of each step, and whether S v is taken from the key first: inside its softmax, so that Hebb's rule is left.
STEPS = {"delta": ("delta", False), "oja": ("hebb", True)}
CHOICES = {"learning_rule": tuple(STEPS), "inputs": ("steps", "latent")}


class FastWeightPainter(nn.Module):
    """A decoder from latent vectors [B, Z] to matrices [B, C, M, M]."""

    def __init__(
        self,
        latent_size: int,
        *,
        side: int,
        channels: int = 3,
        steps: int = 16,
        hidden_size: int = 1024,
        learning_rule: str = "delta",
        inputs: str = "steps",
        latent_start: bool = False,
        softmax_keys: bool = True,
        tanh_values: bool = False,
        tanh_inputs: bool = False,
        tanh_output: bool = False,
    ) -> None:
        """`latent_start` makes the LSTM's first state from the latent vector too, instead of zeros."""
        super().__init__()
        _check({"learning_rule": learning_rule, "inputs": inputs}, latent_size, side, channels, steps, hidden_size)
        self.side, self.channels, self.steps = side, channels, steps
        self.step_rule, self.corrects_keys = STEPS[learning_rule]
        self.softmax_keys, self.tanh_values = softmax_keys, tanh_values
        self.tanh_inputs, self.tanh_output = tanh_inputs, tanh_output
        self.spread = nn.Linear(latent_size, steps * STEP_SIZE) if inputs == "steps" else None
        self.enlarge = nn.Linear(STEP_SIZE, INPUT_SIZE) if inputs == "steps" else None
        self.start = nn.Linear(latent_size, 2 * hidden_size) if latent_start else None
        self.lstm = nn.LSTM(INPUT_SIZE if inputs == "steps" else latent_size, hidden_size, batch_first=True)
        self.kvb_proj = nn.Linear(hidden_size, channels * (2 * side + 1))
        bound = self.kvb_proj.out_features**-0.5
        nn.init.uniform_(self.kvb_proj.weight, -bound, bound)
        nn.init.uniform_(self.kvb_proj.bias, -bound, bound)
        if self.enlarge is not None:
            nn.init.kaiming_normal_(self.enlarge.weight)

    def forward(self, latent_BZ: Tensor) -> Tensor:
        """The matrices [B, C, M, M] of latent vectors."""
        return self.generate_matrix(latent_BZ)

    def generate_matrix(self, latent_BZ: Tensor) -> Tensor:
        """The matrices [B, C, M, M] of latent vectors."""
        if latent_BZ.ndim != 2:
            raise ValueError(f"the latent has shape {list(latent_BZ.shape)}; it must be [B, latent_size]")
        hidden_BTD, _ = self.lstm(self._inputs(latent_BZ), self._start(latent_BZ))
        kvb = self.kvb_proj(hidden_BTD).unflatten(-1, (self.channels, -1))
        state_BCMM = kvb.new_zeros(len(kvb), self.channels, self.side, self.side)
        for t, (k, v, b) in enumerate(
            zip(*(x.unbind(1) for x in kvb.split((self.side, self.side, 1), -1)), strict=True)
        ):
            state_BCMM = self._painted(state_BCMM, k, v, b[..., 0].sigmoid(), first=t == 0)
        image_BCMM = state_BCMM.mT
        return image_BCMM.tanh() if self.tanh_output else image_BCMM

    def _inputs(self, latent_BZ: Tensor) -> Tensor:
        if self.spread is None or self.enlarge is None:
            return latent_BZ[:, None].expand(-1, self.steps, -1)
        short_BTI = self.spread(latent_BZ).unflatten(-1, (self.steps, STEP_SIZE))
        return self.enlarge(short_BTI.tanh() if self.tanh_inputs else short_BTI)

    def _start(self, latent_BZ: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.start is None:
            return None
        h_BD, c_BD = self.start(latent_BZ).chunk(2, dim=-1)
        return h_BD[None].contiguous(), c_BD[None].contiguous()

    def _painted(self, state: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, first: bool) -> Tensor:
        """The state after one step: k, v [B, C, M], beta [B, C]."""
        v = v.tanh() if self.tanh_values else v
        if self.corrects_keys:
            k = k - torch.einsum("bckv,bcv->bck", state, v)
        k = k.softmax(-1) if self.softmax_keys else k
        beta = torch.ones_like(beta) if first and not self.corrects_keys else beta
        return LEARNING_RULES[self.step_rule].step({"state": state}, k, v, beta)["state"]


def _check(choices: dict[str, str], *sizes: int) -> None:
    for name, given in choices.items():
        if given not in CHOICES[name]:
            raise ValueError(f"{name} is {given!r}; choose from {', '.join(map(repr, CHOICES[name]))}")
    if min(sizes) < 1:
        raise ValueError(f"a size is {min(sizes)}; latent_size, side, channels, steps and hidden_size start at 1")
