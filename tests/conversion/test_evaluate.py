"""Measurements against the same quantity written out plainly, on tiny models."""

import copy
import importlib
import math

import pytest
import torch
from teachers import tiny_teacher
from tiny import TEXTS, byte_tokenizer, teacher_folder, tiny_llama
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from hf_fwp import FwpConfig, FwpForCausalLM, FwpForSequenceClassification
from hf_fwp.bench import serve as serving
from hf_fwp.conversion.baselines import (
    baselines,
    fast_weights_off,
    naive_copy,
    sliding_window,
    window_mask,
    window_off,
)
from hf_fwp.conversion.calibrate import attention_heads
from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.evaluate import (
    PROMPTS,
    answer,
    decode_speed,
    evaluate,
    open_model,
    residuals,
    samples,
)
from hf_fwp.conversion.families import attention_modules, copy_teacher, output_projection_name
from hf_fwp.conversion.recipes import STUDENTS
from hf_fwp.conversion.scores import compare, forward_of
from hf_fwp.conversion.softmax import Softmax
from hf_fwp.conversion.stream import Walk
from hf_fwp.conversion.teacher import load_teacher
from hf_fwp.hosts import HOSTS
from hf_fwp.layer import layers_of


@pytest.fixture
def teacher():
    return tiny_teacher("llama")


@pytest.fixture
def student(teacher):
    return copy_teacher(teacher, layers=[0, 2])


@pytest.fixture
def ids_NT():
    return torch.randint(1, 67, (3, 21), generator=torch.Generator().manual_seed(3))


def plain_loss(model, ids_NT):
    with torch.no_grad():
        return sum(model(ids[None], labels=ids[None]).loss.item() for ids in ids_NT) / len(ids_NT)


def test_perplexity_is_the_exponential_of_the_models_own_loss(student, teacher, ids_NT):
    measured = evaluate(student, against=teacher, data=ids_NT, progress=False)
    assert measured["perplexity"] == pytest.approx(math.exp(plain_loss(student, ids_NT)), rel=1e-5)
    assert measured["teacher_perplexity"] == pytest.approx(math.exp(plain_loss(teacher, ids_NT)), rel=1e-5)
    assert measured["ratio"] == pytest.approx(measured["perplexity"] / measured["teacher_perplexity"])
    assert measured["tokens"] == ids_NT.numel()


def test_kl_and_agreement_are_those_written_out(student, teacher, ids_NT):
    measured = evaluate(student, against=teacher, data=ids_NT, progress=False)
    with torch.no_grad():
        ours, theirs = (model(ids_NT).logits[:, :-1].double().softmax(-1) for model in (student, teacher))
    kl = (theirs * (theirs / ours).log()).sum(-1).mean().item()
    assert measured["kl"] == pytest.approx(kl, rel=1e-4)
    assert measured["kl"] > 0.01
    assert measured["agreement"] == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
    assert 0 < measured["agreement"] < 1


def test_a_model_is_identical_with_itself(teacher, ids_NT):
    measured = evaluate(copy_teacher(teacher, layers=[]), against=teacher, data=ids_NT, progress=False)
    assert measured["kl"] == 0
    assert measured["agreement"] == 1
    assert measured["ratio"] == 1


def test_the_kl_does_not_depend_on_how_positions_are_cut(student, teacher, ids_NT, monkeypatch):
    whole = evaluate(student, against=teacher, data=ids_NT, progress=False)
    monkeypatch.setattr(importlib.import_module("hf_fwp.conversion.scores"), "POSITIONS", 7)
    cut = evaluate(student, against=teacher, data=ids_NT, progress=False)
    assert cut["kl"] == pytest.approx(whole["kl"], rel=1e-5)
    assert cut["agreement"] == whole["agreement"]


def test_without_a_teacher_there_is_only_the_perplexity(student, ids_NT):
    assert set(evaluate(student, data=ids_NT, progress=False)) == {"perplexity", "tokens", "sequence_length"}


def test_no_more_logits_than_those_of_one_sequence_are_asked_for(teacher, ids_NT):
    shapes = []
    forward = forward_of(teacher)

    def watched(ids_BT):
        shapes.append(tuple(ids_BT.shape))
        return forward(ids_BT)

    compare({"model": watched}, watched, ids_NT, progress=False)
    assert shapes == [(1, 21)] * 6


def test_modes_are_given_back_and_no_gradient_is_kept(student, teacher, ids_NT):
    student.train()
    evaluate(student, against=teacher, data=ids_NT, progress=False)
    residuals(student, teacher, ids_NT, progress=False)
    assert student.training
    assert not teacher.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_folders_converted_or_not_are_opened_with_their_tokenizer(tmp_path):
    folder = teacher_folder(tmp_path / "teacher")
    student = copy_teacher(tiny_llama(), layers=[1])
    student.save_pretrained(tmp_path / "student")
    measured = evaluate(
        tmp_path / "student", against=folder, data=TEXTS, tokens=128, sequence_length=32, progress=False
    )
    alone = evaluate(folder, data=TEXTS, tokens=128, sequence_length=32, progress=False)
    assert measured["tokens"] == 128
    assert measured["kl"] > 0
    assert measured["teacher_perplexity"] == pytest.approx(alone["perplexity"])


@pytest.mark.parametrize("kind", ["own", "converted", "teacher"])
def test_a_classifier_is_not_measured_as_a_language_model(kind, tmp_path):
    if kind == "own":
        model = FwpForSequenceClassification(FwpConfig(vocab_size=67, hidden_size=16, num_hidden_layers=2, num_heads=2))
    else:
        model = LlamaForSequenceClassification(tiny_llama().config)
    model.save_pretrained(tmp_path / "model")
    if kind == "converted":
        student = copy_teacher(tiny_llama(), layers=[1])
        config = student.config
        config.architectures = ["FwpLlamaForSequenceClassification"]
        config.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"ForSequenceClassification.*give a causal language model"):
        evaluate(tmp_path / "model", data=TEXTS)
    if kind == "teacher":
        with pytest.raises(ValueError, match=r"ForSequenceClassification.*give a causal language model"):
            convert(tmp_path / "model", data=TEXTS, dry_run=True)
    with pytest.raises(ValueError, match=r"ForSequenceClassification.*give a causal language model"):
        serving.with_weights(tmp_path / "model")


def test_what_cannot_be_measured_is_said(teacher, ids_NT, tmp_path):
    with pytest.raises(ValueError, match="comes without a tokenizer"):
        evaluate(teacher, data=TEXTS)
    with pytest.raises(ValueError, match=r"vocabulary of 67 tokens .* of 257"):
        evaluate(teacher, against=tiny_llama(), data=ids_NT)
    with pytest.raises(ValueError, match=r"give \[N, T\] of ints"):
        evaluate(teacher, data=ids_NT[0])
    with pytest.raises(ValueError, match="T at least 2: the first token of a sequence is not foretold"):
        evaluate(teacher, data=ids_NT[:, :1])
    with pytest.raises(ValueError, match="gives token 67, but the model has only 67"):
        evaluate(teacher, data=ids_NT + 67 - ids_NT.max())
    with pytest.raises(ValueError, match="token -1 is among the token ids; give ids of 0"):
        evaluate(teacher, data=ids_NT - 1 - ids_NT.min())
    for opens in (evaluate, load_teacher, open_model):
        with pytest.raises(ValueError, match="there is no device 'cuda:99' here; the devices here are cpu"):
            opens(teacher_folder(tmp_path / "teacher"), device="cuda:99")
    with pytest.raises(ValueError, match="tokens is 0; give at least one to measure on"):
        evaluate(tiny_llama(), data=TEXTS, tokens=0, tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="tokens, but 4096 are needed"):
        evaluate(tiny_llama(), data="too short", tokens=4096, tokenizer=byte_tokenizer())
    copy_teacher(teacher, layers=[0]).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        evaluate(tmp_path, data=ids_NT)


def test_the_residual_is_that_written_out_with_the_teachers_inputs(student, teacher, ids_NT):
    seen = {}

    def keep(module, args, inputs, output):
        seen.update(x=inputs["hidden_states"], rotary=inputs["position_embeddings"], target=output[0])

    hook = attention_modules(teacher)[2].register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        teacher(ids_NT)
        y_BTD = student.hf_fwp_layers[2](seen["x"], position_embeddings=seen["rotary"])[0]
    hook.remove()
    expected = ((y_BTD - seen["target"]).square().sum() / seen["target"].square().sum()).item()
    found = residuals(student, teacher, ids_NT, progress=False)
    assert list(found) == [0, 2]
    assert found[2] == pytest.approx(expected, rel=1e-4)
    assert not any(module._forward_hooks for module in teacher.modules())


def test_the_window_lets_through_the_last_tokens_and_the_first():
    seen = window_mask(7, window=3, sinks=2)
    assert [torch.nonzero(row).flatten().tolist() for row in seen[[0, 2, 4, 6]]] == [
        [0],
        [0, 1, 2],
        [0, 1, 2, 3, 4],
        [0, 1, 4, 5, 6],
    ]


class Windowed(Softmax):
    """Softmax over the last 4 tokens and the first 2."""

    def mass(self, products_NHQT, back_QT):
        seen = window_mask(len(back_QT), window=4, sinks=2)
        return super().mass(products_NHQT, torch.where(seen, back_QT, -1))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(HOSTS))
@torch.no_grad()
def test_windowed_attention_is_a_softmax_over_what_is_let_through(name, implementation):
    """One layer of the teacher alone, its attention written out from the copies of its projections."""
    if implementation == "sdpa" and name in ("gpt_oss", "gemma2"):
        pytest.skip("the family refuses sdpa, which has no sinks and no cap")
    teacher = tiny_teacher(name)
    teacher.set_attn_implementation(implementation)
    ids_BT = torch.randint(1, 67, (1, 14))
    seen = {}
    projection = attention_modules(teacher)[3].get_submodule(output_projection_name(HOSTS[name]))
    hook = projection.register_forward_hook(lambda _, args, output: seen.update(heads=args[0]))
    sliding_window(teacher, layers=[3], window=4, sinks=2)(ids_BT)
    hook.remove()
    mixer, walk = copy_teacher(teacher, layers=[3]).hf_fwp_layers[3], Walk(teacher, ids_BT)
    for layer in range(3):
        walk.move(layer)
    windowed = Windowed(**vars(walk.softmax(3)))
    expected = attention_heads(mixer, walk.inputs(3), walk.rotary(3), softmax=windowed)
    torch.testing.assert_close(seen["heads"], expected.out.flatten(2), rtol=1e-3, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_a_window_as_long_as_the_sequence_changes_nothing(teacher, ids_NT):
    expected = forward_of(teacher)(ids_NT)
    assert not torch.allclose(sliding_window(teacher, layers=[0], window=3, sinks=1)(ids_NT), expected)
    torch.testing.assert_close(sliding_window(teacher, layers=[0, 1], window=21)(ids_NT), expected)


def test_with_fast_weights_off_a_converted_layer_adds_nothing(student, teacher, ids_NT):
    silent = copy_teacher(teacher, layers=[0, 2])
    with torch.no_grad():
        for mixer in silent.hf_fwp_layers.values():
            mixer.o_proj.weight.zero_()
            mixer.o_proj.bias.zero_()
    torch.testing.assert_close(fast_weights_off(student)(ids_NT), forward_of(silent)(ids_NT))
    assert not torch.allclose(forward_of(student)(ids_NT), forward_of(silent)(ids_NT))


def test_beside_a_window_what_is_off_is_one_of_the_two(teacher, ids_NT):
    fwp = {"window": 5, "sinks": 1, "value_skip": 1}
    student = copy_teacher(teacher, layers=[0, 2], fwp=fwp)
    forgetful = copy_teacher(teacher, layers=[0, 2], fwp=fwp)
    with torch.no_grad():
        for mixer in forgetful.hf_fwp_layers.values():
            mixer.o_proj.weight[:, : mixer.options.num_reads * mixer.options.value_head_dim] = 0
    whole, without = forward_of(student)(ids_NT), fast_weights_off(student)(ids_NT)
    torch.testing.assert_close(without, forward_of(forgetful)(ids_NT))
    blind = copy_teacher(teacher, layers=[0, 2], fwp={"value_skip": 1})
    with torch.no_grad():
        for layer, mixer in blind.hf_fwp_layers.items():
            theirs = dict(student.hf_fwp_layers[layer].named_parameters())
            for name, parameter in mixer.named_parameters():
                parameter.copy_(theirs[name][:, : parameter.shape[-1]] if name == "o_proj.weight" else theirs[name])
    torch.testing.assert_close(window_off(student)(ids_NT), forward_of(blind)(ids_NT))
    assert (whole - without).abs().max() > 1e-3
    assert (whole - window_off(student)(ids_NT)).abs().max() > 1e-3
    assert torch.equal(forward_of(student)(ids_NT), whole)
    measured = baselines(teacher, ids_NT, student=student, progress=False)
    assert list(measured) == ["naive_copy", "sliding_window", "fast_weights_off", "window_off"]
    assert measured["window_off"]["kl"] > 0
    parts = evaluate(student, against=teacher, data=ids_NT, parts=True, progress=False)
    assert {name: parts.pop(name) for name in list(measured)[2:]} == {
        name: measured[name] for name in list(measured)[2:]
    }
    assert parts == evaluate(student, against=teacher, data=ids_NT, progress=False)


def test_a_model_without_fast_weights_has_no_parts(teacher, ids_NT):
    with pytest.raises(ValueError, match="the model has no fast weights, so no parts"):
        evaluate(teacher, data=ids_NT, parts=True, progress=False)


def test_parts_of_a_model_of_our_own(ids_NT):
    model = FwpForCausalLM(FwpConfig(vocab_size=67, hidden_size=16, num_hidden_layers=2, num_heads=2)).eval()
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for mixer in layers_of(silent).values():
            mixer.o_proj.weight.zero_()
    measured = evaluate(model, data=ids_NT, parts=True, progress=False)
    without = measured["fast_weights_off"]["perplexity"]
    assert without == evaluate(silent, data=ids_NT, progress=False)["perplexity"] != measured["perplexity"]


def test_the_naive_copy_has_the_rates_it_is_known_for(teacher):
    naive = naive_copy(teacher, layers=[1], half_life=38)
    mixer = naive.hf_fwp_layers[1]
    rates = mixer._rates(torch.randn(1, 5, teacher.config.hidden_size))
    assert torch.all(rates["beta"] == 0.5)
    torch.testing.assert_close((38 * rates["g"]).exp(), torch.full_like(rates["g"], 0.5))
    assert all(mixer.options.rotates)
    assert mixer.options.qk_norm == "l2"


@pytest.mark.parametrize("rule", STUDENTS)
def test_baselines_are_measured_for_every_rule(rule, teacher, ids_NT):
    student = copy_teacher(teacher, layers=[1, 3], fwp={"rule": rule})
    measured = baselines(teacher, ids_NT, student=student, progress=False)
    assert list(measured) == ["naive_copy", "sliding_window", "fast_weights_off"]
    assert measured["sliding_window"]["kl"] == pytest.approx(0, abs=1e-6)  # 21 tokens fit into the window
    assert measured["naive_copy"]["kl"] > 0
    assert measured["fast_weights_off"]["kl"] > 0
    before = F.cross_entropy(teacher(ids_NT).logits[:, :-1].flatten(0, 1), ids_NT[:, 1:].flatten()).exp().item()
    assert measured["naive_copy"]["teacher_perplexity"] == pytest.approx(before, rel=1e-4)


def test_states_do_not_grow_and_keys_and_values_do(student, teacher):
    short, long = decode_speed(student, (8, 32), new_tokens=2, progress=False)
    of_teacher = decode_speed(teacher, (8,), new_tokens=2, progress=False)[0]
    mixer = student.hf_fwp_layers[0].options
    assert short["state_bytes"] == long["state_bytes"] == 2 * mixer.num_states * mixer.head_dim**2 * 4
    # 2 layers, keys and values, the context and 3 tokens (one warms up)
    assert short["kv_bytes"] == 2 * 2 * (8 + 3) * 2 * 8 * 4
    assert long["kv_bytes"] > short["kv_bytes"]
    assert of_teacher["state_bytes"] == 0
    assert of_teacher["cache_bytes"] == 2 * short["kv_bytes"]
    assert all(row["prefill_s"] > 0 and row["tokens_per_s"] > 0 for row in (short, long, of_teacher))


def test_samples_stand_side_by_side(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(teacher_folder(tmp_path))
    student = copy_teacher(model, layers=[])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    found = samples(student, model, tokenizer, PROMPTS[:2], new_tokens=3, progress=False)
    assert [sample["prompt"] for sample in found] == list(PROMPTS[:2])
    assert all(sample["teacher"] == sample["student"] for sample in found)
    inputs = tokenizer(f"<{PROMPTS[0]}>", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert found[0]["teacher"] == tokenizer.decode(out[0, -3:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("template", [None, "<end>{% for message in messages %}<{{ message.content }}>{% endfor %}"])
def test_a_prompt_begins_as_the_tokenizer_begins_a_text(template, monkeypatch):
    """Where there is no template; the words of a template have a beginning of their own."""
    tokenizer, seen = byte_tokenizer(), []
    begins = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.chat_template = template
    model = tiny_llama()
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: seen.append(given["input_ids"]) or generate(**given))
    answer(model, "ab", tokenizer, new_tokens=1)
    assert tokenizer.decode(seen[0][0]) == ("<end>ab" if template is None else "<end><ab>")


def test_a_dtype_may_be_named(tmp_path):
    folder = teacher_folder(tmp_path)
    assert open_model(folder, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_teacher(tiny_llama(), dtype="bfloat16")[0].dtype == torch.bfloat16
    model = tiny_llama()
    assert load_teacher(model, dtype="float32")[0] is model
    copy_teacher(model, layers=[0]).save_pretrained(tmp_path / "student")
    assert open_model(tmp_path / "student", dtype="float16")[0].dtype == torch.float16
    evaluate(folder, dtype="bfloat16", dry_run=True)
    for given in ("float23", "torch.float32", 32):
        for opens in (
            lambda given: load_teacher(tiny_llama(), dtype=given),
            lambda given: open_model(folder, dtype=given),
        ):
            with pytest.raises(ValueError, match=f"unknown dtype {given!r}; the dtypes are float32"):
                opens(given)
