"""The dtypes and devices that a user may name."""

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


def parse_device(given: torch.device | str | None, *, here: bool = True) -> torch.device | None:
    """The torch device of that name; None as it is. `here`: only one that this machine has."""
    if given is None:
        return None
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError) as fault:
        raise ValueError(f"unknown device {given!r}; the devices here are {', '.join(devices())}") from fault
    found = [torch.device(name) for name in devices()]
    if here and not any(device.type == each.type and device.index in (None, each.index or 0) for each in found):
        raise ValueError(f"there is no device {str(device)!r} here; the devices here are {', '.join(devices())}")
    return device


def devices() -> list[str]:
    """The devices that PyTorch can use here, the processor first."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu", *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()) if kind)]
