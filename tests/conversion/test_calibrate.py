"""What the search for a head's setting measures is what the mixer does with the parameters it is given."""

import importlib

import pytest
import torch
from teachers import LAYERS, tiny_teacher

from hf_fwp.cache import MixerInputs
from hf_fwp.conversion.calibrate import LOCAL, Heads, attention_heads, calibrate
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.recipes import STUDENTS, student_options
from hf_fwp.conversion.stream import Walk
from hf_fwp.hosts import HOSTS
from hf_fwp.packing import Window

SEQUENCES, LENGTH = 4, LOCAL + 8
formulas = importlib.import_module("hf_fwp.conversion.formulas")
stage = importlib.import_module("hf_fwp.conversion.calibrate")


@pytest.fixture
def ids_NT():
    return torch.randint(1, 67, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def scene(ids_NT, *, family="llama", rule="gated_delta_net", layer=1, dtype=torch.float32, **fwp):
    """(mixer, inputs, rotary, softmax) of one layer."""
    teacher = tiny_teacher(family).to(dtype)
    student = copy_teacher(teacher, layers=range(LAYERS), fwp={**student_options(rule), **fwp})
    walk = Walk(teacher, ids_NT)
    for before in range(layer):
        walk.attend(before)
    return student.hf_fwp_layers[layer], walk.inputs(layer), walk.rotary(layer), walk.softmax(layer)


@pytest.mark.parametrize("family", HOSTS)
@torch.no_grad()
def test_the_heads_are_the_teachers(family, ids_NT, monkeypatch):
    if family == "falcon":
        pytest.skip("its attention maps add a bool mask to the scores; tests/hosts/test_weights.py compares its logits")
    monkeypatch.setattr(stage, "QUERY_BLOCK", 7)
    teacher = tiny_teacher(family)
    teacher.set_attn_implementation("eager")
    student = copy_teacher(teacher, layers=range(LAYERS), fwp=student_options("gated_delta_net"))
    masses = teacher(ids_NT, output_attentions=True).attentions
    position = torch.arange(LENGTH)
    back = position[:, None] - position
    near = (back < LOCAL) & (position > 0)
    walk = Walk(teacher, ids_NT)
    for layer, mass_NHTT in enumerate(masses):
        x_NTD, answer_NTD, heads_NTC = walk.attend(layer)
        mixer, rotary = student.hf_fwp_layers[layer], walk.rotary(layer)
        found = attention_heads(mixer, x_NTD, rotary, softmax=walk.softmax(layer))
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found.out.flatten(2), heads_NTC, **close)
        torch.testing.assert_close(walk.output_projection(layer)(found.out.flatten(2)), answer_NTD, **close)
        torch.testing.assert_close(found.sink, mass_NHTT[..., 0].transpose(1, 2), **close)
        torch.testing.assert_close(found.local, (mass_NHTT * near).sum(-1).transpose(1, 2), **close)


def some_setting(search, m):
    """Another value of every field for every head: no two heads can be confused."""
    generator = torch.Generator().manual_seed(m)
    random = {
        "half_life": 2 + 30 * torch.rand(search.num_states, generator=generator),
        "beta": 0.05 + 0.9 * torch.rand(search.num_states, generator=generator),
        "bias": 0.1 + torch.rand(search.num_states, generator=generator),
        "rotate": torch.arange(search.num_states) % 2 == m % 2,
    }
    return {name: value for name, value in random.items() if name in search.fields}


def searched(monkeypatch):
    """The reads of the settings that calibrate is made to choose."""
    reads = []

    def best(search, m, found, gate):
        setting = some_setting(search, m)
        reads.append(search.read(setting, gate))
        return setting, reads[-1], torch.zeros(search.num_states)

    monkeypatch.setattr(stage._Search, "best", best)
    return reads


def reads_of(mixer, x_NTD, rotary):
    width = mixer.options.num_reads * mixer.options.value_head_dim
    return mixer.mixed_reads(x_NTD, position_embeddings=rotary)[..., :width]


VARIANTS = [
    {},
    {"family": "qwen3"},
    {"family": "qwen2"},
    {"time_scales": 1},
    {"time_scales": 3},
    {"output_gate": "none"},
    {"state_bias": False},
    {"rope_heads": "none"},
    {"allow_neg_eigval": True},
    {"qk_norm": "none", "scale": 0.3},
    {"value_skip": 0},
    {"state_heads": "grouped"},
    {"window": 5, "sinks": 2},
    {"window": 4, "state_heads": "grouped", "output_gate": "none"},
    {"state_heads": "grouped", "output_gate": "none", "family": "qwen3"},
]


@pytest.mark.parametrize("rule", STUDENTS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_the_mixer_reads_what_the_search_read(rule, variant, ids_NT, monkeypatch):
    if rule == "linear_attention" and "state_bias" in variant:
        variant = {"state_bias": True}
    mixer, x_NTD, rotary, softmax = scene(ids_NT, rule=rule, dtype=torch.float64, **variant)
    before = reads_of(mixer, x_NTD, rotary)
    reads = searched(monkeypatch)
    calibrate(mixer, x_NTD, rotary, softmax=softmax, heldout=2)
    after = reads_of(mixer, x_NTD, rotary)
    expected = torch.cat(reads, dim=2).flatten(2)
    assert (after - expected).norm() < 1e-6 * expected.norm()  # half-lives and beta are float32
    assert (before - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("wrong", ["A_log", "b_proj.bias", "q_bias", "k_bias", "g_proj.bias", "rope_heads"])
@torch.no_grad()
def test_the_comparison_sees_every_parameter(wrong, ids_NT, monkeypatch):
    mixer, x_NTD, rotary, softmax = scene(ids_NT, dtype=torch.float64)
    reads = searched(monkeypatch)
    calibrate(mixer, x_NTD, rotary, softmax=softmax, heldout=2)
    if wrong == "rope_heads":
        mixer.options = mixer.options.replace(rope_heads=mixer.options.rotates[1:] + mixer.options.rotates[:1])
    else:
        parameter = mixer.get_parameter(wrong)
        parameter.copy_(parameter.roll(1, 0))
    expected = torch.cat(reads, dim=2).flatten(2)
    assert (reads_of(mixer, x_NTD, rotary) - expected).norm() > 1e-3 * expected.norm()


FOUND = {
    "gated_delta_net": {"half_life", "beta", "bias", "rotate", "residual"},
    "delta_net": {"beta", "bias", "rotate", "residual"},
    "linear_attention": {"rotate", "residual"},
}


@pytest.mark.parametrize("rule", STUDENTS)
@torch.no_grad()
def test_every_rule_is_searched(rule, ids_NT):
    mixer, x_NTD, rotary, softmax = scene(ids_NT, rule=rule)
    found = calibrate(mixer, x_NTD, rotary, softmax=softmax, heldout=2)
    assert len(found["time_scales"]) == mixer.options.time_scales
    for choice in found["time_scales"]:
        assert set(choice) == FOUND[rule]
        assert all(len(values) == mixer.options.num_attention_heads for values in choice.values())
    residuals = torch.tensor([choice["residual"] for choice in found["time_scales"]])
    assert residuals.isfinite().all()
    turned = [bool(value) for choice in found["time_scales"] for value in choice["rotate"]]
    assert list(mixer.options.rotates) == list(found["rope_heads"]) == turned


@torch.no_grad()
def test_a_known_setting_is_found(ids_NT, monkeypatch):
    monkeypatch.setattr(stage, "START", ({"half_life": 9.0, "beta": 0.1, "bias": 0.35, "rotate": False},))
    grid = {"half_life": (2.0, 12.0, 70.0), "rotate": (False, True), "bias": (0.1, 0.9), "beta": (0.1, 0.5)}
    rounds = (grid, {"half_life": (1000.0,)})  # a later round leaves what is best already
    monkeypatch.setattr(stage, "ROUNDS", (rounds,))
    mixer, x_NTD, rotary, softmax = scene(ids_NT, dtype=torch.float64, time_scales=1, output_gate="none")
    heads = attention_heads(mixer, x_NTD, rotary, softmax=softmax)
    truth = {
        "half_life": [2.0, 12.0, 70.0, 12.0],
        "rotate": [True, False, True, False],
        "bias": [0.1, 0.9, 0.9, 0.1],
        "beta": [0.1, 0.1, 0.5, 0.5],
    }
    read = stage._Search(mixer, heads, 2).read({name: torch.tensor(value) for name, value in truth.items()}, None)
    mixing = torch.randn(*read.shape[2:], read.shape[-1], dtype=read.dtype)
    answered = torch.einsum("nthv,hvw->nthw", read, mixing) + 1
    made = Heads(**{**vars(heads), "out": answered})
    monkeypatch.setattr(stage, "attention_heads", lambda *_, **__: made)
    found = calibrate(mixer, x_NTD, rotary, softmax=softmax, heldout=2)["time_scales"][0]
    assert max(found.pop("residual")) < 1e-2
    for name, values in found.items():
        assert values == pytest.approx(truth[name]), name


@pytest.mark.parametrize("queries", [1, 2])
@torch.no_grad()
def test_the_queries_of_a_state_judge_it_together(queries, ids_NT):
    kind = {1: "query", 2: "grouped"}[queries]
    mixer, x_NTD, rotary, softmax = scene(ids_NT, dtype=torch.float64, state_heads=kind, output_gate="none")
    heads = attention_heads(mixer, x_NTD, rotary, softmax=softmax)
    search = stage._Search(mixer, heads, 2)
    read = search.read(some_setting(search, 0), None)
    weight = search.weights([read[:2]])
    inputs = torch.cat([read, torch.ones_like(read[..., :1])], dim=-1)[2:]
    missed = torch.einsum("nthr,hrv->nthv", inputs, weight) - heads.out[2:]
    expected = [
        missed[:, :, group].square().sum() / heads.out[2:, :, group].square().sum()
        for group in torch.arange(4).split(queries)
    ]
    torch.testing.assert_close(search.residual([read]), torch.stack(expected))
    assert len(expected) == search.num_states == mixer.options.num_states // mixer.options.time_scales


@torch.no_grad()
def test_what_is_fixed_is_not_searched(ids_NT):
    mixer, x_NTD, rotary, softmax = scene(ids_NT)
    fixed = {"half_life": 38.0, "rotate": True}
    chosen = calibrate(mixer, x_NTD, rotary, softmax=softmax, heldout=2, fixed=fixed)["time_scales"]
    for scale in chosen:
        assert scale["half_life"] == [38.0] * 4
        assert scale["rotate"] == [True] * 4
    assert all(mixer.options.rotates)
    assert len({beta for scale in chosen for beta in scale["beta"]}) > 1
    assert (-mixer.A_log.exp()).exp() == pytest.approx(2 ** (-1 / 38.0))
    with pytest.raises(ValueError, match="unknown fixed field 'betas'; did you mean 'beta'"):
        calibrate(mixer, x_NTD, rotary, softmax=softmax, heldout=2, fixed={"betas": 0.5})


@torch.no_grad()
def test_more_time_scales_explain_more(ids_NT):
    mixer, x_NTD, rotary, softmax = scene(ids_NT, time_scales=2)
    first, second = calibrate(mixer, x_NTD, rotary, softmax=softmax, heldout=1)["time_scales"]
    assert sum(second["residual"]) < sum(first["residual"])


@torch.no_grad()
def test_gates_follow_the_sink(ids_NT):
    mixer, x_NTD, rotary, softmax = scene(ids_NT)
    heads = attention_heads(mixer, x_NTD, rotary, softmax=softmax)
    calibrate(mixer, x_NTD, rotary, softmax=softmax, heldout=1)
    gate_NTR = mixer.g_proj(x_NTD).sigmoid()[:, 4:]
    wanted = torch.cat([1 - heads.sink, heads.local], dim=-1)[:, 4:]
    assert torch.corrcoef(torch.stack([gate_NTR.flatten(), wanted.flatten()]))[0, 1] > 0.5


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2"])
@pytest.mark.parametrize("rates", [stage.calibrate, formulas.calibrate_by_formulas])
@torch.no_grad()
def test_what_lies_outside_a_window_is_as_much_as_in_the_teacher(family, rates, ids_NT):
    mixer, x_NTD, rotary, softmax = scene(ids_NT, family=family, window=4, sinks=1)
    heads = attention_heads(mixer, x_NTD, rotary, softmax=softmax)

    def missed():
        mass = mixer.window(MixerInputs(x_NTD), heads.q_rotated, heads.k_rotated, heads.v, Window(None, None), {})[1]
        return (mass + heads.near - 1).square().mean()

    before = missed()
    rates(mixer, x_NTD, rotary, softmax=softmax, heldout=1)
    assert missed() < 0.5 * before
    torch.testing.assert_close(mixer.window.scale, torch.full((4,), softmax.scale))
    at_first = mixer.window(MixerInputs(x_NTD), heads.q_rotated, heads.k_rotated, heads.v, Window(None, None), {})[0]
    torch.testing.assert_close(at_first[:, :5], heads.out[:, :5])


def test_what_cannot_be_calibrated_is_refused(ids_NT):
    mixer, x_NTD, rotary, softmax = scene(ids_NT)
    for heldout in (0, SEQUENCES):
        with pytest.raises(ValueError, match=f"heldout is {heldout} of {SEQUENCES}"):
            calibrate(mixer, x_NTD, rotary, softmax=softmax, heldout=heldout)
