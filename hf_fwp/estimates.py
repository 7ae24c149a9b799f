"""What a run will take, before it starts: of a model its config is enough, of this machine a product of matrices."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

PASS = 1.6  # time of a forward pass over that of its products of matrices: SmolLM2-135M, 256 tokens, 2 CPU cores

# a plan asks for every stage, an ablation for every run
_timed: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()


def empty_model(
    config: Any, *, auto: Any = AutoModelForCausalLM, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a config with every weight on the device "meta": it has shapes, and takes no memory."""
    with torch.device("meta"):
        model: Any = auto.from_config(config, dtype=dtype)
    return model.eval()


def duration(seconds: float) -> str:
    """'40 s', '12 minutes', '3.5 hours': as exact as an estimate is."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"


def size(count: float) -> str:
    """Bytes as '3.2 GiB', what is small as '4.5 MiB'."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def seconds_per_token(model: PreTrainedModel) -> float:
    """Of one forward pass: measured, or for a model without memory from the time of a product of matrices; once."""
    if model not in _timed:
        _timed[model] = _time_per_token(model)
    return _timed[model]


@torch.no_grad()
def _time_per_token(model: PreTrainedModel, length: int = 256) -> float:
    weight: Any = model.get_input_embeddings().weight
    if weight.is_meta:
        products = model.num_parameters() - (0 if model.config.tie_word_embeddings else weight.numel())
        return products * seconds_per_weight(length)
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        model.base_model(input_ids=ids, use_cache=False)
        times.append(time.perf_counter() - started)
    return min(times) / length


def seconds_per_weight(length: int, width: int = 2048) -> float:
    x_TD, weight_DD = torch.zeros(length, width), torch.zeros(width, width)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(x_TD, weight_DD)
        times.append(time.perf_counter() - started)
    return PASS * sorted(times)[2] / (length * width * width)


def peak_memory() -> int | None:
    """The most memory this process has held so far, in bytes; None where the system does not tell (Windows)."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent held when it started this process
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
