"""Loaded weights at aligned addresses, so that a reloaded model computes bit for bit what the saved one did.

`from_pretrained` maps a safetensors file into memory as it lies on the disk. Matrix libraries add in another order at
addresses that are not multiples of 64: measured on a CPU, the logits of a single token changed in the last bit.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
else:
    Model = object

ALIGNMENT = 64

# Pattern in the names that flash-linear-attention saves -> ours. None of them occurs in a checkpoint of this package;
# `norm` is what o_norm was called in old ones.
RENAMED = {
    r"^model\.embeddings\.": "model.embed_tokens.",
    r"\.attn_norm\.": ".mixer_norm.",
    r"\.attn\.(o_)?norm\.": ".mixer.o_norm.",
    r"\.attn\.": ".mixer.",
}


def align_weights(model: nn.Module) -> None:
    """Move the weights of a model on the CPU to memory of their own, if the address of one of them is not aligned.

    All of them, not only that one: a single tensor left behind keeps the whole mapped file in memory.
    """
    tensors = [tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.device.type == "cpu"]
    if any(tensor.data_ptr() % ALIGNMENT for tensor in tensors):
        for tensor in tensors:
            tensor.data = tensor.data.clone()


class AlignedLoading(Model):
    """A model whose `from_pretrained` aligns what it loaded, and names a damaged folder."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            loaded = super().from_pretrained(*args, **kwargs)
        except SafetensorError as fault:
            source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise ValueError(f"a weights file of {source} is damaged ({fault}); copy or download it again") from fault
        align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


class RenamedLoading(AlignedLoading):
    """A model that also loads weights under the names of RENAMED, and saves them under its own."""

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, key_mapping=RENAMED | (key_mapping or {}), **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # what a model remembers of its loading is undone when it is saved
        model._weight_conversions = [
            conversion for conversion in model._weight_conversions if conversion.source_patterns[0] not in RENAMED
        ]
        return loaded
