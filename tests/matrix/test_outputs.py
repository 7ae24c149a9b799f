"""What a forward returns, in every form that can be asked for, is the same numbers."""

import pytest
import torch
from every_model import every_model
from tiny_fwp import assert_close, tokens

ATTENTIONS = ("eager", "sdpa")


def attention_layers(model) -> int:
    return model.config.num_hidden_layers - len(model.hf_fwp_layers)


def test_hidden_states_of_every_layer(model):
    ids = tokens()
    outputs = model(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(outputs.hidden_states[0], model.get_input_embeddings()(ids))
    assert_close(model.get_output_embeddings()(outputs.hidden_states[-1]), model(ids).logits)
    assert model(ids).hidden_states is None


def test_attentions_are_those_of_the_attention_layers(model):
    model.set_attn_implementation("eager")
    attentions = model(tokens(), output_attentions=True).attentions
    assert len(attentions or ()) == attention_layers(model)
    for weights in attentions or ():
        assert weights.shape == (2, 4, 13, 13)
        assert_close(weights.sum(-1), torch.ones(2, 4, 13).double(), 1e-6)


@pytest.mark.parametrize("kept", [1, 4, torch.tensor([0, 5])], ids=["one", "four", "chosen"])
def test_logits_to_keep(model, kept):
    chosen = slice(-kept, None) if isinstance(kept, int) else kept
    assert_close(model(tokens(), logits_to_keep=kept).logits, model(tokens()).logits[:, chosen])


def test_a_tuple_holds_the_same(model):
    whole = model(tokens(), labels=tokens(), output_hidden_states=True)
    parts = model(tokens(), labels=tokens(), output_hidden_states=True, return_dict=False)
    assert [type(part) for part in parts] == [type(part) for part in whole.to_tuple()]
    assert torch.equal(parts[0], whole.loss)
    assert torch.equal(parts[1], whole.logits)


@pytest.mark.parametrize("implementation", ATTENTIONS)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_attention_implementations_agree(name, implementation, padded):
    # float32: transformers' eager attention casts scores to it, where a mask made for float64 is -inf, and the rows of
    # padded positions become NaN (no public issue found)
    model, mask = every_model(name, dtype=torch.float32), torch.ones(2, 13, dtype=torch.long)
    mask[0, :3] = 0 if padded else 1
    expected = model(tokens(), attention_mask=mask).logits
    model.set_attn_implementation(implementation)
    assert_close(model(tokens(), attention_mask=mask).logits[mask.bool()], expected[mask.bool()], 1e-4)
    ways = [model.generate(tokens(), max_new_tokens=3, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*ways)


@pytest.mark.slow
def test_flex_attention_agrees(name):
    model = every_model(name, dtype=torch.float32)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(tokens(), attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        logits = model(tokens(), attention_mask=mask, use_cache=False).logits
    assert_close(logits[mask.bool()], expected[mask.bool()], 1e-4)


def test_flash_attention_that_is_not_installed_is_refused_by_name(model):
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash"):
        model.set_attn_implementation("flash_attention_2")
    assert model(tokens()).logits.isfinite().all()
