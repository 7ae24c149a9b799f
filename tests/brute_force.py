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
        S = delta(S, k, v, β)
        y = S.T @ q
        reads.append(y)
    s |= {"state": S, "y": y}
    return torch.stack(reads)


def delta(S, k, v, β):
    return S - β * outer(k, k) @ S + β * outer(k, v)


def delta_rnn(x, w, s, options):
    S, R, y, reads = s["state"], s["recurrent_state"], s["y"], []
    for t in range(len(x["q"])):
        q, k, v, β, k_r, v_r, b_r = (x[n][t] for n in ("q", "k", "v", "beta", "k_r", "v_r", "b_r"))
        S, R = delta(S, k, v, β), delta(R, soft(k_r), v_r, σ(b_r))
        y = S.T @ q + R.T @ soft(y) if options["variant"] == "v2" else soft(S.T @ q + R.T @ y)
        reads.append(y)
    s |= {"state": S, "recurrent_state": R, "y": y}
    return torch.stack(reads)


def delta_lstm(x, w, s, options):
    variant = options["variant"]
    S, R, h, c, reads = list(s["state"]), list(s["recurrent_state"]), s["h"], s["c"], []
    for t in range(len(x["q"])):
        now = {n: y[t].chunk(3) for n, y in x.items()}
        past, z, pre = h if variant == "v1" else soft(h), [], []
        for γ in range(3):
            q, k = (positive(now[n][γ]) for n in ("q", "k"))
            S[γ] = delta(S[γ], k, now["v"][γ], σ(now["b"][γ]))
            R[γ] = delta(R[γ], soft(now["k_r"][γ]), now["v_r"][γ], σ(now["b_r"][γ]))
            z.append(S[γ].T @ q)
            pre.append(z[γ] + R[γ].T @ past)
        i, u, o = σ(pre[0]), pre[1] if variant == "v4" else σ(pre[1]), σ(pre[2])
        c = i * u + (1 - i) * c
        h = {"v1": soft(o * c), "v2": o * c, "v3": o * c + z[1], "v4": o * c}[variant]
        reads.append(h)
    s |= {"state": torch.stack(S), "recurrent_state": torch.stack(R), "h": h, "c": c}
    return torch.stack(reads)


def positive(x):
    mapped = torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))
    return mapped / (mapped.sum() + 1e-5)


def srwm(x, w, s, options):
    names, reads = ("W_y", "W_q", "W_k", "W_b"), []
    W_0 = [w[n] for n in names]
    sizes = [block.shape[1] for block in W_0]
    W = [a + b for a, b in zip(W_0, s["state"].split(sizes, dim=1), strict=True)]
    for x_t in x["x"]:
        x_t = soft(x_t) if options["input_softmax"] else x_t
        y, a_q, a_k, a_β = (block.T @ x_t for block in W)
        q, k, β = soft(a_q), soft(a_k), σ(a_β)
        W = [block + β[n] * outer(k, block.T @ q - block.T @ k) for n, block in enumerate(W)]
        reads.append(y)
    s |= {"state": torch.cat([a - b for a, b in zip(W, W_0, strict=True)], dim=1)}
    return torch.stack(reads)


SQUASH = {
    "identity": (0.0, lambda a, τ: a),
    "tanh": (0.0, lambda a, τ: tanh(a)),
    "logistic": (0.5, lambda a, τ: 1 / (1 + torch.exp(-τ * (a - 0.5)))),
}
ACT = {"identity": lambda a: a, "tanh": tanh, "logistic": σ}


def fwp_1991(x, w, s, options):
    begin, squash = SQUASH[options["squashing"]]
    f, full, reads = ACT[options["activation"]], options["interface"] == "full", []
    η = options["eta"] or (1.0 if full else 0.5)
    S = begin + s["state"]
    for t, x_t in enumerate(x["x"]):
        change = x["p"][t].reshape(S.shape) if full else outer(f(x["f"][t]), f(x["t"][t]))
        S = squash(S + η * change, options["tau"])
        reads.append(S.T @ x_t)
    s |= {"state": S - begin}
    return torch.stack(reads)


def fwp_1993(x, w, s, options):
    begin, squash = SQUASH[options["squashing"]]
    S, h, reads = begin + s["state"], s["h"], []
    for x_t in x["x"]:
        past = torch.cat([x_t, h, torch.ones(1, dtype=h.dtype)])
        h = tanh((w["W_s"] + S).T @ past)
        S = squash(S + options["eta"] * outer(tanh(w["W_f"].T @ h), tanh(w["W_t"].T @ h)), options["tau"])
        reads.append(w["W_y"].T @ h)
    s |= {"state": S - begin, "h": h}
    return torch.stack(reads)


def self_modifying_delta(x, w, s, options):
    slow = {"state": s["shift"]}
    S, K, reads = s["state"], s["state"].shape[0], []
    for m in srwm(x, w, slow, options):
        q, k, v, β = soft(m[:K]), soft(m[K : 2 * K]), m[2 * K : -1], σ(m[-1])
        S = delta(S, k, v, β)
        reads.append(S.T @ q)
    s |= {"state": S, "shift": slow["state"]}
    return torch.stack(reads)


def delta_delta(x, w, s, options):
    base = w.get("base", 0.0)
    S1, S2, K, reads = s["first_state"] + base, s["state"], s["state"].shape[0], []
    for q, k, v, b in zip(x["q"], x["k"], x["v"], x["b"], strict=True):
        S1 = delta(S1, positive(k), v, σ(b))
        m = S1.T @ positive(q)
        S2 = delta(S2, positive(m[K : 2 * K]), m[2 * K : -1], σ(m[-1]))
        reads.append(S2.T @ positive(m[:K]))
    s |= {"state": S2, "first_state": S1 - base}
    return torch.stack(reads)


def ba_fast_weights(x, w, s, options):
    f = {"relu": lambda a: a.clamp(min=0), "tanh": tanh}[options["activation"]]
    A, h, reads = s["state"], s["h"], []
    for c in x["c"]:
        A = options["decay"] * A + options["eta"] * outer(h, h)
        base = w["W_h"].T @ h + c
        h = f(base)
        for _ in range(options["n_steps"]):
            h = f(layer_norm(base + A.T @ h) * w["gain"] + w["bias"])
        reads.append(h)
    s |= {"state": A, "h": h}
    return torch.stack(reads)


def layer_norm(a):
    centred = a - a.mean()
    return centred / torch.sqrt(centred.square().mean() + 1e-5)


def fast_weight_memory(x, w, s, options):
    M, h, c, reads = s["state"], s["h"], s["c"], []
    K, V = M.shape[1], len(h)
    for a in x["gates"]:
        a = a + w["W_h"].T @ h + w["b_h"]
        i, f, g, o = (a[n * V : (n + 1) * V] for n in range(4))
        c = σ(f + 1) * c + σ(i) * tanh(g)
        h = σ(o) * tanh(c)
        a = w["W_w"].T @ h + w["b_w"]
        κ, t = outer(tanh(a[:K]), tanh(a[K : 2 * K])).reshape(-1), tanh(a[2 * K : 3 * K])
        scale = 1 / K if options["write_scale"] is None else options["write_scale"]
        M = M + outer(κ, scale * σ(a[-1] + 1) * (t - M.T @ κ))
        if options["clip"]:
            M = M / max(1.0, torch.linalg.matrix_norm(M))
        a = w["W_r"].T @ h + w["b_r"]
        q = tanh(a[:K]) if options["tanh_query"] else a[:K]
        for n in range(1, options["n_reads"] + 1):
            q = layer_norm(M.T @ outer(q, tanh(a[n * K : (n + 1) * K])).reshape(-1))
        reads.append(w["W_o"].T @ q + w["b_o"] + h)
    s |= {"state": M, "h": h, "c": c}
    return torch.stack(reads)


def continuous_fwp(x, w, s, options):
    S, reads = s["state"], []
    for t, (q, k, v, b) in enumerate(zip(x["q"], x["k"], x["v"], x["b"], strict=True)):
        Δ = x["dt"][t][0] if "dt" in x else options["time_step"]
        β, kk, rule = σ(b[0]), soft(k), options["learning_rule"]
        if rule == "hebb":
            F = β * outer(kk, tanh(v))
        elif rule == "oja":
            F = β * outer(soft(k - S @ tanh(v)), tanh(v))
        elif rule == "delta_post_tanh":
            F = β * outer(kk, tanh(v - S.T @ kk))
        else:
            F = β * outer(kk, tanh(v) - S.T @ kk)
        if options["solver"] == "exact_hold" and rule == "delta":
            n = kk @ kk
            F = (1 - torch.exp(-β * n * Δ)) / n / (β * Δ) * F
        S = S + Δ * F
        reads.append(S.T @ soft(q))
    s |= {"state": S}
    return torch.stack(reads)


def delta_mlp(x, w, s, options):
    S1, S2, K, reads = list(s["state"]), list(s["second_state"]), x["q"].shape[1], []
    for t, a in enumerate(x["q"]):
        for j in range(options["depth"]):
            k, v = (x[n][t][5 * K * j : 5 * K * (j + 1)] for n in ("k", "v"))
            β1, β2 = σ(x["b"][t][2 * j]), σ(x["b"][t][2 * j + 1])
            S1[j] = delta(S1[j], positive(k[:K]), v[: 4 * K], β1)
            S2[j] = delta(S2[j], positive(k[K:]), v[4 * K :], β2)
            u = positive(layer_norm(a) * w["gain"][j] + w["bias"][j])
            a = a + S2[j].T @ positive(S1[j].T @ u)
        reads.append(a)
    s |= {"state": torch.stack(S1), "second_state": torch.stack(S2)}
    return torch.stack(reads)


BRUTE_FORCE = {
    "delta_mlp": delta_mlp,
    "ba_fast_weights": ba_fast_weights,
    "fast_weight_memory": fast_weight_memory,
    "continuous_fwp": continuous_fwp,
    "fwp_1991": fwp_1991,
    "fwp_1993": fwp_1993,
    "self_modifying_delta": self_modifying_delta,
    "delta_delta": delta_delta,
    "recurrent_delta_net": recurrent_delta_net,
    "delta_rnn": delta_rnn,
    "delta_lstm": delta_lstm,
    "srwm": srwm,
}
