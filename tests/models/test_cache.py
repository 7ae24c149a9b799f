"""A cache must never change what a model says: decoding, splitting, taking back, and choosing rows (I42, I45)."""

import copy

import pytest
import torch
from tiny_fwp import assert_close, tiny_model, tokens
from transformers.cache_utils import DynamicCache, DynamicLayer, QuantizedCache, StaticCache

from hf_fwp import RULES
from hf_fwp.cache import FastWeightCacheLayer, install_fast_weight_layers

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad():
    with torch.no_grad():
        yield


def run(model, ids, cache, **kwargs):
    return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def test_i45_token_by_token_equals_full(model):
    ids = tokens()
    cache = DynamicCache(config=model.config)
    steps = [run(model, ids[:, t : t + 1], cache) for t in range(ids.shape[1])]
    assert_close(torch.cat(steps, dim=1), model(ids).logits)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("split", [1, 4, 12])
def test_split_equals_whole(model, split):
    ids = tokens()
    cache = DynamicCache(config=model.config)
    parts = [run(model, ids[:, :split], cache), run(model, ids[:, split:], cache)]
    assert_close(torch.cat(parts, dim=1), model(ids).logits)


def test_static_cache_equals_full(model):
    ids = tokens()
    cache = StaticCache(config=model.config, max_cache_len=16)
    steps = [run(model, ids[:, :6], cache)]
    steps += [run(model, ids[:, t : t + 1], cache) for t in range(6, ids.shape[1])]
    assert_close(torch.cat(steps, dim=1), model(ids).logits)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(run(model, ids, cache), model(ids).logits)


def test_left_padding_with_a_cache_equals_no_padding(model):
    ids = tokens(1)
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], dim=1)
    mask = (padded != 0).long()
    cache = DynamicCache(config=model.config)
    steps = [run(model, padded[:, :7], cache, attention_mask=mask[:, :7])]
    steps += [run(model, padded[:, t : t + 1], cache, attention_mask=mask[:, : t + 1]) for t in range(7, 16)]
    assert_close(torch.cat(steps, dim=1)[:, 3:], model(ids).logits)


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_crop_takes_tokens_back(model, removed):
    ids, wrong = tokens(), tokens().flip(1)
    cache = DynamicCache(config=model.config)
    run(model, ids[:, :5], cache)
    cache.activate_past_recording()
    run(model, torch.cat([ids[:, 5:7], wrong[:, :removed]], dim=1), cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == 7
    continued = [run(model, ids[:, 7:10], cache)]
    cache.crop(0)  # as `generate` does after every step; a sliding layer of transformers 5.17 needs it
    continued = torch.cat([*continued, run(model, ids[:, 10:], cache)], dim=1)
    assert_close(continued, model(ids).logits[:, 7:])


@pytest.mark.parametrize("rule", RULES)
def test_crop_twice_over_single_steps(rule):
    model, ids = tiny_model(rule), tokens()
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for t in range(9):
        run(model, ids[:, t : t + 1], cache)
    cache.crop(-2)
    cache.crop(-1)
    assert_close(run(model, ids[:, 6:], cache), model(ids).logits[:, 6:])


def test_crop_without_recording_is_refused():
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    run(model, tokens(), cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


def test_crop_cannot_go_back_before_the_last_one():
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    run(model, tokens(), cache)
    cache.crop(0)
    with pytest.raises(RuntimeError, match="0 were recorded"):
        cache.crop(-1)


def test_rows_can_be_repeated_selected_and_reordered(model):
    ids, more = tokens(), tokens(2, 4)
    order = torch.tensor([1, 0, 1])
    whole = torch.cat([ids[order], more[order]], dim=1)
    for name, argument in (("batch_select_indices", order), ("reorder_cache", order)):
        cache = DynamicCache(config=model.config)
        run(model, ids, cache)
        getattr(cache, name)(argument)
        assert_close(run(model, more[order], cache), model(whole).logits[:, -4:])
    cache = DynamicCache(config=model.config)
    run(model, ids, cache)
    cache.batch_repeat_interleave(2)
    whole = torch.cat([ids, more], dim=1).repeat_interleave(2, dim=0)
    assert_close(run(model, more.repeat_interleave(2, dim=0), cache), model(whole).logits[:, -4:])


def test_a_copied_cache_is_independent(model):
    ids = tokens()
    cache = DynamicCache(config=model.config)
    run(model, ids[:, :6], cache)
    twin = copy.deepcopy(cache)
    for t in range(6, 13):
        run(model, ids[:, t : t + 1].flip(0), cache)
    assert_close(run(model, ids[:, 6:], twin), model(ids).logits[:, 6:])


def test_a_cache_made_without_a_config_gets_fast_weight_layers():
    model = tiny_model()
    ids = tokens()
    cache = DynamicCache()
    run(model, ids[:, :6], cache)
    assert all(isinstance(layer, FastWeightCacheLayer) for layer in cache.layers)
    assert_close(run(model, ids[:, 6:], cache), model(ids).logits[:, 6:])


def test_a_quantised_cache_is_refused():
    cache = QuantizedCache.__new__(QuantizedCache)  # its constructor asks for a quantisation library
    cache.layers = [DynamicLayer()]
    with pytest.raises(ValueError, match="quantised"):
        install_fast_weight_layers(cache, [0])


def test_a_cache_in_use_by_attention_is_refused():
    attention = tiny_model("attention first")
    cache = DynamicCache(config=attention.config)
    run(attention, tokens(), cache)
    with pytest.raises(ValueError, match="already in use"):
        install_fast_weight_layers(cache, [0])


def test_decoding_updates_the_state_in_place():
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    run(model, tokens(), cache)
    before = cache.layers[0].states["state"].data_ptr()
    run(model, tokens(2, 1), cache)
    assert cache.layers[0].states["state"].data_ptr() == before


def test_what_a_convolution_keeps_does_not_hold_the_prefill():
    """A view of the last inputs would keep all of them in memory for as long as the cache lives."""
    with torch.no_grad():
        cache = tiny_model()(tokens(1, 13), use_cache=True).past_key_values
    for layer in cache.layers:
        for name, x in layer.states.items():
            assert x.untyped_storage().nbytes() <= x.numel() * x.element_size(), name
