"""Every public function under random calls: right by the numeric rule, or refused in words that name an argument.

By hand for as long as one likes, with fresh seeds and every function in turn:

    WIKIGPT_FUZZ_MINUTES=60 pytest -s tests/test_fuzz.py -k as_long      (make fuzz)
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from typing import Any

import pytest
import wikigpt.kernels
from hypothesis import HealthCheck, Phase, given, seed, settings
from wikigpt.kernels import layers

from tests.fuzz import Call, Finding, Fuzzed
from tests.fuzz_calls import FUNCTIONS, NO_CALLS, STRATEGIES, check

EXAMPLES = 12  # of each function
SLOW = 4  # of so many calls one runs under the interpreter too
MINUTES = float(os.environ.get("WIKIGPT_FUZZ_MINUTES", "0"))
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]


def interpreted(call: Call) -> bool:
    """A part of the calls, the same ones each time."""
    return random.Random(repr(call)).randrange(SLOW) == 0


def test_every_public_function_is_fuzzed():
    public = set(wikigpt.kernels.__all__) - NO_CALLS | {f"layers.{name}" for name in layers.__all__}
    assert set(STRATEGIES) == set(FUNCTIONS) == public


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_call_is_right_or_refused_in_words(name):
    # Derandomised: each run makes the same calls, and a failing one prints as Python.
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET,
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(STRATEGIES[name])
    def holds(call):
        check(call, slow=interpreted(call))

    holds()


@pytest.mark.skipif(not MINUTES, reason="as long as WIKIGPT_FUZZ_MINUTES says")
def test_no_finding_as_long_as_it_is_told_to_look(capsys):
    counts, findings = search(60 * MINUTES, capsys)
    with capsys.disabled():
        print("\nexamples: " + ", ".join(f"{name} {counts[name]}" for name in sorted(STRATEGIES)))
        print(f"{sum(counts.values())} examples, {len(findings)} findings")
    assert not findings, "\n\n".join(str(f) for f in findings.values())


def search(seconds: float, capsys: Any, batch: int = 20) -> tuple[Counter[str], dict[Any, Finding]]:
    """Every function in turn, `batch` calls at a time. A finding is shrunk and printed once; then the search goes on."""
    end, counts, findings = time.monotonic() + seconds, Counter[str](), {}
    only = os.environ.get("WIKIGPT_FUZZ_ONLY", "")
    number = int(os.environ.get("WIKIGPT_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
    with capsys.disabled():
        print(f"\nWIKIGPT_FUZZ_SEED={number}", flush=True)
    while time.monotonic() < end:
        number += 1
        for name in sorted(STRATEGIES):
            if only not in name or time.monotonic() > end:
                continue
            found = one_round(name, number, batch, counts, findings)
            if found is not None:
                findings[found.key] = found
                with capsys.disabled():
                    print(f"\n--- {found}", flush=True)
    return counts, findings


def one_round(name: str, number: int, batch: int, counts: Counter[str], known: dict[Any, Finding]) -> Finding | None:
    last: list[Finding] = []
    began: list[float] = []

    @seed(number)
    @settings(
        max_examples=batch, deadline=None, database=None, suppress_health_check=QUIET, report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(STRATEGIES[name])
    def holds(call):
        counts[name] += 1
        try:
            check(call, slow=interpreted(call))
        except Finding as found:
            if found.key in known:
                return
            began.append(time.monotonic())
            if last and (found.key != last[0].key or began[-1] > began[0] + 60):
                return  # shrink the one that was found, into no other, for a minute
            last[:1] = [found]
            raise

    try:
        holds()
    except Finding:
        return last[0]
    except BaseException as error:
        if last:
            return last[0]
        raise error
    return None


__all__ = ["Fuzzed"]
