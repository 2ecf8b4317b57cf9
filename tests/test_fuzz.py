"""Every public function under random calls: right by the numeric rule, or refused in words that name an argument.

By hand for as long as one likes, with fresh seeds and every function in turn:

    WIKIGPT_FUZZ_MINUTES=60 pytest -s tests/test_fuzz.py -k as_long      (make fuzz)
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch.nn.functional as F
import wikigpt.kernels
from hypothesis import HealthCheck, Phase, given, seed, settings
from wikigpt.kernels import layers
from wikigpt.kernels._dispatch import forced_backend

from tests.fuzz import Call, Finding, T, evaluate
from tests.fuzz_calls import FUNCTIONS, NO_CALLS, STRATEGIES, check, neighbours

EXAMPLES = 12  # of each function
SLOW, SLOW_NEIGHBOURS = 4, 25  # of so many calls one runs under the interpreter too
MINUTES = float(os.environ.get("WIKIGPT_FUZZ_MINUTES", "0"))
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]


def interpreted(call: Call, of: int = SLOW) -> bool:
    """A part of the calls, the same ones each time."""
    return random.Random(repr(call)).randrange(of) == 0


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


def valid_calls(name: str, number: int, most: int) -> list[Call]:
    found: list[Call] = []

    @seed(number)
    @settings(
        max_examples=4 * most, deadline=None, database=None, suppress_health_check=QUIET, phases=[Phase.generate]
    )  # fmt: skip
    @given(STRATEGIES[name])
    def gather(call):
        if len(found) < most and evaluate(call, FUNCTIONS[name].function).error is None:
            found.append(call)

    gather()
    return found


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_call_with_one_tensor_otherwise_is_right_or_refused_in_words(name):
    for call in valid_calls(name, 0, 2):
        for other in neighbours(call):
            check(other, slow=interpreted(other, SLOW_NEIGHBOURS))


# A class keeps its tensors as a module of PyTorch's does, and layers replace `forward` alone.
FUNCTIONS_ALONE = [name for name in sorted(STRATEGIES) if not name.startswith("layers.") and name.lower() == name]
WRONG: dict[str, Any] = {"a string": "a", "a list": [1.0], "a dict": {}, "an object": object()}


@pytest.mark.parametrize("name", FUNCTIONS_ALONE)
def test_an_argument_of_a_wrong_type_is_refused_in_words(name):
    spec, seen = FUNCTIONS[name], Counter[str]()
    for call in valid_calls(name, 0, EXAMPLES):
        for argument, value in call.arguments.items():
            if isinstance(value, (bool, str, list, tuple)) or value is None:
                continue  # a flag is true or false whatever its type
            seen[argument] += 1
            for what, wrong in WRONG.items():
                error = evaluate(dataclasses.replace(call, arguments=call.arguments | {argument: wrong}), spec.function).error
                assert isinstance(error, (TypeError, ValueError)), f"{argument}: {what} gives {error!r} in {call}"
                assert set(re.findall(r"\w+", str(error))) & set(spec.parameters), f"{argument}: {what} gives {error!r}"

    assert seen


# --- what the search itself can see ---------------------------------------------------------------------------------


FAULTS: dict[str, Any] = {
    "a wrong number": lambda x: F.gelu(x) * 1.001,
    "a wrong number in the gradient": lambda x: F.gelu(x).detach() + 0 * x,
    "what lies behind a row is read": lambda x: F.gelu(x) + 0 * x.as_strided((3, 6), x.stride()).sum(),
    "an input is changed": lambda x: F.gelu(x) + 0 * x.detach().add_(1),
    "another dtype": lambda x: F.gelu(x).double(),
    "another shape": lambda x: F.gelu(x)[None],
    "one backend alone refuses": lambda x: check_positive(x),
    "PyTorch's own error": lambda x: F.gelu(x).view(7),
}


def check_positive(x):
    raise ValueError(f"x: got {tuple(x.shape)}, must be nothing")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_search_sees(fault, monkeypatch):
    def broken(x):
        return F.gelu(x) if forced_backend() == "reference" else FAULTS[fault](x)

    monkeypatch.setitem(FUNCTIONS, "gelu", dataclasses.replace(FUNCTIONS["gelu"], function=broken, torch=None))
    with pytest.raises(Finding):
        check(Call("gelu", {"x": T((3, 4), layout="sliced", grad=True)}))


def test_a_call_that_is_right_is_no_finding():
    check(Call("gelu", {"x": T((3, 4), layout="sliced", grad=True)}))


def test_a_call_prints_as_python_that_makes_it_again():
    call = Call("gelu", {"x": T((3, 4), "float16", layout="rows", grad=True, fill=(1.0, float("-inf")))}, upstream=(0,))
    assert eval(repr(call)) == call


def test_an_error_of_the_search_itself_is_reported_and_does_not_end_it(monkeypatch, capsys):
    def broken(call, slow):
        raise KeyError("of the search")

    monkeypatch.setitem(globals(), "check", broken)
    monkeypatch.setenv("WIKIGPT_FUZZ_ONLY", "apply_rotary_emb_qk")
    counts, findings = Counter[str](), dict[Any, Finding]()
    search(0.3, capsys, counts, findings)
    assert [(f.call.function, f.what) for f in findings.values()] == [("apply_rotary_emb_qk", "the search itself fails")]
    assert counts["apply_rotary_emb_qk"] > 20


@pytest.mark.skipif(not MINUTES, reason="as long as WIKIGPT_FUZZ_MINUTES says")
def test_no_finding_as_long_as_it_is_told_to_look(capsys):
    counts, findings = Counter[str](), dict[Any, Finding]()
    try:
        search(60 * MINUTES, capsys, counts, findings)
    finally:  # Ctrl-C too
        with capsys.disabled():
            print("\nexamples: " + ", ".join(f"{name} {counts[name]}" for name in sorted(STRATEGIES)))
            print(f"{sum(counts.values())} examples, {len(findings)} findings")
    assert not findings, "\n\n".join(str(f) for f in findings.values())


def search(seconds: float, capsys: Any, counts: Counter[str], findings: dict[Any, Finding], batch: int = 20) -> None:
    """Every function in turn, `batch` calls at a time. A finding is shrunk and printed once; then the search goes on."""
    end = time.monotonic() + seconds
    only = os.environ.get("WIKIGPT_FUZZ_ONLY", "")
    number = int(os.environ.get("WIKIGPT_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
    with capsys.disabled():
        print(f"\nWIKIGPT_FUZZ_SEED={number}", flush=True)
    while time.monotonic() < end:
        number += 1
        for name in sorted(STRATEGIES):
            if only not in name or time.monotonic() > end:
                continue
            for found in (one_round(name, number, batch, counts, findings), *around(name, number, counts)):
                if found is None or found.key in findings:
                    continue
                findings[found.key] = found
                with capsys.disabled():
                    print(f"\n--- {found}", flush=True)


def around(name: str, number: int, counts: Counter[str]) -> Iterator[Finding]:
    """Next to one call that is valid, all with one tensor otherwise: what a draw seldom brings together."""
    for call in valid_calls(name, number, 1):
        for other in neighbours(call):
            counts[name] += 1
            try:
                check(other, slow=interpreted(other, SLOW_NEIGHBOURS))
            except Exception as error:
                yield as_finding(other, error)


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
        except Exception as error:
            found = as_finding(call, error)
            if found.key in known:
                return
            began.append(time.monotonic())
            if last and (found.key != last[0].key or began[-1] > began[0] + 60):
                return  # shrink the one that was found, into no other, for a minute
            last[:1] = [found]
            raise found from None

    try:
        holds()
    except Finding:
        return last[0]
    except Exception as error:  # Hypothesis: what it shrinks does not fail alike twice, or a strategy fails
        return last[0] if last else as_finding(Call(name, {}), error)
    return None


def as_finding(call: Call, error: Exception) -> Finding:
    """An error of the search itself is a finding too: it did not see what it meant to look at."""
    if isinstance(error, Finding):
        return error
    where = "".join(traceback.format_tb(error.__traceback__)[-3:])
    return Finding(call, "the search itself fails", f"{type(error).__name__}: {error}\n{where}")
