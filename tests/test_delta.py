"""The formulas, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loralib.delta import (
    add_delta,
    balanced_factors,
    block_diagonal_B,
    delta_weight,
    dora_weight,
    effective_rank,
    low_rank,
    olora_factors,
    pissa_factors,
    product_svd,
    scaling_of,
)

quick = settings(max_examples=30, deadline=None, derandomize=True)
sizes = st.integers(1, 7)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_scaling_follows_both_papers() -> None:
    assert scaling_of(8, 16) == 2
    assert scaling_of(8, 16, use_rslora=True) == 16 / math.sqrt(8)
    assert scaling_of(0, 16) == scaling_of(0, 16, use_rslora=True) == 0


@given(sizes, sizes, sizes, st.floats(-4, 4))
@quick
def test_path_and_weight_are_one_formula(inputs: int, outputs: int, r: int, scaling: float) -> None:
    A, B, x = draw(r, inputs), draw(outputs, r, seed=1), draw(2, 3, inputs, seed=2)
    torch.testing.assert_close(low_rank(x, A, B, scaling), x @ delta_weight(A, B, scaling).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    A, B, x = draw(2, 4, dtype=torch.float32), draw(3, 2, dtype=torch.float32), draw(5, 4, dtype=dtype)
    assert low_rank(x, A, B, 1.0).dtype == dtype
    half = delta_weight(A.to(dtype), B.to(dtype), 1.0)
    assert half.dtype == torch.promote_types(dtype, torch.float32)
    weight = draw(3, 4, dtype=dtype)
    assert add_delta(weight, delta_weight(A, B, 1.0)).dtype == dtype
    # One rounding, of the exact sum.
    exact = weight.double() + delta_weight(A, B, 1.0).double()
    ulp = torch.finfo(dtype).eps * exact.abs() / 2 + torch.finfo(torch.float32).eps * exact.abs()
    assert ((add_delta(weight, delta_weight(A, B, 1.0)).double() - exact).abs() <= ulp + 1e-12).all()


@given(st.lists(st.booleans(), min_size=1, max_size=5).filter(any), sizes, st.integers(1, 3), sizes)
@quick
def test_fused_blocks_are_one_plain_product(blocks: list[bool], size: int, r: int, inputs: int) -> None:
    k = sum(blocks)
    A, B = draw(r * k, inputs), draw(size * k, r, seed=1)
    wide = block_diagonal_B(B, blocks)
    assert wide.shape == (size * len(blocks), r * k)
    parts = iter([b @ a for a, b in zip(A.split(r), B.split(size), strict=True)])
    expected = torch.cat([next(parts) if on else torch.zeros(size, inputs, dtype=A.dtype) for on in blocks])
    torch.testing.assert_close(wide @ A, expected)


@given(sizes, sizes, sizes, st.floats(0.1, 4))
@quick
def test_svd_of_a_product_without_the_product(inputs: int, outputs: int, r: int, scaling: float) -> None:
    A, B = draw(r, inputs), draw(outputs, r, seed=1)
    U, S, Vh = product_svd(A, B, scaling)
    k = min(r, inputs, outputs)
    assert S.shape == (k,)
    torch.testing.assert_close(U @ S.diag() @ Vh, scaling * B @ A)
    torch.testing.assert_close(U.T @ U, torch.eye(k, dtype=U.dtype))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(k, dtype=U.dtype))
    assert (S.diff() <= 0).all()


def test_best_approximations() -> None:
    weight = draw(6, 5, dtype=torch.float32)
    U, S, Vh = torch.linalg.svd(weight)
    for r in (1, 3, 5):
        A, B = pissa_factors(weight, r, 2.0)
        assert A.shape == (r, 5)
        assert B.shape == (6, r)
        torch.testing.assert_close(2.0 * B @ A, U[:, :r] @ S[:r].diag() @ Vh[:r], atol=1e-5, rtol=1e-5)
    A, B = balanced_factors(U, S, Vh, 2)
    torch.testing.assert_close(torch.linalg.vector_norm(A), torch.linalg.vector_norm(B))


def test_olora_starts_from_an_orthogonal_B() -> None:
    weight = draw(6, 5, dtype=torch.float32)
    A, B = olora_factors(weight, 3)
    torch.testing.assert_close(B.T @ B, torch.eye(3), atol=1e-5, rtol=0)
    A, B = olora_factors(weight, 5)
    torch.testing.assert_close(B @ A, weight, atol=1e-5, rtol=1e-5)


def test_dora_keeps_the_magnitude() -> None:
    weight, delta, magnitude = draw(4, 3), draw(4, 3, seed=1), draw(4, seed=2).abs()
    moved = dora_weight(weight, delta, magnitude)
    torch.testing.assert_close(torch.linalg.vector_norm(moved, dim=1), magnitude)
    torch.testing.assert_close(
        torch.cosine_similarity(moved, weight + delta, dim=1), torch.ones(4, dtype=torch.float64)
    )
    start = torch.linalg.vector_norm(weight, dim=1)
    torch.testing.assert_close(dora_weight(weight, torch.zeros_like(weight), start), weight)


def test_effective_rank_counts_equal_values() -> None:
    for r in (1, 2, 5):
        assert effective_rank(torch.cat([torch.full((r,), 3.0), torch.zeros(4)])) == pytest.approx(r)
    assert 1 < effective_rank(torch.tensor([1.0, 0.1])) < 2
