"""The benchmark runs, and records what its numbers depend on."""

import json

import pytest
from transformers import AutoConfig

from hf_fwp.bench import hybrids
from hf_fwp.bench.cpu import bench_cpu, cases


def test_bench_cpu_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "cpu.json"
    result = bench_cpu(json=file, shapes=[(1, 70, 2, 8)], dtypes=["bfloat16"], repeats=1, threads=1)
    assert json.loads(file.read_text()) == result
    found = [(row["operator"], row["what"]) for row in result["rows"]]
    whats = ("forward", "forward + backward", "decode step")
    assert found == [(operator, what) for operator in ("gated_delta_rule", "kimi_delta") for what in whats]
    assert all(row["ratio"] == row["transformers_ms"] / row["ms"] > 0 for row in result["rows"])
    assert {"date", "commit", "cpu", "threads", "torch", "transformers"} <= set(result["machine"])
    assert "decode step" in capsys.readouterr().out


def test_what_transformers_could_not_hold_is_left_out():
    assert cases([(1, 2048, 9, 64), (1, 4096, 16, 128)]) == [
        ("gated_delta_rule", (1, 2048, 9, 64)),
        ("gated_delta_rule", (1, 4096, 16, 128)),
        ("kimi_delta", (1, 2048, 9, 64)),
    ]


def test_bench_cpu_refuses_an_unknown_dtype():
    with pytest.raises(ValueError, match="unknown dtype 'int8'; choose from float32, bfloat16"):
        bench_cpu(dtypes=["int8"])


@pytest.mark.parametrize("family", hybrids.FAMILIES)
def test_a_hybrid_has_as_many_experts_as_a_token_is_sent_to(family):
    model_type, fields = hybrids.FAMILIES[family]
    config = AutoConfig.for_model(model_type, **hybrids.SIZES | fields)
    assert getattr(config, "num_experts_per_tok", 0) <= getattr(config, "num_experts", 0) or "num_experts" not in fields
