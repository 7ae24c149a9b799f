"""The equations of the rules with states of their own, written once more: one row and one head, vector by vector.

Every function takes the inputs of one head {name: [T, width]}, its weights {name: [...]}, its states {name: [...]} and
the options; it returns the reads [T, V] and leaves the last states in `states`. Nothing here comes from hf_fwp.
"""

import torch

soft = lambda x: torch.softmax(x, 0)  # noqa: E731 the equations are to be read side by side with the paper's
σ, tanh, outer = torch.sigmoid, torch.tanh, torch.outer


def recurrent_delta_net(x, w, s, options):
    S, y, reads = s["state"], s["y"], []
    for q, k, v, b in zip(x["q"], x["k"], x["v"], x["b"], strict=True):
        h = tanh(y)
        q, k = soft(q + w["R_q"].T @ h), soft(k + w["R_k"].T @ h)
        v, β = v + w["R_v"].T @ h, σ(b[0] + w["r_b"][:, 0] @ h)
        S = S - β * outer(k, k) @ S + β * outer(k, v)
        y = S.T @ q
        reads.append(y)
    s |= {"state": S, "y": y}
    return torch.stack(reads)


BRUTE_FORCE = {
    "recurrent_delta_net": recurrent_delta_net,
}
