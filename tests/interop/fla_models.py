"""Whole models of flash-linear-attention against ours, both ways: theirs read here, ours read there.

Run by test_second_oracle.py in a process of its own. Its kernels need a GPU: the recurrences, the convolution and the
gated norm that stand in for them are its naive ones and PyTorch's.
"""

import json
import subprocess
import sys
from pathlib import Path

import fla.layers.delta_net
import fla.layers.gated_deltanet
import fla.layers.gated_deltaproduct
import fla.layers.kda
import fla.layers.linear_attn
import fla.modules.mlp
import pytest
import torch
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla_kinds import MODELS, model_of
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import hf_fwp
from hf_fwp.interop.fla import translated

HERE = Path(__file__).parent
TOLERANCE = 1e-5
PLAIN = {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False}
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, **PLAIN}
THEIRS = {
    "gated": {"model_type": "gated_deltanet", "head_dim": 8},
    "gated, grouped values": {"model_type": "gated_deltanet", "head_dim": 8, "num_v_heads": 4},
    "gated, sigmoid": {"model_type": "gated_deltanet", "head_dim": 8, "output_gate_activation": "sigmoid"},
    "delta": {"model_type": "delta_net"},
    "delta, gated": {"model_type": "delta_net", "expand_v": 2.0, "use_gate": True, "allow_neg_eigval": True},
    "product": {"model_type": "gated_deltaproduct", "head_dim": 8, "num_householder": 3},
    "product, gated": {
        "model_type": "gated_deltaproduct",
        "head_dim": 8,
        "num_householder": 2,
        "use_forget_gate": True,
        "allow_neg_eigval": True,
    },
    "kda": {"model_type": "kda", "head_dim": 8},
    "kda, bounded": {"model_type": "kda", "head_dim": 8, "num_v_heads": 4, "safe_gate": True, "lower_bound": -5.0},
    "linear": {"model_type": "linear_attn", "feature_map": "elu"},
    "linear, grouped": {"model_type": "linear_attn", "feature_map": "relu", "num_kv_heads": 1},
}


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def by_heads(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def kda(q, k, v, g, beta, A_log, dt_bias, lower_bound=None, allow_neg_eigval=False, **_):
    rates = (g, A_log, dt_bias)
    g = naive_kda_gate(*rates) if lower_bound is None else naive_kda_lowerbound_gate(*rates, lower_bound)
    return naive_recurrent_kda(unit(q), unit(k), v, g, beta.sigmoid() * (1 + allow_neg_eigval))


def gated_delta_rule(q, k, v, g, beta, A_log=None, dt_bias=None, use_gate_in_kernel=False, **call):
    if use_gate_in_kernel:
        g = -A_log.exp() * F.softplus(g.float() + dt_bias)
    if call.get("use_beta_sigmoid_in_kernel"):
        beta = beta.sigmoid() * (1 + call.get("allow_neg_eigval", False))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (unit(q), unit(k)))
    return naive_recurrent_gated_delta_rule(q, k, v, beta, g)


def gated_delta_product(q, k, v, g, beta, num_householder, **_):
    g = torch.zeros_like(q[..., 0]) if g is None else g
    return naive_recurrent_gated_delta_product(
        unit(q), unit(k), v, g, beta, q.shape[-1] ** -0.5, num_householder=num_householder
    )


def delta_rule(q, k, v, beta, **_):
    out, state = delta_rule_recurrence(*by_heads(unit(q), unit(k), v, beta))
    return out.transpose(1, 2), state


def linear_attention(q, k, v, normalize=False, **_):
    assert not normalize
    return naive_recurrent_linear_attn(q, k, v)


def convolution(self, x, *_, **__):
    padded = F.pad(x.mT, (self.kernel_size[0] - 1, 0))
    y = F.conv1d(padded, self.weight, self.bias, groups=self.groups).mT
    return (F.silu(y) if self.activation else y), None


def gated_norm(self, x, g, *_, **__):
    gate = torch.sigmoid(g) if self.activation == "sigmoid" else F.silu(g)
    return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps) * gate


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """The places where its layers call a kernel."""
    places = {
        fla.layers.kda: (kda, "chunk_kda", "fused_recurrent_kda"),
        fla.layers.gated_deltanet: (gated_delta_rule, "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
        fla.layers.delta_net: (delta_rule, "chunk_delta_rule", "fused_recurrent_delta_rule"),
        fla.layers.gated_deltaproduct: (gated_delta_product, "chunk_gated_delta_product"),
        fla.layers.linear_attn: (
            linear_attention,
            "chunk_linear_attn",
            "fused_chunk_linear_attn",
            "fused_recurrent_linear_attn",
        ),
    }
    for module, (stand_in, *names) in places.items():
        for name in names:
            monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(fla.modules.mlp, "swiglu", lambda x, y: F.silu(x) * y)
    monkeypatch.setattr(ShortConvolution, "forward", convolution)
    monkeypatch.setattr(fla.layers.gated_deltanet.GatedDeltaNet, "_use_fused_qkv_conv", lambda *_, **__: False)
    monkeypatch.setattr(FusedRMSNormGated, "forward", gated_norm)
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: F.rms_norm(x, (x.shape[-1],), self.weight, self.eps))
    monkeypatch.setattr(fla.layers.linear_attn, "elu_p1", lambda x: F.elu(x) + 1, raising=False)


def logits(model, ids):
    # with gradients its layers take the chunked form, whatever the length
    return model.eval()(input_ids=ids, use_cache=False).logits.detach()


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", THEIRS)
def test_their_models_read_here(name, tmp_path):
    torch.manual_seed(0)
    fields = SIZES | THEIRS[name]
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    assert type(config).__module__.startswith("fla.")
    theirs = AutoModelForCausalLM.from_config(config)
    for weight in theirs.parameters():
        weight.data += torch.randn_like(weight) / 4
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    config = hf_fwp.FwpConfig(**translated(written["model_type"], written))
    ours, report = hf_fwp.FwpForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 40, (2, 37))
    expected = logits(theirs, ids)
    assert error(logits(ours, ids), expected) < TOLERANCE
    weight = ours.model.layers[1].mixer.k_proj.weight
    weight.data = weight.data.flip(0)
    assert error(logits(ours, ids), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_our_models_read_there(name, tmp_path):
    ours = model_of(name)
    hf_fwp.export(ours, tmp_path / "theirs", format="fla")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True, **PLAIN)
    assert type(theirs).__module__.startswith("fla.")
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 40, (2, 37))
    assert error(logits(ours, ids), logits(theirs, ids)) < TOLERANCE


@pytest.mark.parametrize("order", ["import fla, hf_fwp", "import hf_fwp, fla"])
def test_any_order_of_import(order):
    lines = [
        order,
        "from transformers import AutoConfig, AutoModelForCausalLM",
        "for name in hf_fwp.interop.fla.MODEL_TYPES:",
        "    config = AutoConfig.for_model(name, num_hidden_layers=1, hidden_size=32, num_heads=2)",
        "    assert type(config).__module__.startswith('fla.'), type(config)",
        "assert type(AutoModelForCausalLM.from_config(config)).__module__.startswith('fla.')",
        "ours = hf_fwp.FwpConfig(num_hidden_layers=1, hidden_size=32, num_heads=2)",
        "assert isinstance(AutoModelForCausalLM.from_config(ours), hf_fwp.FwpForCausalLM)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=HERE.parent.parent, check=True)
