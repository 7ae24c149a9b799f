"""Walk a decoder block by block, many sequences side by side, with one block's activations in memory at a time.

    for layer in walk.layers:
        x, A, y = walk.attend(layer)          teacher: input and output of the attention, and on to the next block
        x = walk.inputs(layer)                student: what its mixer is given,
        walk.advance(layer, outputs)          and on to the next block with these outputs in the mixer's place

Nothing is known of a block but where its attention stands, so that every family of hf_fwp.hosts is walked alike.
Shape legend: hf_fwp/rules/base.py; N sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fwp.hosts import Host, find_host

from .families import WEIGHT_MAPS

ROWS = 2  # sequences that are computed at once: what a mixer holds for four is 40 MB more (SmolLM2-135M)


def output_projection_name(host: Host) -> str:
    """What the teacher's attention calls the projection that becomes the mixer's o_proj."""
    weights = WEIGHT_MAPS[host.projections]
    return next(name for name, place in weights.items() if place == "o_proj.weight").removesuffix(".weight")


class _Seen(Exception):
    """The stand-in has been reached, and nobody has told it what to answer."""


class StandIn(nn.Module):
    """Stands where an attention stood: keeps what it was given, and answers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Tensor | None = None
        self.answer: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        self.given = args[0] if args else kwargs["hidden_states"]
        if self.answer is None:
            raise _Seen
        return self.answer, None


class Walk:
    """The residual stream of `model` over the token blocks `ids_NT`, one block of the decoder after the other."""

    def __init__(self, model: PreTrainedModel, ids_NT: Tensor) -> None:
        host = find_host(model.config)
        base = model.base_model
        self.model = model
        self.attention_name = host.attention
        self.projection_name = output_projection_name(host)
        self.blocks = list(getattr(base, host.blocks))
        self.ids_NT = ids_NT.to(model.device)
        self.arguments = self._arguments(base)
        self.hidden_NTD = torch.cat([self._embedded(base, rows) for rows in self.rows()])

    def rows(self) -> Iterator[slice]:
        """Slices of sequences that are computed together."""
        return (slice(start, start + ROWS) for start in range(0, len(self.ids_NT), ROWS))

    def attention(self, layer: int) -> nn.Module:
        """The attention, or the mixer, of a block."""
        return getattr(self.blocks[layer], self.attention_name)

    def rotary(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin of the positions, [1, T, R], as the block is given them."""
        return self.arguments[layer].get("position_embeddings")

    def window(self, layer: int) -> int | None:
        """How many tokens a query of this layer sees, its own included; None: all before it."""
        return getattr(self.attention(layer), "sliding_window", getattr(self.model.config, "sliding_window", None))

    @torch.no_grad()
    def move(self, layer: int) -> None:
        """Move the stream on to the next block."""
        for rows in self.rows():
            self.hidden_NTD[rows] = self._block(layer, rows)

    @torch.no_grad()
    def attend(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """(x, A, y): input and output [N,T,D] of the attention, and what its output projection is given, [N,T,H V]:
        the heads side by side. The stream moves on to the next block."""
        x, answers, heads = (torch.empty(0) for _ in range(3))
        seen: dict[str, Tensor] = {}

        def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen["x"], seen["answer"] = args[0] if args else kwargs["hidden_states"], output[0]

        def keep_heads(_: nn.Module, args: Any) -> None:
            seen["heads"] = args[0]

        hooks = [
            self.attention(layer).register_forward_hook(keep, with_kwargs=True),
            self.output_projection(layer).register_forward_pre_hook(keep_heads),
        ]
        try:
            for rows in self.rows():
                self.hidden_NTD[rows] = self._block(layer, rows)
                if rows.start == 0:
                    # filled in place: a list and its concatenation would need twice the memory
                    x, answers, heads = (self._like(seen[name]) for name in ("x", "answer", "heads"))
                x[rows], answers[rows], heads[rows] = seen["x"], seen["answer"], seen["heads"]
        finally:
            for hook in hooks:
                hook.remove()
        return x, answers, heads

    def _like(self, part: Tensor) -> Tensor:
        return part.new_empty(len(self.ids_NT), *part.shape[1:])

    def output_projection(self, layer: int) -> nn.Linear:
        """The teacher's projection from the heads to the residual stream."""
        projection: Any = self.attention(layer).get_submodule(self.projection_name)
        return projection

    @torch.no_grad()
    def inputs(self, layer: int) -> Tensor:
        """What the attention or mixer of this block is given, [N,T,D]; the stream stays where it is."""
        x_NTD = torch.empty_like(self.hidden_NTD)
        for rows in self.rows():
            x_NTD[rows] = self._with_stand_in(layer, rows, None)[1]
        return x_NTD

    @torch.no_grad()
    def advance(self, layer: int, outputs_NTD: Tensor) -> None:
        """Move the stream on to the next block, with `outputs_NTD` for what its attention or mixer answers."""
        for rows in self.rows():
            self.hidden_NTD[rows] = self._with_stand_in(layer, rows, outputs_NTD[rows])[0]

    @torch.no_grad()
    def finish(self, layer: int, hidden_NTD: Tensor) -> Tensor:
        """The final hidden states [n,T,D] (after the last norm) of a stream that enters block `layer`."""
        for later in range(layer, len(self.blocks)):
            hidden_NTD = self.blocks[later](hidden_NTD, **self.arguments[later])
        return self._last_norm(hidden_NTD)

    def _block(self, layer: int, rows: slice) -> Tensor:
        return self.blocks[layer](self.hidden_NTD[rows], **self.arguments[layer])

    def _with_stand_in(self, layer: int, rows: slice, answer: Tensor | None) -> tuple[Tensor, Tensor]:
        block, stand_in = self.blocks[layer], StandIn()
        stand_in.answer = answer
        attention = getattr(block, self.attention_name)
        setattr(block, self.attention_name, stand_in)
        hidden = self.hidden_NTD[rows]
        try:
            hidden = self._block(layer, rows)
        except _Seen:
            pass
        finally:
            setattr(block, self.attention_name, attention)
        assert stand_in.given is not None, "the block did not call its attention"
        return hidden, stand_in.given

    @torch.no_grad()
    def _arguments(self, base: nn.Module) -> list[dict[str, Any]]:
        """What each block is called with beside the hidden states: equal for all unpadded sequences of one length."""
        seen: list[dict[str, Any]] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
            for block in self.blocks
        ]
        try:
            base(input_ids=self.ids_NT[:1, :], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return [{name: value for name, value in kwargs.items() if name != "past_key_values"} for kwargs in seen]

    @torch.no_grad()
    def _embedded(self, base: nn.Module, rows: slice) -> Tensor:
        found: list[Tensor] = []

        def stop(_: nn.Module, args: Any) -> None:
            found.append(args[0])
            raise _Seen

        hook = self.blocks[0].register_forward_pre_hook(stop)
        try:
            base(input_ids=self.ids_NT[rows], use_cache=False)
        except _Seen:
            pass
        finally:
            hook.remove()
        return found[0]

    def _last_norm(self, hidden_NTD: Tensor) -> Tensor:
        norm = getattr(self.model.base_model, "norm", None)
        return hidden_NTD if norm is None else norm(hidden_NTD)
