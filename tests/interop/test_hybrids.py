"""transformers' own hybrids with our functions: the same results, exact packing, and back as they were."""

import functools
import importlib
import importlib.util
import inspect
import json

import pytest
import torch
from fla_kinds import INSTALL
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

from hf_fwp import patch_hybrids
from hf_fwp.bench import hybrids as bench_hybrids
from hf_fwp.interop import hybrids

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "pad_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES = {
    "qwen3_next": "qwen3_next",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "olmo_hybrid": "olmo_hybrid",
    "kimi_linear": "kimi_linear",
}
KIMI = {
    "num_key_value_heads": 4,
    "bos_token_id": 1,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_local_experts": 4,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
# What only some of the families have in their config.
NOT_KIMI = ("head_dim", "num_experts", "linear_num_key_heads", "linear_num_value_heads")
RULES = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")
LENGTHS = (5, 9, 70)
FLA = importlib.util.find_spec("fla") is not None


@pytest.fixture(autouse=True)
def stock_functions(monkeypatch):
    """What transformers computes with on a processor, also where flash-linear-attention is installed."""
    for family in hybrids.HYBRIDS if FLA else ():
        file = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name in hybrids.FUNCTIONS:
            if hasattr(file, name):
                monkeypatch.setattr(file, name, fallback(getattr(file, name)))


def fallback(function):
    plain = inspect.unwrap(function)
    known = set(inspect.signature(plain).parameters)

    @functools.wraps(plain)
    def stock(*args, **kwargs):
        return plain(*args, **{name: given for name, given in kwargs.items() if name in known})

    return stock


@pytest.fixture(params=hybrids.HYBRIDS)
def model(request):
    torch.manual_seed(0)
    sizes = SIZES
    if request.param == "kimi_linear":
        sizes = {name: size for name, size in SIZES.items() if name not in NOT_KIMI} | KIMI
    config = AutoConfig.for_model(FAMILIES[request.param], **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def logits_and_gradients(model, ids, **inputs):
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logits.float().square().mean(), weights, allow_unused=True)
    return [logits, *(g for g in gradients if g is not None)]


def assert_agree(ours, theirs, tolerance=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-7


def functions(model):
    file = importlib.import_module(type(model).__module__)
    return {name: getattr(file, name) for name in hybrids.FUNCTIONS if hasattr(file, name)}


def test_same_logits_and_gradients_and_back_as_they_were(model):
    ids = torch.randint(2, 60, (2, 70))
    before, stock = functions(model), logits_and_gradients(model, ids)
    with patch_hybrids(model):
        assert set(functions(model).values()) == {hybrids.FUNCTIONS[name][0] for name in before}
        assert_agree(logits_and_gradients(model, ids), stock)
    assert functions(model) == before


@pytest.mark.skipif(not FLA, reason=f"needs flash-linear-attention: {INSTALL}")
def test_runs_on_a_processor_where_flash_linear_attention_is_installed(model, monkeypatch):
    ids = torch.randint(2, 60, (2, 70))
    stock = logits_and_gradients(model, ids)
    monkeypatch.undo()  # its kernels are back, which want a GPU
    with pytest.raises(RuntimeError, match="active drivers"):
        model(input_ids=ids)
    with patch_hybrids(model):
        assert_agree(logits_and_gradients(model, ids), stock)


@pytest.mark.parametrize("rows", [1, 3])
def test_same_tokens_from_generate(model, rows):
    ids = torch.randint(2, 60, (rows, 7))
    stock = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    with patch_hybrids(model):
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None), stock)


def packed(kind):
    torch.manual_seed(1)
    sequences = [torch.randint(2, 60, (n,)).tolist() for n in LENGTHS]
    signals = {
        "position_ids": {},
        "cu_seqlens": {"return_flash_attn_kwargs": True},
        "seq_idx": {"return_seq_idx": True},
    }
    batch = DataCollatorWithFlattening(**signals[kind])([{"input_ids": s} for s in sequences])
    batch.pop("labels")
    return sequences, batch


@pytest.mark.parametrize("kind", ["position_ids", "cu_seqlens", "seq_idx"])
def test_packed_equals_separate(model, kind):
    sequences, batch = packed(kind)
    with patch_hybrids(model):
        apart = torch.cat([model(input_ids=torch.tensor([s]), use_cache=False).logits for s in sequences], dim=1)
        together = model(**batch).logits
    assert (together - apart).norm() <= 1e-5 * apart.norm()


def test_the_stock_layers_leak_from_one_packed_sequence_into_the_next(model):
    """The comparison above can fail: with position_ids alone the stock functions do."""
    sequences, batch = packed("position_ids")
    apart = torch.cat([model(input_ids=torch.tensor([s]), use_cache=False).logits for s in sequences], dim=1)
    together = model(**batch, use_cache=False).logits
    assert (together - apart).norm() > 1e-2 * apart.norm()


def chunk_rule_of(file):
    return next(getattr(file, name) for name in RULES if hasattr(file, name))


def test_every_family_until_closed():
    names = [f"transformers.models.{family}.modeling_{family}" for family in hybrids.HYBRIDS]
    files = [importlib.import_module(name) for name in names]
    before = [chunk_rule_of(file) for file in files]
    patch = patch_hybrids()
    assert {chunk_rule_of(file) for file in files} == {hybrids.chunk_rule}
    patch.close()
    assert [chunk_rule_of(file) for file in files] == before


def test_patches_nest(model):
    before = functions(model)
    with patch_hybrids(model):
        with patch_hybrids():
            pass
        assert functions(model) != before
    assert functions(model) == before


def test_a_model_of_another_family_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Linear is none of the hybrids .*qwen3_next"):
        patch_hybrids(model)


def test_other_arguments_than_known_are_refused(model, monkeypatch):
    file = importlib.import_module(type(model).__module__)

    def changed(keys, queries):
        raise NotImplementedError

    monkeypatch.setattr(file, next(name for name in RULES if hasattr(file, name)), changed)
    before = functions(model)
    with pytest.raises(ValueError, match=r"takes \(keys, queries, ...\) and not \(query, key"):
        patch_hybrids(model)
    assert functions(model) == before


def test_bench_hybrids_compares_every_family_with_itself(tmp_path, capsys, monkeypatch):
    assert tuple(bench_hybrids.FAMILIES) == hybrids.HYBRIDS
    model_type, fields = bench_hybrids.FAMILIES["kimi_linear"]
    smaller = fields | {"linear_head_dim": 8, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    monkeypatch.setitem(bench_hybrids.FAMILIES, "kimi_linear", (model_type, smaller | {"num_key_value_heads": 4}))
    bench_hybrids.bench_hybrids(json=tmp_path / "b.json", families=["kimi_linear"], tokens=70, repeats=1, threads=1)
    written = json.loads((tmp_path / "b.json").read_text())
    assert [row["what"] for row in written["rows"]] == ["forward", "forward + backward", "generate 16 tokens"]
    assert all(row["ms"] > 0 and row["transformers_ms"] > 0 and row["error"] < 1e-4 for row in written["rows"])
    assert "kimi_linear" in capsys.readouterr().out
    for wrong in ({"families": ["llama"]}, {"tokens": 0}):
        with pytest.raises(ValueError, match=r"choose from|at least 1"):
            bench_hybrids.bench_hybrids(**wrong)
