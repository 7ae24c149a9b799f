"""transformers' own hybrids on a CPU: as they are, and with `patch_hybrids`.

Three linear-attention layers and one softmax layer with random weights, the same model both times, in turns in one
process: other work on the machine then slows both alike. The median counts.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rich.table
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..interop.hybrids import patch_hybrids
from ..telling import tell
from .cpu import PART, in_turns, machine, say_plan, threads_of_torch

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
HEADS = {
    "head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}
# Family -> (model type, what its config has beside SIZES).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", HEADS | EXPERTS),
    "qwen3_5": ("qwen3_5_text", HEADS),
    "qwen3_5_moe": ("qwen3_5_moe_text", HEADS | EXPERTS),
    "olmo_hybrid": ("olmo_hybrid", HEADS),
    "kimi_linear": (
        "kimi_linear",
        {
            "linear_head_dim": 64,
            "linear_num_heads": 8,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
            "mlp_layer_types": ["dense"] * 4,
        },
    ),
}
NEW_TOKENS = 16
HEADER = ("family", "tokens", "what", "patched ms", "as it is ms", "times faster")


def bench_hybrids(
    *,
    json: str | Path | None = None,
    families: Sequence[str] = tuple(FAMILIES),
    tokens: int = 1024,
    repeats: int = 3,
    threads: int = 2,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Time forward, forward + backward, and `generate` after a short prompt; print a table, and write it to `json`.

    dry_run: print what would be timed and how long that takes, found with sequences of an eighth, and return nothing.
    """
    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise ValueError(f"unknown family {unknown[0]!r}; choose from {', '.join(FAMILIES)}")
    if min(tokens, repeats, threads) < 1:
        raise ValueError(f"tokens is {tokens}, repeats {repeats} and threads {threads}; each must be at least 1")
    if dry_run:
        with threads_of_torch(threads):
            rows = [row for family in families for row in time_family(family, -(-tokens // PART), 1)]
        say_plan(rows, repeats)
        return {}
    with threads_of_torch(threads):
        rows = [row for family in families for row in time_family(family, tokens, repeats)]
    result = {"machine": machine(threads), "repeats": repeats, "rows": rows}
    tell(table(result))
    if json is not None:
        Path(json).write_text(jsonlib.dumps(result, indent=2) + "\n")
    return result


def time_family(family: str, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One row per thing that is timed, after a check that both say the same."""
    model = make_model(family)
    ids = torch.randint(2, SIZES["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = model(input_ids=ids, use_cache=False).logits
        with patch_hybrids(model):
            ours = model(input_ids=ids, use_cache=False).logits
    error = float((ours - stock).norm() / stock.norm())
    if not error < 1e-3:
        raise ValueError(f"the patched {family} differs from the stock one by {error:.1e}; report this")
    rows = []
    for what, run in runs(model, ids).items():
        times = in_turns(patched(model, run), run, repeats)
        rows.append({"family": family, "tokens": tokens, "what": what, **times, "error": error})
    return rows


def make_model(family: str) -> PreTrainedModel:
    model_type, fields = FAMILIES[family]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | fields)).eval()


def runs(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Callable[[], None]]:
    """What is timed, by name."""
    found: Any = model

    def forward() -> None:
        with torch.no_grad():
            found(input_ids=ids, use_cache=False)

    def backward() -> None:
        found(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()
        model.zero_grad(set_to_none=True)

    def decode() -> None:
        found.generate(ids[:, :8], min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False)

    return {"forward": forward, "forward + backward": backward, f"generate {NEW_TOKENS} tokens": decode}


def patched(model: PreTrainedModel, run: Callable[[], None]) -> Callable[[], None]:
    """`run` while the model's family is patched."""

    def inside() -> None:
        with patch_hybrids(model):
            run()

    return inside


def table(result: dict[str, Any]) -> rich.table.Table:
    about = result["machine"]
    title = f"hybrids of transformers {about['transformers']} on {about['cpu']}, {about['threads']} threads"
    found = rich.table.Table(title=title)
    for column in HEADER:
        found.add_column(column)
    for row in result["rows"]:
        numbers = (f"{row['ms']:.1f}", f"{row['transformers_ms']:.1f}", f"{row['ratio']:.2f}")
        found.add_row(row["family"], str(row["tokens"]), row["what"], *numbers)
    return found
