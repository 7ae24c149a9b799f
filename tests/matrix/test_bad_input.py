"""The table of mistakes: each raises the right exception, whose message names what was given and what to do.

A row is (what is done, what must be told), by default a ValueError; what is done gets a new folder and a tiny teacher.
"""

import json
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiny
import torch
from every_model import every_model
from teachers import tiny_config as host_config
from tiny_fwp import tiny_config, tiny_model, tokens
from transformers import AutoModelForCausalLM, CodeGenConfig, DynamicCache, T5Config
from typer.testing import CliRunner

from hf_fwp import RULES, FwpConfig, MixerOptions, cli, convert, ops
from hf_fwp.conversion import checkpoint, data, keep, teacher
from hf_fwp.hosts import find_host, student_config

T, IDS = 5, tokens()
GOOD = {name: torch.zeros(2, T, 2, 4) for name in "qkv"} | {name: torch.zeros(2, T, 2) for name in ("g", "beta")}
PACKED = {name: x[:1] for name, x in GOOD.items()}
LINEAR = {"rule": "linear_attention"}
SLIDING = {"rule": ["sliding_attention", "delta_net"]}
LEARNED = {"position_embedding": "learned", "max_position_embeddings": 8}

CONFIG = {  # told: changes of a working config
    "'feature_mapp'; did you mean 'feature_map'": {"feature_mapp": "relu"},
    "'layer_typess'": {"layer_typess": 1},
    "layer_types is derived; give rule a list": {"layer_types": ["full_attention"]},
    "'delta_nett'; did you mean 'delta_net'": {"rule": "delta_nett"},
    "'transformer'.* the rules are": {"rule": "transformer"},
    "names 1 layers, num_hidden_layers is 2": {"rule": ["delta_net"], "num_hidden_layers": 2},
    "num_hidden_layers is 0; it must be at least 1": {"num_hidden_layers": 0},
    "vocab_size is 0; it must be at least 1": {"vocab_size": 0},
    "hidden_size is -32; it must be at least 1": {"hidden_size": -32},
    "num_attention_heads is 0; it must be at least 1": {"num_attention_heads": 0},
    "num_key_value_heads is 0; it must be at least 1": {"num_key_value_heads": 0},
    "num_value_heads is 0; it must be at least 1": {"num_value_heads": 0},
    "head_dim is 0; it must be at least 1": {"head_dim": 0},
    "intermediate_size is -1; it must be at least 1": {"intermediate_size": -1},
    "max_position_embeddings is 0; it must be at least 1": {"max_position_embeddings": 0},
    "hidden_size 30 is not a multiple of num_attention_heads 4": {"hidden_size": 30},
    "num_attention_heads 4 is not a multiple of num_key_value_heads 3": {"num_key_value_heads": 3},
    "3 value heads do not group": {"num_value_heads": 3},
    "expand_v is 0.3 .*head_dim 8": {"expand_v": 0.3},
    "expand_v is -1.0": {"expand_v": -1.0},
    "unknown feature_map 'sofmax'; did you mean 'softmax'": {"feature_map": "sofmax"},
    "'relu' takes no number": {"feature_map": "relu:3"},
    "'x' is not a positive whole number": {"feature_map": "dpfp:x"},
    "'0' is not a positive whole number": {"feature_map": "favor:0"},
    "unknown qk_norm 'l3'": {"qk_norm": "l3"},
    "unknown output_gate 'sillu'; did you mean 'silu'": {"output_gate": "sillu"},
    "unknown mlp_type 'swiglue'; did you mean 'swiglu'": {"mlp_type": "swiglue"},
    "unknown norm_type 'rmss'; did you mean 'rms'": {"norm_type": "rmss"},
    "unknown norm_placement 'pree'; did you mean 'pre'": {"norm_placement": "pree"},
    "unknown position_embedding 'rpoe'; did you mean 'rope'": {"position_embedding": "rpoe"},
    "unknown hidden_act 'sillu'; did you mean 'silu'": {"hidden_act": "sillu"},
    "unknown backend 'cuda'": {"backend": "cuda"},
    "conv_size is -1; it must be 0": {"conv_size": -1},
    "value_skip is -2; it must be 0": {"value_skip": -2},
    "conv_size lists 1 values for 2 layers": {"conv_size": [4]},
    "time_scales is 0; it must be at least 1": {"time_scales": 0},
    "sliding_window is None; give the window": {**SLIDING, "sliding_window": None},
    "sliding_window is 0; it must be at least 1": {**SLIDING, "sliding_window": 0},
    "dropout is 1.5; it must lie between 0 and 1": {"dropout": 1.5},
    "dropout is -0.1; it must lie between 0 and 1": {"dropout": -0.1},
    "norm_eps is 0.0; it must be above 0": {"norm_eps": 0.0},
    "initializer_range is -0.02; it must be 0 or more": {"initializer_range": -0.02},
    "pad_token_id is 99.* vocab_size 61": {"pad_token_id": 99},
    "rope_heads is 'all' but .*set position_embedding='rope'": {"rope_heads": "all"},
    "unknown rope_heads 'som'": {"rope_heads": "som", "position_embedding": "rope"},
    "rope_heads has 1 entries; it needs one per state": {"rope_heads": [True], "position_embedding": "rope"},
    "head_dim 7 is odd": {"head_dim": 7, "position_embedding": "rope"},
    "hidden_size 33 is odd": {
        "hidden_size": 33,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "position_embedding": "sinusoidal",
    },
    "'normalise'; did you mean 'normalize'": {**LINEAR, "rule_options": {"normalise": True}},
    "options are given per rule": {"rule": ["linear_attention", "delta_net"], "rule_options": {"normalize": True}},
}
OPERATOR = {  # told: arguments of gated_delta_rule
    "unknown backend 'cuda'; choose from": {"backend": "cuda"},
    "'step' takes one token per row, but T = 5": {"backend": "step"},
    **{f"{x} has dtype torch.int64; allowed are": {x: GOOD[x].long()} for x in GOOD},
    **{f"{x} has 3 dimensions, shape": {x: torch.zeros(2, T, 8)} for x in "qkv"},
    **{f"differ: .*{x} \\[2, 4\\]": {x: torch.zeros(2, 4, 2, 4)} for x in "qkv"},
    "q has size 6 per head and k 4": {"q": torch.zeros(2, T, 2, 6)},
    "v has 3 heads and k 2": {"v": torch.zeros(2, T, 3, 4)},
    "q has 3 heads": {"q": torch.zeros(2, T, 3, 4)},
    r"beta has shape \[2, 5, 1\]": {"beta": torch.zeros(2, T, 1)},
    r"g has shape \[2, 5, 3\]": {"g": torch.zeros(2, T, 3)},
    r"mask has shape \[2, 4\]; it must be": {"mask": torch.ones(2, 4)},
    r"state has shape .* need \[2, 2, 4, 4\]": {"initial_state": torch.zeros(2, 2, 3, 4)},
    "must be torch.float32: use .to": {"initial_state": torch.zeros(2, 2, 4, 4).bfloat16()},
    "but B = 2; flatten": {"cu_seqlens": torch.tensor([0, T])},
    "int32 or int64 with the boundaries": PACKED | {"cu_seqlens": torch.tensor([0.0, 5.0])},
    r"shape \[1\] and dtype": PACKED | {"cu_seqlens": torch.tensor([0])},
    "cu_seqlens is .0, 3.; it must": PACKED | {"cu_seqlens": torch.tensor([0, 3])},
    "cu_seqlens is .1, 5.; it must": PACKED | {"cu_seqlens": torch.tensor([1, 5])},
    "never decrease": PACKED | {"cu_seqlens": torch.tensor([0, 4, 3, 5])},
    "the sequence is empty": {name: x[:, :0] for name, x in GOOD.items()},
    "q is a list; give a tensor": {"q": GOOD["q"].tolist()},
}


def model_with(**changes):
    return tiny_model("delta_net", dtype=torch.float32, **changes)


def used_cache(model, *, record=False):
    cache = DynamicCache(config=model.config)
    if record:
        cache.activate_past_recording()
    model(IDS, past_key_values=cache)
    return cache


def crop(amount, *, record):
    used_cache(model_with(), record=record).crop(-amount)


MODEL = {  # told: what is done with a model
    "exactly one of input_ids and inputs_embeds": lambda: model_with()(),
    "exactly one of": lambda: model_with()(IDS, inputs_embeds=torch.zeros(2, 13, 32)),
    r"input_ids has shape \[13\]; it must be \[B, T\]": lambda: model_with()(IDS[0]),
    "input_ids has dtype torch.float32": lambda: model_with()(IDS.float()),
    "input_ids holds 61.* vocab_size is 61": lambda: model_with()(IDS * 0 + 61),
    "input_ids holds -1": lambda: model_with()(IDS * 0 - 1),
    r"inputs_embeds has shape \[2, 13, 8\]": lambda: model_with()(inputs_embeds=torch.zeros(2, 13, 8)),
    "attention_mask has 3 dimensions": lambda: model_with()(IDS, attention_mask=torch.ones(1, 13, 13)),
    r"attention_mask has shape \[2, 7\]": lambda: model_with()(IDS, attention_mask=torch.ones(2, 7)),
    r"attention_mask has shape \[3, 13\]": lambda: model_with()(IDS, attention_mask=torch.zeros(3, 13)),
    "attention mask of type str": lambda: model_with()(IDS, attention_mask="causal"),
    "position_ids holds 12, but max_position_embeddings is 8": lambda: model_with(**LEARNED)(IDS),
    "a packed batch .cu_seq_lens_q. cannot use a cache": lambda: model_with()(
        IDS, past_key_values=used_cache(model_with()), cu_seq_lens_q=torch.tensor([0, 26])
    ),
    "packed .seq_idx. and padded": lambda: model_with()(IDS, attention_mask=IDS * 0, seq_idx=IDS),
    r"seq_idx has shape \[2, 4\]": lambda: model_with()(IDS, seq_idx=IDS[:, :4]),
    "end with T = 26": lambda: model_with()(IDS, cu_seq_lens_q=torch.tensor([0, 9])),
    "cannot use a quantised cache": lambda: model_with().generate(IDS, cache_implementation="quantized"),
    "continuous batching pages keys": lambda: model_with().generate_batch([[1]]),
    "only its own mixer can write": lambda: used_cache(model_with()).layers[0].update(IDS, IDS),
    "backend 'triton'": lambda: model_with(backend="triton")(IDS),
    "given no position_embeddings": lambda: every_model("llama converted").hf_fwp_layers[0](torch.zeros(1, 2, 32)),
    "did you mean 'value_skip'": lambda: MixerOptions.from_dict({"value_skipp": 1}),
    "did you mean 'conv_size'": lambda: MixerOptions("delta_net", 8, 2).replace(conv_sizes=1),
    "did you mean 'yang2024-deltanet'": lambda: FwpConfig.preset("yang2024-delta-net"),
    "beta was not given": lambda: RULES["gated_delta_net"].apply(*(GOOD[x] for x in "qkv"), g=GOOD["g"]),
    "unknown option 'normalise'": lambda: RULES["linear_attention"].apply(
        *(GOOD[x] for x in "qkv"), options={"normalise": True}
    ),
    "must be a pair": lambda: ops.linear_attention(
        *(GOOD[x] for x in "qkv"), normalize=True, initial_state=torch.zeros(2, 2, 4, 4)
    ),
    "normaliser has no decay": lambda: ops.linear_attention(*(GOOD[x] for x in "qkvg"), normalize=True),
    "unknown state 'stat'": lambda: RULES["delta_net"].apply(
        *(GOOD[x] for x in "qkv"), beta=GOOD["beta"], states={"stat": GOOD["q"]}
    ),
}
CACHE = {  # told: (tokens taken back, whether the past was recorded); a RuntimeError, as transformers' own layers raise
    "call `activate_past_recording` before": (1, False),
    "cannot remove 14 tokens: 13 were recorded": (14, True),
}
HOST = {  # told: (layers, fwp)
    "unknown field of fwp 'rulle'; did you mean 'rule'": ([0], {"rulle": "delta_net"}),
    "unknown update rule 'delta_nett'": ([0], {"rule": "delta_nett"}),
    "did you mean 'conv_size'": ([0], {"per_layer": {0: {"conv_sise": 4}}}),
    "unknown field of fwp 'hidden_size'": ([0], {"hidden_size": 4}),
    "layer '1', which is not one of the layers .*; leave": ([0], {"per_layer": {1: {"conv_size": 4}}}),
    "no layer 4 to convert; the model has 4 layers": ([4], {}),
    "no layer -1 to convert": ([-1], {}),
    "no layer True to convert": ([True], {}),
    "no layer '0' to convert": (["0"], {}),
    "names a layer twice": ([1, 1], {}),
    "rope_heads has 1 entries": ([0], {"rope_heads": [True]}),
    "time_scales is 0": ([0], {"time_scales": 0}),
}
KEEP = {  # told: keep, of a model with 6 layers
    "keep is 7 layers, but the model has 6": 7,
    "keep is -1 layers": -1,
    "keep is 1.5; a fraction lies between": 1.5,
    "keep is -0.5; a fraction lies between": -0.5,
    "keep is 'half'; give a fraction": "half",
    "keep is 'uniform:2'; give a fraction": "uniform:2",
    "keep is 'evenly:0.5'; give a fraction": "evenly:0.5",
    r"keep is \[6\]; .*\[6\] are not layers": [6],
    "a layer is named twice": [1, 1],
    "keep is True; give a fraction": True,
    "keep is None; give a fraction": None,
}
CONVERT = {  # told: arguments of convert; no output may be left
    "unknown recipe 'quik'; did you mean 'quick'": {"recipe": "quik"},
    "unknown update rule for conversion 'delta_nett'": {"rule": "delta_nett"},
    "without a tokenizer; give one": {"tokenizer": None},
    "resume needs the output folder": {"resume": True, "output": None},
    "keep is 5 layers, but the model has 2": {"keep": 5},
    "budget is 'soon'; give a number of tokens": {"budget": "soon", "recipe": "quick"},
    "budget is '3x'; give": {"budget": "3x", "recipe": "quick"},
    "budget is 'infm'; give": {"budget": "infm", "recipe": "quick"},
    "budget is 'infM'; give": {"budget": "infM", "recipe": "quick"},
    "takes no gradient steps": {"budget": "9k"},
    "a budget of '10' leaves": {"budget": "10", "recipe": "quick"},
    "data holds no text": {"data": " "},
    "cannot read data of type int": {"data": 3},
    "nowhere.txt does not exist": {"data": Path("nowhere.txt")},
    "the splits validation; it needs 'train'": {"data": {"validation": ["a"]}},
    "tokens, but .* are needed .*give more text": {"data": "few words"},
    "teacher is a int; give a model": {"teacher": 3},
    "found no model 'no/where'": {"teacher": "no/where"},
    "there is no file .*nowhere.gguf; check": {"teacher": "nowhere.gguf"},
    "is a Linear, which is no transformers model": {"teacher": torch.nn.Linear(2, 2)},
    "need float32 weights: give dtype": {"dtype": torch.bfloat16},
}
COMMAND = {  # told: words of the command line; exit code 2, one line
    "needs --output": ("convert", "TEACHER"),
    "cannot read --keep 'many'; give a fraction": ("convert", "TEACHER", "--output", "OUT", "--keep", "many"),
    "unknown dtype 'int8'; the dtypes are": ("convert", "TEACHER", "--output", "OUT", "--dtype", "int8"),
    "did you mean 'delta_net'": ("convert", "TEACHER", "--output", "OUT", "--rule", "delta_nett"),
    "did you mean 'quick'": ("convert", "TEACHER", "--output", "OUT", "--recipe", "quik"),
    "nowhere.txt does not exist": ("convert", "TEACHER", "--output", "OUT", "--data", "nowhere.txt"),
    "found no model 'nowhere/at'": ("convert", "nowhere/at", "--output", "OUT"),
    "in use; give a new folder": ("convert", "TEACHER", "--output", "TEACHER"),
    "found no model 'nowhere/of'": ("evaluate", "nowhere/of"),
}


def config_with(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def saved_fwp(folder):
    tiny_model("delta_net", dtype=torch.float32).save_pretrained(folder)
    return folder


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def saved_and(spoil):
    """Load a saved model after its files were spoilt."""

    def load(folder):
        spoil(saved_fwp(folder))
        AutoModelForCausalLM.from_pretrained(folder)

    return load


def teacher_and(spoil):
    def load(folder):
        tiny.teacher_folder(folder)
        spoil(folder)
        teacher.load_teacher(folder)

    return load


def lines(text):
    def read(folder):
        (folder / "text.jsonl").write_text(text)
        list(data.read_data(folder / "text.jsonl"))

    return read


def interrupted(folder):
    checkpoint.save(folder, 3, [{"x": torch.zeros(1)}], {})
    checkpoint.latest(folder, resume=False)


FILES = {  # told: what is done in an empty folder
    "no field 'conv_sise'; did you mean 'conv_size'": saved_and(lambda f: config_with(f, conv_sise=4)),
    "unknown update rule 'delta_nut'": saved_and(lambda f: config_with(f, rule="delta_nut")),
    "names 1 layers": saved_and(lambda f: config_with(f, rule=["delta_net"])),
    "a weights file of .* is damaged .*; copy or download": saved_and(lambda f: cut(f / "model.safetensors", 90)),
    "a weights file of .* is damaged .* too small": saved_and(lambda f: cut(f / "model.safetensors", 0)),
    "model.safetensors is damaged .*header too small": teacher_and(lambda f: cut(f / "model.safetensors", 5)),
    "has no weights .model.safetensors.": teacher_and(lambda f: (f / "model.safetensors").unlink()),
    "is not a model folder: it has no config.json; give the one": teacher_and(lambda f: (f / "config.json").unlink()),
    "is a file; give the folder": lambda f: teacher.load_teacher(tiny.teacher_folder(f) / "config.json"),
    "found no tokenizer in": teacher_and(lambda f: [file.unlink() for file in f.glob("tokenizer*")]),
    "line 2: a line must be a JSON object": lines('{"text": "a"}\nb\n'),
    'line 1: a line must be a JSON object with a "text"': lines('{"words": "a"}\n'),
    "data holds no text": lines(""),
    "holds an earlier run; give resume=True": interrupted,
    "was begun with lr = 1, not 2": lambda f: checkpoint.check_settings({"lr": 1}, {"lr": 2}, folder=f),
    "sequence_length is 1": lambda f: data.token_blocks(["a"], tiny.byte_tokenizer(), sequence_length=1),
    "'fwp_llama' is a converted model already": lambda f: teacher.check_family(every_model("llama converted").config),
    "unknown model family 'codegen'; the families": lambda f: find_host(CodeGenConfig()),
    "'t5' is an encoder-decoder": lambda f: find_host(T5Config()),
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def told_by(mistake, *, kind=ValueError):
    with pytest.raises(kind) as caught:
        mistake()
    return " ".join(str(caught.value).split())


def assert_told(text, pattern):
    assert re.search(pattern, text), text
    assert len(text) > 20


@pytest.mark.parametrize("told", CONFIG)
def test_config(told):
    assert_told(told_by(lambda: tiny_config(**CONFIG[told])), told)


@pytest.mark.parametrize("told", OPERATOR)
def test_operator(told):
    assert_told(told_by(lambda: ops.gated_delta_rule(**(GOOD | OPERATOR[told]))), told)


@pytest.mark.parametrize("told", MODEL)
def test_model(told):
    assert_told(told_by(MODEL[told]), told)


@pytest.mark.parametrize("told", CACHE)
def test_cache(told):
    amount, record = CACHE[told]
    assert_told(told_by(lambda: crop(amount, record=record), kind=RuntimeError), told)


@pytest.mark.parametrize("told", HOST)
def test_host(told):
    layers, fwp = HOST[told]
    assert_told(told_by(lambda: student_config(host_config("llama"), layers=layers, fwp=fwp)), told)


@pytest.mark.parametrize("told", KEEP)
def test_keep(told):
    assert_told(told_by(lambda: keep.kept_count(KEEP[told], 6)), told)


@pytest.mark.parametrize("told", CONVERT)
def test_convert(told, tmp_path):
    output = tmp_path / "out"
    given = {"teacher": tiny.tiny_llama(), "tokenizer": tiny.byte_tokenizer(), "recipe": "closed-form"}
    given |= {"data": tiny.TEXTS, "output": output, **CONVERT[told]}
    assert_told(told_by(lambda: convert(given.pop("teacher"), **given)), told)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return tiny.teacher_folder(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("told", COMMAND)
def test_command(told, teacher_folder, tmp_path):
    places = {"TEACHER": str(teacher_folder), "OUT": str(tmp_path / "out")}
    ended = CliRunner().invoke(cli.app, [places.get(word, word) for word in COMMAND[told]])
    assert ended.exit_code == 2
    assert_told(ended.stderr.strip().splitlines()[-1], "hf-fwp: .*" + told)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("told", FILES)
def test_files(told, tmp_path):
    assert_told(told_by(lambda: FILES[told](tmp_path)), told)


def test_there_are_enough_mistakes():
    tables = (CONFIG, OPERATOR, MODEL, CACHE, HOST, KEEP, CONVERT, COMMAND, FILES)
    assert sum(map(len, tables)) >= 120
