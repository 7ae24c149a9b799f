"""Every invariant I1 to I50 has a test named after it, and every such test fails where a rule breaks the law."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_fwp import tiny_model
from torch.autograd.gradcheck import GradcheckError

from hf_fwp import FastWeightPainter, features
from hf_fwp.cache import FastWeightCacheLayer
from hf_fwp.duality import DualForm
from hf_fwp.rules import RULES

TESTS = Path(__file__).parent.parent
# laws of rules that are not here, with what they are waiting for
LATER = {
    39: "mesa_net",
    40: "titans_linear and rwkv7_delta",
}


def module(path: str):
    """A module of tests, under a name of its own, so that its tests are not collected a second time."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), TESTS / f"{path}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


linear = module("ops/test_invariants")
reductions = module("ops/test_reductions")
own = module("ops/test_sequential_invariants")
backends = module("ops/test_backends")
mapped = module("models/test_features")
cached = module("models/test_cache")
models = module("models/test_models")
painted = module("models/test_painter")
dual = module("ops/test_dual_form")


def invariants() -> dict[int, list[str]]:
    """The tests of each invariant by its number, read off their names."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("*.py")):
        for name in re.findall(r"^def (test(?:_i\d+)+\w*)", path.read_text(), flags=re.MULTILINE):
            for number in re.findall(r"_i(\d+)(?=_)", name):
                found.setdefault(int(number), []).append(f"{path.relative_to(TESTS)}::{name}")
    return found


def test_every_invariant_has_a_test():
    missing = set(range(1, 51)) - set(invariants())
    assert missing <= set(LATER)


# what is done to every rule: rule -> rule


def late(rule):
    """Reads come one token late."""

    def apply(*args, **kwargs):
        out, states = rule.apply(*args, **kwargs)
        return out.roll(1, dims=1), states

    return replace(rule, apply=apply)


def fading(rule):
    """States lose a little."""
    return with_states(rule, lambda x: 0.99 * x)


def growing(rule):
    """States gain a little, everywhere."""
    return with_states(rule, lambda x: x + 0.01)


def narrow(rule):
    """States are kept in bf16."""
    return with_states(rule, lambda x: x.bfloat16())


def with_states(rule, change):
    def apply(*args, **kwargs):
        out, states = rule.apply(*args, **kwargs)
        return out, {name: change(x) for name, x in states.items()}

    return replace(rule, apply=apply)


def mixing(rule):
    """Rows and heads hear of each other."""

    def apply(*args, **kwargs):
        out, states = rule.apply(*args, **kwargs)
        return out + out.mean((0, 2), keepdim=True), states

    return replace(rule, apply=apply)


def half_a_gradient(rule):
    """Values are right and gradients are not."""

    def apply(*args, **kwargs):
        out, states = rule.apply(*args, **kwargs)
        return (out + out.detach()) / 2, states

    return replace(rule, apply=apply)


def aware_of_the_query(rule):
    """The raw query is heard beside its softmax."""

    def apply(*args, **kwargs):
        out, states = rule.apply(*args, **kwargs)
        return out + kwargs["q"].mean(-1, keepdim=True), states

    return replace(rule, apply=apply)


def undecayed(rule):
    """What is erased is read before the decay."""

    def step(states, *, k, v, beta, g, **rest):
        held = torch.einsum("bhkv,bhk->bhv", states["state"], k)
        decay = g.exp()[..., None] if g.ndim == 3 else g.exp()[..., None, None]
        return {"state": decay * states["state"] + k[..., None] * (beta[..., None] * (v - held))[..., None, :]}, v

    return replace(rule, step=step)


def never_forgetting(rule):
    """Hebb's rule in place of Oja's."""

    def step(states, *, k, v, beta, **rest):
        return {"state": states["state"] + beta[..., None, None] * k[..., None] * v[..., None, :]}, v

    return replace(rule, step=step)


def half_a_step(rule):
    """What is held exactly lasts half as long."""

    def apply(*args, options, **kwargs):
        half = options["time_step"] / (2 if options["solver"] == "exact_hold" else 1)
        return rule.apply(*args, options={**options, "time_step": half}, **kwargs)

    return replace(rule, apply=apply)


def halved(rule):
    """Half of what should be read."""

    def apply(*args, **kwargs):
        out, states = rule.apply(*args, **kwargs)
        return out / 2, states

    return replace(rule, apply=apply)


def late_in_chunks(rule):
    """Reads come one token late, but not in the recurrence."""

    def apply(*args, backend=None, **kwargs):
        return (late(rule) if backend == "torch" else rule).apply(*args, backend=backend, **kwargs)

    return replace(rule, apply=apply)


# (test, what it is given, what is done, to which rule; "" = to all)
BROKEN = [
    (linear.test_i1_i2_linear_attention_is_masked_attention_without_softmax, ["torch"], late, ""),
    (linear.test_i3_orthonormal_keys_store_every_value_exactly, ["torch"], fading, ""),
    (linear.test_i4_a_repeated_key_is_overwritten_at_rate_beta, ["torch"], late, ""),
    (linear.test_i5_i37_keys_of_length_below_one, [], halved, ""),
    (linear.test_i6_nothing_is_written_at_rate_zero, ["kimi_delta", "torch"], growing, ""),
    (linear.test_i6_what_is_never_written_is_a_linear_layer, ["torch"], halved, ""),
    (linear.test_i7_a_step_can_be_reversed, ["gated_delta_net", 1], undecayed, ""),
    (linear.test_i7_a_step_can_be_reversed, ["kimi_delta", 6], undecayed, ""),
    (reductions.test_i9_normalised_removal_is_a_shorter_key_at_a_higher_rate, ["torch"], fading, "delta_net"),
    (linear.test_i10_without_decay_the_gated_rule_is_the_delta_rule, ["torch"], late, "gated_delta_net"),
    (reductions.test_i11_equal_channels_are_one_decay_per_head, ["torch"], late, "kimi_delta"),
    (reductions.test_i11_gates_with_equal_channels_are_one_rate, ["torch"], late, "gated_delta_net_2"),
    (reductions.test_i11_comba_that_erases_all_and_corrects_nothing_is_the_gated_delta_rule, ["torch"], late, "comba"),
    (reductions.test_i12_delta_product_is_the_delta_rule_on_all_steps, ["torch", 3], late, "delta_product"),
    (reductions.test_i13_two_reflections_rotate, [], growing, ""),
    (own.test_i14_an_unsquashed_from_to_programmer_is_linear_attention, ["torch"], late, "fwp_1991"),
    (own.test_i15_a_delta_mlp_that_writes_nothing_is_its_query, ["torch"], late, ""),
    (own.test_i16_a_delta_delta_net_that_writes_nothing_reads_nothing, ["torch"], late, ""),
    (own.test_i17_a_delta_rnn_without_recurrent_writes_is_a_delta_net, ["torch"], late, "delta_rnn"),
    (own.test_i18_a_delta_lstm_with_open_gates_is_the_update_s_delta_net, ["torch"], late, "delta_lstm"),
    (own.test_i19_a_recurrent_delta_net_without_recurrence_is_a_delta_net, ["torch"], late, "recurrent_delta_net"),
    (own.test_i20_a_constant_added_to_queries_and_keys_changes_nothing, ["torch", "q", True], aware_of_the_query, ""),
    (own.test_i21_a_query_reaches_later_outputs_only_through_a_recurrent_read, ["delta_rnn", "torch"], late, ""),
    (linear.test_i21_what_is_asked_changes_nothing_later, ["kimi_delta"], late, ""),
    (own.test_i22_a_srwm_with_rates_zero_is_a_linear_layer, ["torch"], late, ""),
    (own.test_i23_a_srwm_with_equal_query_and_key_never_changes, ["torch"], growing, ""),
    (own.test_i24_a_srwm_reads_before_it_writes, ["torch"], late, ""),
    (own.test_i25_a_rate_of_the_srwm_acts_on_its_own_columns, ["torch", 1], growing, ""),
    (own.test_i26_a_self_modifying_net_with_rates_zero_is_a_delta_net, ["torch"], late, "self_modifying_delta"),
    (own.test_i27_euler_with_steps_of_one_is_the_discrete_rule, ["torch"], late, "continuous_fwp"),
    (own.test_i28_exact_hold_is_the_limit_of_small_euler_steps, ["reference"], half_a_step, ""),
    (own.test_i28_what_a_key_of_length_one_retrieves_nears_its_value_exponentially, ["torch"], growing, ""),
    (own.test_i29_two_half_steps_of_exact_hold_are_one_and_none_is_nothing, ["torch"], growing, ""),
    (reductions.test_i30_oja_of_a_linear_neuron_finds_the_principal_component, [], never_forgetting, ""),
    (own.test_i31_a_fast_weight_memory_without_clipping_is_a_delta_rule, ["torch"], growing, "fast_weight_memory"),
    (own.test_i32_ba_s_fast_weights_attend_to_the_past, ["torch"], growing, ""),
    (reductions.test_i34_oja_is_the_transposed_delta_rule, ["torch"], fading, "oja"),
    (reductions.test_i35_gated_oja_without_decay_is_oja, ["torch"], late, "oja"),
    (reductions.test_i35_oja_without_forgetting_is_hebb, [], late, "oja"),
    (linear.test_i38_negative_eigenvalues_count_parity, ["torch"], late, ""),
    (linear.test_i42_split_is_whole, ["delta_rnn", 30], late, ""),
    (linear.test_i42_one_token_at_a_time_is_whole, ["delta_rnn"], late, ""),
    (backends.test_i43_gradcheck, ["kimi_delta", "torch"], half_a_gradient, ""),
    (linear.test_i44_padding_is_absence, ["srwm", "torch"], late, ""),
    (linear.test_i44_padding_alone_leaves_the_state_bit_for_bit, ["srwm", 70, None], growing, ""),
    (linear.test_i46_rows_and_heads_are_independent, ["comba", "torch"], mixing, ""),
    (linear.test_i47_the_future_does_not_reach_the_past, ["fwp_1993"], late, ""),
    (linear.test_i49_bf16_inputs_are_summed_in_float32, ["oja"], narrow, ""),
]


@pytest.mark.parametrize(("test", "given", "wrong", "rule"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_rule_breaks_the_law(test, given, wrong, rule, monkeypatch):
    test(*given)
    for name in [rule] if rule else list(RULES):
        monkeypatch.setitem(RULES, name, wrong(RULES[name]))
    with pytest.raises((AssertionError, GradcheckError)):
        test(*given)


def test_i8_fails_where_chunks_read_late(monkeypatch):
    monkeypatch.setitem(RULES, "delta_rnn", late_in_chunks(RULES["delta_rnn"]))
    with pytest.raises(AssertionError):
        linear.test_i8_any_chunk_length_gives_the_recurrence(64, monkeypatch)


def test_i36_and_i37_fail_for_other_features(monkeypatch):
    monkeypatch.setattr(features.Dpfp, "expand", lambda self, x: x.abs())
    monkeypatch.setattr(features.Favor, "expand", lambda self, x: x.abs())
    monkeypatch.setitem(features.QK_NORMS, "sum", features.identity)
    for test, *given in (
        (mapped.test_i36_dpfp_is_homogeneous_of_degree_two_and_non_negative,),
        (mapped.test_i36_favor_estimates_the_exponential_kernel,),
        (mapped.test_i37_keys_that_sum_to_one_make_contractions, "elu1", "sum"),
    ):
        with pytest.raises(AssertionError):
            test(*given)


def test_i33_fails_where_a_stroke_is_more_than_one_key_and_one_value(monkeypatch):
    def smeared(self, state, k, v, beta, *, first):
        return state + k[..., None] * v[..., None, :] + beta[..., None, None] * torch.eye(self.side)

    monkeypatch.setattr(FastWeightPainter, "_painted", smeared)
    with pytest.raises(AssertionError):
        painted.test_i33_the_rank_is_that_of_the_steps(2)
    with pytest.raises(AssertionError):
        painted.test_i33_the_first_step_of_the_delta_rule_is_not_gated("delta", True)


def test_i41_fails_where_patterns_are_forgotten(monkeypatch):
    monkeypatch.setattr(DualForm, "add", lambda self, x, error: None)
    with pytest.raises(AssertionError):
        dual.test_i41_the_trained_layer_is_attention_over_its_training(True)


def test_i45_fails_with_a_cache_that_forgets(monkeypatch):
    def forgetful(self, states):
        self.states = {name: 0.99 * x for name, x in states.items()}

    monkeypatch.setattr(FastWeightCacheLayer, "_store", forgetful)
    with torch.no_grad(), pytest.raises(AssertionError, match="relative error"):
        cached.test_i45_token_by_token_equals_full(tiny_model("srwm"))


def test_i48_fails_where_random_features_are_not_saved(monkeypatch, tmp_path):
    def unsaved(self, name, tensor, persistent=True):
        torch.nn.Module.register_buffer(self, name, tensor, persistent=False)

    monkeypatch.setattr(features.Favor, "register_buffer", unsaved)
    with pytest.raises(AssertionError):
        models.test_i48_feature_maps_are_saved_too("favor:8", tmp_path)


def test_every_law_was_broken():
    here = [name for test, *_ in BROKEN for name in [test.__name__]] + [name for name in globals() if "_fail" in name]
    broken = {int(number) for name in here for number in re.findall(r"_?i(\d+)(?=_)", name)}
    # I50 compares with somebody else's code, and changes its own inputs to see that it can fail
    assert set(range(1, 51)) - broken - {50} <= set(LATER)
