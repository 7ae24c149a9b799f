"""The words nearest to a vector of a layer: carried through its output projection and the model's own output head.

What one head adds to the residual stream is W_o,h z. The final norm and the output head, read on that sum alone, say
which next tokens it speaks for (logit lens, nostalgebraist 2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

WORDS = 4


@dataclass
class Lens:
    """The end of a model: what it does with the residual stream after its last layer."""

    head: nn.Module
    norm: nn.Module | None = None

    @torch.no_grad()
    def words(self, weight_DV: Tensor, vectors: Tensor) -> Tensor:
        """The WORDS likeliest tokens of W z for vectors [..., V]: [..., WORDS]."""
        hidden = (vectors.to(weight_DV.dtype) @ weight_DV.mT).flatten(0, -2)
        hidden = hidden if self.norm is None else self.norm(hidden)
        best = [self.head(part).topk(WORDS).indices for part in hidden.split(256)]  # [256, vocabulary] at a time
        return torch.cat(best).view(*vectors.shape[:-1], WORDS)


@contextmanager
def finding_lens(model: PreTrainedModel) -> Iterator[Lens | None]:
    """While this lasts, a forward of the model tells which norm is its last. None without an output head."""
    head = model.get_output_embeddings()
    if head is None:
        yield None
        return
    lens = Lens(head)

    def ran(module: nn.Module, inputs: object, output: object) -> None:
        lens.norm = module

    # the decoder's own parts run one after the other: the last is the norm before the head, where there is one
    parts = [part for part in model.get_decoder().children() if "norm" in type(part).__name__.lower()]
    hooks = [part.register_forward_hook(ran) for part in parts]
    try:
        yield lens
    finally:
        for hook in hooks:
            hook.remove()
