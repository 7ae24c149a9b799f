"""The interpreter of Triton, quicker and with the rounding of a GPU."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def patch() -> None:
    """For this process."""
    patch_once_per_launch()
    round_as_a_gpu()
    compare_to_bits()


def patch_once_per_launch() -> None:
    """By itself it patches the language (5 ms) in every call inside a kernel."""
    call, launch = interpreter.InterpretedFunction.__call__, interpreter.GridExecutor.__call__
    patched: set[tuple[str, ...]] = set()
    languages: dict[object, tuple[str, ...]] = {}

    def call_patched(self, *arguments, **keywords):
        if self.fn not in languages:
            found = [n for n, m in (("tl", tl), ("core", tl.core)) if any(x is m for x in self.fn.__globals__.values())]
            languages[self.fn] = tuple(found)
        if languages[self.fn] in patched:
            return self.rewrite()(*arguments, **keywords)
        patched.add(languages[self.fn])
        return call(self, *arguments, **keywords)

    def launch_unpatched(self, *arguments, **keywords):
        patched.clear()
        return launch(self, *arguments, **keywords)

    interpreter.InterpretedFunction.__call__ = call_patched
    interpreter.GridExecutor.__call__ = launch_unpatched


def round_as_a_gpu() -> None:
    """To bf16 it cuts the lower bits off (Triton 3.6, 3.7): twice the error of rounding, and always towards 0, which
    adds up in a sum."""
    convert = interpreter._convert_float

    def convert_rounded(x, from_type, to_type, rounding_mode):
        if (from_type, to_type) == (tl.float32, tl.bfloat16):
            return nearest_bf16(x)
        return convert(x, from_type, to_type, rounding_mode)

    interpreter._convert_float = convert_rounded


def compare_to_bits() -> None:
    """What a comparison gives is of the type int1. By itself it says int32, and the mask made of it and another one is
    refused (Triton 3.9)."""
    operate = interpreter.InterpreterBuilder.binary_op

    def operate_typed(self, lhs, rhs, op):
        result = operate(self, lhs, rhs, op)
        return interpreter.TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    interpreter.InterpreterBuilder.binary_op = operate_typed


def nearest_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bf16 of float32 numbers; ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)
