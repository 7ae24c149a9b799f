"""Every way that transformers offers to generate gives the tokens of plain decoding without a cache, or says no.

The oracle is always the same model without a cache, without padding, one row at a time where rows could meet.
"""

from queue import Queue

import pytest
import torch
import transformers
from every_model import every_model
from packaging.version import Version
from tiny import ALPHABET, byte_tokenizer
from tiny_fwp import PAD, assert_close, tiny_model, tokens
from transformers import CompileConfig, DynamicCache, StaticCache, pipeline
from transformers.generation.streamers import BaseStreamer

OLD = Version(transformers.__version__) < Version("5.23")
NEW = 6
PLAIN = {"max_new_tokens": NEW, "do_sample": False}
MODES = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunked prefill into a static cache": {"prefill_chunk_size": 4, "cache_implementation": "static"},
    "beam search": {"num_beams": 3},
    "beams in a static cache": {"num_beams": 3, "cache_implementation": "static"},
    "sampling, several sequences": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams, several sequences": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
}
ABOUT_CACHES = ("cache_implementation", "prefill_chunk_size")


def generate(model, ids, **kwargs):
    torch.manual_seed(0)
    return model.generate(ids, **{"attention_mask": (ids != PAD).long(), **PLAIN, **kwargs})


def uncached(model, ids, **kwargs):
    return generate(model, ids, **{key: x for key, x in kwargs.items() if key not in ABOUT_CACHES}, use_cache=False)


def left_padded(amount=3, batch=2, length=9):
    ids = tokens(batch, length)
    ids[0, :amount] = PAD
    return ids


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_gives_the_tokens_of_no_cache(model, mode):
    ids = left_padded()
    assert torch.equal(generate(model, ids, **MODES[mode]), uncached(model, ids, **MODES[mode]))


def test_left_padding_gives_the_tokens_of_each_row_alone(name):
    model, ids = every_model(name, wide=True), left_padded()
    alone = [uncached(model, ids[:1, 3:])[:, 6:], uncached(model, ids[1:])[:, 9:]]
    assert torch.equal(generate(model, ids)[:, 9:], torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_prompt_padded_on_the_right_then_decoded(name, static):
    model, ids = every_model(name, wide=True), tokens(2, 12)
    padded, mask = ids[:, :8].clone(), torch.ones(2, 8, dtype=torch.long)
    padded[0, 5:], mask[0, 5:] = PAD, 0
    caches = {False: lambda: DynamicCache(config=model.config), True: lambda: StaticCache(model.config, 16)}
    cache = caches[static]()
    model(padded, attention_mask=mask, position_ids=positions(mask), past_key_values=cache)
    for t in range(4):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        step = torch.stack([ids[0, 5 + t], ids[1, 8 + t]])[:, None]
        placed = positions(mask)[:, -1:]
        logits = model(step, attention_mask=mask, position_ids=placed, past_key_values=cache).logits[:, -1]
        expected = [model(ids[:1, : 6 + t]).logits[:, -1], model(ids[1:, : 9 + t]).logits[:, -1]]
        assert_close(logits, torch.cat(expected), 1e-6)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp_min(0)


def test_continuation_from_a_returned_cache(model):
    ids = tokens(2, 9)
    first = generate(model, ids, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tokens(2, 3)], dim=1)
    whole = {"attention_mask": torch.ones_like(longer)}  # a model may have generated the token of the padding
    continued = generate(model, longer, past_key_values=first.past_key_values, **whole)
    assert torch.equal(continued, uncached(model, longer, **whole))


def test_embeddings_in_place_of_tokens(model):
    ids = tokens(2, 9)
    embeds = model.get_input_embeddings()(ids)
    given = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **PLAIN)
    assert torch.equal(given, uncached(model, ids)[:, 9:])


@pytest.mark.parametrize("guesses", ["prompt lookup", "assistant"])
def test_speculation_gives_the_greedy_tokens(model, guesses):
    ids = tokens(1, 7).repeat(1, 2)
    settings = {"prompt_lookup_num_tokens": 3}
    if guesses == "assistant":
        helper = tiny_model("delta_net", vocab_size=model.config.vocab_size)
        helper.generation_config.num_assistant_tokens = 3
        settings = {"assistant_model": helper}
    assert torch.equal(generate(model, ids, **settings, max_new_tokens=10), uncached(model, ids, max_new_tokens=10))


class Collected(BaseStreamer):
    def __init__(self):
        self.queue = Queue()

    def put(self, value):
        self.queue.put(value)

    def end(self):
        self.queue.put(None)


def test_a_stream_is_what_is_returned(model):
    ids, stream = tokens(1, 9), Collected()
    returned = generate(model, ids, streamer=stream)
    parts = list(iter(stream.queue.get_nowait, None))
    assert len(parts) == 1 + NEW
    assert torch.equal(torch.cat([part.reshape(1, -1) for part in parts], dim=1), returned)
    assert torch.equal(returned, uncached(model, ids))


def byte_model(name):
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer, every_model(name, wide=True, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)


def test_a_stop_string_stops(name):
    tokenizer, model = byte_model(name)
    ids = tokenizer("what is written can be read", return_tensors="pt")["input_ids"]
    # half of a letter has no string: the random model may only say capitals
    settings = {**PLAIN, "suppress_tokens": [i for i, token in enumerate(ALPHABET) if not "A" <= token <= "Z"]}
    free = model.generate(ids, **settings, use_cache=False)
    stop = tokenizer.decode(free[0, -3:-2])
    first = next(t for t in range(ids.shape[1], free.shape[1]) if stop in tokenizer.decode(free[0, t : t + 1]))
    stopped = model.generate(ids, **settings, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(stopped, free[:, : first + 1])


def test_a_pipeline_in_batches_says_what_it_says_one_by_one(name):
    tokenizer, model = byte_model(name)
    texts = ["fast weights", "a key", "what is written can be read"]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    batched = pipe(texts, batch_size=3, **PLAIN)
    single = [pipe(text, **PLAIN, use_cache=False) for text in texts]
    assert [answer[0]["generated_text"] for answer in batched] == [answer[0]["generated_text"] for answer in single]


@torch.no_grad()
def test_tokens_taken_back_and_fed_again(model):
    ids, wrong = tokens(), tokens().flip(1)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    cache.activate_past_recording()
    model(torch.cat([ids[:, 5:7], wrong[:, :2]], dim=1), past_key_values=cache)
    cache.crop(-2)
    assert cache.get_seq_length() == 7
    assert_close(model(ids[:, 7:], past_key_values=cache).logits, model(ids).logits[:, 7:], 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_reset_cache_is_a_fresh_one(model, static):
    if OLD and not static and len(model.hf_fwp_layers) < model.config.num_hidden_layers:
        pytest.skip("before 5.23 growing keys and values keep their length in reset (huggingface/transformers#48809)")
    ids = tokens()
    cache = StaticCache(model.config, 16) if static else DynamicCache(config=model.config)
    model(ids.flip(1), past_key_values=cache)
    cache.reset()
    logits = [model(part, past_key_values=cache).logits for part in ids.split([5, 7, 1], dim=1)]
    assert_close(torch.cat(logits, dim=1), model(ids).logits, 1e-6)


@torch.no_grad()
def test_rows_of_a_cache_repeated_selected_reordered(model):
    ids, more, order = tokens(), tokens(2, 4), torch.tensor([1, 0, 1])
    changes = {"batch_select_indices": order, "reorder_cache": order, "batch_repeat_interleave": 2}
    for change, argument in changes.items():
        rows = order if isinstance(argument, torch.Tensor) else torch.tensor([0, 0, 1, 1])
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        getattr(cache, change)(argument)
        whole = model(torch.cat([ids[rows], more[rows]], dim=1)).logits[:, -4:]
        assert_close(model(more[rows], past_key_values=cache).logits, whole, 1e-6)


@pytest.mark.slow
def test_compiled_decoding_gives_the_same_tokens(name):
    model, ids = every_model(name), left_padded()
    compiled = CompileConfig(backend="eager", fullgraph=True, dynamic=False)
    compiled._compile_all_devices = True  # transformers compiles on accelerators only, unless told so
    settings = {"cache_implementation": "static", "compile_config": compiled, "max_new_tokens": 4}
    torch._dynamo.reset()
    assert torch.equal(generate(model, ids, **settings), uncached(model, ids, max_new_tokens=4))


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_gives_the_tokens_of_no_cache(model, cache):
    """The states stay where they are. Keys and values are moved by streams, which only an accelerator has."""
    expected = uncached(model, tokens())
    attends = len(model.hf_fwp_layers) < model.config.num_hidden_layers
    if attends and not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|accelerator"):
            generate(model, tokens(), cache_implementation=cache)
    else:
        assert torch.equal(generate(model, tokens(), cache_implementation=cache), expected)
    assert torch.equal(generate(model, tokens()), expected)


REFUSED = {
    "quantised cache": (
        lambda model: generate(model, tokens(), cache_implementation="quantized"),
        "cache_implementation='quantized'",
    ),
    "early exit": (lambda model: generate(model, tokens(1), assistant_early_exit=1), "prompt_lookup_num_tokens"),
    "continuous batching": (lambda model: model.generate_batch([[1, 2, 3]]), "continuous batching"),
    "its manager": (lambda model: model.init_continuous_batching(), "continuous batching"),
    "its context": (lambda model: enter(model.continuous_batching_context_manager()), "continuous batching"),
    "paged cache": (lambda model: generate(model, tokens(), cache_implementation="paged"), "continuous batching"),
}


def enter(context):
    with context:
        raise AssertionError("must have been refused")


@pytest.mark.parametrize("mode", REFUSED)
def test_refused_with_a_sentence_and_works_afterwards(model, mode):
    use, message = REFUSED[mode]
    with pytest.raises(ValueError, match=message):
        use(model)
    assert torch.equal(generate(model, tokens()), uncached(model, tokens()))
