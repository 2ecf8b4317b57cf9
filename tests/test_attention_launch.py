"""How often attention is compiled: once for each kind of problem, whatever its lengths, counts and windows."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton", reason="triton, which compiles, is for Linux alone")

SWEEPS = ("training", "windows", "packed", "decoding", "masks", "gpu")


@pytest.fixture(scope="module")
def compilations():
    command = [sys.executable, "-m", "tests.counted_compiles", *SWEEPS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True).stdout)


@pytest.mark.parametrize("sweep", ["training", "windows"])
def test_any_length_batch_number_of_heads_and_window_is_one_kernel(compilations, sweep):
    assert compilations[sweep] == {"_forward": 1, "_dq": 1, "_dkdv": 1}


def test_any_packed_batch_is_one_kernel(compilations):
    # What clears the tokens behind the last sequence is another for the forward (out, lse) than for the backward (dq, dk, dv).
    assert compilations["packed"] == {"_forward": 1, "_dq": 1, "_dkdv": 1, "clear_tails": 2}


def test_any_cache_is_a_kernel_for_each_kind_of_call(compilations):
    # cache_seqlens as an int or as a tensor; _decode in parts or not. They are combined alike.
    assert compilations["decoding"] == {"_append": 2, "_decode": 4, "_combine": 1}


def test_masks_of_any_length_are_a_kernel_for_those_read_in_vectors_and_few_for_the_others(compilations):
    # A bias and a boolean mask are two kinds each; the strides of rows that begin anywhere may be multiples of 16 or not.
    assert all(compilations["masks"][kernel] <= 4 for kernel in ("_forward", "_dq", "_dkdv"))
    assert compilations["masks"]["_dbias"] <= 3
    assert compilations["masks"]["block_list"] <= 6


def test_the_gpu_tests_compile_few_enough_kernels_for_a_minute(compilations):
    assert sum(compilations["gpu"].values()) <= 250
