"""How the kernels of the linear class are launched: a literal table, and when a scan is cut into segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOLVE = 64  # tokens that one inverse is for; a scan's chunks are as long or shorter


class Launch(NamedTuple):
    """How one kernel is launched: the width of its tiles (value columns; key columns for the inverse), what runs it."""

    columns: int
    num_warps: int
    num_stages: int


class Launches(NamedTuple):
    """One row of the table."""

    chunk: int
    invert: Launch
    forward: Launch
    backward: Launch
    gradients: Launch


# By bytes per number and padded head size. Chosen by the memory and registers that the compiler reports for sm_90; not
# yet measured on a device. Shorter chunks take less of both, but leave more states to the backward.
TABLE = {
    (2, 64): Launches(64, Launch(64, 1, 2), Launch(64, 4, 2), Launch(64, 4, 2), Launch(32, 8, 1)),
    (2, 128): Launches(64, Launch(64, 1, 2), Launch(32, 4, 2), Launch(32, 4, 2), Launch(16, 8, 1)),
    (2, 256): Launches(64, Launch(64, 1, 2), Launch(16, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
    (4, 64): Launches(64, Launch(32, 1, 2), Launch(32, 4, 1), Launch(32, 4, 1), Launch(16, 8, 1)),
    (4, 128): Launches(32, Launch(32, 1, 2), Launch(16, 8, 1), Launch(16, 8, 1), Launch(32, 8, 1)),
    (4, 256): Launches(16, Launch(32, 1, 2), Launch(16, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
}
CARRY = Launch(16, 4, 1)
PROGRAMS = 128  # about the multiprocessors of a large GPU, where the device does not say
NARROW = 16  # value columns
CARRIED = 32  # rows of a state that one product between segments takes
SEGMENTS = 4  # every segment is walked twice: with fewer of them than this, walking in one go takes as long
SEGMENT_CHUNKS = 4  # fewer would cost more in transitions than they save


def padded(size: int) -> int:
    """Tiles have sizes that are powers of two, products at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def pieces(size: int, width: int) -> int:
    return -(-size // width)


def computing_word(*tensors: Tensor) -> torch.dtype:
    """The type of the operands of products: that of the inputs, float32 when they differ."""
    kinds = {x.dtype for x in tensors}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def programs_at_once(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type == "cpu":
        return PROGRAMS
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", PROGRAMS)


def segment_chunks(programs: int, chunks: int, at_once: int) -> int:
    """Chunks of one segment, or 0 to walk whole sequences: when these give fewer programs than run at once, and are
    long enough. Two programs for each multiprocessor hide each other's waiting."""
    if programs >= at_once or chunks < SEGMENTS * SEGMENT_CHUNKS:
        return 0
    return max(SEGMENT_CHUNKS, pieces(chunks, max(SEGMENTS, pieces(2 * at_once, programs))))


class Sizes(NamedTuple):
    """How many there are of what: slots (tiles.py) of chunks, of inverses and of segments; 0 segments = not cut."""

    word: torch.dtype  # in which T and the states are kept
    launches: Launches
    at_once: int  # programs that fill the device
    sequences: int
    chunks: int
    inverses: int
    span: int  # tokens of a segment
    segments: int


def sizes_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    table: Mapping[tuple[int, int], Launches] | None = None,
    whole: bool = False,
) -> Sizes:
    """Everything that follows from shapes, types and device alone; no tensor is read. `table` is TABLE by itself; with
    `whole`, one program of a scan takes all value columns."""
    batch, length, _, key_size = k.shape
    value_heads, value_size = v.shape[2:]
    word = computing_word(q, k, v)
    launches = (TABLE if table is None else table)[word.itemsize, max(64, padded(key_size), padded(value_size))]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def slots(tokens: int) -> int:
        return batch * pieces(length, tokens) if cu_seqlens is None else length // tokens + sequences

    programs = sequences * value_heads
    if not whole:
        programs *= pieces(value_size, min(launches.forward.columns, padded(value_size)))
    at_once = programs_at_once(v.device)
    span = launches.chunk * segment_chunks(programs, pieces(length, launches.chunk), at_once)
    chunks, segments = slots(launches.chunk), slots(span) if span else 0
    return Sizes(word, launches, at_once, sequences, chunks, slots(SOLVE), span, segments)


class Call(NamedTuple):
    """The arguments of all kernels that do not depend on the kernel."""

    sizes: Sizes
    constants: dict[str, Any]
    dynamic: dict[str, int]

    def run(
        self, kernel: Any, programs: int, launch: Launch, *arguments: Tensor | float | None, **constants: Any
    ) -> None:
        """Launch it with those of the constants that it has."""
        known = self.constants | constants
        chosen = {name: known[name] for name in kernel.arg_names if name in known}
        warps = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        kernel[(programs,)](*arguments, *self.dynamic.values(), **chosen, **warps)

    def scan(
        self, kernel: Any, launch: Launch, *arguments: Tensor | float | None, whole: bool = False, **flags: Any
    ) -> None:
        """One program for every sequence or segment, value head and, unless it takes them `whole`, tile of columns."""
        width, values = self.width(launch), self.constants["V"]
        while not whole and width > NARROW and self.walks * pieces(values, width) < self.sizes.at_once:
            width //= 2
        programs = self.walks * (1 if whole else pieces(values, width))
        segmented = self.sizes.segments > 0
        self.run(kernel, programs, launch, *arguments, BV=width, SEGMENTED=segmented, **flags)

    def segment_starts(
        self,
        map_segments: Any,
        carry: Any,
        given: Sequence[Tensor | None],
        cu_seqlens: Tensor | None,
        state: Tensor | None,
        transitions: Tensor,
        final: Tensor,
    ) -> Tensor:
        """The state at the start of every segment; `transitions` and `final` are written. The kernel that maps segments
        gets one program for every segment, value head and tile of columns of B and M."""
        launch = self.sizes.launches.forward
        width, added = self.width(launch), transitions.new_empty(self.sizes.segments, *final.shape[1:])
        parts = pieces(self.constants["V"], width) + pieces(self.constants["K"], width)
        self.run(map_segments, self.walks * parts, launch, *given, added, transitions, BV=width)
        return self._carried(carry, (cu_seqlens, state, added, transitions), final, False)

    def segment_ends(
        self,
        scan_backward: Any,
        carry: Any,
        given: Sequence[Tensor | None],
        rest: Sequence[Tensor | float | None],
        cu_seqlens: Tensor | None,
        d_final: Tensor | None,
        transitions: Tensor,
        d_initial: Tensor,
    ) -> Tensor:
        """The gradient of the state at the end of every segment; `d_initial` is written. `given` and `rest` are what
        the scan takes before and after the gradients of its last and first state."""
        added = transitions.new_empty(self.sizes.segments, *d_initial.shape[1:])
        flags = {"HAS_FINAL": False, "KEEP": False}
        self.scan(scan_backward, self.sizes.launches.backward, *given, None, added, *rest, **flags)
        return self._carried(carry, (cu_seqlens, d_final, added, transitions), d_initial, True)

    def _carried(self, carry: Any, given: Sequence[Tensor | None], end: Tensor, backwards: bool) -> Tensor:
        """One program for every sequence, value head and tile of value columns."""
        _, start, added, _ = given
        assert added is not None
        between, width = torch.empty_like(added), self.width(CARRY)
        programs = self.sizes.sequences * self.constants["HV"] * pieces(self.constants["V"], width)
        flags = {"HAS_START": start is not None, "BACKWARDS": backwards}
        self.run(carry, programs, CARRY, *given, between, end, BV=width, KB=CARRIED, **flags)
        return between

    def width(self, launch: Launch) -> int:
        return min(launch.columns, padded(self.constants["V"]))

    @property
    def walks(self) -> int:
        """Sequences or segments, each with its value heads."""
        return (self.sizes.segments or self.sizes.sequences) * self.constants["HV"]

    @property
    def readers(self) -> int:
        """Query heads, as those of the outputs are counted."""
        return self.constants["HV"] * self.constants["R"]


def only_if(keep: bool, solve: Tensor, states: Tensor, transitions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward needs, or nothing; of the states there is nothing then."""
    return (solve, states, transitions) if keep else (solve.new_empty(0), states, transitions.new_empty(0))
