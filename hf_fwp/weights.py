"""The weights files of a folder: whole, named inside the folder, safetensors only, finite."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weights_files(folder: Path) -> list[str]:
    """The names of the weights files that `from_pretrained` reads, or none. Raises ValueError for a wrong index."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    return index_names(folder / INDEX) if (folder / INDEX).is_file() else []


def index_names(index: Path) -> list[str]:
    """The files that an index names; it must be a table of weights, and may name files beside itself only."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ValueError(f"{index} is damaged: it has no table weight_map; copy or download it again") from fault
    for name in names:
        if not isinstance(name, str) or "\\" in name or Path(name).name != name:
            raise ValueError(
                f"{index} names the file {name!r}; an index may name files of its own folder only. Do not load this "
                "folder, unless you trust who wrote it and correct the name"
            )
    return names


def check_weights(folder: Path) -> None:
    """Refuse a folder in which a weights file is missing or damaged."""
    names = weights_files(folder)
    if not names and not list(folder.glob("*.bin")):
        raise ValueError(f"{folder} has no weights ({SINGLE}); copy or download it again")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no file {name}, which its index names; copy or download it again")
        check_safetensors(folder / name)


def check_safetensors(file: Path) -> None:
    """Refuse a safetensors file whose header cannot be, or asks for another size than the file has."""
    try:
        with safe_open(file, framework="pt"):
            return
    except SafetensorError as fault:
        raise ValueError(f"{file} is damaged ({fault}); copy or download it again") from fault


def check_folder(folder: Path) -> None:
    """What a loader looks at before it opens anything: names in every index, and weights that are not pickled."""
    for index in folder.glob("*.safetensors.index*.json"):
        index_names(index)
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if pickled and not list(folder.glob("*.safetensors*")):
        raise ValueError(
            f"{folder} has pickled weights only ({pickled[0]}); only safetensors files are read: ask for those, or, if "
            "you trust this folder, give use_safetensors=False once and save the model again"
        )


def check_finite(model: nn.Module, source: object) -> None:
    """Refuse weights that are NaN or infinite; quantised ones and those kept on the disk are not looked at."""
    broken = [name for name, weight in model.named_parameters() if _plain(weight) and not _finite(weight)]
    if broken:
        raise ValueError(
            f"{len(broken)} weights of {source} are NaN or infinite in places ({', '.join(broken[:3])}): its training "
            "diverged, the file was spoilt, or the dtype is too narrow; take an earlier checkpoint, or float32"
        )


def _plain(weight: torch.Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype in FLOATS and not weight.is_meta and weight.numel() > 0


@torch.no_grad()
def _finite(weight: torch.Tensor) -> bool:
    return all(bool(extreme.isfinite()) for extreme in weight.aminmax())  # no mask as large as the weight
