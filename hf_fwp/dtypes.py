"""The dtypes that a user may name."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """The torch dtype of that name; a dtype, or None, as it is."""
    if given is None or isinstance(given, torch.dtype):
        return given
    if given not in DTYPES:
        raise ValueError(f"unknown dtype {given!r}; the dtypes are {', '.join(DTYPES)}")
    return DTYPES[given]
