"""The tests of tests/gpu on a processor, under Triton's interpreter: that they can pass, before there is a GPU.

    TRITON_INTERPRET=1 PYTHONPATH=tests python -m pytest -p gpu_on_a_processor tests/gpu --matching "heads_of.*-16"

What takes a GPU itself (CUDA graphs, which backend is chosen) cannot be run so.
"""

import re

import operators as problems
import triton_interpreter

from hf_fwp.rules import linear_class

triton_interpreter.patch()
problems.GPU = "cpu"
linear_class.has_decode_kernel = lambda _: True  # of convolution and gated norm, too
outcome = problems.outcome
# on a processor the kernels are no backend that is chosen by itself
problems.outcome = lambda apply, given, backend: outcome(apply, given, backend or "triton")


def pytest_addoption(parser):
    parser.addoption("--matching", default="", help="only tests whose names match this regular expression")


def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if re.search(config.getoption("--matching"), item.name)]
