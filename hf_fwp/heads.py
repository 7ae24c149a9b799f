"""transformers' heads with `times` among the arguments: Trainer drops from a batch what a forward does not name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForTokenClassification
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput


class TimedTokenClassification(GenericForTokenClassification):
    """Scores of tokens or observations."""

    # the loss is the mean of the batch: Trainer has to divide it by the batches that it accumulates
    accepts_loss_kwargs = False

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        times: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        kwargs |= {"position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        kwargs |= {"labels": labels, "use_cache": use_cache, "times": times}
        return super().forward(input_ids, attention_mask, **kwargs)


class TimedQuestionAnswering(GenericForQuestionAnswering):
    """Where in a text or series the answer starts and ends."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        times: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        kwargs |= {"position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        kwargs |= {"start_positions": start_positions, "end_positions": end_positions, "times": times}
        return super().forward(input_ids, attention_mask, **kwargs)
