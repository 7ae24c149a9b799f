"""Attention with separate projections q_proj, k_proj, v_proj and o_proj: llama, mistral, qwen2, qwen3.

Rows of k_proj and v_proj stay [key/value head, head size] as they are: the mixer itself lets each group of query
heads share a key/value head, so no row is repeated or moved.
"""

from .moves import Place

# teacher's attention parameter -> mixer's parameter; None: dropped, knowingly
WEIGHTS: dict[str, Place] = {
    "q_proj.weight": "q_proj.weight",
    "k_proj.weight": "k_proj.weight",
    "v_proj.weight": "v_proj.weight",
    "o_proj.weight": "o_proj.weight",
    "q_proj.bias": "q_proj.bias",
    "k_proj.bias": "k_proj.bias",
    "v_proj.bias": "v_proj.bias",
    "o_proj.bias": "o_proj.bias",
    "q_norm.weight": "q_norm.weight",
    "k_norm.weight": "k_norm.weight",
    "rotary_emb.inv_freq": None,  # a constant that old checkpoints stored
}
