"""Checkpoints as flash-linear-attention writes them, without it: the formulas of its layers are written out below."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_fwp import FwpConfig
from hf_fwp.interop import fla

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "hidden_ratio": 4}
WIDE = ("gated_deltanet", "gated_deltaproduct")  # whose values are twice as large as keys by default
CONFIGS = {
    "gated": {"model_type": "gated_deltanet", "head_dim": 8},
    "gated, grouped values": {
        "model_type": "gated_deltanet",
        "head_dim": 8,
        "num_v_heads": 4,
        "allow_neg_eigval": True,
    },
    "gated, sigmoid": {"model_type": "gated_deltanet", "head_dim": 8, "output_gate_activation": "sigmoid"},
    "gated, bare": {"model_type": "gated_deltanet", "head_dim": 8, "use_gate": False, "use_short_conv": False},
    "product": {"model_type": "gated_deltaproduct", "head_dim": 8, "num_householder": 3},
    "product, gated": {
        "model_type": "gated_deltaproduct",
        "head_dim": 8,
        "num_householder": 2,
        "use_forget_gate": True,
        "allow_neg_eigval": True,
    },
    "kda": {"model_type": "kda", "head_dim": 8},
    "kda, grouped and bounded": {
        "model_type": "kda",
        "head_dim": 8,
        "num_v_heads": 4,
        "expand_v": 2.0,
        "lower_bound": -5.0,
        "allow_neg_eigval": True,
    },
    "delta": {"model_type": "delta_net"},
    "delta, wide": {"model_type": "delta_net", "expand_v": 2.0, "use_gate": True, "allow_neg_eigval": True},
    "linear": {"model_type": "linear_attn", "feature_map": "elu"},
    "linear, grouped": {"model_type": "linear_attn", "feature_map": "relu", "num_kv_heads": 1},
}


def config_of(name):
    return SIZES | CONFIGS[name]


def shapes(c):
    """Names and shapes of one layer's mixer as they stand in such a checkpoint."""
    D, H = c["hidden_size"], c["num_heads"]
    K = c.get("head_dim", D // H)
    V = int(K * c.get("expand_v", 2.0 if c["model_type"] in WIDE else 1.0))
    HV, HK, n = c.get("num_v_heads") or H, H, c.get("num_householder", 1)
    if c["model_type"] == "linear_attn":
        HV = HK = c.get("num_kv_heads") or H
        return {"q_proj": (H * K, D), "k_proj": (HK * K, D), "v_proj": (HV * V, D), "o_proj": (D, H * V), "norm": (V,)}
    found = {"q_proj": (H * K, D), "k_proj": (n * H * K, D), "v_proj": (n * HV * V, D), "o_proj": (D, HV * V)}
    found |= {"o_norm": (V,), "b_proj": (n * HV, D)}
    if c.get("use_short_conv", True):
        found |= {"q_conv1d": (H * K, 1, 4), "k_conv1d": (n * H * K, 1, 4), "v_conv1d": (n * HV * V, 1, 4)}
    if c["model_type"] == "gated_deltanet" or c.get("use_forget_gate"):
        found |= {"a_proj": (HV, D), "A_log": (HV,), "dt_bias": (HV,)}
    if c["model_type"] == "kda":
        found |= {"f_proj.0": (V, D), "f_proj.1": (HV * K, V), "A_log": (HV,), "dt_bias": (HV * K,)}
        return found | {"g_proj.0": (V, D), "g_proj.1": (HV * V, V), "g_proj.1.bias": (HV * V,)}
    if c.get("use_gate", c["model_type"] in WIDE):
        found["g_proj"] = (HV * V, D)
    return found


def checkpoint(folder, c, *, old_names=False):
    """A folder as that library saves it: config.json and model.safetensors with random weights."""
    torch.manual_seed(0)
    D, width = c["hidden_size"], 256
    weights = {
        "model.embeddings.weight": (c["vocab_size"], D),
        "model.norm.weight": (D,),
        "lm_head.weight": (c["vocab_size"], D),
    }
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        weights |= {f"{at}.attn_norm.weight": (D,), f"{at}.mlp_norm.weight": (D,)}
        for name, shape in {"gate_proj": (width, D), "up_proj": (width, D), "down_proj": (D, width)}.items():
            weights[f"{at}.mlp.{name}.weight"] = shape
        for name, shape in shapes(c).items():
            name = "norm" if old_names and name == "o_norm" else name
            weights[f"{at}.attn.{name}" if name.endswith(("A_log", "bias")) else f"{at}.attn.{name}.weight"] = shape
    tensors = {name: torch.randn(shape) * (0.3 if len(shape) > 1 else 1.0) for name, shape in weights.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(c | {"architectures": ["ForCausalLM"], "transformers_version": "4.48.0"})
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def expected_logits(w, c, ids):
    """Token by token, from the formulas of the library's layers, in float64."""
    w = {name: x.double() for name, x in w.items()}
    h = w["model.embeddings.weight"][ids]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        own = {
            n.removeprefix(f"{at}.attn.").removesuffix(".weight"): x
            for n, x in w.items()
            if n.startswith(f"{at}.attn.")
        }
        h = h + mixer(own, c, rms(h, w[f"{at}.attn_norm.weight"]))
        x = rms(h, w[f"{at}.mlp_norm.weight"])
        gate, up = (x @ w[f"{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        h = h + (F.silu(gate) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    return rms(h, w["model.norm.weight"]) @ w["lm_head.weight"].T


def mixer(w, c, x):
    H, V = c["num_heads"], w.get("o_norm", w.get("norm")).shape[0]
    linear = c["model_type"] == "linear_attn"
    q, k, v = (x @ w[f"{n}_proj"].T for n in "qkv")
    if not linear:
        if "q_conv1d" in w:
            q, k, v = (convolved(y, w[f"{n}_conv1d"][:, 0]) for y, n in ((q, "q"), (k, "k"), (v, "v")))
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    K = q.shape[-1] // H
    n = c.get("num_householder", 1)
    q, k, v = q.unflatten(-1, (1, -1, K)), k.unflatten(-1, (n, -1, K)), v.unflatten(-1, (n, -1, V))
    if linear:
        q, k = (F.elu(q) + 1, F.elu(k) + 1) if c["feature_map"] == "elu" else (q.relu(), k.relu())
    else:
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    heads = max(H, v.shape[3])
    q, k, v = (y.repeat_interleave(heads // y.shape[3], dim=3) for y in (q, k, v))
    decay = decays(w, c, x, heads)
    beta = torch.ones_like(v[..., 0])
    if not linear:
        beta = (x @ w["b_proj"].T).sigmoid().unflatten(-1, (n, -1)) * (2 if c.get("allow_neg_eigval") else 1)
    outs, state = [], torch.zeros(x.shape[0], heads, K, V, dtype=x.dtype)
    for t in range(x.shape[1]):
        state = state * decay[:, t, ..., None]
        for j in range(n):
            old = 0 if linear else torch.einsum("bhkv,bhk->bhv", state, k[:, t, j])
            new = beta[:, t, j, :, None] * (v[:, t, j] - old)
            state = state + k[:, t, j, :, :, None] * new[:, :, None]
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t, 0]) * K**-0.5)
    o = rms(torch.stack(outs, 1), w.get("o_norm", w.get("norm"))).flatten(2)
    if "g_proj.1" in w:
        o = o * (x @ w["g_proj.0"].T @ w["g_proj.1"].T + w["g_proj.1.bias"]).sigmoid()
    if "g_proj" in w:
        gate = x @ w["g_proj"].T
        o = o * (gate.sigmoid() if c.get("output_gate_activation") == "sigmoid" else F.silu(gate))
    return o @ w["o_proj"].T


def decays(w, c, x, heads):
    """exp(g) as [B, T, heads, 1] or, of every key channel, [B, T, heads, K]."""
    if "A_log" not in w:
        return torch.ones_like(x[..., :1, None]).expand(-1, -1, heads, 1)
    f = x @ w["a_proj"].T if "a_proj" in w else x @ w["f_proj.0"].T @ w["f_proj.1"].T
    f, rate = (f + w["dt_bias"]).unflatten(-1, (heads, -1)), w["A_log"].exp()[:, None]
    bound = c.get("lower_bound")
    return torch.exp(-rate * F.softplus(f) if bound is None else bound * (rate * f).sigmoid())


def convolved(x, weight):
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    return sum(padded[:, j : j + x.shape[1]] * weight[:, j] for j in range(weight.shape[1]))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("old_names", [False, True])
def test_logits_of_the_formulas(name, old_names, tmp_path):
    weights = checkpoint(tmp_path / "theirs", config_of(name), old_names=old_names)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 40, (2, 37))
    expected = expected_logits(weights, config_of(name), ids)
    found = model(ids).logits
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    key = "model.layers.1.attn.k_proj.weight"
    wrong = expected_logits(weights | {key: weights[key].flip(0)}, config_of(name), ids)
    assert (found - wrong).norm() > 1e-2 * expected.norm()


def test_saved_again_it_is_one_of_ours(tmp_path):
    checkpoint(tmp_path / "theirs", config_of("gated"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "fwp"
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(model.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.randint(0, 40, (1, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=5), again.generate(ids, max_new_tokens=5))


def test_base_model_and_changed_fields(tmp_path):
    checkpoint(tmp_path / "theirs", config_of("delta"))
    model = AutoModel.from_pretrained(tmp_path / "theirs")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, 40, (1, 9))
    assert torch.equal(model(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    config = AutoConfig.from_pretrained(tmp_path / "theirs", use_cache=False)
    assert isinstance(config, FwpConfig)
    assert config.use_cache is False


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("gated", {"attn": {"layers": [0], "num_heads": 2}}, "attn="),
        ("gated", {"attnres_block_size": 2}, "attnres_block_size=2"),
        ("delta", {"qk_norm": "sum"}, "qk_norm='sum'"),
        ("delta", {"qk_activation": "relu"}, "qk_activation='relu'"),
        ("linear", {"feature_map": "hedgehog"}, "feature_map='hedgehog'"),
        ("linear", {"norm_feature_map": True}, "norm_feature_map=True"),
    ],
)
def test_what_is_not_understood_is_named(name, changed, message, tmp_path):
    checkpoint(tmp_path / "theirs", config_of(name))
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config_of(name) | changed))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")


def test_a_delta_net_without_beta_has_none():
    config = FwpConfig(**fla.translated("delta_net", config_of("delta") | {"use_beta": False}))
    assert not [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters() if "b_proj" in name]


def test_a_model_type_that_is_taken_stays(monkeypatch):
    monkeypatch.setitem(fla.MODEL_TYPES, "llama", fla.MODEL_TYPES["delta_net"])
    fla.register_checkpoints()
    assert AutoConfig.for_model("llama").model_type == "llama"
