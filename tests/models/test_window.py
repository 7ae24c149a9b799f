"""The window beside fast weights against a softmax written out, in float64, in every way that a mixer is called."""

import copy
import itertools

import pytest
import torch
from teachers import tiny_teacher
from tiny_fwp import assert_close
from transformers.cache_utils import DynamicCache

from hf_fwp import FastWeightLayer, FwpConfig, MixerOptions
from hf_fwp import window as module
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.packing import Window
from hf_fwp.rotation import rotate

SIZES = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "value_head_dim": 5}
BARE = {"conv_size": 0, "feature_map": "identity", "qk_norm": "l2", "output_gate": "head_sigmoid", "output_norm": False}
# rule, options: heads that rotate and heads that do not, a norm of heads, two time scales, values skipped ahead
KINDS = {
    "gated_delta_net": {"window": 4, "sinks": 2, "rope_heads": [False, True] * 4, "time_scales": 2, "value_skip": 2},
    "linear_attention": {"window": 3, "rope_heads": [False] * 4, "head_norm": True},
    "delta_net": {"window": 1, "sinks": 3, "state_heads": "grouped", "rope_heads": "all", "conv_size": 3},
}
LENGTH = 13


def mixer_of(rule, **changes):
    torch.manual_seed(0)
    layer = FastWeightLayer(MixerOptions(rule=rule, **{**SIZES, **BARE, **KINDS.get(rule, {}), **changes}), 0).double()
    with torch.no_grad():
        layer.window.scale.mul_(torch.linspace(1, 3, 4))
    return layer


def hidden(length=LENGTH, batch=2):
    return torch.randn(batch, length, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rotary(length=LENGTH):
    angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    angle = torch.cat([angle, angle], dim=-1)[None]
    return angle.cos(), angle.sin()


def turned(x, positions):
    return None if x is None else tuple(part[:, positions] for part in x)


@pytest.fixture(params=KINDS)
def layer(request):
    return mixer_of(request.param)


def written_out(q, k, v, x, layer, *, window, sinks):
    """(window's part [B, T, H, V], mass outside [B, T, H]) by one softmax over all tokens and the place outside."""
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(group, 2)) * layer.window.scale[:, None, None]
    row, column = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
    seen = (column <= row) & ((column > row - window) | (column < sinks))
    outside = (column <= row).sum(1) - seen.sum(1)
    logit = layer.window.outside(x).transpose(1, 2) + outside.double().log()
    mass = torch.cat([scores.masked_fill(~seen, -torch.inf), logit[..., None]], dim=-1).softmax(-1)
    part = torch.einsum("bhts,bshv->bthv", mass[..., :-1], v.repeat_interleave(group, 2))
    return part, mass[..., -1].transpose(1, 2)


def without_window(layer):
    """The same fast weights, with the same parameters, and nothing beside them."""
    bare = copy.copy(layer)
    bare._modules = {name: module for name, module in layer._modules.items() if name != "window"}
    bare.options, bare.window = layer.options.replace(window=0, sinks=0), None
    return bare


def reads_written_out(layer, x, *, window, sinks):
    """The input of o_proj: the same mixer without its window gives the reads of fast weights."""
    o, width = layer.options, layer.options.num_reads * layer.options.value_head_dim
    found = without_window(layer).mixed_reads(x, position_embeddings=rotary(x.shape[1]))
    reads, skipped = found[..., :width].unflatten(-1, (o.time_scales, 4, -1)), found[..., width:]
    projected = [getattr(layer, f"{name}_proj")(x) for name in "qkv"]
    if o.conv_size:
        weights = [getattr(layer, f"{name}_conv1d").weight[:, 0] for name in "qkv"]
        taps = [torch.nn.functional.pad(p, (0, 0, o.conv_size - 1, 0)).unfold(1, o.conv_size, 1) for p in projected]
        projected = [(tap * weight).sum(-1) for tap, weight in zip(taps, weights, strict=True)]
    q, k, v = (p.unflatten(-1, (-1, size)) for p, size in zip(projected, (6, 6, 5), strict=True))
    if o.head_norm:
        q, k = layer.q_norm(q), layer.k_norm(k)
    q, k = (rotate(part, *rotary(x.shape[1])) for part in (q, k))
    near, outside = written_out(q, k, v, x, layer, window=window, sinks=sinks)
    return torch.cat([(reads * outside[:, :, None, :, None]).flatten(2), near.flatten(2), skipped], dim=-1)


def test_it_is_one_softmax_over_window_sinks_and_what_lies_outside(layer):
    x = hidden()
    window, sinks = layer.options.window, layer.options.sinks
    expected = reads_written_out(layer, x, window=window, sinks=sinks)
    assert_close(layer.mixed_reads(x, position_embeddings=rotary()), expected)
    for wrong in ((window + 1, sinks), (window, sinks + 1)):  # the comparison sees one token more
        other = reads_written_out(layer, x, window=wrong[0], sinks=wrong[1])
        with pytest.raises(AssertionError, match="relative error"):
            assert_close(layer.mixed_reads(x, position_embeddings=rotary()), other)


def test_beside_a_short_text_nothing_lies_outside():
    layer = mixer_of("gated_delta_net", window=LENGTH - 2)
    outside = layer.mixed_reads(hidden(), position_embeddings=rotary())[..., :40]
    assert not outside.any()
    layer = mixer_of("gated_delta_net", window=LENGTH - 3)
    outside = layer.mixed_reads(hidden(), position_embeddings=rotary())[..., :40]
    assert outside[:, -1].any()
    assert not outside[:, :-1].any()


def test_gradients_are_those_of_the_softmax_written_out(layer):
    x = hidden().requires_grad_()
    weight = torch.randn(layer.o_proj.in_features + layer.options.value_skip * 10, dtype=torch.float64)
    leaves = [x, *layer.window.parameters(), layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]
    ours = layer.mixed_reads(x, position_embeddings=rotary()) @ weight
    written = reads_written_out(layer, x, window=layer.options.window, sinks=layer.options.sinks) @ weight
    found = torch.autograd.grad(ours.square().sum(), leaves)
    wanted = torch.autograd.grad(written.square().sum(), leaves, allow_unused=True)
    assert_close(torch.cat([x.flatten() for x in found]), torch.cat([x.flatten() for x in wanted]))


def pieces(layer, x, edges, mask=None):
    """The outputs of x given piece by piece with a cache, and the cache."""
    cache, outputs = DynamicCache(), []
    for start, end in itertools.pairwise(edges):
        seen = None if mask is None else mask[:, :end]
        given = {"position_embeddings": turned(rotary(x.shape[1]), slice(start, end)), "past_key_values": cache}
        outputs.append(layer(x[:, start:end], attention_mask=seen, **given)[0])
    return torch.cat(outputs, dim=1), cache


@pytest.mark.parametrize("edges", [range(LENGTH + 1), [0, 1, 2, LENGTH], [0, 6, LENGTH], [0, 9, 10, LENGTH]], ids=str)
@torch.no_grad()
def test_any_pieces_are_the_whole(layer, edges):
    x = hidden()
    assert_close(pieces(layer, x, list(edges))[0], layer(x, position_embeddings=rotary())[0])


@torch.no_grad()
def test_the_cache_does_not_grow(layer):
    sizes = []
    for length in (1, LENGTH, 200):
        _, cache = pieces(layer, hidden(length), [0, length])
        sizes.append({name: tuple(state.shape) for name, state in cache.layers[0].states.items()})
    assert sizes[0] == sizes[1] == sizes[2]
    wanted = {"near_k": (2, layer.options.window - 1, 12), "sink_v": (2, layer.options.sinks, 10), "near_seen": (2,)}
    assert all(sizes[0].get(name) == shape for name, shape in wanted.items() if shape[1:] != (0, shape[-1]))


@pytest.mark.parametrize("edges", [[0, 9, LENGTH], [0, 2, 5, 6, 7, LENGTH], list(range(LENGTH + 1))], ids=str)
@torch.no_grad()
def test_padding_changes_nothing_even_where_it_is_nan(layer, edges):
    x = hidden()
    alone = layer(x[1:, :5], position_embeddings=turned(rotary(), slice(4, 9)))[0]
    padded = x.clone()
    padded[1] = torch.nan
    padded[1, 4:9] = x[1, :5]
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[0], mask[1, 4:9] = True, True
    for found in (pieces(layer, padded, edges, mask)[0], layer(padded, mask, position_embeddings=rotary())[0]):
        assert_close(found[1, 4:9], alone[0])
        assert_close(found[:1], layer(x[:1], position_embeddings=rotary())[0])
        assert not found[1, :4].any()


def test_packed_sequences_are_the_sequences_alone(layer):
    lengths = (5, 1, 9, 2)
    x = hidden(sum(lengths), batch=1).requires_grad_()
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    starts = [rotary(length) for length in lengths]
    together = tuple(torch.cat([pair[i] for pair in starts], dim=1) for i in range(2))
    packed = layer(x, position_embeddings=together, cu_seqlens=bounds.to(torch.int32))[0]
    parts = x.split(lengths, dim=1)
    alone = [layer(part, position_embeddings=turns)[0] for part, turns in zip(parts, starts, strict=True)]
    assert_close(packed, torch.cat(alone, dim=1))
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (packed, torch.cat(alone, dim=1)))
    assert_close(ours, theirs)
    with pytest.raises(AssertionError, match="relative error"):  # without the bounds one sees the other
        assert_close(layer(x, position_embeddings=together)[0], torch.cat(alone, dim=1))


@torch.no_grad()
def test_rows_can_be_reordered_and_tokens_taken_back(layer):
    x = hidden(batch=3)
    whole = layer(x[[2, 0, 0]], position_embeddings=rotary())[0]
    _, cache = pieces(layer, x, [0, 9])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    given = {"position_embeddings": turned(rotary(), slice(9, None)), "past_key_values": cache}
    assert_close(layer(x[[2, 0, 0], 9:], **given)[0], whole[:, 9:])
    _, cache = pieces(layer, x, [0, 2])
    cache.layers[0].record_past = True
    for start, end in ((2, 7), (7, 8)):
        layer(x[:, start:end] + 1, position_embeddings=turned(rotary(), slice(start, end)), past_key_values=cache)
    cache.layers[0].crop(-6)
    given = {"position_embeddings": turned(rotary(), slice(2, None)), "past_key_values": cache}
    assert_close(layer(x[:, 2:], **given)[0], layer(x, position_embeddings=rotary())[0][:, 2:])


def test_a_dropped_window_leaves_all_to_the_fast_weights(layer):
    x, width = hidden(), layer.options.num_reads * layer.options.value_head_dim
    layer.window.dropped_B = torch.tensor([True])
    reads = layer.mixed_reads(x, position_embeddings=rotary())
    assert_close(reads[..., :width], without_window(layer).mixed_reads(x, position_embeddings=rotary())[..., :width])
    assert not reads[..., width : layer.options.output_width].any()
    layer.window.dropped_B = torch.tensor([True, False, True])
    rows = layer.mixed_reads(hidden(batch=3), position_embeddings=rotary())[..., width : layer.options.output_width]
    assert rows.flatten(1).any(1).tolist() == [False, True, False]


FAMILIES = ("llama", "qwen3", "gpt_neox", "phi3", "olmo2", "cohere", "opt", "stablelm", "smollm3", "falcon")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_copy_whose_window_reaches_everything_is_the_teacher(family):
    teacher = tiny_teacher(family)
    ids = torch.randint(1, 67, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    for scales in (1, 2):
        fwp = {"window": LENGTH - 3, "sinks": 3, "time_scales": scales}
        student = copy_teacher(teacher, layers=range(4), fwp=fwp)
        assert_close(student(ids).logits, teacher(ids).logits, 1e-5)
    student = copy_teacher(teacher, layers=range(4), fwp={"window": LENGTH - 5, "sinks": 3})
    assert (student(ids).logits - teacher(ids).logits).abs().max() > 1e-3


def test_what_cannot_have_a_window_says_so():
    wrong = {
        "sinks is 4 but window is 0": {"sinks": 4},
        "window is -1": {"window": -1},
        "2 key heads and 4 value heads": {"window": 4, "num_value_heads": 4},
        "several keys of a token": {"window": 4, "rule": "delta_product", "rule_options": {"num_householder": 2}},
        "takes no queries, keys and values": {"window": 4, "rule": "fwp_1991"},
    }
    for said, options in wrong.items():
        with pytest.raises(ValueError, match=said):
            MixerOptions(**{"rule": "gated_delta_net", **SIZES, **BARE, **options})
    with pytest.raises(ValueError, match="FwpConfig has no field 'window'"):
        FwpConfig(window=4)
    with pytest.raises(ValueError, match="linear bias"):
        copy_teacher(tiny_teacher("bloom"), layers=[0], fwp={"window": 4})


def _positions_that_count_padding(x, window, seen):
    return real_positions(x, Window(None, window.offsets_BT1), seen)


def _sinks_that_are_forgotten(x, position, window, before, *, count):
    return real_sinks(x, position, window, None, count=count)


def _sinks_of_the_whole_row(x, position, window, before, *, count):
    found = real_sinks(x, position, window, before, count=count)
    return found if window.offsets_BT1 is None else found[:, :1].expand_as(found)


def _an_outside_without_its_number(self, position):
    near, first, outside = real_visible(self, position)
    return near, first, outside.clamp_max(0)


def _a_window_that_forgets_its_newest(self, x, size, history):
    return real_last(self, x, size, history).roll(1, dims=1)


real_positions, real_sinks, real_visible = module._positions, module._sinks, module.WindowAttention._visible
real_last = Window.last
WRONG = {
    "padding is counted": ("_positions", _positions_that_count_padding, "padding"),
    "sinks are forgotten": ("_sinks", _sinks_that_are_forgotten, "pieces"),
    "packed sequences share sinks": ("_sinks", _sinks_of_the_whole_row, "packed"),
    "the number outside is not told": ("WindowAttention._visible", _an_outside_without_its_number, "softmax"),
    "the window's last token is lost": ("Window.last", _a_window_that_forgets_its_newest, "pieces"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_comparisons_reject(name, monkeypatch):
    where, wrong, check = WRONG[name]
    layer = mixer_of("gated_delta_net")
    checks = {
        "padding": lambda: test_padding_changes_nothing_even_where_it_is_nan(layer, [0, 2, 5, 6, 7, LENGTH]),
        "pieces": lambda: test_any_pieces_are_the_whole(layer, [0, 6, LENGTH]),
        "packed": lambda: test_packed_sequences_are_the_sequences_alone(layer),
        "softmax": lambda: test_it_is_one_softmax_over_window_sinks_and_what_lies_outside(layer),
    }
    checks[check]()
    monkeypatch.setattr(f"hf_fwp.window.{where}", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        checks[check]()
