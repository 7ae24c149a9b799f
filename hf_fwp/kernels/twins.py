"""The sequential rules that a kernel walks through. Imported here, so that torch.compile sees plain functions."""

from . import (
    ba_fast_weights,
    continuous_fwp,
    delta_lstm,
    delta_rnn,
    fast_weight_memory,
    fwp_1991,
    fwp_1993,
    lstm,
    recurrent_delta_net,
    srwm,
)

WALKS = {
    "recurrent_delta_net": recurrent_delta_net.walk,
    "delta_rnn": delta_rnn.walk,
    "delta_lstm": delta_lstm.walk,
    "srwm": srwm.walk,
    "fwp_1991": fwp_1991.walk,
    "fwp_1993": fwp_1993.walk,
    "ba_fast_weights": ba_fast_weights.walk,
    "continuous_fwp": continuous_fwp.walk,
    "fast_weight_memory": fast_weight_memory.walk,
    "lstm": lstm.walk,
}
