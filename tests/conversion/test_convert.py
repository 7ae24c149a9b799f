"""The verb, from a teacher's folder to a model that reloads, and everything it refuses."""

import copy
import importlib
import json
import re
from dataclasses import replace

import datasets
import pytest
import torch
from peft import LoraConfig
from tiny import TEXTS, byte_tokenizer, teacher_folder, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification, T5Config

from hf_fwp.conversion import tokens
from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.recipes import RECIPES, Recipe
from hf_fwp.hosts import converted_layers

LAYERS, LENGTH = 3, 16
verb = importlib.import_module("hf_fwp.conversion.convert")
calibration = importlib.import_module("hf_fwp.conversion.calibrate")

SMALL = {"sequence_length": LENGTH, "solve_tokens": 7 * LENGTH, "rank_solve_tokens": 5 * LENGTH, "rank_tokens": LENGTH}
TRAINED = {"align_tokens": 8 * LENGTH, "distil_tokens": 8 * LENGTH}
LONGER = Recipe(
    "longer", "x", **SMALL, **TRAINED, extend_tokens=8 * LENGTH, extend_length=2 * LENGTH, extend={"batch_size": 4}
)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """The stages as they are, on few tokens; the measurements have tests of their own."""
    monkeypatch.setattr(verb, "REPORT_TOKENS", 2 * LENGTH)
    few = {"tokens": 2 * LENGTH, "baseline_tokens": 0, "residual_tokens": 0, "lengths": (), "prompts": (), "needles": 0}
    monkeypatch.setattr(verb, "_MEASURES", few)
    monkeypatch.setattr(calibration, "ROUNDS", (({"rotate": (False, True)},), ({"rotate": (False, True)},)))
    monkeypatch.setitem(RECIPES, "closed-form", Recipe("closed-form", "small", **SMALL))
    monkeypatch.setitem(RECIPES, "quick", Recipe("quick", "small", **SMALL, **TRAINED))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return teacher_folder(tmp_path_factory.mktemp("teacher") / "tiny", layers=LAYERS)


@pytest.fixture
def ids():
    return torch.randint(1, 250, (2, 9), generator=torch.Generator().manual_seed(1))


def with_token(word):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([word])
    return tokenizer


def spoilt():
    model = tiny_llama()
    model.lm_head.weight.data[3, 1] = torch.nan
    return model


def adapted():
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def weights_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize(("recipe", "mixer"), [("closed-form", None), ("quick", {"window": 4, "sinks": 1})])
def test_from_a_folder_to_a_model_that_reloads(recipe, mixer, folder, ids, tmp_path):
    student = convert(folder, keep=1, recipe=recipe, mixer=mixer, data=TEXTS, output=tmp_path / "made")
    assert [layer.window is not None for layer in student.hf_fwp_layers.values()] == [mixer is not None] * (LAYERS - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "report.json", "README.md"}
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["recipe"] == recipe
    assert report["kept_layers"] == student.conversion_report["kept_layers"]
    assert len(report["ranking"]) == LAYERS
    assert set(report["stages"]) == {"solve"} | ({"align", "distil"} if recipe == "quick" else set())
    assert report["evaluation"]["kl"] >= 0
    assert len(converted_layers(student.config)) == LAYERS - 1

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert_same(weights_of(reloaded), weights_of(student))
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, student(ids).logits)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = reloaded.generate(ids, **settings)
    assert torch.equal(cached, reloaded.generate(ids, use_cache=False, **settings))
    assert AutoTokenizer.from_pretrained(tmp_path / "made")("fast").input_ids == byte_tokenizer()("fast").input_ids


def test_a_model_object_is_neither_modified_nor_shared(ids):
    teacher = tiny_llama(layers=LAYERS).train()
    before, config = weights_of(teacher), copy.deepcopy(teacher.config.to_dict())
    made = [
        convert(teacher, tokenizer=byte_tokenizer(), keep=0.34, recipe="quick", data=TEXTS, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert_same(weights_of(teacher), before)
    assert teacher.config.to_dict() == config
    assert teacher.training
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not any(parameter.data_ptr() in theirs for parameter in made[0].parameters())
    assert_same(weights_of(made[0]), weights_of(made[1]))
    assert any(not torch.equal(value, weights_of(made[2]).get(key)) for key, value in weights_of(made[0]).items())


@pytest.mark.parametrize("stage", ["solve", "align", "distil", "measure"])
def test_an_interrupted_run_continues_to_the_same_model(stage, folder, tmp_path, monkeypatch):
    said = {"keep": [1], "recipe": "quick", "data": TEXTS}
    whole = convert(folder, output=tmp_path / "whole", **said)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verb, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, output=tmp_path / "made", **said)
    assert not (tmp_path / "made").exists()
    if stage == "align":
        with pytest.raises(ValueError, match="holds an interrupted run; continue it with resume=True"):
            convert(folder, output=tmp_path / "made", **said)
        for changed in ({"keep": [0]}, {"seed": 1}, {"rule": "delta_net"}, {"data": TEXTS[1:]}):
            with pytest.raises(ValueError, match="holds a run with other arguments"):
                convert(folder, output=tmp_path / "made", **{**said, **changed}, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_document_ids", lambda *_, **__: pytest.fail("the text is tokenised again"))
        resumed = convert(folder, output=tmp_path / "made", **said, resume=True)
    assert_same(weights_of(resumed), weights_of(whole))
    assert not (tmp_path / "made.partial").exists()


def test_a_run_does_not_go_on_with_another_teacher(tmp_path, monkeypatch):
    said = {"tokenizer": byte_tokenizer(), "keep": [1], "recipe": "quick", "data": TEXTS, "output": tmp_path / "made"}
    with monkeypatch.context() as patch:
        patch.setattr(verb, "align", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(tiny_llama(layers=LAYERS), **said)
    with pytest.raises(ValueError, match=r"holds a run with other arguments \(weights was '\w{16}', is '\w{16}'\)"):
        convert(tiny_llama(layers=LAYERS, seed=5), **said, resume=True)
    file = tmp_path / "made.partial" / "plan.json"
    begun = json.loads(file.read_text())
    del begun["weights"]  # by an older version
    file.write_text(json.dumps(begun))
    assert converted_layers(convert(tiny_llama(layers=LAYERS), **said, resume=True).config) == (0, 2)


def test_a_run_with_a_budget_of_time_can_be_resumed(folder, tmp_path, monkeypatch):
    said = {"keep": [1], "recipe": "quick", "data": TEXTS, "budget": "20m", "output": tmp_path / "made"}
    plan = importlib.import_module("hf_fwp.conversion.plan")
    monkeypatch.setattr(plan, "_seconds_per_token", lambda _: 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(verb, "align", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(folder, **said)
    monkeypatch.setattr(plan, "_seconds_per_token", lambda _: 0.4)  # measured anew, it is never the same
    assert converted_layers(convert(folder, **said, resume=True).config) == (0, 2)


def planned(capsys, folder, **said):
    convert(folder, **{"data": TEXTS, "keep": [], "recipe": "quick", **said}, dry_run=True)
    return " ".join(capsys.readouterr().err.split())


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    told = planned(capsys, folder, keep=0.34, output=tmp_path / "made")
    assert f"1 of {LAYERS} layers stay softmax, ranked by measured KL" in told
    assert "solve 112 tokens" in told
    for stage in ("rank 96", "solve 112", "align 128", "distil 128"):
        assert re.search(rf"{stage} tokens: about \d+ s, \d+\.\d GiB", told)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_text_is_missing_and_what_helps(folder, tmp_path, capsys):
    said = {"keep": [], "recipe": "quick", "data": "x" * 379, "output": tmp_path / "made"}
    told = planned(capsys, folder, **said)
    assert "distil 128 tokens: about" in told
    assert "note: a run would be refused: 20 tokens are missing: the data has 380, and 400 are needed" in told
    assert "hf-fwp write-text" in told
    budget = int(re.search(r"--budget (\d+) at most", told)[1])
    assert "note" not in planned(capsys, folder, **said, budget=budget)
    with pytest.raises(ValueError, match="the data has 380 tokens, but 400 are needed"):
        convert(folder, **said)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_is_no_help_where_it_is_not_what_is_missing(folder, capsys):
    for data in ({"train": TEXTS, "test": "x" * 9}, "x" * 9):
        told = planned(capsys, folder, data=data)
        assert "tokens are missing: the data has 10, and" in told
        assert "budget" not in told


def test_a_budget_is_tokens_or_a_time(folder, capsys, monkeypatch):
    assert "align 200" not in planned(capsys, folder)
    for budget, each in ((400, 200), ("0.001M", 500)):
        told = planned(capsys, folder, budget=budget)
        assert f"align {each} tokens" in told
        assert f"distil {each} tokens" in told
    monkeypatch.setattr(importlib.import_module("hf_fwp.conversion.plan"), "_seconds_per_token", lambda _: 0.1)
    told = [planned(capsys, folder, budget=budget) for budget in ("5m", "0.5h")]
    shorter, longer = (int(words.partition("distil ")[2].partition(" tokens")[0]) for words in told)
    assert 0 < shorter < longer


@pytest.mark.parametrize("kind", ["text", "path", "list", "dataset", "splits", "folder", "streamed"])
def test_data_comes_in_many_forms_and_the_plan_says_what_was_taken(kind, folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    (tmp_path / "set").mkdir()
    table, heldout = datasets.Dataset.from_dict({"text": TEXTS}), datasets.Dataset.from_dict({"text": ["held " * 50]})
    table.to_parquet(tmp_path / "set" / "train.parquet")
    heldout.to_parquet(tmp_path / "set" / "test.parquet")
    data, told = {
        "text": ("\n".join(TEXTS), f"{len(chr(10).join(TEXTS))} characters of text"),
        "path": (tmp_path / "text.txt", str(tmp_path / "text.txt")),
        "list": (TEXTS, f"{len(TEXTS)} documents of a list"),
        "dataset": (table, "Dataset"),
        "splits": (datasets.DatasetDict(train=table, test=heldout), "Dataset; reported on its split test"),
        "folder": (tmp_path / "set", f"IterableDataset {tmp_path / 'set'}, split train; reported on its split test"),
        "streamed": (table.to_iterable_dataset(), "IterableDataset"),
    }[kind]
    said = planned(capsys, folder, data=data)
    assert "solve 112 tokens" in said
    assert f"text: {told} rank" in said.replace(" solve 112", " rank", 1)


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
def test_a_stream_gives_the_same_blocks_for_the_same_seed(shuffled, folder):
    def blocks(seed, kind):
        data = datasets.Dataset.from_dict({"text": TEXTS})
        data = data.to_iterable_dataset() if kind == "streamed" else data
        data = data.shuffle(seed=5, buffer_size=8) if shuffled else data
        made = convert(folder, recipe=named, keep=[1], data=data, seed=seed)
        return made.state_dict()

    named = Recipe("x", "few", **{**SMALL, "rank_solve_tokens": 0})
    first = blocks(0, "streamed")
    assert_same(blocks(0, "streamed"), first)
    other = blocks(1, "streamed")
    assert any(not torch.equal(value, other[key]) for key, value in first.items())
    if not shuffled:
        assert_same(blocks(0, "whole"), first)


@pytest.mark.parametrize(
    ("keep", "converted"),
    [([0, 2], (1,)), ("uniform:0.34", (0, 2)), (0, (0, 1, 2)), (1.0, ())],
    ids=str,
)
def test_layers_that_were_named_stay_softmax(keep, converted, folder):
    student = convert(folder, keep=keep, recipe="closed-form", data=TEXTS)
    assert converted_layers(student.config) == converted
    assert student.conversion_report["kept_layers"] == [i for i in range(LAYERS) if i not in converted]


@pytest.mark.parametrize("keep", [1.0, 0.999, "uniform:1", [0, 1, 2]], ids=str)
def test_where_all_layers_stay_softmax_the_student_is_the_teacher(keep, folder, tmp_path):
    measured = {
        "tokens": 2 * LENGTH,
        "baseline_tokens": LENGTH,
        "residual_tokens": LENGTH,
        "lengths": (8,),
        "needles": 1,
    }
    longer = {"extend_tokens": 4 * LENGTH, "extend_length": 2 * LENGTH}
    recipe = replace(RECIPES["quick"], report=measured | {"prompts": ("Hi",), "new_tokens": 2}, **longer)
    student = convert(folder, keep=keep, recipe=recipe, data=TEXTS, output=tmp_path / "made")
    report = student.conversion_report
    assert set(report["stages"]) == {"solve"}
    assert set(report["baselines"]) == {"naive_copy", "sliding_window"}
    assert report["evaluation"]["kl"] == pytest.approx(0, abs=1e-6)
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "made").state_dict(), theirs)


def test_a_long_text_is_solved_on_as_far_as_the_recipe_reads(folder, monkeypatch):
    seen, solved = [], verb.solve
    monkeypatch.setattr(verb, "solve", lambda *args, **said: (seen.append(args[2].shape), solved(*args, **said))[1])
    recipe = Recipe("more", "small", **SMALL, solve_more=2.5)
    for keep, ranked in ((0, 0), ([1], 0), (2, 6)):
        report = convert(folder, keep=keep, recipe=recipe, data=TEXTS).conversion_report
        assert seen[-1] == (17, LENGTH)
        assert report["tokens"] == (17 + ranked) * LENGTH


def test_a_shorter_text_is_read_as_far_as_it_goes(folder, tmp_path, monkeypatch, capsys):
    seen, solved = [], verb.solve

    def watched(student, teacher, ids_NT, **said):
        seen.append(len(ids_NT))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return solved(student, teacher, ids_NT, **said)

    recipe = Recipe("more", "small", **SMALL, solve_more=2.5)
    given = {"keep": 2, "recipe": recipe, "output": tmp_path / "student"}
    texts = {tokens: {"train": ["x" * (tokens - 1)], "test": TEXTS} for tokens in (16 * LENGTH + 3, 13 * LENGTH - 1)}
    enough, short = texts.values()
    monkeypatch.setattr(verb, "solve", watched)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, data=enough, **given)
    report = convert(folder, data=enough, **given, resume=True).conversion_report
    assert seen == [5, 10, 5, 10]
    assert report["tokens"] == 16 * LENGTH
    assert f"the text has {10 * LENGTH} tokens for solve, which would read {17 * LENGTH}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"has {13 * LENGTH - 1} tokens, but {13 * LENGTH} are needed"):
        convert(folder, data=short, **{**given, "output": tmp_path / "other"})


def test_a_recipe_that_reads_nothing_copies(folder):
    recipe, data = (
        Recipe("copy", "x", copied=True, solve_tokens=0, sequence_length=LENGTH),
        {"train": TEXTS, "test": TEXTS},
    )
    student = convert(folder, keep=[1], recipe=recipe, data=data)
    assert converted_layers(student.config) == (0, 2)
    assert student.conversion_report["tokens"] == 0


def test_layers_are_ranked_for_recall_as_with_the_recipe_that_says_so(folder):
    said = {"rank": {"recall": 1.0}}
    given = [("recall:0.34", {}), (0.34, said), (0.34, {}), ("recall:0.34", {"rank": {"recall": 0.5}})]
    rankings = []
    for keep, change in given:
        recipe = replace(RECIPES["closed-form"], **change)
        rankings.append(convert(folder, keep=keep, recipe=recipe, data=TEXTS).conversion_report["ranking"])
    assert rankings[0] == rankings[1]
    assert rankings[0] != rankings[2]
    assert rankings[0] != rankings[3]  # a weight of one's own stays


BAD = [
    ({"rule": "delta_nett"}, "'delta_nett'; did you mean 'delta_net'"),
    ({"recipe": "quik"}, "unknown recipe 'quik'; did you mean 'quick'"),
    ({"keep": 1.5}, "keep is 1.5"),
    ({"keep": [7]}, r"\[7\] are not layers of it"),
    ({"keep": "uniform:x"}, "keep is 'uniform:x'"),
    ({"data": ""}, "data holds no text"),
    ({"data": []}, "data holds no text"),
    ({"data": "too short"}, r"the data has \d+ tokens, but \d+ are needed"),
    ({"data": {"test": TEXTS}}, "it needs 'train'"),
    ({"data": 3}, "cannot read data of type int"),
    ({"budget": "soon"}, "budget is 'soon'; give a number of tokens"),
    ({"budget": 100}, "leaves 50 tokens to align on, and 64 are the least"),
    ({"budget": 200, "recipe": LONGER}, "leaves 67 tokens to extend on, and 128 are the least"),
    ({"budget": 1000, "recipe": "closed-form"}, "takes no gradient steps"),
    ({"resume": True}, "resume needs the output folder"),
    ({"dtype": torch.bfloat16}, r"give dtype=torch\.float32"),
    ({"seed": -1}, "seed is -1; give a whole number from 0 to 4294967295"),
    ({"seed": 2**32}, "seed is 4294967296; give a whole number"),
    ({"mixer": {"rule": "delta_net"}}, "'rule' is no option of the mixers of a recipe; give rule="),
    ({"mixer": {"layers": [1]}}, "'layers' is no option of the mixers of a recipe; give keep="),
    ({"mixer": {"per_layer": {}}}, "'per_layer' is no option of the mixers of a recipe"),
    ({"mixer": {"window": "64k"}}, "window is '64k'; it must be a whole number, 0 "),
    ({"mixer": {"window": 4.5}}, "window is 4.5; it must be a whole number"),
    ({"mixer": {"window": True}}, "window is True; it must be a whole number"),
    ({"mixer": {"window": 4, "sinks": "1"}}, "sinks is '1'; it must be a whole number"),
    ({"mixer": {"window": -4}}, "window is -4; it must be 0"),
    ({"device": "foo"}, "unknown device 'foo'; the devices here are cpu"),
    ({"device": "cuda:99"}, "there is no device 'cuda:99' here; the devices here are cpu"),
    ({"mixer": {"window": LENGTH - 1, "sinks": 1}}, "window and sinks are 16 tokens, and recipe 'quick' reads"),
    ({"teacher": tiny_llama().model}, "is a LlamaModel, which does not foretell the next token"),
    ({"teacher": LlamaForSequenceClassification(tiny_llama().config)}, "is a LlamaForSequenceClassification, which"),
    ({"teacher": spoilt()}, "1 weights of the teacher are NaN or infinite in places"),
    ({"teacher": adapted()}, "LlamaForCausalLM with an adapter of peft inside; give the model itself"),
    ({"tokenizer": with_token("rewrites.")}, "gives token 257, but the teacher has only 257"),
]

# changes of the recipe "quick", with keep=1
BAD_RECIPES = [
    ({"align": {"learning_rate": 1e-3}}, "unknown setting of align 'learning_rate'"),
    ({"distil": {"seed": 1}}, "unknown setting of distil 'seed'"),
    ({"extend": {"losses": {"kl": 1.0}}}, "unknown setting of extend 'losses'"),
    ({"solve": {"lambda": 1.0}}, "unknown setting of solve 'lambda'; did you mean 'lambdas'"),
    ({"rank": {"recal": 1.0}}, "unknown setting of rank 'recal'; did you mean 'recall'"),
    ({"report": {"token": 10}}, "unknown setting of report 'token'; did you mean 'tokens'"),
    ({"report": {"tokens": LENGTH - 1}}, "report is to be measured on 15 tokens, and 16 are the least"),
    ({"align": {"window_dropout": 2}}, "window_dropout is .*2.*; give two probabilities"),
    ({"distil": {"window_dropout": (0.5, 2)}}, "window_dropout is .*; give two probabilities"),
    ({"distil": {"losses": {"ce": 1.0}}}, "unknown loss 'ce'; allowed: cross_entropy, kl"),
    ({"distil": {"losses": {"kl": 0}}}, "losses of distil is .'kl': 0.; give a weight above 0 to one or more of kl"),
    ({"distil": {"losses": {}}}, "losses of distil is ..; give a weight above 0"),
    ({"distil": {"losses": {"kl": 1.0, "cross_entropy": -1.0}}}, "losses of distil is .*; give a weight above 0"),
    ({"distil": {"losses": "kl"}}, "losses of distil is 'kl'; give a weight above 0"),
    ({"distil": {"lr": 0, "lr_rest": 0}}, "nothing is learned in distil: lr is 0 and lr_rest is 0; give one"),
    ({"extend": {"lr": 0.0, "lr_rest": 0.0}}, "nothing is learned in extend: lr is 0.0 and lr_rest is 0.0"),
    ({"align": {"lr": 0, "lr_projections": 0}}, "nothing is learned in align: lr is 0 and lr_projections is 0"),
    ({"distil": {"lr": -1}}, "the setting lr of distil is -1; give a number, 0 or more"),
    ({"align": {"lr": "x"}}, "the setting lr of align is 'x'; give a number, 0 or more"),
    ({"align": {"lr": float("nan")}}, "the setting lr of align is nan; give a number"),
    ({"align": {"batch_size": 0}}, "the setting batch_size of align is 0; give a whole number, 1 or more"),
    ({"distil": {"save_every": 0}}, "the setting save_every of distil is 0; give a whole number, 1 or more"),
    ({"distil": {"steps": 2.5}}, "the setting steps of distil is 2.5; give a whole number"),
    ({"solve": {"lambdas": [-1.0]}}, r"the setting lambdas of solve is \[-1.0\]; give numbers of 0 or more"),
    ({"report": {"needles": -1}}, "the setting needles of report is -1; give a whole number, 0 or more"),
    ({"solve_more": 0.5}, "solve_more is 0.5; give 1, or how many times"),
    (
        {"extend_tokens": 40, "extend_length": 20, "extend": {"batch_size": 4}},
        "extend_tokens is 40, which is less than",
    ),
    ({"distil_tokens": 3 * LENGTH, "distil": {"steps": 9}}, "distil_tokens is 48, which is less than a step of 4"),
    ({"align_tokens": 3 * LENGTH}, "align_tokens is 48, which is less than a step of 4 sequences"),
    ({"distil_tokens": 3 * LENGTH}, "distil_tokens is 48, which is less than a step of 4 sequences"),
    ({"align_tokens": -1}, "align_tokens is -1; give 0 to leave the stage out"),
    ({"rank_tokens": 0}, "rank_tokens is 0, and 1 are the least to rank layers"),
    ({"rank_solve_tokens": 0}, "rank_solve_tokens is 0, and 64 are the least to rank layers"),
    ({"solve": {"heldout": 0}}, "heldout of solve is 0; at least 1 sequence has to judge"),
    ({"solve_tokens": 5 * LENGTH}, "solve_tokens is 80, and 96 are the least to solve them"),
    ({"sequence_length": 1}, "sequence_length is 1; it must be at least 2"),
]


@pytest.fixture
def _no_stage(monkeypatch):
    for stage in ("copy_teacher", "solve", "rank_layers", "align", "distil", "extend", "measure"):
        monkeypatch.setattr(verb, stage, lambda *_, stage=stage, **__: pytest.fail(f"{stage} was called"))


@pytest.mark.parametrize(("said", "told"), BAD, ids=lambda value: str(value)[:40])
@pytest.mark.usefixtures("_no_stage")
def test_bad_arguments_are_refused(said, told, folder):
    given = {"teacher": folder, "tokenizer": byte_tokenizer(), "data": TEXTS, "recipe": "quick", "keep": [1]}
    with pytest.raises(ValueError, match=told):
        convert(**{**given, **said})


@pytest.mark.parametrize(("change", "told"), BAD_RECIPES, ids=lambda value: str(value)[:40])
@pytest.mark.usefixtures("_no_stage")
def test_recipes_that_cannot_be_followed_are_refused(change, told, folder):
    with pytest.raises(ValueError, match=told):
        convert(folder, keep=1, recipe=replace(RECIPES["quick"], **change), data=TEXTS)


@pytest.mark.usefixtures("_no_stage")
def test_an_attention_without_masks_is_refused_where_one_is_needed():
    teacher = tiny_llama(layers=LAYERS)
    teacher.set_attn_implementation("flex_attention")
    recipe = replace(RECIPES["quick"], report={"baseline_tokens": LENGTH})
    with pytest.raises(ValueError, match="attention is 'flex_attention', which takes no mask of its own"):
        convert(teacher, tokenizer=byte_tokenizer(), keep=[1], recipe=recipe, data=TEXTS)


def test_a_missing_or_empty_file_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        convert(folder, data=tmp_path / "none.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="data holds no text"):
        convert(folder, data=tmp_path / "empty.txt")


def test_an_output_folder_in_use_is_refused(folder, tmp_path):
    (tmp_path / "notes.txt").touch()
    for output in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="is in use; give a new folder"):
            convert(folder, data=TEXTS, output=output)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (AutoConfig.for_model("gptj"), "unknown model family 'gptj'"),
        (AutoConfig.for_model("deepseek_v3"), "multi-head latent attention"),
        (T5Config(), "encoder-decoder"),
    ],
    ids=["family", "mla", "encoder-decoder"],
)
def test_a_teacher_of_another_kind_is_refused(config, told, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told):
        convert(tmp_path, data=TEXTS)


def test_truncated_weights_are_refused(tmp_path):
    folder = teacher_folder(tmp_path / "tiny")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        convert(folder, data=TEXTS)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="without a tokenizer; give one as tokenizer="):
        convert(tiny_llama(), data=TEXTS)
