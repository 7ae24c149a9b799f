"""Attention with one Conv1D for queries, keys and values, which stores [in, out]: gpt2."""

from .moves import QKV_BIASES, QKV_WEIGHTS, Cut, Place, stacked, stacked_columns, transposed

WEIGHTS: dict[str, Place] = {
    "c_attn.weight": Cut(QKV_WEIGHTS, stacked_columns),
    "c_attn.bias": Cut(QKV_BIASES, stacked),
    "c_proj.weight": Cut(("o_proj.weight",), transposed),
    "c_proj.bias": "o_proj.bias",
    "bias": None,  # the causal mask and its fill value, constants that old checkpoints stored
    "masked_bias": None,
}
