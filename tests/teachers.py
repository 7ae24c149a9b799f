"""A tiny random teacher of every family in the table; a new row is tested with nothing added here."""

import torch
import transformers

from hf_fwp.hosts import HOSTS, find_host

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
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
# what makes a family's attention different, so that forgetting it shows
VARIANTS = {
    "llama": {"attention_bias": True, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"head_dim": 12, "attention_bias": True},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gpt_neox": {"use_parallel_residual": False},
    "gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3, "sliding_window": 5, "attention_bias": True},
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 3},
    "olmo2": {"initializer_range": 0.1},
    "olmo3": {"initializer_range": 0.1, "sliding_window": 5},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "attention_bias": True},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 16, "attention_bias": True},
    "mixtral": {**EXPERTS, "sliding_window": 5},
    "starcoder2": {"sliding_window": 5},
    "stablelm": {"use_qkv_bias": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "cohere": {"use_qk_norm": True, "attention_bias": True},
    "gpt_oss": {**EXPERTS, "sliding_window": 5},
}


def settable(config, key):
    return hasattr(config, key) and not isinstance(getattr(type(config), key, None), property)


def tiny_config(name, **changes):
    family = getattr(transformers, f"{HOSTS[name].title}Config")
    known = family()
    shapes = {key: value for key, value in SHAPES.items() if settable(known, key)}
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
    return base, f"{base}{find_host(teacher.config).blocks}."
