"""Run by tests/kernels/test_mixer_step.py in a process of its own, with TRITON_INTERPRET=1: a mixer in one launch.

Judged against the same layer in float64, which takes the path of many operations. bf16 is left out: the interpreter
computes it wrongly without saying so.
"""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import triton_interpreter
from operators import TOLERANCE, assert_agrees, pairwise
from tiny_fwp import tiny_model, tokens

from hf_fwp import MixerOptions, decoding
from hf_fwp.cache import MixerInputs
from hf_fwp.kernels import mixer_step
from hf_fwp.layer import FastWeightLayer
from hf_fwp.rules import linear_class

SOURCE = Path(mixer_step.__file__).read_text()
# queries, keys, values, where states are kept
HEADS = ((2, 2, 2, "query"), (4, 2, 2, "query"), (4, 2, 2, "grouped"), (2, 2, 4, "grouped"), (6, 1, 3, "grouped"))
CHOICES = {
    "rule": tuple(decoding.ERASES),
    "dtype": (torch.float32, torch.float16),
    "heads": HEADS,
    "sizes": ((8, 8), (6, 5), (4, 12)),
    "conv_size": (0, 1, 2, 4),
    "feature_map": decoding.KNOWN["feature_map"],
    "qk_norm": ("none", "l2"),
    "head_norm": decoding.KNOWN["head_norm"],
    "rope": ("none", "all", "half", "mixed"),
    "time_scales": (1, 2),
    "state_bias": (False, True),
    "value_skip": decoding.KNOWN["value_skip"],
    "allow_neg_eigval": (False, True),
    "output_gate": ("none", "silu", "sigmoid", "sigmoid2", "head_sigmoid", "low_rank_sigmoid"),
    "output_norm": (False, True),
    "output_scale": (1.0, 0.7),
    "padded": (False, True),
}
COVERING = pairwise(CHOICES)
STRICT = {
    "rule": "gated_delta_net",
    "dtype": torch.float32,
    "heads": (4, 2, 2, "query"),
    "sizes": (6, 5),
    "conv_size": 4,
    "feature_map": "silu",
    "qk_norm": "l2",
    "head_norm": True,
    "rope": "mixed",
    "time_scales": 2,
    "state_bias": True,
    "value_skip": 1,
    "allow_neg_eigval": True,
    "output_gate": "silu",
    "output_norm": True,
    "output_scale": 0.7,
    "padded": True,
}

triton_interpreter.patch()


@pytest.fixture(autouse=True)
def _kernel_instead_of_torch(monkeypatch):
    """The mixers take the kernel on the processor too, and every output is NaN until it is written."""
    monkeypatch.setattr(linear_class, "has_decode_kernel", lambda device_type: True)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan")))


def mixer(row) -> FastWeightLayer:
    """A float64 mixer whose weights are rounded to the dtype and large enough to matter."""
    queries, keys, values, kept = row["heads"]
    states = row["time_scales"] * (values if kept == "grouped" else max(queries, values))
    turned = tuple(i % 3 == 0 for i in range(states)) if row["rope"] == "mixed" else "none"
    named = {name: x for name, x in row.items() if name not in ("dtype", "heads", "sizes", "rope", "padded")}
    if row["rule"] != "gated_delta_net" and row["rule"] != "delta_net":
        named |= {"rule_options": {"normalize": False}, "allow_neg_eigval": False}
    K, V = row["sizes"]
    options = MixerOptions(
        hidden_size=16,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        num_value_heads=values,
        state_heads=kept,
        head_dim=K,
        value_head_dim=V,
        rope_heads="all" if row["rope"] in ("all", "half") else turned,
        **named,
    )
    torch.manual_seed(0)
    layer = FastWeightLayer(options, 0).double().requires_grad_(False)
    for name, x in layer.named_parameters():
        rounded = torch.float32 if name in ("A_log", "dt_bias") else row["dtype"]
        x.copy_(0.4 * torch.randn_like(x) + (0.7 if "norm" in name else 0)).copy_(x.to(rounded))
    return layer


def token(row, t: int, dtype: torch.dtype) -> MixerInputs:
    """One token of two sequences; of the padded ones, one is not there and holds NaN."""
    torch.manual_seed(t + 1)
    x_BTD = torch.randn(2, 1, 16).to(row["dtype"]).to(dtype)
    size = row["sizes"][0] // (2 if row["rope"] == "half" and row["sizes"][0] % 4 == 0 else 1)
    rotary = torch.randn(2, 1 if t % 2 else 2, 1, size).to(row["dtype"]).to(dtype)
    mask_BT = torch.ones(2, 1).bool()
    if row["padded"]:
        mask_BT[t % 2] = False
        x_BTD[t % 2] = float("nan")
    turns = (rotary[0], rotary[1]) if row["rope"] != "none" else None
    return MixerInputs(x_BTD, mask_BT if row["padded"] else None, turns)


def stepped(row, layer: FastWeightLayer, start, steps: int = 2):
    """(reads and states of the kernel, those of the same layer in float64) after some tokens of decoding."""
    wide = {name: x.double() for name, x in start.items()}
    narrow = {name: x.to(torch.float32 if name == "state" else row["dtype"]) for name, x in start.items()}
    small = copy.deepcopy(layer).to(row["dtype"])
    for name in ("A_log", "dt_bias"):
        if hasattr(small, name):
            setattr(small, name, torch.nn.Parameter(getattr(layer, name).float(), requires_grad=False))
    for t in range(steps):
        exact, wide = layer._mix(token(row, t, torch.float64), wide)
        given = token(row, t, row["dtype"])
        assert decoding.can_decode(small, given, narrow)
        reads = decoding.decode(small, given, narrow)
    assert reads.dtype == row["dtype"]
    names = [name for name, x in narrow.items() if x.numel()]
    assert names
    return {"out": reads} | {n: narrow[n] for n in names}, {"out": exact} | {n: wide[n] for n in names}


def start_of(row, layer: FastWeightLayer):
    torch.manual_seed(9)
    states = layer._mix(token(row | {"padded": False}, 0, torch.float64), {})[1]
    kept = {n: row["dtype"] if "conv" in n else torch.float32 for n in states}
    return {n: torch.randn_like(x).to(kept[n]).double() for n, x in states.items()}


@torch.no_grad()
def decoded(row) -> None:
    """Raise AssertionError unless decoding with the kernel agrees with the layer in float64."""
    layer = mixer(row)
    result, expected = stepped(row, layer, start_of(row, layer))
    assert all(torch.isfinite(x).all() for x in result.values()), "relative error: not written"
    assert_agrees(result, expected, TOLERANCE[row["dtype"]])


@pytest.mark.parametrize("row", COVERING, ids=range(len(COVERING)))
def test_agrees_with_the_layer_in_float64(row):
    decoded(row)


def test_the_sum_norm():
    decoded(STRICT | {"feature_map": "elu1", "qk_norm": "sum", "state_bias": False})


def test_the_strict_mixer_agrees():
    decoded(STRICT)


# What the kernel does, and what a broken kernel would do instead.
MUTATIONS = {
    "filter reversed": ("tl.load(weight + at * CONV + i, mask", "tl.load(weight + at * CONV + CONV - 2 - i, mask"),
    "newest input forgotten": ("y *= tl.load(weight", "y *= 0 * tl.load(weight"),
    "history not shifted": ("stride + i * channels + at, newer", "stride + (i + 1) * channels + at, newer"),
    "newest not remembered": ("n * stride + (CONV - 2)", "n * stride + 0 * (CONV - 2)"),
    "history of another sequence": ("before = tl.load(history + n * stride", "before = tl.load(history + 0 * stride"),
    "head norm without its weight": ("inverse * tl.load(norm + rows", "inverse + 0 * tl.load(norm + rows"),
    "partner without head norm": ("z = z * inverse", "z = z + 0 * inverse"),
    "rotation the other way": ("tl.where(first, -z, z)", "tl.where(first, z, -z)"),
    "rotation of another sequence": ("tl.load(cos + n * rotary_stride", "tl.load(cos + 0 * rotary_stride"),
    "all states rotated": ("turned = (word >> (s % WORD)) & 1", "turned = 1 + 0 * word"),
    "bias of another state": ("bias + owner * K", "bias + 0 * owner * K"),
    "no activation": ("x = x * tl.sigmoid(x)", "x = x"),
    "value without activation": ("value = value * tl.sigmoid(value)", "value = value"),
    "norm forgotten": ("x = x * tl.rsqrt(tl.sum(x * x, 0) + L2_EPS)", "x = x"),
    "value of another head": ("value_head = head // (STATES // VALUES)", "value_head = head % VALUES"),
    "query of another read": ("(head * EACH + j) // (READS // QUERIES)", "(head * EACH + j) % QUERIES // 2"),
    "states of the first time scale": ("s = (i // GROUP) * STATES + head", "s = 0 * (i // GROUP) * STATES + head"),
    "decay without softplus": ("grown = tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))", "grown = tl.maximum(x, 0.0)"),
    "rate not exponentiated": ("tl.exp(tl.load(rate + s).to(tl.float32))", "tl.load(rate + s).to(tl.float32)"),
    "nothing erased": ("write = write - tl.sum(key[:, None] * kept, 0)", "write = write"),
    "beta without sigmoid": ("(most * tl.sigmoid(tl.load(b + pair).to(tl.float32)))", "(most * tl.load(b + pair))"),
    "beta of one": ("(most * tl.sigmoid(", "(tl.sigmoid("),
    "state not stored": ("tl.store(place, new, mask=both)", "pass"),
    "read before the write": ("(query * scale)[:, None] * new", "(query * scale)[:, None] * kept"),
    "scale forgotten": ("read = factor * tl.sum((query * scale)", "read = factor * tl.sum((query)"),
    "output scale forgotten": ("read = factor * tl.sum(", "read = tl.sum("),
    "output norm over the padded size": ("tl.sum(read * read, 0) / V", "tl.sum(read * read, 0) / BLOCK_V"),
    "output norm without its weight": ("read = read * tl.load(norm_o", "read = read + 0 * tl.load(norm_o"),
    "gate of another read": ("gate + (n * reads + r) * V", "gate + (n * reads) * V"),
    "gate without its input": ("open = open * x", "open = open"),
    "mask ignored": ("valid = tl.load(mask + n) != 0", "valid = tl.load(mask + n) < 2"),
    "value left out": ("at = n * WIDTH + SCALES * READS * V + value_head * V", "at = n * WIDTH + value_head * V"),
    "last rows lost": ("in_k, in_v = rows < K,", "in_k, in_v = rows < K - 1,"),
}


def mutant_of(name: str, folder: Path, monkeypatch):
    right, wrong = MUTATIONS[name]
    assert SOURCE.count(right) == 1, f"{right!r} is no longer in the kernel, or not once"
    file = folder / "mutant.py"
    file.write_text(SOURCE.replace(right, wrong).replace("hf_fwp::", f"mixer_mutant{list(MUTATIONS).index(name)}::"))
    spec = importlib.util.spec_from_file_location("hf_fwp.kernels.mutant", file)
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, mutant)
    spec.loader.exec_module(mutant)
    return mutant


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_rejected(name, tmp_path, monkeypatch):
    monkeypatch.setattr(mixer_step, "mixer_step", mutant_of(name, tmp_path, monkeypatch).mixer_step)
    with pytest.raises(AssertionError, match="relative error"):
        decoded(STRICT)


def test_log1p_keeps_small_numbers():
    """What 1 + x rounds away in float32 would be lost for every step smaller than 1e-7."""

    @mixer_step.triton.jit
    def kernel(x, y):
        mixer_step.tl.store(y, mixer_step.log1p(mixer_step.tl.load(x)))

    for number in (0.0, 1e-12, 1e-7, 3e-4, 0.1, 1.0):
        x, y = torch.tensor([number]), torch.zeros(1)
        kernel[(1,)](x, y)
        assert float((y - x.double().log1p()).abs()) <= 3e-7 * number


def generated(model, ids, cache=None, steps: int = 2) -> torch.Tensor:
    """Logits of decoding token by token after a prefill."""
    out = model(input_ids=ids[:, :6], use_cache=True, past_key_values=cache)
    parts, cache = [out.logits], out.past_key_values
    for t in range(6, 6 + steps):
        parts.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("rule", ["gated_delta_net", "delta_net"])
def test_a_model_decodes_with_it(rule):
    model, ids = tiny_model(rule, dtype=torch.float32), tokens(2, 8)
    with torch.no_grad():
        found = generated(model, ids)
        assert set(model.hf_fwp_backend.values()) == {"fused step"}
        whole = model(input_ids=ids, use_cache=False).logits
    assert_agrees({"logits": found}, {"logits": whole}, 1e-5)


def test_generate_gives_the_same_tokens_with_it(monkeypatch):
    model, ids = tiny_model(dtype=torch.float32), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    for cache in (None, "static"):
        fused = model.generate(input_ids=ids, cache_implementation=cache, disable_compile=True, **settings)
        assert set(model.hf_fwp_backend.values()) == {"fused step"}
        with monkeypatch.context() as without:
            without.setattr(linear_class, "has_decode_kernel", lambda device_type: False)
            plain = model.generate(input_ids=ids, cache_implementation=cache, disable_compile=True, **settings)
        assert set(model.hf_fwp_backend.values()) == {"step"}
        assert torch.equal(fused, plain)


def test_a_whole_model_compiles_without_graph_breaks():
    model, ids = tiny_model(dtype=torch.float32), tokens(2, 8)

    def steps(run):
        with torch.no_grad():
            cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
            found = [run(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in (6, 7)]
        return torch.stack(found), [x.clone() for layer in cache.layers for x in layer.states.values()]

    torch._dynamo.reset()
    found, expected = steps(torch.compile(model, fullgraph=True, backend="aot_eager")), steps(model)
    torch.testing.assert_close(found, expected)


def test_with_a_gradient_or_a_past_to_return_to_it_stays_away():
    model, ids = tiny_model(dtype=torch.float32), tokens(1, 10)
    generated(model, ids, steps=1)  # gradients are recorded
    assert "fused step" not in model.hf_fwp_backend.values()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        cache.activate_past_recording()
        model(input_ids=ids[:, 6:7], past_key_values=cache)
    assert set(model.hf_fwp_backend.values()) == {"step"}


def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck compares runs, and NaN is not equal to NaN
    for row, convolved in ((STRICT, True), (STRICT | {"conv_size": 0, "rope": "all"}, False)):
        layer = mixer(row).float()
        found = []
        monkeypatch.setattr(mixer_step, "mixer_step", lambda *a, found=found: found.append(a))
        states = {n: x.float() for n, x in start_of(row, mixer(row)).items()}
        decoding.decode(layer, token(row, 0, torch.float32), states)
        monkeypatch.undo()
        assert len(found[0][1]) == 3 * convolved
        arguments = [list(x) if isinstance(x, tuple) else x for x in found[0]]
        torch.library.opcheck(mixer_step.mixer_step, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
