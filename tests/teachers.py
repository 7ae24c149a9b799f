"""A tiny random teacher of every family in the table; a new row is tested with nothing added here."""

import torch
import transformers

from hf_fwp.hosts import HOSTS

LAYERS = 4
SHAPES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
# what makes a family's attention different, so that forgetting it shows
VARIANTS = {
    "llama": {"attention_bias": True, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"head_dim": 12, "attention_bias": True},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
}


def tiny_config(name, **changes):
    family = getattr(transformers, f"{HOSTS[name].title}Config")
    known = family()
    shapes = {key: value for key, value in SHAPES.items() if hasattr(known, key)}
    return family(**{**shapes, **VARIANTS.get(name, {}), **changes})


def tiny_teacher(name, head="ForCausalLM", **changes):
    torch.manual_seed(7)
    teacher = getattr(transformers, HOSTS[name].class_name(head))(tiny_config(name, **changes)).eval()
    with torch.no_grad():
        for key, parameter in teacher.named_parameters():
            if parameter.ndim == 1:  # biases and norms are 0 and 1 at first: then losing one would not show
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" not in key:
                parameter.mul_(6)
    return teacher


def base_prefix(teacher):
    """How the names of what the base model holds begin, and those of its blocks."""
    base = teacher.base_model_prefix + "."
    return base, f"{base}{HOSTS[teacher.config.model_type].blocks}."
