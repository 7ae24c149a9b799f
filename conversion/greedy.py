"""How far a model writes what its teacher writes, when both go on from the same held-out text.

    followed = mean over texts of (tokens before the first that the model would not write) / (tokens written)

The teacher writes greedily. One pass of the model over what it wrote tells where the model's own greedy text is another
one: up to there both are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .positions import positions_of
from .scores import evaluating, forward_of, tokens_shown

TEXTS, GIVEN, WRITTEN = 16, 64, 32  # texts, tokens that each begins with, tokens that the teacher adds


def followed(
    model: PreTrainedModel, teacher: PreTrainedModel, ids_NT: Tensor, *, texts: int = TEXTS, progress: bool = True
) -> float:
    """The share, of the first `texts` sequences or as many as there are."""
    limits = [limit for limit in map(positions_of, (model, teacher)) if limit is not None]
    given = max(1, min(GIVEN, ids_NT.shape[1] // 2))
    count = min([WRITTEN, *(limit - given for limit in limits)])
    text_NT = written(teacher, ids_NT[:texts, :given], count)
    forward, same = forward_of(model), 0
    for ids_T in tokens_shown(text_NT, progress=progress, description="greedy text"):
        said_T = forward(ids_T[None])[0, given - 1 : -1].argmax(-1).to(ids_T.device)
        same += int((said_T == ids_T[given:]).cumprod(0).sum())
    return same / (len(text_NT) * count)


def written(model: PreTrainedModel, ids_NT: Tensor, count: int) -> Tensor:
    """The sequences with `count` tokens more, the most likely ones."""
    parts, cache = [ids_NT.to(model.device)], None
    with evaluating(model):
        for _ in range(count):
            out = model(input_ids=parts[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            parts.append(out.logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(parts, dim=1).to(ids_NT.device)
