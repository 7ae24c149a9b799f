"""Attention with one Linear whose rows go group by group: queries, key, value of a key/value head, then of the next.

gpt_neox, bloom: a group is one head. falcon: a group is one head, all heads, or several (new_decoder_architecture).
"""

from .moves import QKV_BIASES, QKV_WEIGHTS, Cut, Place, grouped

WEIGHTS: dict[str, Place] = {
    "query_key_value.weight": Cut(QKV_WEIGHTS, grouped),
    "query_key_value.bias": Cut(QKV_BIASES, grouped),
    "dense.weight": "o_proj.weight",
    "dense.bias": "o_proj.bias",
    "rotary_emb.inv_freq": None,  # constants that old checkpoints stored, and the causal mask with its fill value
    "bias": None,
    "masked_bias": None,
}
