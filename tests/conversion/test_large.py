"""A checkpoint of several gigabytes is converted in a process that may not hold half of it.

3.5 GiB, layers ranked, took 66 s on two cores of a Xeon and at most 1.19 GiB.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny import TEXTS, byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

GIB = 2**30
LIMIT = 1.7  # GiB that the system gives the process for its data, and that the plan is to stay in

CHILD = """
import json, resource, sys, time
from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.recipes import RECIPES, Recipe
from hf_fwp.conversion.report import peak_memory

limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
few = {"solve_tokens": 8 * 16, "rank_solve_tokens": 6 * 16, "rank_tokens": 16}
RECIPES["closed-form"] = Recipe("closed-form", "few tokens", sequence_length=16, **few)
sys.modules["hf_fwp.conversion.convert"].REPORT_TOKENS = 32
texts = json.loads(sys.stdin.read())
began = time.perf_counter()
student = convert(sys.argv[1], keep=0.25, recipe="closed-form", data=texts, output=sys.argv[2], max_memory=limit)
print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak_memory()}))
"""


def write_checkpoint(folder, config):
    """Random weights, written layer by layer; returns their bytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        shards.setdefault(name.partition(".layers.")[2].partition(".")[0] or "rest", []).append(name)
    places: dict[str, str] = {}
    generator, total = torch.Generator().manual_seed(0), 0
    for part, names in shards.items():
        file = f"model-{part}.safetensors"
        weights = {}
        for name in names:
            shape = model.state_dict()[name].shape
            norm = len(shape) == 1
            weights[name] = torch.ones(shape) if norm else 0.02 * torch.randn(shape, generator=generator)
            total += weights[name].nbytes
        save_file(weights, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return total


@pytest.mark.slow
def test_a_checkpoint_larger_than_the_memory_is_converted(tmp_path):
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=1024,
        intermediate_size=24576,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=256,
        pad_token_id=256,
        bos_token_id=None,
    )
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    size, limit = write_checkpoint(teacher, config), int(LIMIT * GIB)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(teacher), str(tmp_path / "made"), str(limit)],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    found = json.loads(child.stdout.splitlines()[-1])
    sys.stdout.write(f"{size / GIB:.1f} GiB in {found['seconds']:.0f} s, at most {found['peak'] / GIB:.2f} GiB held\\n")
    assert found["peak"] < limit < size / 2
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    ranked = sorted(report["ranking"], key=lambda layer: -report["ranking"][layer])
    assert report["kept_layers"] == sorted(map(int, ranked[:3]))
    assert len(report["residuals"]) == 9
