"""The state of a stage on disk: a folder per saved step, complete or not there at all.

FOLDER/step-00000050/state-0000.safetensors     tensors by name, as many files as there are parts
FOLDER/step-00000050/state.json                 everything else

What a step is says the stage: align counts every change of a layer.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

TENSORS, REST = "state-{:04d}.safetensors", "state.json"
FULL = 2**16  # bytes; a disk with less than this left is full


def save(folder: Path, step: int, parts: Iterable[dict[str, Tensor]], rest: dict[str, Any]) -> None:
    """Write under another name, then rename: a kill leaves the step before. Older steps are deleted.

    One part of the tensors is asked for, and written, after the other.
    """
    place = folder / f"step-{step:08d}"
    if place.is_dir():
        return
    unfinished = folder / f"unfinished-{step:08d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for number, tensors in enumerate(parts):
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, unfinished / TENSORS.format(number))
    (unfinished / REST).write_text(json.dumps(rest))
    unfinished.rename(place)
    for older in steps(folder):
        if older.name < place.name:
            shutil.rmtree(older)


def load(place: Path) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
    """What `save` was given: the tensors one after the other, and everything else."""
    return _tensors(place), json.loads((place / REST).read_text())


def _tensors(place: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in list(stored.keys()):
                yield name, stored.get_tensor(name)


def steps(folder: Path) -> list[Path]:
    """Folders of the complete saved steps, oldest first."""
    return sorted(folder.glob("step-*"))


def latest(folder: Path, *, resume: bool) -> Path | None:
    """The newest saved step; without `resume` there must be none."""
    saved = steps(folder)
    if saved and not resume:
        raise ValueError(f"{folder} holds an earlier run; give resume=True to continue it, or another folder")
    return saved[-1] if saved else None


def check_settings(saved: dict[str, Any], given: dict[str, Any], *, folder: Path) -> None:
    """Refuse to continue a run with other settings than it was begun with."""
    changed = [name for name in given if saved.get(name) != json.loads(json.dumps(given[name]))]
    if changed:
        told = ", ".join(f"{name} = {saved.get(name)!r}, not {given[name]!r}" for name in changed)
        raise ValueError(f"{folder} was begun with {told}; use the same settings to resume, or another folder")


@contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """A full disk is an OSError that says what to do, in whichever way the library that met it puts it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as fault:
        # safetensors raises its own type, and torch tells of a position in a file
        if "No space left" not in str(fault) and shutil.disk_usage(folder).free >= FULL:
            raise
        told = f"no space left for {folder}; what was finished is in it: free some space and go on with resume=True"
        raise OSError(errno.ENOSPC, told) from fault
