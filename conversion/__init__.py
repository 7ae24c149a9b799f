"""How a pretrained checkpoint becomes a fast-weight model. Stages are functions, each usable alone."""

from typing import TYPE_CHECKING, Any

from .ablate import ablate
from .align import align
from .calibrate import calibrate
from .convert import convert
from .distil import distil
from .evaluate import evaluate
from .extend import extend
from .keep import keep_softmax, rank_layers
from .recipes import RECIPES, Recipe
from .report import write_report
from .solve import solve
from .teacher import load_teacher
from .write_text import write_text

if TYPE_CHECKING:
    from .trainer import DistilTrainer

__all__ = [
    "RECIPES",
    "DistilTrainer",
    "Recipe",
    "ablate",
    "align",
    "calibrate",
    "convert",
    "distil",
    "evaluate",
    "extend",
    "keep_softmax",
    "load_teacher",
    "rank_layers",
    "solve",
    "write_report",
    "write_text",
]


def __getattr__(name: str) -> Any:
    if name == "DistilTrainer":
        from .trainer import DistilTrainer  # transformers' Trainer takes a second and 90 MB to import

        return DistilTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
