"""Adapters of peft on models of this package: checked and described before they are pushed.

`AutoModelForCausalLM.from_pretrained` of an adapter's repository loads the base model that it names, then the adapter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig

from .auto_map import WithAutoMap, names_our_code
from .card import TASKS, auto_class, loading
from .weights import check_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEMPLATE = "[More Information Needed]"  # in the card that peft writes when it is told nothing
AUTO = {  # task of a peft config -> what loads its model
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: its config.json as it is published, its base model's address, itself without weights."""

    settings: dict[str, Any]
    base: str
    auto: str
    model: PeftModel


def whole_adapter(folder: Path, base: str | None, *, token: str | None = None) -> Adapter:
    """The adapter in `folder`; ValueError where it is not whole, or not one of a model of this package.

    `base` is the address of the base model, whose config is read there; it is needed where adapter_config.json names a
    folder of this machine.
    """
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    named = settings.get("base_model_name_or_path")
    if base is None and (not named or Path(named).is_dir()):
        raise ValueError(
            f"{folder / CONFIG} names {named!r} as its base model, which others do not have; push that model first, "
            "then give its address: base='you/the-model'"
        )
    address: str = base or named
    config = AutoConfig.from_pretrained(address, token=token)
    if not isinstance(config, WithAutoMap):
        raise ValueError(f"the base model {address} is a {config.model_type!r}, no model of this package")
    given = PeftConfig.from_pretrained(str(folder))
    auto = AUTO.get(str(given.task_type)) or auto_class(config, (given.auto_mapping or {}).get("base_model_class"))
    given.base_model_name_or_path = None  # peft warns that the address is another
    with torch.device("meta"):
        model = get_peft_model(getattr(transformers, auto).from_config(config), given)
    check_adapter_weights(folder, model)
    return Adapter({**settings, "base_model_name_or_path": address}, address, auto, model)


def check_adapter_weights(folder: Path, model: PeftModel) -> None:
    """Refuse weights that are damaged, not finite, or not those of the adapter's config."""
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}; save the adapter again with save_pretrained")
    check_safetensors(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as found:
        names = set(found.keys())
        embeds = any("embed" in name for name in names)
        wanted = get_peft_model_state_dict(model, save_embedding_layers=embeds)
        odd = sorted(names ^ set(wanted))
        odd += [n for n in names & set(wanted) if tuple(found.get_slice(n).get_shape()) != tuple(wanted[n].shape)]
        if odd:
            raise ValueError(
                f"the weights of {folder} are not those of its config and base model: {', '.join(odd[:3])}; save the "
                "adapter again, or correct its base model"
            )
        broken = sorted(name for name in names if not found.get_tensor(name).isfinite().all())
    if broken:
        raise ValueError(f"{len(broken)} weights of {folder} are NaN or infinite ({', '.join(broken[:3])})")


def adapter_card(adapter: Adapter, *, name: str, address: str) -> ModelCard:
    """README.md of an adapter: what it changes in which model, and how both are loaded from `address`."""
    method: Any = adapter.model.peft_config["default"].peft_type
    kind = str(method.value)
    inner: Any = adapter.model.get_base_model()
    front = ModelCardData(
        base_model=adapter.base,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag=TASKS[adapter.auto],
        tags=[*inner.model_tags, "adapter", kind.lower()],
    )
    learned = sum(weight.numel() for weight in get_peft_model_state_dict(adapter.model).values())
    with_code = names_our_code(inner.config.auto_map)
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name}",
        f"An adapter ({kind}, {learned} weights) of {adapter.base}, a model with fast weights.",
        loading(address, adapter.auto, with_code=with_code, tokenizer=adapter.base),
    ]
    return ModelCard("\n\n".join(parts) + "\n")
