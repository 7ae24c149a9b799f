"""Saved in every form, loaded in every form: the same function, and a file that does not fit is named."""

import ast
import copy
import importlib.util
import io
import multiprocessing
import pickle

import pytest
import torch
from every_model import every_model
from safetensors.torch import load_file, save_file
from tiny_fwp import assert_close, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
)

from hf_fwp.loading import ROWS, check_blocks

DTYPES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
HEADS = (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)


@pytest.fixture
def folder(name, tmp_path):
    every_model(name).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_loaded_in_every_dtype(name, folder, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # decays stay float32 where the rest is narrower
    expected = every_model(name)(tokens()).logits
    logits = loaded(tokens()).logits
    assert logits.dtype == dtype
    assert_close(logits.double(), expected, max(DTYPES[dtype], 1e-6))


def test_a_dtype_that_is_read_from_the_file(name, folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.lm_head.weight.dtype == torch.float64


@torch.no_grad()
def test_sharded_files_and_pieces_of_the_vocabulary(name, tmp_path):
    model = every_model(name, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
@torch.no_grad()
def test_placed_on_devices(name, folder, device_map):
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(tokens()).logits, plain(tokens()).logits)


@torch.no_grad()
def test_weights_kept_on_the_disk(name, tmp_path):
    from accelerate import disk_offload

    model = every_model(name, dtype=torch.float32)
    expected = model(tokens()).logits
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    assert_close(model(tokens()).logits, expected, 1e-6)


@torch.no_grad()
def test_weights_kept_in_memory_until_they_are_read(name):
    from accelerate import cpu_offload

    model = every_model(name, dtype=torch.float32)
    expected = model(tokens()).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    assert_close(model(tokens()).logits, expected, 1e-6)


@torch.no_grad()
def test_what_does_not_fit_is_loaded_from_the_disk_where_it_is_read(name, folder, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    room = {"cpu": int(0.7 * sum(weight.nbytes for weight in plain.parameters()))}
    settings = {"device_map": "auto", "max_memory": room, "offload_folder": tmp_path / "offloaded"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    assert any(weight.is_meta for weight in loaded.parameters())
    assert_close(loaded(tokens()).logits, plain(tokens()).logits, 1e-6)
    ways = [model.generate(tokens(), max_new_tokens=4, do_sample=False) for model in (loaded, plain)]
    assert torch.equal(*ways)


def test_made_on_the_meta_device_without_touching_data(name, folder):
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert all(weight.is_meta for weight in empty.parameters())
    assert empty.state_dict().keys() == every_model(name).state_dict().keys()


def test_missing_and_unexpected_weights_are_reported(name, folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    lost = next(key for key in weights if key.endswith("o_proj.weight"))
    weights["nowhere.weight"] = weights.pop(lost)
    save_file(weights, file, metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(report["missing_keys"]) == {lost}
    assert set(report["unexpected_keys"]) == {"nowhere.weight"}
    assert loaded.get_parameter(lost).isfinite().all()


def test_a_weight_of_another_shape_is_named(name, folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    wrong = next(key for key in weights if key.endswith("o_proj.weight"))
    weights[wrong] = weights[wrong][:-1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
@torch.no_grad()
def test_a_head_on_a_causal_checkpoint(name, folder, auto):
    model, report = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    assert all(key.startswith(("score", "qa_outputs")) for key in report["missing_keys"])
    hidden = AutoModel.from_pretrained(folder, dtype=torch.float64)(tokens()).last_hidden_state
    assert_close(model.base_model(tokens()).last_hidden_state, hidden)
    answers = [x for x in model(tokens()).to_tuple() if isinstance(x, torch.Tensor)]
    model.save_pretrained(folder / "head")
    loaded, report = auto.from_pretrained(folder / "head", output_loading_info=True, dtype=torch.float64)
    assert not report["missing_keys"]
    again = [x for x in loaded(tokens()).to_tuple() if isinstance(x, torch.Tensor)]
    assert answers
    assert all(torch.equal(a, b) for a, b in zip(answers, again, strict=True))


@torch.no_grad()
def test_copies_are_equal_and_independent(model):
    expected, original = model(tokens()).logits, model.get_input_embeddings().weight
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    for twin in copies:
        assert torch.equal(twin(tokens()).logits, expected)
        assert twin.get_input_embeddings().weight.data_ptr() != original.data_ptr()


def test_a_config_reaches_worker_processes(model):
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        assert pool.apply(type, (model.config,)) is type(model.config)


class Scored(torch.utils.data.Dataset):
    """A data set that asks a model, in the worker that reads it."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    @torch.no_grad()
    def __getitem__(self, index):
        return self.model(tokens()[index : index + 1]).logits[0]


@pytest.mark.parametrize("start", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_model_in_the_workers_of_a_loader(name, start):
    model = every_model(name)
    loader = torch.utils.data.DataLoader(Scored(model), num_workers=1, multiprocessing_context=start)
    assert_close(torch.cat(list(loader)), model(tokens()).logits)


@torch.no_grad()
def test_tied_weights_stay_tied(name, tmp_path):
    model = every_model(name, tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_larger_vocabulary(name, tied, tmp_path):
    model = every_model(name, tie_word_embeddings=tied)
    before, size = model(tokens()).logits, model.config.vocab_size
    model.resize_token_embeddings(size + 3)
    assert_close(model(tokens()).logits[..., :size], before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.vocab_size == size + 3
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def torchao_int8(model):
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def four_bits(model):
    """All but what does not fill the blocks of a processor's kernels."""
    linear = [(key, x) for key, x in model.named_modules() if isinstance(x, torch.nn.Linear)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=[key for key, x in linear if x.out_features % ROWS or x.in_features % 64],
    )


def in_bf16(module, args):
    return (args[0].bfloat16().double(),)


def in_int8(module, args):
    """The inputs as bitsandbytes rounds them: rows in 8 bits, columns with a number of 6 or more as they are."""
    from bitsandbytes.functional import int8_vectorwise_quant

    one = torch.ones(1, 1)
    unit = torch.ops.bitsandbytes.int8_mm_dequant(one.int(), one[0], one[0], dtype=torch.float32)  # about 1 / 127**2
    x = args[0].flatten(0, -2)
    rows, largest, outliers = int8_vectorwise_quant(x.half(), threshold=6.0)
    rounded = rows.double() * largest[:, None] * 127 * unit
    rounded[:, outliers] = x[:, outliers]
    return (rounded.view_as(args[0]),)


QUANTISED = {  # library, its settings, how it rounds inputs, how far from the same model with what all these stand for
    "int8 of torchao": ("torchao", torchao_int8, None, 1e-5),
    # a number at the edge may be rounded to the other side
    "int8 of bitsandbytes": ("bitsandbytes", lambda _: BitsAndBytesConfig(load_in_8bit=True), in_int8, 1e-2),
    "4 bits of bitsandbytes": ("bitsandbytes", four_bits, in_bf16, DTYPES[torch.bfloat16]),  # multiplied in it
}
BLOCKS = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}  # 4 bits come in blocks of 64


def plain_weight(weight):
    """What a quantised weight stands for."""
    if hasattr(weight, "SCB"):
        return weight.data * weight.SCB[:, None] / 127
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize()


def stands_for(loaded, plain, rounded):
    """`plain` with the weights of `loaded`, and with its inputs `rounded`; how many there are."""
    changed = 0
    for key, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter:
            twin = plain.get_submodule(key)
            twin.weight.copy_(plain_weight(module.weight))
            if rounded is not None:
                twin.register_forward_pre_hook(rounded)
            changed += 1
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTISED)
@torch.no_grad()
def test_quantised_weights(name, kind, tmp_path):
    library, settings, rounded, tolerance = QUANTISED[kind]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is no dependency of hf_fwp: pip install {library} to run this test")
    saved = every_model(name, dtype=torch.float32, **BLOCKS)
    saved.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings(saved), dtype=torch.float32, device_map="cpu"
    )
    plain = saved.double()
    assert stands_for(loaded, plain, rounded) >= 4 * plain.config.num_hidden_layers
    assert_close(loaded(tokens()).logits, plain(tokens()).logits, tolerance)
    decays = [p for key, p in loaded.named_parameters() if key.endswith(("A_log", "dt_bias"))]
    assert all(p.dtype == torch.float32 for p in decays)
    ways = [loaded.generate(tokens(), max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*ways)


class Packed(torch.nn.Linear):
    """As bitsandbytes loads a projection in 4 bits on a processor with AVX512-BF16."""

    support_avx512bf16_for_cpu = True

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight.blocksize = 64


def test_projections_that_4_bits_of_a_processor_cannot_multiply_are_named(name):
    model = every_model(name, dtype=torch.float32, **BLOCKS)
    quantised = [key for key, x in model.named_modules() if isinstance(x, torch.nn.Linear) and key != "lm_head"]
    skipped = {key for key in quantised if model.get_submodule(key).out_features % ROWS} | {"lm_head"}
    for key in quantised:
        model.set_submodule(key, Packed(model.get_submodule(key)))
    if skipped == {"lm_head"}:
        check_blocks(model)
        return
    with pytest.raises(ValueError, match="llm_int8_skip_modules=") as told:
        check_blocks(model)
    named = ast.literal_eval(str(told.value).partition("llm_int8_skip_modules=")[2])
    assert all(any(key.endswith(place) for place in named) for key in skipped)


@pytest.mark.slow
@torch.no_grad()
def test_exported_program_is_the_same_function(name):
    model = every_model(name, dtype=torch.float32)
    model.config.use_cache = False
    exported = torch.export.export(model, (tokens(),), kwargs={"use_cache": False}, strict=False)
    assert_close(exported.module()(tokens(), use_cache=False).logits, model(tokens(), use_cache=False).logits, 1e-5)
