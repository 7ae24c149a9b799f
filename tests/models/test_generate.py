"""Every way to decode must give the tokens that decoding without a cache gives."""

import pytest
import torch
from tiny import byte_tokenizer
from tiny_fwp import PAD, assert_close, tiny_model, tokens
from transformers import DynamicCache, StaticCache, pipeline
from transformers.masking_utils import create_masks_for_generate

NEW = 8
# a generated PAD would be masked when its sequence is continued, and was not when it was generated
PLAIN = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [PAD]}
MODES = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunked prefill of one": {"prefill_chunk_size": 1},
    "beam search": {"num_beams": 3},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
}


def generate(model, ids, **kwargs):
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=(ids != PAD).long(), **{**PLAIN, **kwargs})


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_changes_nothing(model, mode):
    ids = tokens(2, 11)
    ids[0, :3] = PAD
    uncached = {**MODES[mode], "use_cache": False}
    for name in ("cache_implementation", "prefill_chunk_size"):
        uncached.pop(name, None)
    assert torch.equal(generate(model, ids, **MODES[mode]), generate(model, ids, **uncached))


def test_a_padded_batch_equals_each_alone(kind):
    model = tiny_model(kind)
    ids = tokens(2, 11)
    ids[0, :4] = PAD
    together = generate(model, ids)[:, 11:]
    alone = [generate(model, ids[:1, 4:])[:, 7:], generate(model, ids[1:])[:, 11:]]
    assert torch.equal(together, torch.cat(alone))


def test_continuation_from_a_returned_cache(model):
    ids = tokens(2, 11)
    first = generate(model, ids, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tokens(2, 3)], dim=1)
    continued = generate(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(continued, generate(model, longer))


@pytest.mark.parametrize("assistant", ["prompt lookup", "smaller model"])
def test_speculation_equals_greedy(kind, assistant):
    model = tiny_model(kind)
    ids = tokens(1, 11).repeat(1, 2)
    if assistant == "prompt lookup":
        guesses = {"prompt_lookup_num_tokens": 3}
    else:
        helper = tiny_model("gated_delta_net")
        helper.generation_config.num_assistant_tokens = 3
        guesses = {"assistant_model": helper}
    assert torch.equal(generate(model, ids, **guesses, max_new_tokens=14), generate(model, ids, max_new_tokens=14))


def test_embeddings_in_place_of_tokens(model):
    ids = tokens(2, 11)
    embeds = model.get_input_embeddings()(ids)
    from_embeds = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **PLAIN)
    assert torch.equal(from_embeds, generate(model, ids)[:, 11:])


def test_forward_after_generate_from_the_same_cache(model):
    cache = DynamicCache(config=model.config)
    generated = generate(model, tokens(2, 11), past_key_values=cache)
    assert cache.get_seq_length() == generated.shape[1] - 1


def test_decoding_compiles_to_one_graph():
    model = tiny_model(rule=["delta_net", "full_attention"])
    ids = tokens(2, 14)
    graphs = []
    compiled = torch.compile(model.forward, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(ids[:, :11], past_key_values=cache)
        for t in range(11, 14):
            inputs = {"past_key_values": cache, "position_ids": torch.full((2, 1), t), "use_cache": True}
            masks = create_masks_for_generate(
                model.config, torch.empty(2, 1, 0).double(), torch.ones(2, t + 1), cache, inputs["position_ids"]
            )
            logits = compiled(ids[:, t : t + 1], attention_mask=masks, **inputs).logits
        assert_close(logits, model(ids).logits[:, -1:])
    assert len(graphs) == 1


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="continuous batching"):
        tiny_model().generate_batch([[1, 2, 3]])


def test_pipeline_in_batches():
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, dtype=torch.float64)
    texts = ["fast weights", "a key", "what is written can be read"]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    batched = pipe(texts, batch_size=3, **PLAIN)
    single = [pipe(text, **PLAIN) for text in texts]
    assert [answer[0]["generated_text"] for answer in batched] == [answer[0]["generated_text"] for answer in single]
