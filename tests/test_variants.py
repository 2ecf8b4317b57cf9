"""A number of rows, tokens, positions or heads that a kernel has not met compiles nothing: a step of training or a token of
decoding never waits for the compiler."""

import pytest

from tests import variants

pytest.importorskip("triton", reason="triton, which compiles, is for Linux alone")


@pytest.fixture(scope="module")
def counted():
    return variants.counted()


@pytest.mark.parametrize("sweep", variants.SWEEPS)
def test_a_sweep_of_shapes_compiles_one_variant_of_each_kernel(sweep, counted):
    # Products of either kind, into d_input and into d_weight; d_input is summed in float32 where there are several chunks.
    several = {"linear_cross_entropy_triton._filtered_product": 3}
    assert counted[sweep]
    assert {name: n for name, n in counted[sweep].items() if n > several.get(name, 1)} == {}
