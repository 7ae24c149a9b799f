"""What the README shows is run as it stands, in a folder where the Hub ids it names are small local models."""

import re
from pathlib import Path

import pytest
import tiny

from hf_fwp import catalogue
from hf_fwp.hosts import HOSTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)

# Sizes are all that is changed, and each of them stands in the README.
SMALLER = {"hidden_size=512": "hidden_size=64", "max_steps=100": "max_steps=2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    tiny.teacher_folder(folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    (folder / "corpus.txt").write_text("\n".join(tiny.TEXTS * 8))
    return folder


def test_sizes_that_are_made_smaller_stand_in_the_readme():
    assert all(size in README for size in SMALLER)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_readme_runs(number, folder, monkeypatch):
    if '"smol-delta"' in BLOCKS[number] and "output=" not in BLOCKS[number] and not (folder / "smol-delta").exists():
        pytest.skip("the block that converts the model has not run")
    source = BLOCKS[number]
    for size, smaller in SMALLER.items():
        source = source.replace(size, smaller)
    monkeypatch.chdir(folder)
    exec(compile(source, f"README.md, block {number}", "exec"), {"__name__": "readme"})


# A row of the table of modes -> the tests that hold it, by what it begins with.
MODES = {
    "greedy": ("matrix/test_generation.py", "test_a_mode_gives_the_tokens_of_no_cache"),
    "padding on the left": ("matrix/test_batching.py", "test_padding_changes_neither_outputs_nor_gradients"),
    "packed batches by": ("matrix/test_batching.py", "test_a_packed_batch_is_its_sequences_one_by_one"),
    "hidden states": ("matrix/test_outputs.py", "test_attention_implementations_agree"),
    "every dtype": ("matrix/test_loading.py", "test_loaded_in_every_dtype"),
    "LoRA": ("matrix/test_peft.py", "test_trained_saved_loaded_and_merged_is_the_same_function"),
    "prompt tuning": ("matrix/test_peft.py", "test_soft_prompts_are_tokens_before_the_first"),
    "`Trainer`": ("matrix/test_training.py", "test_accumulated_steps_are_whole_steps"),
    "trl": ("matrix/test_trl.py", "test_packed_rows_lose_what_separate_rows_lose"),
    "two processes": ("matrix/test_processes.py", "test_two_processes_train_as_one"),
    "FSDP2 with": ("matrix/test_processes.py", "test_mixed_precision_is_near_that_of_one_process"),
    "`device_map": ("matrix/test_loading.py", "test_what_does_not_fit_is_loaded_from_the_disk_where_it_is_read"),
    "4 bits": ("matrix/test_loading.py", "test_projections_that_4_bits_of_a_processor_cannot_multiply_are_named"),
    "packing together": ("matrix/test_batching.py", "test_packed_and_padded_at_once_is_refused"),
    "quantised cache": ("matrix/test_generation.py", "test_refused_with_a_sentence_and_works_afterwards"),
    "continuous batching": ("matrix/test_generation.py", "test_refused_with_a_sentence_and_works_afterwards"),
    "prefix tuning": ("matrix/test_peft.py", "test_a_method_that_needs_keys_and_values_is_refused_with_a_sentence"),
    "packed batches in": ("hosts/test_graft.py", "test_packed_sequences_do_not_see_each_other"),
    "weights that are": ("interop/test_malicious.py", "test_pickled_weights_are_not_opened_and_never_executed"),
    "next tokens of": ("models/test_series.py", "test_what_a_spline_cannot_do_is_named"),
    "flash attention": ("matrix/test_outputs.py", "test_flash_attention_that_is_not_installed_is_refused_by_name"),
    "`crop` of": ("models/test_cache.py", "test_crop_without_recording_is_refused"),
    "offloaded cache": ("matrix/test_generation.py", "test_an_offloaded_cache_gives_the_tokens_of_no_cache"),
}
CLOSED = sorted(name for name, host in HOSTS.items() if host.closed)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quoted(name: str) -> str:
    return README.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0].strip()


def test_every_mode_of_the_table_is_held_by_a_test():
    rows = re.findall(r"^\| (.+) \| (.+) \|$", README.partition("| mode | |")[2].partition("\n\n")[0], flags=re.M)
    modes = [mode for mode, told in rows[1:] if told != "out of scope"]
    assert len(modes) == len(MODES)
    for mode, (begins, (file, test)) in zip(modes, MODES.items(), strict=True):
        assert mode.startswith(begins)
        assert f"def {test}" in (ROOT / "tests" / file).read_text(), mode
    assert f"converted {', '.join(CLOSED[:-1])} and {CLOSED[-1]} " in README


def test_the_table_of_rules_is_the_one_in_the_code():
    assert quoted("rules") == catalogue.markdown(catalogue.rule_table(), first="rule", code=("what a token does",)), (
        "print it with python -m hf_fwp.catalogue"
    )


def test_the_table_of_hosts_is_the_one_in_the_code():
    rows = [(f"`{host.name}`", host.title, f"`{host.model_type}`") for host in HOSTS.values()]
    assert quoted("hosts") == table(("model type", "family", "converted model type"), rows)
