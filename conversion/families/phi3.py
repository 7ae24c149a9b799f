"""Attention with one Linear whose rows are all queries, all keys, all values: phi3."""

from .moves import QKV_WEIGHTS, Cut, Place, stacked

WEIGHTS: dict[str, Place] = {
    "qkv_proj.weight": Cut(QKV_WEIGHTS, stacked),
    "o_proj.weight": "o_proj.weight",
    "rotary_emb.inv_freq": None,  # a constant that old checkpoints stored
}
