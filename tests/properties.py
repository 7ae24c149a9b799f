"""How often a property is tried on random examples: some in every run, always the same; many in `make test-full`."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest

QUICK, MANY = 30, 600


def for_any(**examples: Any) -> Callable[..., Callable[..., None]]:
    """Turn a function of random arguments into a test."""

    def decorate(holds: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("count", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)])
        def test(count: int) -> None:
            often = hypothesis.settings(
                max_examples=count,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            often(hypothesis.given(**examples)(holds))()

        test.__doc__ = holds.__doc__
        return test

    return decorate
