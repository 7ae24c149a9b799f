"""What each option of the mixer means, by laws that hold for every rule."""

import pytest
import torch
from tiny_fwp import assert_close
from transformers.cache_utils import DynamicCache

from hf_fwp import RULES, FastWeightLayer, MixerOptions
from hf_fwp.companions import ShortConvolution
from hf_fwp.options import WITHOUT_QKV
from hf_fwp.packing import Window
from hf_fwp.rules.gating import value_of

SIZES = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
BARE = {"conv_size": 0, "feature_map": "identity", "qk_norm": "l2", "output_gate": "none", "output_norm": False}


@pytest.fixture(params=RULES)
def rule(request):
    return request.param


@pytest.fixture(params=[rule for rule in RULES if RULES[rule].qkv])
def qkv_rule(request):
    return request.param


def mixer(rule, **options):
    """A mixer with these options, without those that need queries, keys and values where the rule takes none."""
    torch.manual_seed(0)
    chosen = {**SIZES, **BARE, **options}
    if not RULES[rule].qkv:
        chosen = {name: x for name, x in chosen.items() if name not in WITHOUT_QKV}
    return FastWeightLayer(MixerOptions(rule=rule, **chosen), 0).double()


def hidden(length=11):
    return torch.randn(2, length, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rotary(length=11):
    angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    angle = torch.cat([angle, angle], dim=-1)[None]
    return angle.cos(), angle.sin()


def copy_rows(layer, other, rows):
    """Give `layer`'s states the rates of `other`'s states `rows`."""
    for name in ("b_proj.weight", "b_proj.bias", "a_proj.weight", "A_log", "dt_bias"):
        if name in layer.state_dict():
            given = other.state_dict()[name].unflatten(0, (-1, other.options.num_states))
            layer.state_dict()[name].copy_(given[:, rows].flatten(0, 1))
    if other.gates is not None:
        for name, x in layer.gates.state_dict().items():
            given = other.gates.state_dict()[name]
            if not name.endswith("_down.weight"):
                given = given.unflatten(0, (other.options.num_states, -1))[rows].flatten(0, 1)
            x.copy_(given)
    for name, weight in ({} if layer.own is None else layer.own.state_dict()).items():
        by_state = other.own.state_dict()[name].unflatten(0, (other.own.states, -1))[rows]
        weight.copy_(by_state.flatten(0, 1))


@torch.no_grad()
def test_forward_is_o_proj_of_mixed_reads(qkv_rule):
    layer = mixer(qkv_rule, value_skip=2, time_scales=2, o_bias=True)
    reads = layer.mixed_reads(hidden())
    assert reads.shape[-1] == 2 * 4 * 6 + 2 * layer.writes * 2 * 6
    width = layer.o_proj.in_features
    assert_close(layer(hidden())[0], layer.o_proj(reads[..., :width]) + layer.skip_proj(reads[..., width:]))


@torch.no_grad()
def test_time_scales_are_independent_fast_weights(rule):
    two = mixer(rule, time_scales=2)
    blocks = []
    for scale in (0, 1):
        one = mixer(rule)
        for name in ("q_proj", "k_proj", "v_proj") if RULES[rule].qkv else ():
            getattr(one, name).load_state_dict(getattr(two, name).state_dict())
        copy_rows(one, two, slice(4 * scale, 4 * scale + 4))
        blocks.append(one.mixed_reads(hidden()))
    assert_close(two.mixed_reads(hidden()), torch.cat(blocks, dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("scales", [1, 2])
def test_each_state_rotates_or_not(qkv_rule, scales):
    options = {"time_scales": scales, "feature_map": "elu1"}
    turned, plain = mixer(qkv_rule, rope_heads="all", **options), mixer(qkv_rule, **options)
    choice = [state % 3 == 0 for state in range(4 * scales)]
    mixed = mixer(qkv_rule, rope_heads=choice, **options)
    reads = mixed.mixed_reads(hidden(), position_embeddings=rotary()).unflatten(-1, (-1, 6))
    turned = turned.mixed_reads(hidden(), position_embeddings=rotary()).unflatten(-1, (-1, 6))
    plain = plain.mixed_reads(hidden()).unflatten(-1, (-1, 6))
    assert not torch.allclose(turned, plain)
    expected = torch.where(torch.tensor(choice)[:, None], turned, plain)
    assert_close(reads, expected)


@torch.no_grad()
def test_rotation_depends_on_distance_only():
    layer = mixer("delta_net", rope_heads="all")
    far = tuple(part[:, 5:] for part in rotary(16))
    assert_close(layer(hidden(), position_embeddings=far)[0], layer(hidden(), position_embeddings=rotary())[0])


@torch.no_grad()
def test_partial_rotation_leaves_the_rest(qkv_rule):
    layer = mixer(qkv_rule, rope_heads="all")
    part = tuple(x[..., :4] for x in rotary())
    still = tuple(torch.stack([x[:, 0]] * 11, dim=1) for x in part)
    plain = mixer(qkv_rule)
    assert_close(layer(hidden(), position_embeddings=still)[0], plain(hidden())[0])
    assert not torch.allclose(layer(hidden(), position_embeddings=part)[0], plain(hidden())[0])


def test_rotation_needs_position_embeddings(qkv_rule):
    with pytest.raises(ValueError, match="no position_embeddings"):
        mixer(qkv_rule, rope_heads="all")(hidden())


@torch.no_grad()
def test_value_skip_adds_the_last_values(qkv_rule):
    layer = mixer(qkv_rule, value_skip=3)
    without = mixer(qkv_rule)
    without.load_state_dict(layer.state_dict(), strict=False)
    v = layer.v_proj(hidden())
    shifted = [torch.nn.functional.pad(v, (0, 0, j, 0))[:, : v.shape[1]] for j in range(3)]
    assert_close(layer(hidden())[0], without(hidden())[0] + layer.skip_proj(torch.cat(shifted, dim=-1)))


@pytest.mark.parametrize("own_rule", [rule for rule in RULES if RULES[rule].own])
def test_a_rule_with_states_of_its_own_has_one_query_per_state(own_rule):
    options = mixer(own_rule, state_heads="grouped").options
    assert (options.state_heads, options.num_states) == ("query", 4)


@pytest.mark.parametrize("own_rule", [rule for rule in RULES if not RULES[rule].qkv])
@pytest.mark.parametrize("option", WITHOUT_QKV)
def test_a_rule_without_queries_refuses_what_acts_on_them(own_rule, option):
    value = {"feature_map": "relu", "qk_norm": "l2", "rope_heads": "all"}.get(option, 1)
    with pytest.raises(ValueError, match=f"{option} is .* takes no queries"):
        MixerOptions(rule=own_rule, **{**SIZES, option: value})


@pytest.mark.parametrize("own_rule", [rule for rule in RULES if RULES[rule].own])
def test_a_hidden_state_that_does_not_split_over_the_heads_is_refused(own_rule):
    options = {**SIZES, "rule": own_rule, "hidden_size": 30}
    if MixerOptions(**{**options, "hidden_size": 24}).own().hidden:
        with pytest.raises(ValueError, match="split over the heads, so hidden_size"):
            MixerOptions(**options)
    else:
        assert MixerOptions(**options).hidden_size == 30


@pytest.mark.parametrize("square", [rule for rule in RULES if RULES[rule].square])
def test_larger_values_are_refused_where_keys_and_values_are_equal(square):
    with pytest.raises(ValueError, match="set expand_v=1"):
        MixerOptions(rule=square, **SIZES, value_head_dim=8)


@torch.no_grad()
@pytest.mark.parametrize("rule", [rule for rule in RULES if not RULES[rule].own])
def test_grouped_states_equal_query_states_with_equal_rates(rule):
    grouped, query = mixer(rule, state_heads="grouped"), mixer(rule)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(query, name).load_state_dict(getattr(grouped, name).state_dict())
    copy_rows(query, grouped, torch.tensor([0, 0, 1, 1]))
    assert_close(grouped(hidden())[0], query(hidden())[0])


@torch.no_grad()
def test_more_value_heads_than_keys_share_the_keys(qkv_rule):
    layer = mixer(qkv_rule, num_attention_heads=2, num_value_heads=4, time_scales=2)
    one = mixer(qkv_rule, num_attention_heads=1, num_key_value_heads=1)
    states = 0

    def of_head(weight, head):
        writes = 1 if weight is layer.q_proj.weight else layer.writes
        return weight.unflatten(0, (writes, -1, 6))[:, head].flatten(0, 1)

    reads = layer.mixed_reads(hidden()).unflatten(-1, (2, 4, 6))
    for scale in range(2):
        for head in range(4):
            for name, heads in (("q_proj", head // 2), ("k_proj", head // 2), ("v_proj", head)):
                getattr(one, name).weight.copy_(of_head(getattr(layer, name).weight, heads))
            copy_rows(one, layer, slice(states, states + 1))
            states += 1
            assert_close(reads[:, :, scale, head], one.mixed_reads(hidden()))


@torch.no_grad()
def test_a_convolution_of_the_current_token_changes_nothing(qkv_rule):
    layer = mixer(qkv_rule, conv_size=3)
    plain = mixer(qkv_rule)
    plain.load_state_dict(layer.state_dict(), strict=False)
    for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
        weight = getattr(layer, name).weight
        weight.zero_()
        weight[:, :, -1] = 1
    assert_close(layer(hidden())[0], plain(hidden())[0])


@torch.no_grad()
def test_a_convolution_equals_torch():
    convolution = ShortConvolution(24, 4).double()
    y, kept = convolution(hidden(), Window.of(None, None, total=11))
    padded = torch.nn.functional.pad(hidden().transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(padded, convolution.weight, groups=24).transpose(1, 2)
    assert_close(y, expected)
    assert torch.equal(kept, hidden()[:, -3:])


@torch.no_grad()
def test_rates(rule):
    layer = mixer(rule, allow_neg_eigval=True)
    rates, halved = layer._rates(hidden()), mixer(rule, allow_neg_eigval=False)._rates(hidden())
    assert set(rates) == set(RULES[rule].inputs_with(layer.options.rule_options))
    for name in {"beta", "erase"} & set(rates):
        assert_close(rates[name], 2 * halved[name])
    for name, gate in layer._rates(hidden(), raw=True).items():
        assert torch.equal(value_of(gate), rates[name])
    if "g" in rates:
        assert (rates["g"] < 0).all()
    if hasattr(layer, "a_proj"):
        layer.a_proj.weight.zero_()
        constant = layer._rates(hidden())["g"]
        expected = -layer.A_log.exp() * torch.nn.functional.softplus(layer.dt_bias)
        assert_close(constant, expected.expand_as(constant))


@torch.no_grad()
@pytest.mark.parametrize("gate", ["sigmoid2", "low_rank_sigmoid", "low_rank_sigmoid_bias"])
def test_norm_scale_and_gate(rule, gate):
    layer = mixer(rule, output_norm=True, output_gate=gate, output_scale=0.5)
    bare = mixer(rule)
    bare.load_state_dict(layer.state_dict(), strict=False)
    reads = bare.mixed_reads(hidden()).unflatten(-1, (-1, 6)) * 0.5
    normed = reads * torch.rsqrt(reads.square().mean(-1, keepdim=True) + 1e-6) * layer.o_norm.weight
    assert (list(layer.g_proj.modules())[-1].bias is None) == (gate != "low_rank_sigmoid_bias")
    gate = (2 if gate == "sigmoid2" else 1) * torch.sigmoid(layer.g_proj(hidden()))
    assert_close(layer.mixed_reads(hidden()), normed.flatten(2) * gate, 1e-6)


@torch.no_grad()
def test_every_form_of_mask_says_the_same(rule):
    layer = mixer(rule, conv_size=3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1], [1] * 11])
    causal = torch.tril(torch.ones(11, 11, dtype=torch.bool)) & mask[:, None, None, :].bool()
    additive = torch.zeros(causal.shape, dtype=torch.float64).masked_fill(~causal, torch.finfo(torch.float64).min)
    expected = layer(hidden(), mask)[0]
    assert (expected[0, :2] == 0).all()
    for given in (mask.bool(), causal, additive, {"full_attention": None, "sliding_attention": additive}):
        assert torch.equal(layer(hidden(), given)[0], expected)


@torch.no_grad()
def test_states_are_float32_under_bf16(rule):
    layer = mixer(rule, time_scales=2, feature_map="elu1").bfloat16()
    cache = DynamicCache()
    out, _ = layer(hidden().bfloat16(), past_key_values=cache)
    assert out.dtype == torch.bfloat16
    assert cache.layers[0].states["state"].dtype == torch.float32
    exact = mixer(rule, time_scales=2, feature_map="elu1")(hidden())[0]
    assert_close(out.double(), exact, 3e-2)


@torch.no_grad()
def test_rows_do_not_meet(rule):
    layer = mixer(rule, conv_size=3, value_skip=2)
    assert_close(layer(hidden()[1:])[0], layer(hidden())[0][1:])


@torch.no_grad()
def test_the_future_does_not_reach_back(rule):
    layer = mixer(rule, conv_size=3, value_skip=2, backend="reference")
    changed = hidden()
    changed[:, 7] *= -1
    before, after = layer(hidden())[0], layer(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])
