"""continuous_fwp on irregularly sampled series: splines, solvers, times, padding, the classification head."""

import inspect
import runpy
import sys
from pathlib import Path

import pytest
import torch
from brute_force import continuous_fwp as brute_force
from tiny_fwp import assert_close, tiny_config, tiny_model, tokens
from transformers import (
    AutoModelForSequenceClassification,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_fwp import FwpConfig, pad_series
from hf_fwp.modeling import (
    MODELS,
    FwpForCausalLM,
    FwpForQuestionAnswering,
    FwpForSequenceClassification,
    FwpForTokenClassification,
    FwpModel,
)
from hf_fwp.rules import RULES
from hf_fwp.series import Spline, SplineLayer, solve

spirals = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "classify_series.py"))["spirals"]
CONTROLS = ("ode", "cde", "dx_only")
LEARNING_RULES = ("delta", "hebb", "oja", "delta_post_tanh")
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8, "num_labels": 3}
MASKS = ([0, 1, 1, 0, 0, 1, 1, 1, 0, 1], [1] * 10, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0])


def series_model(model_class=FwpForSequenceClassification, *, layers=1, **options):
    torch.manual_seed(0)
    blocks = {"norm_type": "layer", "use_bias": True, "initializer_range": 0.5, "input_size": 3}
    config = FwpConfig(rule="continuous_fwp", rule_options=options, **{**SIZES, "num_hidden_layers": layers}, **blocks)
    return model_class(config).double().eval()


def series(batch=2, length=10):
    torch.manual_seed(1)
    values, times = torch.randn(batch, length, 3), (0.05 + torch.rand(batch, length)).cumsum(1)
    return values.double(), times.double()


def smooth_series():
    """A path that turns slowly."""
    times = torch.tensor([[0.1, 0.6, 1.4], [0.2, 0.5, 0.7]], dtype=torch.float64)
    values = torch.stack([times.sin() + 2 * times, (1.3 * times).cos() + times, 1 + 0.5 * times**2], dim=-1)
    return values, times


def reads(values, times, mask=None, **options):
    model = series_model(FwpModel, **options)
    return model(inputs_embeds=values, times=times, attention_mask=mask).last_hidden_state


# the spline


def test_a_spline_is_that_of_scipy_for_rows_of_any_length():
    interpolate = pytest.importorskip("scipy.interpolate", reason="scipy comes with torchdiffeq")
    values, times = series(batch=5, length=7)
    mask = torch.arange(7) < torch.tensor([7, 4, 3, 2, 1])[:, None]
    poisoned = torch.where(mask[..., None], values, torch.nan), torch.where(mask, times, torch.nan)
    spline = Spline.through(*poisoned, mask)
    for row, count in enumerate([7, 4, 3, 2]):
        expected = interpolate.CubicSpline(times[row, :count], values[row, :count], bc_type="natural")
        slopes = torch.from_numpy(expected(times[row, :count].numpy(), 1))
        assert_close(spline.slopes()[row, :count], slopes)
        for place in (0.0, 0.3, 1.0, count - 1.4, count - 1.0):
            below = min(int(place), count - 2)
            when = (times[row, below] + (place - below) * (times[row, below + 1] - times[row, below])).item()
            value, slope, _ = spline.at(torch.tensor(place, dtype=torch.float64).nextafter(torch.tensor(below + 0.5)))
            assert_close(value[row], torch.from_numpy(expected(when)))
            assert_close(slope[row], torch.from_numpy(expected(when, 1)))
    assert all(torch.isfinite(x).all() for x in (spline.values_BTD, spline.bends_BTD, spline.slopes()))
    straight = torch.zeros_like(spline.bends_BTD)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(Spline(spline.values_BTD, straight, spline.gaps_BT).slopes()[0], spline.slopes()[0])


# the solver


@pytest.mark.parametrize(
    ("learning_rule", "control"), [*((rule, "ode") for rule in LEARNING_RULES), ("delta", "cde"), ("delta", "dx_only")]
)
@torch.no_grad()
def test_runge_kutta_converges_with_order_four(learning_rule, control):
    """Half the step, a sixteenth of the error."""
    values, times = smooth_series()
    options = {"learning_rule": learning_rule, "control": control, "solver": "rk4"}
    exact = reads(values, times, substeps=32, **options)
    coarse, fine = (float((reads(values, times, substeps=n, **options) - exact).norm()) for n in (4, 8))
    assert coarse > 1e-9
    assert 12 < coarse / fine < 24


def test_i28_runge_kutta_reaches_the_exact_solution_for_constant_inputs():
    values, times = series(length=5)
    constant, options = values[:, :1].expand_as(values), {"time_step": 0.0}  # nothing before the first observation
    held = reads(constant, times, solver="exact_hold", **options)
    assert_close(reads(constant, times, solver="rk4", substeps=4, **options), held, 1e-6)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(reads(constant, 2 * times, solver="rk4", substeps=4, **options), held, 1e-6)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(reads(constant, times, solver="euler", **options), held, 1e-6)


def test_a_field_may_jump_at_the_observations():
    slopes = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    states = solve(lambda place, state: slopes[int(place)].expand_as(state), torch.zeros(1).double(), 4, substeps=3)
    assert_close(states[:, 0], torch.tensor([0.0, 1.0, -1.0, 4.0], dtype=torch.float64))


def gradients(values, times, **options):
    model = series_model(**options)
    values, times = values.clone().requires_grad_(), times.clone().requires_grad_()
    out = model(inputs_embeds=values, times=times, labels=torch.tensor([0, 2]))
    return torch.autograd.grad(out.loss, [values, times, *model.parameters()])


@pytest.mark.parametrize("control", CONTROLS)
def test_the_adjoint_gradient_is_that_of_the_equation(control):
    values, times = smooth_series()
    plain = gradients(values, times, control=control, solver="rk4", substeps=8)
    adjoint = gradients(values, times, control=control, solver="rk4_adjoint", substeps=8)
    for a, b in zip(adjoint, plain, strict=True):
        assert (a - b).norm() <= 1e-6 * (1 + b.norm())
    assert all(x.norm() > 0 for x in plain[:2])


def test_gradients_are_those_of_the_discretisation(monkeypatch):
    values, times = series(length=10)
    recomputed = gradients(values, times, control="cde", solver="rk4")
    monkeypatch.setattr("hf_fwp.series.checkpoint", lambda function, *given, use_reentrant: function(*given))
    for a, b in zip(recomputed, gradients(values, times, control="cde", solver="rk4"), strict=True):
        assert (a - b).norm() <= 1e-9 * (1 + b.norm())
    few_values, few_times = series(batch=1, length=3)
    few = (few_values.requires_grad_(), few_times.requires_grad_())
    assert torch.autograd.gradcheck(lambda v, t: reads(v, t, control="cde", solver="rk4"), few)


# observations: held, or on a spline


@pytest.mark.parametrize("solver", ["euler", "exact_hold"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("learning_rule", LEARNING_RULES)
def test_an_observation_lasts_as_long_as_it_says(learning_rule, backend, solver):
    if solver == "exact_hold" and learning_rule not in ("delta", "hebb"):
        with pytest.raises(ValueError, match="has no exact_hold"):
            RULES["continuous_fwp"].resolve_options({"learning_rule": learning_rule, "solver": solver})
        return
    torch.manual_seed(0)
    given = {name: torch.randn(1, 9, 1, width).double() for name, width in {"q": 4, "k": 4, "v": 3, "b": 1}.items()}
    given["dt"] = torch.rand(1, 9, 1, 1).double()
    options = {"learning_rule": learning_rule, "solver": solver, "time_step": 0.7}
    states = {"state": torch.randn(4, 3).double()}
    start = {"state": states["state"][None, None].clone()}
    out, final = RULES["continuous_fwp"].apply(**given, states=start, options=options, backend=backend)
    expected = brute_force({name: x[0, :, 0] for name, x in given.items()}, {}, states, options)
    assert_close(out[0, :, 0], expected)
    assert_close(final["state"][0, 0], states["state"])
    ignored = {name: x for name, x in given.items() if name != "dt"}
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(RULES["continuous_fwp"].apply(**ignored, options=options, backend=backend)[0][0, :, 0], expected)


@pytest.mark.parametrize("solver", ["euler", "exact_hold", "rk4"])
@pytest.mark.parametrize("control", CONTROLS)
def test_padding_changes_nothing_whatever_it_holds(control, solver):
    values, times = series(batch=4)
    mask = torch.tensor(MASKS)
    poisoned = torch.where(mask[..., None].bool(), values, torch.nan).requires_grad_()
    when = torch.where(mask.bool(), times, torch.nan)
    model = series_model(layers=1 if solver == "rk4" else 2, control=control, solver=solver)
    out = model(inputs_embeds=poisoned, times=when, attention_mask=mask).logits
    alone = [
        model(inputs_embeds=values[row : row + 1, keep], times=times[row : row + 1, keep]).logits
        for row, keep in enumerate(mask.bool())
    ]
    assert_close(out, torch.cat(alone))
    grads = torch.autograd.grad(out.square().sum(), [poisoned, *model.parameters()])
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][~mask.bool()] == 0).all()
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(model(inputs_embeds=values, times=times).logits, torch.cat(alone))


def test_what_looks_ahead():
    values, times = series()
    later = values.clone()
    later[:, -1] += 1
    for options, looks in (
        ({"solver": "euler"}, False),
        ({"solver": "exact_hold"}, False),
        ({"solver": "rk4"}, True),
        ({"control": "cde"}, True),
        ({"control": "dx_only"}, True),
    ):
        same = torch.equal(reads(values, times, **options)[:, :-1], reads(later, times, **options)[:, :-1])
        assert same != looks
        assert isinstance(series_model(**options).model.layers[0].mixer, SplineLayer) == looks


@pytest.mark.parametrize("learning_rule", LEARNING_RULES)
def test_a_series_in_two_parts_with_a_cache_is_the_whole(learning_rule):
    values, times = series()
    model = series_model(FwpModel, learning_rule=learning_rule, layers=2)
    mask = torch.tensor([MASKS[0], MASKS[1]])
    times = torch.where(mask.bool(), times, torch.nan)
    whole = model(inputs_embeds=values, times=times, attention_mask=mask).last_hidden_state
    for cut in range(1, 10):
        first = model(inputs_embeds=values[:, :cut], times=times[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
        second = model(
            inputs_embeds=values[:, cut:],
            times=times[:, cut:],
            attention_mask=mask,
            past_key_values=first.past_key_values,
        )
        joined = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)
        assert_close(joined[mask.bool()], whole[mask.bool()])
        assert {"state", "time"} == set(first.past_key_values.layers[0].states)
    given = times.clone()
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, 16)):
        for _ in range(2):
            steps = [one_by_one(model, cache, t, values, times, mask) for t in range(10)]
            assert_close(torch.cat(steps, dim=1)[mask.bool()], whole[mask.bool()])
            assert torch.equal(times[mask.bool()], given[mask.bool()])
            cache.reset()


@torch.no_grad()
def one_by_one(model, cache, t, values, times, mask):
    one = slice(t, t + 1)
    given = {"inputs_embeds": values[:, one], "times": times[:, one], "attention_mask": mask[:, : t + 1]}
    return model(**given, past_key_values=cache).last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
def test_a_cache_keeps_times_of_its_own(make):
    """Without padding the last of the times is where the caller has it."""
    values, times = series()
    model = series_model(FwpModel, layers=2)
    whole = model(inputs_embeds=values, times=times).last_hidden_state
    cache = make(**{"config": model.config, **({"max_cache_len": 16} if make is StaticCache else {})})
    given = times.clone()
    for parts in ([1] * 10, [10], [4, 1, 5]):
        cache.reset()
        pairs = zip(values.split(parts, dim=1), times.split(parts, dim=1), strict=True)
        steps = [model(inputs_embeds=v, times=t, past_key_values=cache).last_hidden_state for v, t in pairs]
        assert_close(torch.cat(steps, dim=1), whole)
        assert torch.equal(times, given)


def test_observations_are_taken_back():
    values, times = series()
    model = series_model(FwpModel)
    whole = model(inputs_embeds=values[:, :6], times=times[:, :6]).last_hidden_state
    cache = model(inputs_embeds=values[:, :3], times=times[:, :3], use_cache=True).past_key_values
    cache.layers[0].record_past = True
    model(inputs_embeds=values[:, 4:8], times=times[:, 4:8], past_key_values=cache)
    cache.crop(-4)
    again = model(inputs_embeds=values[:, 3:6], times=times[:, 3:6], past_key_values=cache).last_hidden_state
    assert_close(again, whole[:, 3:])


def test_packed_series_are_separate():
    values, times = series(batch=1, length=9)
    times = torch.cat([times[:, :4], times[:, :5] + 7], dim=1)
    model = series_model(FwpModel, learning_rule="oja")
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = model(inputs_embeds=values, times=times, cu_seq_lens_q=ends).last_hidden_state
    parts = [(values[:, :4], times[:, :4]), (values[:, 4:], times[:, 4:])]
    separate = [model(inputs_embeds=v, times=t).last_hidden_state for v, t in parts]
    assert_close(packed, torch.cat(separate, dim=1))


@pytest.mark.parametrize("options", [{}, {"solver": "rk4"}], ids=["held", "rk4"])
def test_without_times_observations_are_one_time_step_apart(options):
    values, _ = series()
    steps = torch.arange(10, dtype=torch.float64).expand(2, -1)
    implied = series_model(FwpModel, time_step=0.5, **options)(inputs_embeds=values).last_hidden_state
    assert_close(implied, reads(values, 0.5 * steps, time_step=0.5, **options))
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(implied, reads(values, steps, time_step=0.5, **options))


def test_tokens_are_classified_along_a_spline():
    model = tiny_model(
        "continuous_fwp", model_class=FwpForSequenceClassification, rule_options={"control": "cde"}, num_labels=2
    )
    assert model(tokens()).logits.shape == (2, 2)


# what is refused

WRONG_CONFIGS = {
    "choose from 'euler', 'exact_hold'": {"rule_options": {"solver": "dopri5"}},
    "choose from 'ode', 'cde'": {"rule_options": {"control": "sde"}},
    "substeps is 0": {"rule_options": {"substeps": 0}},
    "input_size is 0": {"input_size": 0},
}


@pytest.mark.parametrize("options", [{"control": "cde"}, {"solver": "rk4"}])
def test_an_empty_series_is_refused(options):
    with pytest.raises(ValueError, match="T = 0"):
        series_model(**options)(inputs_embeds=torch.zeros(2, 0, 3).double())


@pytest.mark.parametrize("message", WRONG_CONFIGS)
def test_a_wrong_option_is_named(message):
    with pytest.raises(ValueError, match=message):
        tiny_config("continuous_fwp", **WRONG_CONFIGS[message])


WRONG_CALLS = {
    "times go back": ({}, {"times": torch.tensor([[1.0, 0.5]])}),
    "must increase": ({"solver": "rk4"}, {"times": torch.tensor([[1.0, 1.0]])}),
    r"it must be \[B, T\] = \[1, 2\]": ({}, {"times": torch.tensor([[1, 2]])}),
    r"\[B, T, input_size\] with input_size 3": ({}, {"inputs_embeds": torch.zeros(1, 2, 4)}),
    "reads real values, not tokens": ({}, {"inputs_embeds": None, "input_ids": torch.tensor([[1, 2]])}),
    "a packed batch cannot be used": ({"control": "cde"}, {"cu_seq_lens_q": torch.tensor([0, 1, 2])}),
}


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_a_wrong_call_is_named(message):
    options, given = WRONG_CALLS[message]
    with pytest.raises(ValueError, match=message):
        series_model(FwpModel, **options).float()(**{"inputs_embeds": torch.zeros(1, 2, 3), **given})


def test_what_a_spline_cannot_do_is_named():
    with pytest.raises(ValueError, match="cannot predict tokens"):
        tiny_model("continuous_fwp", rule_options={"control": "cde"})
    with pytest.raises(ValueError, match="cannot predict tokens"):
        tiny_model("delta_net", input_size=3)
    with pytest.raises(ValueError, match="no layer asks for them"):
        tiny_model("delta_net")(tokens(), times=torch.zeros(2, 13))
    with pytest.raises(ValueError, match="conv_size is 4, but continuous_fwp"):
        FwpModel(tiny_config("continuous_fwp", rule_options={"control": "cde"}, conv_size=4))
    with pytest.raises(ValueError, match="generate cannot tell when"):
        tiny_model("continuous_fwp").generate(tokens(), times=torch.zeros(2, 13), max_new_tokens=2)
    cache = tiny_model("continuous_fwp")(tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a cache cannot be used"):
        series_model(FwpModel, solver="rk4")(inputs_embeds=torch.zeros(1, 2, 3).double(), past_key_values=cache)
    with pytest.raises(ValueError, match="needs the path between"):
        RULES["continuous_fwp"].apply(q=torch.zeros(1, 1, 1, 2), options={"solver": "rk4"})


def test_without_torchdiffeq_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    values, times = series()
    with pytest.raises(ImportError, match=r"pip install hf_fwp\[ode\]"):
        reads(values, times, solver="rk4")
    reads(values, times, control="cde", solver="exact_hold")


# training


def test_saved_and_loaded_is_equal(tmp_path):
    model = series_model(control="cde", solver="rk4").float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    values, times = (x.float() for x in series())
    assert torch.equal(
        loaded(inputs_embeds=values, times=times).logits, model(inputs_embeds=values, times=times).logits
    )
    assert loaded.get_input_embeddings() is loaded.model.embed_values


def test_labels_of_observations_are_padded_so_that_no_loss_counts_them():
    values, _ = series(length=6)
    rows = [
        {"inputs_embeds": values[0, :4].tolist(), "labels": [1, 0, 2, 1]},
        {"inputs_embeds": values[1].tolist(), "labels": [2, 2, 0, 0, 1, 0]},
    ]
    batch = pad_series(rows)
    assert batch["labels"].tolist() == [[1, 0, 2, 1, -100, -100], [2, 2, 0, 0, 1, 0]]
    model = series_model(FwpForTokenClassification).float()
    alone = [model(**pad_series([row])).loss * len(row["labels"]) for row in rows]
    assert_close(model(**batch).loss, sum(alone) / 10, 1e-5)
    whole = [{"inputs_embeds": row["inputs_embeds"], "labels": label} for row, label in zip(rows, (2, 1), strict=True)]
    assert pad_series(whole)["labels"].tolist() == [2, 1]
    several = [{**row, "labels": [0.0, 1.0]} for row in rows]  # of a whole series
    assert pad_series(several)["labels"].shape == (2, 2)


@pytest.mark.parametrize("model_class", MODELS.values())
def test_trainer_hands_over_the_times(model_class, tmp_path):
    assert "times" in inspect.signature(model_class.forward).parameters
    labels = {
        FwpForCausalLM: {"labels": [1] * 6},
        FwpForSequenceClassification: {"labels": 1},
        FwpForTokenClassification: {"labels": [1] * 6},
        FwpForQuestionAnswering: {"start_positions": 1, "end_positions": 2},
    }
    if model_class not in labels:
        return
    model, given = tiny_model("continuous_fwp", model_class=model_class, dtype=torch.float32), []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["times"]), with_kwargs=True)
    row = {"input_ids": [1] * 6, "times": [float(i * i) for i in range(6)], **labels[model_class]}
    args = TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True)
    Trainer(model=model, args=args, train_dataset=[row, row], data_collator=default_data_collator).train()
    assert torch.equal(given[0], torch.tensor([row["times"]] * 2))


def trained_accuracy(folder, steps=60, **options):
    torch.manual_seed(0)
    sizes = {"input_size": 2, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "num_labels": 2}
    blocks = {"norm_type": "layer", "mlp_type": "mlp", "use_bias": True, "initializer_range": 0.3}
    model = AutoModelForSequenceClassification.from_config(
        FwpConfig(rule="continuous_fwp", rule_options=options, **sizes, **blocks)
    )
    arguments = {"max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "save_strategy": "no"}
    args = TrainingArguments(str(folder), **arguments, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model=model, args=args, train_dataset=spirals(512, 0), data_collator=pad_series)
    trainer.train()
    found = trainer.predict(spirals(256, 1))
    return float((found.predictions.argmax(-1) == found.label_ids).mean())


# Chance is 0.5, and 0.62 nearly four standard deviations above it.
QUICK = {"hebb cde": (30, 0.9), "oja dx_only": (30, 0.9), "delta ode": (60, 0.62)}
LONG = {"hebb ode": 0.62, "hebb dx_only": 0.9, "oja ode": 0.62, "oja cde": 0.9, "delta dx_only": 0.9}


@pytest.mark.parametrize("variant", QUICK)
def test_trainer_learns_which_way_a_spiral_turns(variant, tmp_path):
    learning_rule, control = variant.split()
    steps, accuracy = QUICK[variant]
    solver = "euler" if learning_rule == "oja" else "exact_hold"
    options = {"learning_rule": learning_rule, "control": control, "solver": solver}
    assert trained_accuracy(tmp_path, steps, **options) > accuracy


@pytest.mark.slow
@pytest.mark.parametrize("variant", LONG)
def test_trainer_learns_it_with_every_rule_and_control(variant, tmp_path):
    learning_rule, control = variant.split()
    assert trained_accuracy(tmp_path, learning_rule=learning_rule, control=control) > LONG[variant]


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "control"), [("rk4_adjoint", "cde"), ("rk4", "dx_only")])
def test_trainer_learns_it_by_runge_kutta(solver, control, tmp_path):
    assert trained_accuracy(tmp_path, control=control, solver=solver) > 0.9
