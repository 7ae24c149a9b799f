"""What an inspection says is what the rule did: against brute force, and on pages read by a real browser."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from every_model import every_model
from teachers import tiny_teacher
from tiny import byte_tokenizer
from tiny_fwp import KINDS, VOCAB, assert_close, tiny_model

import hf_fwp
from hf_fwp.inspection import _projections, inspect, measures
from hf_fwp.inspection.measures import first_order_shares, measure, value_weights, view_state
from hf_fwp.inspection.page import LEVELS, packed
from hf_fwp.inspection.recording import recording
from hf_fwp.layer import layers_of
from hf_fwp.modeling import MODELS, FwpForCausalLM

# rules that read Σ_i a_ti v_i with numbers a_ti that no value changes
LINEAR_IN_VALUES = {
    "linear_attention",
    "delta_net",
    "gated_delta_net",
    "delta_product",
    "kimi_delta",
    "comba",
    "precond_delta",
}
# every channel of a value has a gate: the shares of a read add up all the same
LINEAR_BY_CHANNEL = {"gated_delta_net_2"}
LENGTH = 9
IDS = torch.randint(1, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(3))


def look(model, **changes):
    return inspect(model, input_ids=IDS, progress=False, **changes)


def recorded(model):
    with torch.no_grad(), recording(model) as found:
        model(IDS[None], use_cache=False)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_can_be_looked_into(kind):
    model = tiny_model(kind, dtype=torch.float32)
    before = {index: layer.rule for index, layer in layers_of(model).items()}
    found = look(model)
    assert list(found.layers) == list(before)
    assert {index: layer.rule for index, layer in layers_of(model).items()} == before
    for index, view in found.layers.items():
        assert view.rule == before[index].name
        assert view.exact == (view.rule in LINEAR_IN_VALUES)
        assert torch.isfinite(view.attention_RTT).all()
        assert view.attention_RTT.abs().sum() > 0
        assert (view.attention_RTT.triu(1) == 0).all()
        for state in view.states.values():
            assert (state.norm_TS > 0).any()
            assert (state.rank_PS >= 0).all()
            assert state.rank_PS.max() <= min(state.singular_PSN.shape[-1], measures.SINGULAR_VALUES) + 1e-3


def test_converted_models_are_shown_beside_their_teacher():
    teacher = tiny_teacher("llama").eval()
    before = teacher.config._attn_implementation
    found = look(every_model("llama converted", dtype=torch.float32), against=teacher)
    assert teacher.config._attn_implementation == before
    assert list(found.softmax) == list(found.layers) == [0, 1]
    for weights in found.softmax.values():
        assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]), atol=1e-5)


def test_beside_a_window_the_reads_of_fast_weights_are_shown():
    model, given = every_model("llama with a window", dtype=torch.float32), []
    model.hf_fwp_layers[1].o_proj.register_forward_pre_hook(lambda _, args: given.append(args[0][0]))
    reads = recorded(model)[1].mixed_TRV
    width = reads.shape[1] * reads.shape[2]
    assert torch.equal(reads.flatten(1), given[0][:, :width])
    assert given[0].shape[1] > width
    assert list(look(model).layers) == [0, 1]
    assert _projections(model.hf_fwp_layers[1]).shape == (reads.shape[1], 32, reads.shape[2])


def test_maps_are_never_those_of_another_layer():
    half = every_model("qwen3 half converted", dtype=torch.float32)
    with pytest.raises(ValueError, match="gives 1 attention maps for 2 layers"):
        look(half, against=half)


def by_hand(q, k, beta, decay):
    """a_ti = q_tᵀ Π_{i<j≤t} exp(g_j) (I - β_j k_j k_jᵀ) β_i k_i of one head, in float64."""
    weights = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        written = beta[i] * k[i]
        for t in range(i, len(q)):
            if t > i:
                written = decay[t] * written
                written = written - beta[t] * k[t] * (k[t] @ written)
            weights[t, i] = q[t] @ written
    return weights


def test_effective_attention_of_the_gated_delta_rule_by_hand():
    model = tiny_model("gated_delta_net", dtype=torch.float32)
    one = recorded(model)[0]
    q, k, beta, g = (one.tokens[name][0].double() for name in ("q", "k", "beta", "g"))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    weights = value_weights(one)
    assert weights is not None
    for read in range(len(weights)):
        of_read = [x[:, read * x.shape[1] // len(weights)] for x in (q, k, beta, g.exp())]
        expected = by_hand(*of_read) * k.shape[-1] ** -0.5
        assert_close(weights[read].double(), expected, 1e-4)


def test_first_order_shares_are_exact_where_a_rule_is_linear_in_its_values():
    for rule in sorted(LINEAR_BY_CHANNEL | {"delta_net"}):
        one = recorded(tiny_model(rule, dtype=torch.float32))[0]
        assert_close(first_order_shares(one).sum(-1).T, one.out_TRV.norm(dim=-1), 1e-4)


def test_weights_that_do_not_give_back_the_read_are_not_called_exact(monkeypatch):
    one = recorded(tiny_model("delta_net", dtype=torch.float32))[0]
    run = type(one).run
    monkeypatch.setattr(type(one), "run", lambda self, *given: (run(self, *given)[0].roll(1, dims=1), None))
    assert value_weights(one) is None


def test_states_are_those_of_the_recurrence():
    model = tiny_model("delta_net", dtype=torch.float32)
    one = recorded(model)[0]
    over_time = measures.states_over_time(one)["state"]
    _, after = one.run(one.tokens)
    assert_close(over_time[-1], after["state"][0], 1e-5)
    assert (over_time[0] == 0).all()
    view = measure(one)
    assert_close(view.states["state"].norm_TS[-1], after["state"][0].flatten(1).norm(dim=-1), 1e-5)
    # a delta rule of rate 1 recalls what it wrote; whatever the rate, the write goes along its key
    keys = one.tokens["k"][0]
    change = over_time[1:] - over_time[:-1]
    units = (keys / keys.norm(dim=-1, keepdim=True)).repeat_interleave(change.shape[1] // keys.shape[1], dim=1)
    assert view.recalled_TSV is not None
    assert_close(units[..., None] * view.recalled_TSV[..., None, :], change, 1e-4)


def test_measures_of_known_matrices():
    states = torch.zeros(4, 1, 3, 3)
    states[1, 0] = torch.eye(3)
    states[2, 0] = 0.5 * torch.eye(3)
    states[3, 0, 0, 0] = 2.0
    view = view_state(states)
    assert_close(view.rank_PS[:, 0], torch.tensor([3.0, 3.0, 1.0]), 1e-6)
    assert_close(view.norm_TS[:, 0], torch.tensor([3**0.5, 0.5 * 3**0.5, 2.0]), 1e-6)
    assert_close(view.remains_TS[:, 0], torch.tensor([1.0, 0.5, 2 * 0.5 / 0.75]), 1e-6)
    assert_close(view.singular_PSN[2, 0], torch.tensor([2.0, 0.0, 0.0]), 1e-6)


def test_packed_maps_are_the_lower_triangles():
    import base64

    maps = torch.randn(2, 5, 5).tril()
    for values, found in zip(maps, packed(maps), strict=True):
        levels = torch.frombuffer(bytearray(base64.b64decode(found["bytes"])), dtype=torch.int8)
        rows, columns = torch.tril_indices(5, 5)
        assert (levels * found["scale"] - values[rows, columns]).abs().max() <= values.abs().max() / LEVELS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": "a", "input_ids": IDS}, "one of them only"),
        ({}, "a text or input_ids"),
        ({"text": "a"}, "give tokenizer="),
        ({"input_ids": IDS[:0]}, "at least one token"),
        ({"input_ids": IDS, "layers": [7]}, r"layer 7 .* \[0, 1\]"),
    ],
)
def test_bad_requests_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        inspect(tiny_model(dtype=torch.float32), progress=False, **change)


def test_models_without_fast_weights_and_teachers_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"no fast-weight layer; convert it first"):
        look(tiny_teacher("llama"))
    small = tiny_teacher("llama", vocab_size=int(IDS.max()))
    with pytest.raises(ValueError, match="compare with the model that this one was made from"):
        look(tiny_model(dtype=torch.float32), against=small)


def test_figures(tmp_path):
    found = look(tiny_model("hybrid", dtype=torch.float32))
    found.figure(2, head=1).savefig(tmp_path / "head.svg")
    assert "effective attention" in (tmp_path / "head.svg").read_text()
    with pytest.raises(ValueError, match=r"layer 1 was not inspected; choose from \[0, 2\]"):
        found.figure(1)
    with pytest.raises(ValueError, match="heads 0 to 3; 4 is none"):
        found.figure(0, head=4)


def test_a_page_is_written_whole(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    look(tiny_model(dtype=torch.float32), output=page)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert "http" not in re.sub(r"http://www.w3.org\S*", "", page.read_text())


@pytest.mark.parametrize("model_class", [*MODELS.values()])
def test_two_inspections_of_a_folder_are_the_same_page(model_class, tmp_path):
    """Loaded as another model it would speak the words of a random head."""
    tokenizer = byte_tokenizer()
    model = tiny_model("hybrid", model_class=model_class, dtype=torch.float32, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    pages = []
    for seed in range(2):
        torch.manual_seed(seed)
        found = inspect(tmp_path / "saved", "what is written", progress=False)
        assert bool(found.reads) == (model_class is FwpForCausalLM)
        pages.append(found.html())
    assert pages[0] == pages[1]
    dry = inspect(tmp_path / "saved", "what is written", dry_run=True)
    assert dry.tokens == found.tokens


def test_the_page_in_a_browser(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium or google-chrome on PATH")
    page = tmp_path / "page.html"
    found = hf_fwp.inspect(tiny_model("hybrid", dtype=torch.float32), input_ids=IDS, output=page, progress=False)

    def seen(place: str) -> str:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", profile, page.as_uri() + place]
        shown = subprocess.run(words, capture_output=True, timeout=300, check=True)
        return html.unescape(shown.stdout.decode())

    start, other = seen(""), seen("#layer=2&head=1&token=4")
    assert f"Layer 0, head 0 (gated_delta_net), token {LENGTH} of {LENGTH}" in start
    assert "Layer 2, head 1 (delta_net), token 5 of" in other
    assert other.count('class="later"') == LENGTH - 5, "tokens after the chosen one are grey"
    assert len(re.findall(r"<polyline [^>]*points=\"\d", start)) == 7
    weights = found.layers[2].attention_RTT[1, 4]
    titles = re.findall(r'<span title="([-+.e\d]+)"', other.split('id="fast"')[1].split("</div>")[0])
    step = float(found.layers[2].attention_RTT[1].abs().max()) / LEVELS
    assert torch.allclose(torch.tensor([float(x) for x in titles]), weights[:5], atol=step)


def test_a_text_cannot_end_the_script_that_holds_it():
    class Hostile:
        def decode(self, ids):
            return "</script><b>"

        def batch_decode(self, rows):
            return [self.decode(row) for row in rows]

    plain, hostile = (look(tiny_model(dtype=torch.float32), tokenizer=x).html() for x in (None, Hostile()))
    assert hostile.count("</script") == plain.count("</script")
    assert "\\u003c/script>" in hostile


def test_the_summary_is_json():
    told = look(tiny_model("delta_net", dtype=torch.float32)).summary()
    assert json.loads(json.dumps(told)) == told
    assert set(told["layers"]["0"]) == {"rule", "norm", "effective rank", "mean beta"}
