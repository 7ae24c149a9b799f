"""The table of update rules. A new rule is a file beside this one and a line in RULES."""

from . import (
    ba_fast_weights,
    comba,
    continuous_fwp,
    delta_delta,
    delta_lstm,
    delta_mlp,
    delta_net,
    delta_product,
    delta_rnn,
    fast_weight_memory,
    fwp_1991,
    fwp_1993,
    gated_delta_net,
    gated_delta_net_2,
    kimi_delta,
    linear_attention,
    oja,
    precond_delta,
    recurrent_delta_net,
    self_modifying_delta,
    srwm,
)
from .base import Rule

RULES: dict[str, Rule] = {
    "linear_attention": linear_attention.RULE,
    "delta_net": delta_net.RULE,
    "gated_delta_net": gated_delta_net.RULE,
    "delta_product": delta_product.RULE,
    "kimi_delta": kimi_delta.RULE,
    "gated_delta_net_2": gated_delta_net_2.RULE,
    "comba": comba.RULE,
    "precond_delta": precond_delta.RULE,
    "oja": oja.RULE,
    "gated_oja": oja.GATED,
    "recurrent_delta_net": recurrent_delta_net.RULE,
    "delta_rnn": delta_rnn.RULE,
    "delta_lstm": delta_lstm.RULE,
    "srwm": srwm.RULE,
    "fwp_1991": fwp_1991.RULE,
    "fwp_1993": fwp_1993.RULE,
    "self_modifying_delta": self_modifying_delta.RULE,
    "delta_delta": delta_delta.RULE,
    "delta_mlp": delta_mlp.RULE,
    "ba_fast_weights": ba_fast_weights.RULE,
    "fast_weight_memory": fast_weight_memory.RULE,
    "continuous_fwp": continuous_fwp.RULE,
}

__all__ = ["RULES", "Rule"]
