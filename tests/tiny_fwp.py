"""Tiny models of every rule and of mixes; a new entry of RULES is tested with nothing added here."""

import torch

from hf_fwp import RULES, FwpConfig
from hf_fwp.modeling import FwpForCausalLM

VOCAB = 61
PAD = 0
HYBRIDS = {
    "hybrid": ["gated_delta_net", "full_attention", "delta_net", "sliding_attention"],
    "attention first": ["full_attention", "linear_attention"],
}
VARIANTS = {
    "normalised delta_net": {
        "rule": "delta_net",
        "rule_options": {"normalize": "full"},
        "feature_map": "elu1",
        "qk_norm": "sum",
    },
    "delta_net of an LSTM": {"rule": "delta_net", "rule_options": {"slow_net": "lstm"}},
}
KINDS = [*RULES, *HYBRIDS, *VARIANTS]


def tiny_config(kind: str = "gated_delta_net", **changes) -> FwpConfig:
    changes = {**VARIANTS.get(kind, {}), **changes}
    rule = changes.pop("rule", HYBRIDS.get(kind, kind))
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": len(rule) if isinstance(rule, list) else 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "pad_token_id": PAD,
        "sliding_window": 5 if "sliding_attention" in rule else None,
        "initializer_range": 0.2,  # large, so that every part of the model matters
    }
    return FwpConfig(rule=rule, **{**sizes, **changes})


def tiny_model(kind: str = "gated_delta_net", *, model_class=FwpForCausalLM, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return model_class(tiny_config(kind, **changes)).to(dtype).eval()


def tokens(batch: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert torch.isfinite(a).all()
    assert b.norm() > 0
    error = ((a - b).norm() / b.norm()).item()
    assert error <= tolerance, f"relative error {error:.1e}"
