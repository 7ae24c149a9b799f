"""Loaded weights at aligned addresses, so that a reloaded model computes bit for bit what the saved one did.

`from_pretrained` maps a safetensors file into memory as it lies on the disk. Matrix libraries add in another order at
addresses that are not multiples of 64: measured on a CPU, the logits of a single token changed in the last bit
(safetensors/safetensors#607).
"""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

from .options import find_rule
from .weights import check_finite, check_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
else:
    Model = object

ALIGNMENT = 64
ROWS = 32  # that bitsandbytes multiplies at once in 4 bits on a processor with AVX512-BF16
TAGS = ("hf_fwp", "fast-weights")  # of every model on the Hub

# Pattern in the names that flash-linear-attention saves -> ours. None of them occurs in a checkpoint of this package;
# `norm` is what o_norm was called in old ones.
RENAMED = {
    r"^model\.embeddings\.": "model.embed_tokens.",
    r"\.attn\.f_proj\.0\.": ".mixer.gates.f_down.",
    r"\.attn\.f_proj\.1\.": ".mixer.gates.f_up.",
    r"\.attn_norm\.": ".mixer_norm.",
    r"\.attn\.(o_)?norm\.": ".mixer.o_norm.",
    r"\.attn\.": ".mixer.",
}
# The same where the rule has a module for its decay, which those checkpoints do not.
DECAYS = {r"\.attn\.A_log$": ".mixer.gates.A_log", r"\.attn\.dt_bias$": ".mixer.gates.dt_bias"}


def align_weights(model: nn.Module) -> None:
    """Move the weights of a model on the CPU to memory of their own, if the address of one of them is not aligned.

    All of them, not only that one: a single tensor left behind keeps the whole mapped file in memory.
    """
    tensors = [tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.device.type == "cpu"]
    if any(tensor.data_ptr() % ALIGNMENT for tensor in tensors):
        for tensor in tensors:
            tensor.data = tensor.data.clone()


def check_blocks(model: nn.Module) -> None:
    """Raise ValueError where weights in 4 bits do not fill the blocks in which bitsandbytes multiplies them on a CPU.

    A rate has one row per head. The first forward would fail with an assertion (no public issue found).
    """
    whole, unfit = set(), set()
    modules: Any = model.named_modules()
    for name, module in modules:
        place = re.sub(r"^.*\.\d+\.", "", name)  # in its block
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            whole |= {place} if isinstance(module, nn.Linear) else set()
        elif module.weight.device.type == "cpu" and (
            module.out_features % ROWS or module.in_features % module.weight.blocksize
        ):
            unfit.add(place)
    if unfit:
        raise ValueError(
            f"this processor multiplies 4-bit weights of bitsandbytes in blocks, which {', '.join(sorted(unfit))} do "
            f"not fill; give BitsAndBytesConfig llm_int8_skip_modules={sorted(unfit | whole)}"
        )


class AlignedLoading(Model):
    """A model whose `from_pretrained` aligns what it loaded and names a spoilt folder, and which describes itself on
    the Hub. Safetensors files are the only weights it reads, unless it is given `use_safetensors=False`."""

    @classmethod
    def from_pretrained(cls, *args: Any, use_safetensors: bool | None = True, **kwargs: Any) -> Any:
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        folder = Path(source or "", kwargs.get("subfolder") or "")
        if use_safetensors and source is not None and folder.is_dir():
            check_folder(folder)
        try:
            loaded = super().from_pretrained(*args, use_safetensors=use_safetensors, **kwargs)
        except SafetensorError as fault:
            raise ValueError(f"a weights file of {source} is damaged ({fault}); copy or download it again") from fault
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_blocks(model)
        align_weights(model)
        check_finite(model, source)
        return loaded

    def post_init(self) -> None:
        """Also what the Hub finds the model by: this package and the update rules."""
        super().post_init()
        layers: Any = self.hf_fwp_layers
        self.model_tags = [*TAGS, *sorted({layer.options.rule for layer in layers.values()})]

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] theirs is a wrapper
        """Upload the model with its card, as `hf_fwp.hub.push_model` says; returns what the Hub tells of the commit."""
        try:
            from .hub import push_model
        except ImportError:  # exported code does without
            inherited: Any = super()
            return inherited.push_to_hub(repo_id, **kwargs)
        return push_model(self, repo_id, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: transformers would copy the file of the class on every save; auto_map.py sees to the code."""


class RenamedLoading(AlignedLoading):
    """A model that also loads weights under the names of RENAMED, and saves them under its own."""

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        renamed = _renamed(kwargs.get("config"))
        loaded = super().from_pretrained(*args, key_mapping=renamed | (key_mapping or {}), **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # what a model remembers of its loading is undone when it is saved
        model._weight_conversions = [
            conversion for conversion in model._weight_conversions if conversion.source_patterns[0] not in renamed
        ]
        return loaded


def _renamed(config: Any) -> dict[str, str]:
    """RENAMED, and with it DECAYS for a model of a rule that computes its own decay."""
    layers = getattr(config, "fast_weight_layers", [])
    gates = [find_rule(rule).gates for rule in {config.rules[layer_idx] for layer_idx in layers}]
    return DECAYS | RENAMED if any("g" in getattr(gate, "gives", ()) for gate in gates) else RENAMED
