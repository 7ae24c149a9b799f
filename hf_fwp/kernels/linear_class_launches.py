"""How the kernels of the linear class are launched: a literal table, and when a scan is cut into segments."""

from __future__ import annotations

from typing import NamedTuple

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


def sizes_of(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Sizes:
    """Everything that follows from shapes, types and device alone; no tensor is read."""
    batch, length, _, key_size = k.shape
    value_heads, value_size = v.shape[2:]
    word = computing_word(q, k, v)
    launches = TABLE[word.itemsize, max(64, padded(key_size), padded(value_size))]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def slots(tokens: int) -> int:
        return batch * pieces(length, tokens) if cu_seqlens is None else length // tokens + sequences

    programs = sequences * value_heads * pieces(value_size, min(launches.forward.columns, padded(value_size)))
    at_once = programs_at_once(v.device)
    span = launches.chunk * segment_chunks(programs, pieces(length, launches.chunk), at_once)
    chunks, segments = slots(launches.chunk), slots(span) if span else 0
    return Sizes(word, launches, at_once, sequences, chunks, slots(SOLVE), span, segments)
