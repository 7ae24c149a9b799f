"""A model in a form that others run: `hf_fwp.export(model, output, format="fla")`; `hf-fwp export DIR OUT` is the same.

    fla     a checkpoint of flash-linear-attention (interop/to_fla.py)
    onnx    one token of a model, with its states as inputs and outputs (interop/onnx.py), run by `OnnxDecoder`

The model is not changed. What a format cannot hold is refused before anything is written.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from .architecture import config_of, is_adapter, refuse_other_heads
from .estimates import empty_model, size
from .options import refuse_unknown
from .telling import say

# format -> the module whose `write(model, folder)` writes it, and whose `check(model)` refuses what it cannot
FORMATS = {"fla": "hf_fwp.interop.to_fla", "onnx": "hf_fwp.interop.onnx"}
WHOLE = ("fla",)  # formats without a place for an adapter beside the weights
# What goes along from the folder of a model, by name.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def export(model: PreTrainedModel | str | Path, output: str | Path, *, format: str, dry_run: bool = False) -> Path:
    """Write a model, or the one in a folder, to the new folder `output`, which is returned.

    From a folder its tokenizer and generation_config.json go along. dry_run: refuse what would be refused, print how
    much would be written, and write nothing; of a folder the weights are not read.

    Raises:
        ValueError: an unknown format, an `output` that holds something, a model that is no causal language model, or
            one that this format cannot hold; it names the option, what it may be, and what to do.
    """
    refuse_unknown("export format", [format], FORMATS)
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; name a new one")
    _refuse_other_heads(model)
    if format in WHOLE and _adapted(model):
        raise ValueError(f"format={format!r} holds no adapter; merge it first: model.merge_and_unload()")
    if dry_run:
        planned = model if isinstance(model, PreTrainedModel) else empty_model(config_of(model))
        importlib.import_module(FORMATS[format]).check(planned)
        held = size(planned.num_parameters() * planned.dtype.itemsize)
        say(f"would write {type(planned).__name__} to {output}, for {format}: {held} of weights")
        return output
    source = None if isinstance(model, PreTrainedModel) else Path(model)
    loaded = model if isinstance(model, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(str(model))
    importlib.import_module(FORMATS[format]).write(loaded, output)
    if source is not None and source.is_dir():
        for pattern in COMPANIONS:
            for file in source.glob(pattern):
                if file.is_file() and not (output / file.name).exists():
                    shutil.copyfile(file, output / file.name)
    return output


def _adapted(model: PreTrainedModel | str | Path) -> bool:
    """Whether weights of an adapter stand beside those of the model."""
    if isinstance(model, PreTrainedModel):
        return any(hasattr(module, "base_layer") for module in model.modules())
    return is_adapter(model)


def _refuse_other_heads(model: PreTrainedModel | str | Path) -> None:
    """Raise ValueError for what is no causal language model; of a folder its config tells."""
    if isinstance(model, PreTrainedModel):
        names = [known.__name__ for known in type(model).__mro__]
        refuse_other_heads(model.config, names, told=f"the model is a {type(model).__name__}")
        return
    config = config_of(model)
    if config.architectures:  # a checkpoint of flash-linear-attention, read as ours, names none
        refuse_other_heads(config, config.architectures, told=f"{model} holds {config.architectures}")
