"""Convert a family that the table of hosts does not have: one row, one call.

    python examples/register_family.py --output seed-oss-fast

    FwpSeedOssForCausalLM with fast weights in layers [1, 3]

The row names the parts of the family's attention. This one has separate projections q_proj, k_proj, v_proj and o_proj;
for fused ones a weight map is given too: `hf_fwp.conversion.families.WEIGHT_MAPS["mine"] = {...}`, named in the row as
`projections="mine"` (see hf_fwp/conversion/families/phi3.py for how one is written).

Took 5 s of one core (a machine of 2 Intel Xeon cores busy with other work), torch 2.13.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, SeedOssConfig, SeedOssForCausalLM

from hf_fwp.conversion.families import copy_teacher
from hf_fwp.hosts import Host, register_family
from hf_fwp.hosts.table import SHAPES


def main(words: Sequence[str] | None = None) -> None:
    """Register the family, put fast weights into two layers of a small model of it, save it and load it again."""
    parser = argparse.ArgumentParser(description="Convert a family that the table of hosts does not have.")
    parser.add_argument("--output", type=Path, default=Path("seed-oss-fast"), help="a new folder")
    output = parser.parse_args(words).output

    row = Host("seed_oss", "SeedOss", {**SHAPES, "qkv_bias": "attention_bias", "o_bias": "attention_out_bias"})
    register_family(row)

    shapes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    shapes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    teacher = SeedOssForCausalLM(SeedOssConfig(**shapes, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    student = copy_teacher(teacher.eval(), layers=[1, 3])  # hf_fwp.convert(teacher, ...) does this, and trains it
    student.save_pretrained(output)

    # A program that only loads the model makes the same call first.
    loaded: Any = AutoModelForCausalLM.from_pretrained(output)
    tokens = torch.arange(3, 11)[None]
    assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    print(type(loaded).__name__, "with fast weights in layers", list(loaded.hf_fwp_layers))


if __name__ == "__main__":
    main()
