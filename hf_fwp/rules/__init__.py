"""The table of update rules. A new rule is a file beside this one and a line in RULES."""

from . import (
    comba,
    delta_lstm,
    delta_net,
    delta_product,
    delta_rnn,
    gated_delta_net,
    gated_delta_net_2,
    kimi_delta,
    linear_attention,
    oja,
    precond_delta,
    recurrent_delta_net,
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
}

__all__ = ["RULES", "Rule"]
