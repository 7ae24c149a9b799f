"""Every test that takes `name` runs for every kind of model; one that takes `model` gets it in float64.

All of it is `make test-full`. `make test` takes every rule through the tests of EVERY_RULE, one own and one converted
model through those of PAIR, which take seconds each, and CORE through the others. Windows: tests/models/test_window.py.
"""

import pytest
from every_model import CONVERTED, MODELS, WINDOWED, every_model
from tiny_fwp import HYBRIDS

CORE = {"gated_delta_net", *HYBRIDS, *CONVERTED}
EVERY_RULE = {
    "test_a_mode_gives_the_tokens_of_no_cache",
    "test_tokens_taken_back_and_fed_again",
    "test_padding_changes_neither_outputs_nor_gradients",
    "test_a_packed_batch_is_its_sequences_one_by_one",
    "test_accumulated_steps_are_whole_steps",
    "test_extreme_inputs_stay_finite",
}
PAIR = {
    "test_two_processes_train_as_one": {"hybrid", "llama converted"},
    "test_packed_rows_lose_what_separate_rows_lose": {"hybrid", "llama converted"},
}


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        test = metafunc.function.__name__
        quick = set(MODELS) - set(WINDOWED) if test in EVERY_RULE else PAIR.get(test, CORE)
        names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
        metafunc.parametrize("name", names)


@pytest.fixture
def model(name):
    return every_model(name)
