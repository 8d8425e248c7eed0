"""Property tests by Hypothesis."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, seed, settings
from placements import SEED


def property_test(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Draw new shapes on every run, and the same with the same HNE_TEST_SEED."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        return seed(SEED)(
            settings(
                max_examples=examples,
                deadline=None,
                database=None,
                # The fixture only chooses the backend, which is the same for all examples.
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
            )(function)
        )

    return decorate
