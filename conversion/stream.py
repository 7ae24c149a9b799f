"""Walk a decoder block by block, many sequences side by side, with one block's activations in memory at a time.

    for layer in walk.layers:
        for rows in walk.rows():
            x, A, y = walk.attend(layer, rows)     teacher: input and output of the attention, and on to the next block
            x = walk.inputs(layer, rows)           student: what its mixer is given,
            walk.advance(layer, outputs, rows)     and on to the next block with these outputs in the mixer's place

Of all sequences only the residual stream is kept. Nothing is known of a block but where its attention stands, so that
every family of hf_fwp.hosts is walked alike.
Shape legend: hf_fwp/rules/base.py; N sequences.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.pytorch_utils import Conv1D

from hf_fwp.hosts import blocks_of, find_host, layer_rotates

from .families import output_projection_name
from .memory import forget, mapped
from .softmax import Softmax

ROWS = 2  # sequences that are computed at once: what a mixer holds for four is 40 MB more (SmolLM2-135M)
ALL = slice(None)
IN_MEMORY = 2**25  # numbers of a residual stream, above which it is kept in a file where there is a folder for it

NOT_REPEATED = {"hidden_states", "past_key_values", "layer_past"}  # of a block's arguments


class _Seen(Exception):
    """The stand-in has been reached, and nobody has told it what to answer."""


class StandIn(nn.Module):
    """Stands where an attention stood: keeps what it was given, and answers what it was told."""

    def __init__(self, *, adds_residual: bool = False) -> None:
        super().__init__()
        self.adds_residual = adds_residual
        self.given: Tensor | None = None
        self.answer: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        self.given = args[0] if args else kwargs["hidden_states"]
        if self.answer is None:
            raise _Seen
        return (args[1] + self.answer if self.adds_residual else self.answer), None


class Walk:
    """The residual stream of `model` over the token blocks `ids_NT`, one block of the decoder after the other.

    folder: where a large stream of a CPU lies, in a file; what is used of it is in memory meanwhile.
    """

    def __init__(self, model: PreTrainedModel, ids_NT: Tensor, *, folder: Path | None = None) -> None:
        host = find_host(model.config)
        base = model.base_model
        self.model = model
        self.host = host
        self.projection_name = output_projection_name(host)
        self.blocks = list(blocks_of(base, host))
        self.ids_NT = ids_NT.to(model.device)
        self.folder: Path | None = None
        self.arguments = self._arguments(base)
        for rows in self.rows():
            part = self._embedded(base, rows)
            if rows.start == 0:
                self.hidden_NTD = self._room(part, folder)
            self._put(rows, part)

    def rows(self, count: int | None = None) -> Iterator[slice]:
        """Slices of sequences that are computed together, of the first `count` or of all."""
        end = len(self.ids_NT) if count is None else count
        return (slice(start, min(start + ROWS, end)) for start in range(0, end, ROWS))

    def times(self, count: int) -> Walk:
        """A walk through the same blocks with room for this stream `count` times, one after the other."""
        other = copy.copy(self)
        other.ids_NT = self.ids_NT.repeat(count, 1)
        other.hidden_NTD = other._room(self.hidden_NTD, self.folder)
        return other

    def join(self, other: Walk) -> None:
        """Go on where another walk is: through blocks that both models have alike they need not go both."""
        self._put(ALL, other.hidden_NTD)

    def keep_in(self, folder: Path) -> None:
        """From here on a large stream lies in a file of `folder`."""
        stream = self.hidden_NTD
        self.hidden_NTD = self._room(stream, folder)
        self._put(ALL, stream)

    def attention(self, layer: int) -> nn.Module:
        """The attention, or the mixer, of a block."""
        return getattr(self.blocks[layer], self.host.attention)

    def rotary(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin of the positions, [1, T, R], as the block is given them."""
        return self.arguments[layer].get("position_embeddings") if layer_rotates(self.model.config, layer) else None

    def softmax(self, layer: int) -> Softmax:
        """How the teacher's attention of this layer makes its mass, as read from its module and the block's call."""
        attention, alibi = self.attention(layer), self.arguments[layer].get("alibi")
        size = getattr(attention, "head_dim", getattr(attention, "head_size", 0))
        # alibi [(1,) heads, 1, T] is the slope times the position, added before the scale (beta = scale) or after it
        slopes = None if alibi is None else attention.beta * (alibi[..., 0, 1] - alibi[..., 0, 0]).flatten()
        return Softmax(
            scale=getattr(attention, "scaling", 0) or size**-0.5,
            window=getattr(attention, "sliding_window", getattr(self.model.config, "sliding_window", None)),
            cap=getattr(self.model.config, "attn_logit_softcapping", None),
            slopes_H=slopes,
            sinks_H=getattr(attention, "sinks", None),
        )

    @torch.no_grad()
    def move(self, layer: int, count: int | None = None) -> None:
        """Move the stream, or the first `count` sequences of it, on to the next block."""
        for rows in self.rows(count):
            self._put(rows, self._block(layer, self.hidden_NTD[rows]))

    @torch.no_grad()
    def attend(self, layer: int, rows: slice = ALL) -> tuple[Tensor, Tensor, Tensor]:
        """(x, A, y): input and output [n,T,D] of the attention, and what its output projection is given, [n,T,H V]:
        the heads side by side. The stream of these sequences moves on to the next block."""
        seen: dict[str, Tensor] = {}

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            # where no norm comes first, it is the stream itself, which moves on
            seen["x"] = (args[0] if args else kwargs["hidden_states"]).clone()

        def keep_heads(_: nn.Module, args: Any, output: Any) -> None:
            seen["heads"], seen["answer"] = args[0], output

        attention = self.attention(layer)
        hooks = [
            attention.register_forward_pre_hook(keep, with_kwargs=True),
            attention.get_submodule(self.projection_name).register_forward_hook(keep_heads),
        ]
        try:
            self._put(rows, self._block(layer, self.hidden_NTD[rows]))
        finally:
            for hook in hooks:
                hook.remove()
        return seen["x"], seen["answer"], seen["heads"]

    def _put(self, rows: slice, moved_NTD: Tensor) -> None:
        """Write a part of the stream."""
        self.hidden_NTD[rows] = moved_NTD
        if self.folder is not None:
            forget(self.hidden_NTD)

    def _room(self, part_NTD: Tensor, folder: Path | None) -> Tensor:
        """An empty stream of which this is a part, in a file if it is large and there is a folder."""
        shape = (len(self.ids_NT), *part_NTD.shape[1:])
        large = part_NTD.device.type == "cpu" and math.prod(shape) > IN_MEMORY
        self.folder = folder if large else None
        return part_NTD.new_empty(shape) if self.folder is None else mapped(self.folder, shape, part_NTD.dtype)

    def output_projection(self, layer: int) -> nn.Linear:
        """The teacher's projection from the heads to the residual stream."""
        projection: Any = self.attention(layer).get_submodule(self.projection_name)
        if not isinstance(projection, Conv1D):
            return projection
        linear = nn.Linear(projection.nx, projection.nf, device="meta")  # the same numbers, [out, in]
        linear.weight = nn.Parameter(projection.weight.detach().mT, requires_grad=False)
        linear.bias = projection.bias
        return linear

    @torch.no_grad()
    def inputs(self, layer: int, rows: slice = ALL) -> Tensor:
        """What the attention or mixer of this block is given, [n,T,D]; the stream stays where it is."""
        return self._with_stand_in(layer, rows, None)[1]

    @torch.no_grad()
    def advance(self, layer: int, outputs_NTD: Tensor, rows: slice = ALL) -> None:
        """Move the stream on to the next block, with `outputs_NTD` for what its attention or mixer answers."""
        self._put(rows, self._with_stand_in(layer, rows, outputs_NTD)[0])

    @torch.no_grad()
    def finish(self, layer: int, hidden_NTD: Tensor) -> Tensor:
        """The final hidden states [n,T,D] (after the last norm) of a stream that enters block `layer`."""
        for later in range(layer, len(self.blocks)):
            hidden_NTD = self._block(later, hidden_NTD)
        for name in self.host.last:
            part = getattr(self._owner(name), name.rpartition(".")[2], None)
            hidden_NTD = hidden_NTD if part is None else part(hidden_NTD)
        return hidden_NTD

    def _owner(self, name: str) -> nn.Module:
        return self.model.base_model.get_submodule(name.rpartition(".")[0])

    def _block(self, layer: int, hidden_NTD: Tensor) -> Tensor:
        arguments = dict(self.arguments[layer])
        alibi = arguments.get("alibi")
        if alibi is not None and alibi.ndim == 3:  # [sequences * heads, 1, T], the one that does not broadcast
            arguments["alibi"] = alibi.repeat(len(hidden_NTD), 1, 1)
        moved = self.blocks[layer](hidden_NTD, **arguments)
        return moved[0] if isinstance(moved, tuple) else moved

    def _with_stand_in(self, layer: int, rows: slice, answer: Tensor | None) -> tuple[Tensor, Tensor]:
        block, stand_in = self.blocks[layer], StandIn(adds_residual=self.host.adds_residual)
        stand_in.answer = answer
        attention = getattr(block, self.host.attention)
        setattr(block, self.host.attention, stand_in)
        hidden = self.hidden_NTD[rows]
        try:
            hidden = self._block(layer, hidden)
        except _Seen:
            pass
        finally:
            setattr(block, self.host.attention, attention)
        assert stand_in.given is not None, "the block did not call its attention"
        return hidden, stand_in.given

    @torch.no_grad()
    def _arguments(self, base: nn.Module) -> list[dict[str, Any]]:
        """What each block is called with beside the hidden states: equal for all unpadded sequences of one length.

        The blocks are told apart but not run: their weights need not be in memory.
        """
        seen: list[dict[str, Any]] = []

        def recorder(signature: inspect.Signature) -> Callable[..., tuple[Any]]:
            def record(*args: Any, **kwargs: Any) -> tuple[Any]:
                given = signature.bind(*args, **kwargs).arguments
                given = {**given, **given.pop("kwargs", {})}
                seen.append({name: value for name, value in given.items() if name not in NOT_REPEATED})
                if len(seen) == len(self.blocks):
                    raise _Seen
                # whether a family takes the first of what a block returns or all of it, the next block gets this
                hidden = given["hidden_states"]
                return hidden if isinstance(hidden, tuple) else (hidden,)

            return record

        own = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.forward = recorder(inspect.signature(block.forward))
            base(input_ids=self.ids_NT[:1], use_cache=False)
        except _Seen:
            pass
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward
        return seen

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


# (layers, walks, found) -> the layers in turn, each with its weights where `walks` finds them (offload.py)
Visit = Callable[[Iterable[int], list[Walk], dict[int, dict[str, Any]]], Iterable[int]]


def every(layers: Iterable[int], walks: list[Walk], found: dict[int, dict[str, Any]]) -> Iterable[int]:
    """The layers in turn, of a model that is in memory as a whole."""
    return layers


@dataclass
class _Final(BaseModelOutputWithPastAndCrossAttentions):
    """The output of any family's base model."""

    router_logits: Any = None


class _Answer(nn.Module):
    """Stands where the owner of the blocks stood, and answers the final hidden states that it was told."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD

    def forward(self, *_: Any, **__: Any) -> _Final:
        return _Final(last_hidden_state=self.hidden_BTD)


def logits(model: PreTrainedModel, hidden_TD: Tensor) -> Tensor:
    """[T, V]: what `model` makes of final hidden states, its own scale and cap of logits included."""
    path = f"{model.base_model_prefix}.{find_host(model.config).blocks}".rpartition(".")[0]
    decoder = model.get_submodule(path)
    model.set_submodule(path, _Answer(hidden_TD[None]))
    try:
        return model(inputs_embeds=hidden_TD[None], use_cache=False).logits[0]
    finally:
        model.set_submodule(path, decoder)
