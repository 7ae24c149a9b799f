"""What a person is told while something runs, and after it: one place, so that the command line can turn it off.

    progress_bar    how far a loop is, on stderr
    say             what is going to be done, on stderr
    tell            what came out, on stdout

In a program and in a notebook all three speak; `manner` is how `--quiet`, and a stderr that is no terminal, are
heeded, by the bars of transformers and of the Hub too. A process started meanwhile is given it by `adopt`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm
from transformers.utils import logging


@dataclass(frozen=True)
class Manner:
    """What is shown."""

    bars: bool = True
    words: bool = True


_manner = Manner()


def current() -> Manner:
    """How it is told here."""
    return _manner


def adopt(wanted: Manner) -> None:
    """Tell it like this from here on; for a process that was started for a part of the work."""
    global _manner
    _manner = wanted
    if not wanted.bars and logging.is_progress_bar_enabled():
        logging.disable_progress_bar()


@contextmanager
def manner(*, bars: bool, words: bool) -> Iterator[None]:
    """Nothing inside is told that is not wanted here, or was not wanted outside; afterwards it is as before."""
    before, libraries = current(), logging.is_progress_bar_enabled()
    adopt(Manner(bars=before.bars and bars, words=before.words and words))
    try:
        yield
    finally:
        adopt(before)
        if libraries and not logging.is_progress_bar_enabled():
            logging.enable_progress_bar()


def progress_bar(*args: Any, progress: bool = True, **options: Any) -> tqdm:
    """A bar of tqdm, shown if `progress` is wanted by the caller and bars are by the user."""
    return tqdm(*args, disable=not (progress and current().bars), **options)


def say(text: str) -> None:
    """What is going to be done."""
    if current().words:
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def tell(result: Any) -> None:
    """What came out: a text, or a table of rich."""
    if current().words:
        Console().print(result, highlight=False, markup=False, soft_wrap=isinstance(result, str))
