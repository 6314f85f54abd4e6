"""Network trouble is retried with exponential backoff and jitter; anything else ends at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from orchestrator.errors import UnreachableError
from orchestrator.ssh.settings import RetryListener, RetryNotice, RetryPolicy

if TYPE_CHECKING:
    import tenacity

T = TypeVar("T")
_JITTER = 0.5
"""Each wait is between half and all of its step, so that many clients do not come back at the same instant."""


def with_retry(
    attempt: Callable[[], T],
    policy: RetryPolicy,
    on_retry: RetryListener | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call `attempt` until it succeeds. `UnreachableError` is retried until `policy.patience_s` has passed since the
    first call and is then raised as it is; every other error is raised at once."""
    import tenacity

    began = time.monotonic()

    def patience_left_s() -> float:
        return policy.patience_s - (time.monotonic() - began)

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if on_retry is not None and error is not None:
            on_retry(RetryNotice(str(error), state.attempt_number, state.upcoming_sleep, max(0.0, patience_left_s())))

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(UnreachableError),
        wait=_backoff(policy),
        stop=lambda state: state.upcoming_sleep >= patience_left_s(),
        before_sleep=tell,
        sleep=sleep,
        reraise=True,
    )
    return retrying(attempt)


def _backoff(policy: RetryPolicy) -> Callable[[tenacity.RetryCallState], float]:
    def wait_s(state: tenacity.RetryCallState) -> float:
        step_s = min(policy.longest_wait_s, policy.first_wait_s * 2.0 ** min(state.attempt_number - 1, 30))
        return step_s * (1.0 - _JITTER * random.random())  # noqa: S311  (no secret)

    return wait_s
