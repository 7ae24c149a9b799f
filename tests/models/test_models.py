"""The models as transformers sees them: saving, dtypes, heads, outputs, checkpointing, compilation."""

import pytest
import torch
from tiny_fwp import KINDS, VOCAB, assert_close, tiny_config, tiny_model, tokens
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import hf_fwp
from hf_fwp.conversion.memory import recompute_activations
from hf_fwp.modeling import (
    MODELS,
    FwpForCausalLM,
    FwpForQuestionAnswering,
    FwpForSequenceClassification,
    FwpForTokenClassification,
    FwpModel,
)

FEATURE_MAPS = ["dpfp:3", "favor:8", "favor:8,redraw=1,eps=0,prescale=1", "hedgehog", "softmax"]


def assert_saved_and_loaded(model, folder):
    with torch.no_grad():
        before = model(tokens()).logits
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert type(loaded) is FwpForCausalLM
        saved, read = model.state_dict(), loaded.state_dict()
        assert saved.keys() == read.keys()
        assert all(torch.equal(saved[name], read[name]) for name in saved)
        assert torch.equal(loaded(tokens()).logits, before)


def test_i48_saved_and_loaded_is_bitwise_equal(model, tmp_path):
    assert_saved_and_loaded(model, tmp_path)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_i48_feature_maps_are_saved_too(feature_map, tmp_path):
    assert_saved_and_loaded(tiny_model(feature_map=feature_map, tie_word_embeddings=True), tmp_path)


@pytest.mark.parametrize("placement", ["pre", "post", "idsia_pre", "residual", "none"])
@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope"])
def test_placements_and_positions(placement, position, tmp_path):
    assert_saved_and_loaded(tiny_model(norm_placement=placement, position_embedding=position), tmp_path)


def test_a_fresh_model_starts_as_configured():
    model = AutoModelForCausalLM.from_config(tiny_config(initializer_range=0.02, feature_map="hedgehog"))
    mixer = hf_fwp.layers_of(model)[0]
    assert 0.01 < mixer.q_proj.weight.std() < 0.03
    assert torch.equal(mixer.feature_map.key.weight, torch.eye(8))
    assert (mixer.A_log.exp() <= 16).all()
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert ((dt > 0.9e-4) & (dt < 0.11)).all()
    assert mixer.v_conv1d.weight.abs().max() <= 0.5
    assert (mixer.o_norm.weight == 1).all()


def test_a_model_names_its_mixers_and_what_ran():
    model = tiny_model("hybrid")
    assert list(model.hf_fwp_layers) == list(hf_fwp.layers_of(model)) == [0, 2]
    assert model.hf_fwp_backend == {0: None, 2: None}
    with torch.no_grad():
        cache = model(tokens()).past_key_values
        assert model.hf_fwp_backend == hf_fwp.backends_of(model) == {0: "torch", 2: "torch"}
        model(tokens(2, 1), past_key_values=cache)
    assert model.hf_fwp_backend == {0: "step", 2: "step"}


def test_bf16_keeps_decays_in_float32(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    decays = {p.dtype for name, p in loaded.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    rest = {p.dtype for name, p in loaded.named_parameters() if not name.endswith(("A_log", "dt_bias"))}
    assert (decays, rest) == ({torch.float32}, {torch.bfloat16})
    output = loaded(tokens(), labels=tokens())
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert_close(output.logits.float(), model(tokens()).logits, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_cast_models_run(kind):
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.isfinite(tiny_model(kind, dtype=dtype, initializer_range=0.02)(tokens()).logits).all()


def test_the_auto_classes_know_every_head():
    classes = [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification]
    classes += [AutoModelForTokenClassification, AutoModelForQuestionAnswering]
    assert [type(auto.from_config(tiny_config())) for auto in classes] == [MODELS[auto] for auto in classes]


def test_sequence_classification_reads_the_last_real_token(kind):
    model = tiny_model(kind, model_class=FwpForSequenceClassification, num_labels=3)
    ids = tokens()
    padded = torch.cat([ids, torch.zeros_like(ids[:, :2])], dim=1)
    output = model(padded, attention_mask=(padded != 0).long(), labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    assert_close(output.logits, model(ids).logits)
    output.loss.backward()


def test_token_classification(kind):
    model = tiny_model(kind, model_class=FwpForTokenClassification, num_labels=3)
    output = model(tokens(), labels=tokens() % 3)
    assert output.logits.shape == (2, 13, 3)
    output.loss.backward()


def test_question_answering(kind):
    model = tiny_model(kind, model_class=FwpForQuestionAnswering)
    output = model(tokens(), start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4]))
    assert output.start_logits.shape == output.end_logits.shape == (2, 13)
    output.loss.backward()


def test_heads_load_the_base_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    base = FwpModel.from_pretrained(tmp_path, dtype=torch.float64)
    hidden = base(tokens()).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(tokens()).logits)


def test_outputs(model):
    ids = tokens()
    output = model(ids, output_hidden_states=True, logits_to_keep=2)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    full = model(ids).logits
    assert_close(output.logits, full[:, -2:])
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])
    logits, *_ = model(ids, return_dict=False)
    assert_close(logits, full)
    assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, full)


def test_attentions_come_from_the_attention_layers():
    model = tiny_model("hybrid")
    model.set_attn_implementation("eager")
    attentions = model(tokens(), output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(2, 4, 13, 13)] * 2


def test_eager_attention_equals_sdpa():
    model = tiny_model("hybrid")
    sdpa = model(tokens()).logits
    model.set_attn_implementation("eager")
    assert_close(model(tokens()).logits, sdpa, 1e-6)


def test_an_empty_sequence_is_refused(model):
    nothing, cache = tokens()[:, :0], model(tokens()[:, :3], use_cache=True).past_key_values
    for given in ({"input_ids": nothing}, {"inputs_embeds": torch.zeros(2, 0, 32).double()}):
        for beside in ({}, {"past_key_values": cache}, {"attention_mask": nothing}):
            with pytest.raises(ValueError, match="T = 0"):
                model(**given, **beside)
    for layer in hf_fwp.layers_of(model).values():
        with pytest.raises(ValueError, match="T = 0"):
            layer(torch.zeros(2, 0, 32).double())


def test_two_inputs_or_none_are_refused():
    with pytest.raises(ValueError, match="exactly one of"):
        tiny_model()()


def test_gradient_checkpointing_changes_nothing(kind):
    outcomes = []
    for checkpointing in (False, True):
        model = tiny_model(kind).train()
        if checkpointing:
            recompute_activations(model, on=True)
        loss = model(tokens(), labels=tokens()).loss
        outcomes.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for plain, checkpointed in zip(*outcomes, strict=True):
        assert torch.equal(plain, checkpointed)


def test_forward_compiles_without_a_break():
    mask = torch.ones_like(tokens())
    model = tiny_model(dtype=torch.float32, rule=["gated_delta_net", "full_attention"], num_hidden_layers=2)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(tokens(), use_cache=False, attention_mask=mask).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(tokens(), use_cache=False, attention_mask=mask).logits
    assert_close(got[mask.bool()], expected[mask.bool()], 1e-5)


def test_compiled_training_gives_the_same_gradients():
    model = tiny_model("delta_net", dtype=torch.float32, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weights = list(model.parameters())
    losses = [m(tokens(), labels=tokens(), use_cache=False).loss for m in (model, compiled)]
    gradients = [torch.autograd.grad(loss, weights) for loss in losses]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * (1 + a.norm())


def test_vocabulary_can_grow():
    model = tiny_model()
    model.resize_token_embeddings(VOCAB + 3)
    assert model(tokens()).logits.shape[-1] == VOCAB + 3
