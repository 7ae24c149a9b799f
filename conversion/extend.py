"""Stage 4, extend: the student goes on to learn by itself, on longer sequences than it was made with.

    minimise  -1/N sum_t log q(x_t+1 | x_<=t)       over the N tokens that count

No teacher: its own context may be shorter. For chat data only what the assistant says counts: `convert` labels its
blocks so (tokens.py), and `chat_blocks` makes rows of one conversation each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .distil import distil
from .tokens import IGNORED, chat_labels

LOSSES = {"cross_entropy": 1.0}


def extend(
    student: PreTrainedModel,
    ids_NT: Tensor,
    *,
    batch_size: int = 1,
    lr: float = 1e-5,
    lr_rest: float = 1e-5,
    lr_end: float = 0.1,
    gradient_checkpointing: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Train `student` by cross-entropy on the token blocks ids_NT (4096 to 16384 long); returns the history.

    `settings` are those of distil, `labels_NT` among them: -100 where a token does not count, else the token. What is
    in memory of a step grows with the sequence, so that blocks of the model are computed again in backward.
    """
    return distil(
        student,
        None,
        ids_NT,
        losses=LOSSES,
        batch_size=batch_size,
        lr=lr,
        lr_rest=lr_rest,
        lr_end=lr_end,
        gradient_checkpointing=gradient_checkpointing,
        **settings,
    )


def chat_blocks(
    conversations: Iterable[Sequence[Mapping[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
) -> tuple[Tensor, Tensor]:
    """(ids, labels) [N, sequence_length] of conversations, each a list of {"role", "content"}, one to a row.

    Only the assistant's words and the end of its turn have labels. Longer conversations are cut; the rest of a row is
    padded, without labels. Raises ValueError for a tokenizer without a chat template, and for a template that rewrites
    earlier turns when a later one follows without marking the answers (`{% generation %}`).
    """
    filler: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = [chat_labels(conversation, tokenizer) for conversation in conversations]
    if not rows:
        raise ValueError("there are no conversations; give lists of messages with 'role' and 'content'")
    ids_NT = torch.full((len(rows), sequence_length), filler or 0)
    labels_NT = torch.full_like(ids_NT, IGNORED)
    for row, (ids, labels) in enumerate(rows):
        count = min(len(ids), sequence_length)
        ids_NT[row, :count] = torch.tensor(ids[:count])
        labels_NT[row, :count] = torch.tensor(labels[:count])
    return ids_NT, labels_NT
