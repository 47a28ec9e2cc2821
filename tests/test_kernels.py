"""The compiled kernels: compared with formulas in fp64 for all accepted shapes; and what happens without them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from loralib.engine import kernels as kernels_module
from loralib.engine.kernels import Factors, GroupOperands, Kernels, RowUpdate, VisibilityBlocks, compiled, loaded
from loralib.generation.beam import best_tokens

DTYPES = pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = loaded()
    if found is None:
        pytest.skip("no gcc here")
    return found


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(*tensors: Tensor) -> list[Tensor]:
    """The same numbers in fp64, with gradients."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def close(found: Tensor, expected: Tensor, error: float) -> None:
    expected = expected.detach()
    size = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error * size)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 16), (2, 3, 576), (200, 160)])
def test_rms_norm(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, error: float) -> None:
    x, weight, gradient = (
        draw(*shape, dtype=dtype),
        draw(shape[-1], dtype=dtype, seed=1),
        draw(*shape, dtype=dtype, seed=2),
    )
    y, factor = kernels.rms_norm(x, weight, 1e-5)
    (wide,) = exact(x)
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    expected.backward(gradient.double())
    close(y, expected, error)
    assert wide.grad is not None
    close(kernels.rms_norm_back(gradient, x, weight, factor), wide.grad, error)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (40, 1536)])
def test_swiglu(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, error: float) -> None:
    gate, up, gradient = (draw(*shape, dtype=dtype, seed=seed) * 4 for seed in range(3))
    wide_gate, wide_up = exact(gate, up)
    expected = F.silu(wide_gate) * wide_up
    expected.backward(gradient.double())
    close(kernels.swiglu(gate, up), expected, error)
    for found, wide in zip(kernels.swiglu_back(gradient, gate, up), (wide_gate, wide_up), strict=True):
        assert wide.grad is not None
        close(found, wide.grad, error)


@DTYPES
@pytest.mark.parametrize("shape", [(16,), (3, 5, 48), (200, 160)])
def test_gelu(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, error: float) -> None:
    x, gradient = 3 * draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    (wide,) = exact(x)
    expected = F.gelu(wide, approximate="tanh")
    expected.backward(gradient.double())
    close(kernels.gelu(x), expected, error)
    assert wide.grad is not None
    close(kernels.gelu_back(gradient, x), wide.grad, error)
    far = torch.tensor([-1e4, -90.0, 90.0, 1e4] * 4, dtype=dtype)
    assert torch.equal(kernels.gelu(far), far.clamp(min=0))
    assert torch.equal(kernels.gelu_back(torch.ones_like(far), far), (far > 0).to(dtype))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (400, 1536)])
def test_scaled_back(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, error: float) -> None:
    y, gradient, step = (draw(*size, dtype=dtype, seed=seed) for seed, size in enumerate((shape, shape, shape[1:])))
    grad_z, sums = kernels.scaled_back(gradient, y, step)
    close(grad_z, gradient.double() * (1 + step.double()), error)
    close(sums, (gradient.double() * y.double()).sum(0), 1e-5)


def test_swiglu_of_numbers_beyond_the_range_of_exp(kernels: Kernels) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -1e-30, 0.0, 88.0, 200.0, 1e30] * 2)
    torch.testing.assert_close(kernels.swiglu(gate, torch.ones(16)), F.silu(gate), rtol=1e-6, atol=1e-30)


@DTYPES
@pytest.mark.parametrize("dense", [True, False])
def test_rotation_and_back(kernels: Kernels, dense: bool, dtype: torch.dtype, error: float) -> None:
    """The inverse is the transpose: rotating forth and back, with cos^2 + sin^2 = 1, returns x."""
    x = draw(1, 7, 3, 32, dtype=dtype).transpose(1, 2) if dense else draw(1, 3, 7, 32, dtype=dtype)
    angle = draw(7, 32).double()
    angle[:, 16:] = angle[:, :16]
    cos, sin = angle.cos().to(dtype)[None, None], angle.sin().to(dtype)[None, None]
    turned = kernels.rotate(x, cos, sin, back=False)
    x1, x2 = x.double().chunk(2, -1)
    close(turned, x.double() * cos.double() + torch.cat((-x2, x1), -1) * sin.double(), error)
    close(kernels.rotate(turned, cos, sin, back=True), x.double(), 2 * error)


@st.composite
def attentions(draw_: Any) -> dict[str, Any]:
    group = draw_(st.sampled_from([1, 2, 3, 5]))
    return {
        "total": draw_(st.integers(1, 70)),
        "group": group,
        "kv_heads": draw_(st.sampled_from([1, 2, 3])),
        "width": draw_(st.sampled_from([16, 64, 80])),
        "seed": draw_(st.integers(0, 99)),
        "dtype": draw_(st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])),
        "threads": draw_(st.sampled_from([1, 2, 3])),
    }


def test_blocks_of_tiles_are_those_of_a_mask() -> None:
    """Three full blocks, and one with a single query; keys that no query of a block sees are left out."""
    sees = (torch.rand(49, 60, generator=torch.Generator().manual_seed(0)) < 0.1) | torch.eye(49, 60).bool()
    starts = torch.arange(0, 49, 16)
    whole = VisibilityBlocks.of(F.pad(sees, (0, 0, 0, 15)).view(4, 16, 60), (49 - starts).clamp(max=16), torch.zeros(4))
    tiles = [(part.any(0).nonzero()[:, 0], part[:, part.any(0)]) for part in sees.split(16)]
    for name, found in vars(VisibilityBlocks.of_tiles(tiles)).items():
        expected = vars(whole)[name]
        assert torch.equal(found, expected) if isinstance(found, Tensor) else found == expected


def dense_attention(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scaling: float) -> Tensor:
    """The attention of q (R, H, D) over k and v (T, H_kv, D), where `sees` (R, T) is true."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("rhd,thd->hrt", q, k) * scaling
    return torch.einsum("hrt,thd->rhd", scores.masked_fill(~sees, float("-inf")).softmax(-1), v)


@given(attentions())
@settings(max_examples=40, deadline=None)
def test_attention_and_its_gradients(
    kernels: Kernels, monkeypatch_module: pytest.MonkeyPatch, case: dict[str, Any]
) -> None:
    dtype, error = case["dtype"]
    total, kv_heads, width, seed = case["total"], case["kv_heads"], case["width"], case["seed"]
    heads = kv_heads * case["group"]
    q, gradient = (draw(total, heads, width, dtype=dtype, seed=seed + number) for number in (0, 1))
    k, v = (draw(total, kv_heads, width, dtype=dtype, seed=seed + number) for number in (2, 3))
    sees = (torch.rand(total, total, generator=torch.Generator().manual_seed(seed)) < 0.4) | torch.eye(total).bool()
    padded = F.pad(sees, (0, 0, 0, -total % 16)).view(-1, 16, total)
    starts = 16 * torch.arange(len(padded))
    blocks = VisibilityBlocks.of(padded, (total - starts).clamp(max=16), torch.zeros_like(starts))
    monkeypatch_module.setattr(kernels, "_threads", lambda numbers: case["threads"])
    y, kept = kernels.attention(q, k, v, blocks, 0.3, keep=True)
    assert kept is not None
    wide = exact(q, k, v)
    expected = dense_attention(*wide, sees, 0.3)
    expected.backward(gradient.double())
    close(y, expected, error)
    grads = kernels.attention_back(gradient, q, k, v, y, kept, blocks, 0.3)
    scale = max(float(each.grad.abs().max()) for each in wide if each.grad is not None)
    for found, each in zip(grads, wide, strict=True):
        torch.testing.assert_close(found.double(), each.grad, rtol=2 * error, atol=2 * error * scale)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("group", [1, 3, 16])
def test_attention_of_the_branches_of_several_texts(kernels: Kernels, group: int) -> None:
    """A text with more branches than a block has room for, one with a single branch, and one with none."""
    counts, texts, columns, kv_heads, width = [11, 1], [0, 2], 9, 2, 16
    size = 16 // group
    q = draw(sum(counts), kv_heads * group, width)
    keys, values = (draw(3, kv_heads, columns, width, seed=seed) for seed in (1, 2))
    sees = (draw(sum(counts), columns, seed=3) > 0) | (torch.arange(columns) == 4)
    parts, sizes, of_texts = [], [], []
    for part, text in zip(sees.split(counts), texts, strict=True):
        for block in part.split(size):
            parts.append(F.pad(block, (0, 0, 0, size - len(block))))
            sizes.append(len(block))
            of_texts.append(text)
    blocks = VisibilityBlocks.of(torch.stack(parts), torch.tensor(sizes), torch.tensor(of_texts), heads=group)
    found, kept = kernels.attention(q, keys, values, blocks, 0.5)
    assert kept is None
    for rows, mine, text in zip(q.split(counts), sees.split(counts), texts, strict=True):
        expected = dense_attention(rows, keys[text].transpose(0, 1), values[text].transpose(0, 1), mine, 0.5)
        torch.testing.assert_close(found[: len(rows)], expected, rtol=1e-5, atol=1e-5)
        found = found[len(rows) :]


@DTYPES
def test_sums_for_log_softmax(kernels: Kernels, dtype: torch.dtype, error: float) -> None:
    x = draw(5, 192, dtype=dtype) * 8
    most, sums, of_groups = kernels.log_sums(x, 64)
    torch.testing.assert_close(most + sums.log(), x.float().logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(of_groups, x.view(5, 3, 64).amax(-1))
    banned = torch.full((1, 64), float("-inf"))
    assert kernels.log_sums(banned, 64)[1].isnan().all()


@DTYPES
def test_the_best_tokens_of_a_large_vocabulary(kernels: Kernels, dtype: torch.dtype, error: float) -> None:
    logits = draw(7, 6400, dtype=dtype) * 4
    gains, tokens = best_tokens(logits, 10)
    expected = torch.log_softmax(logits.float(), -1).topk(10).values
    torch.testing.assert_close(gains, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.log_softmax(logits.float(), -1).gather(1, tokens), expected, rtol=1e-5, atol=1e-5)


@st.composite
def factors(draw_: Any) -> dict[str, Any]:
    layers = draw_(st.integers(1, 3))
    return {
        "count": draw_(st.integers(1, 40)),
        "width": draw_(st.sampled_from([32, 96, 160, 4128])),
        "ranks": [draw_(st.sampled_from([2, 4, 8, 10, 16, 22, 40])) for _ in range(layers)],
        "widths": [draw_(st.sampled_from([32, 64, 160])) for _ in range(layers)],
        "drops": draw_(st.booleans()),
        "transposed": draw_(st.booleans()),
        "threads": draw_(st.sampled_from([1, 2, 3])),
        "seed": draw_(st.integers(0, 99)),
    }


@given(factors())
@settings(max_examples=60, deadline=None)
def test_linears_with_lora_and_their_gradients(
    kernels: Kernels, monkeypatch_module: pytest.MonkeyPatch, case: dict[str, Any]
) -> None:
    """h is rounded when it is stored, as by a linear layer; the rest is computed from the stored values."""
    count, width, ranks, widths, seed = (case[name] for name in ("count", "width", "ranks", "widths", "seed"))

    def half(*shape: int, number: int) -> Tensor:
        return draw(*shape, dtype=torch.bfloat16, seed=seed + number)

    x, A = half(count, width, number=0), half(sum(ranks), width, number=1)
    seen = half(count, width, number=12) if case["drops"] else x
    B = [half(*shape, number=2 + number) for number, shape in enumerate(zip(ranks, widths, strict=True))]
    weights = [half(each, width, number=13 + number) for number, each in enumerate(widths)]
    if case["transposed"]:
        weights = [weight.T.contiguous().T for weight in weights]
    biases = [half(each, number=16) if number != 1 else None for number, each in enumerate(widths)]
    gradients = [half(count, each, number=5 + number) for number, each in enumerate(widths)]
    if not (kernels.accept_factors(Factors(A, B)) and all(map(kernels.accept_weight, weights))):
        pytest.skip("this processor does not multiply pairs of bf16, or better than that")
    monkeypatch_module.setattr(kernels, "_threads", lambda numbers: case["threads"])
    grad_A, grad_B = torch.full_like(A, torch.nan), [torch.full_like(b, torch.nan) for b in B]
    operands = GroupOperands(weights, biases, [Factors(A, B)], [Factors(grad_A, grad_B)])
    h, outputs = kernels.lora(x, seen, operands)
    close(h, seen.double() @ A.double().T, 2**-7)
    for output, part, b, weight, bias in zip(outputs, h.double().split(ranks, 1), B, weights, biases, strict=True):
        expected = x.double() @ weight.double().T + part @ b.double()
        close(output, expected if bias is None else expected + bias.double(), 2**-8)

    grad_x, grad_seen = kernels.lora_back(gradients, seen, h, operands, wants_x=True, wants_seen=case["drops"])
    grad_h = torch.cat([g.double() @ b.double().T for g, b in zip(gradients, B, strict=True)], 1)
    through_weights = sum(g.double() @ weight.double() for g, weight in zip(gradients, weights, strict=True))
    assert grad_x is not None
    if case["drops"]:
        assert grad_seen is not None
        close(grad_x, through_weights, 2**-8)
        close(grad_seen, grad_h @ A.double(), 2**-6)
    else:
        assert grad_seen is None
        close(grad_x, through_weights + grad_h @ A.double(), 2**-6)
    for gradient, of_part in zip(grad_A.split(ranks), grad_h.split(ranks, 1), strict=True):
        close(gradient, of_part.T @ seen.double(), 2**-6)
    for gradient, part, of_output in zip(grad_B, h.double().split(ranks, 1), gradients, strict=True):
        close(gradient, part.T @ of_output.double(), 2**-6)
    unwanted = kernels.lora_back(gradients, seen, h, operands, wants_x=False, wants_seen=False)
    assert unwanted == (None, None)


@given(
    runs=st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0, 2, 10, 16, 40])), min_size=1, max_size=9),
    width=st.sampled_from([32, 160, 4128]),
    widths=st.lists(st.sampled_from([32, 96]), min_size=1, max_size=3),
    threads=st.sampled_from([1, 2, 3]),
)
@settings(max_examples=60, deadline=None)
def test_each_run_has_the_rows_and_gradients_it_has_alone(
    kernels: Kernels,
    monkeypatch_module: pytest.MonkeyPatch,
    runs: list[tuple[int, int]],
    width: int,
    widths: list[int],
    threads: int,
) -> None:
    """Several runs, each with its own adapter of any rank or none, in one call; bit for bit the same as alone."""
    seeds = iter(range(1000))

    def half(*shape: int) -> Tensor:
        return draw(*shape, dtype=torch.bfloat16, seed=next(seeds))

    counts = [count for count, _ in runs]
    assume(sum(counts))
    weights, biases = [half(each, width) for each in widths], [half(each) for each in widths]
    factors = [Factors(half(len(widths) * rank, width), [half(rank, each) for each in widths]) for _, rank in runs]
    if not (kernels.accept_factors(*factors) and all(map(kernels.accept_weight, weights))):
        pytest.skip("this processor does not multiply pairs of bf16, or better than that")
    monkeypatch_module.setattr(kernels, "_threads", lambda numbers: threads)
    x, gradients = half(sum(counts), width), [half(sum(counts), each) for each in widths]

    def both_ways(x: Tensor, gradients: list[Tensor], factors: list[Factors], rows: list[int] | None) -> list[Tensor]:
        found = [Factors(torch.full_like(A, torch.nan), [torch.full_like(b, torch.nan) for b in B]) for A, B in factors]
        operands = GroupOperands(weights, biases, factors, found, rows)
        h, outputs = kernels.lora(x, x, operands)
        grad_x, _ = kernels.lora_back(gradients, x, h, operands, wants_x=True, wants_seen=False)
        assert grad_x is not None
        return [*outputs, grad_x, *[each for A, B in found for each in (A, *B)]]

    together = both_ways(x, gradients, factors, counts)
    of_rows, of_factors = together[: len(widths) + 1], together[len(widths) + 1 :]
    each = len(widths) + 1
    begin = 0
    for number, (count, _) in enumerate(runs):
        here = slice(begin, begin + count)
        begin += count
        if count:
            alone = both_ways(x[here], [g[here] for g in gradients], [factors[number]], None)
            assert all(map(torch.equal, (tensor[here] for tensor in of_rows), alone))
            assert all(map(torch.equal, of_factors[number * each : (number + 1) * each], alone[each:]))


@DTYPES
@given(
    shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 70), st.booleans()), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_many_factors_are_cast_and_their_gradients_handed_back(
    kernels: Kernels, dtype: torch.dtype, error: float, shapes: list[tuple[int, int, bool]], seed: int
) -> None:
    """Rounded as by PyTorch, row- or column-wise, also as part of a wider tensor."""
    own = [draw(rows, columns, seed=seed + number) for number, (rows, columns, _) in enumerate(shapes)]
    rooms = [
        torch.full((columns, rows + 3) if turned else (rows, columns + 5), torch.nan, dtype=dtype)
        for rows, columns, turned in shapes
    ]
    casts = [
        room[:, 1 : 1 + rows].T if turned else room[:, 2 : 2 + columns]
        for room, (rows, columns, turned) in zip(rooms, shapes, strict=True)
    ]
    scales = [1.0 + number / 3 for number in range(len(shapes))]
    assert kernels.accept_copies(own, casts)
    kernels.copy_scaled(own, casts, scales)
    expected = [(each * scale).to(dtype) for each, scale in zip(own, scales, strict=True)]
    assert all(map(torch.equal, casts, expected))
    assert sum(int(room.isnan().sum()) for room in rooms) == sum(room.numel() for room in rooms) - sum(
        each.numel() for each in own
    )
    back = [torch.full_like(each, torch.nan) for each in own]
    kernels.copy_scaled(back, casts, scales, back=True)
    assert all(torch.equal(to, each.float() * scale) for to, each, scale in zip(back, casts, scales, strict=True))


@given(
    rows=st.integers(1, 40),
    shape=st.tuples(st.sampled_from([32, 96, 4096, 4128, 8256]), st.sampled_from([32, 64, 160])),
    transposed=st.booleans(),
    added=st.sampled_from(["nothing", "a bias", "rows"]),
    threads=st.sampled_from([1, 2, 3, 5]),
)
@settings(max_examples=40, deadline=None)
def test_products_with_weights(
    kernels: Kernels,
    monkeypatch_module: pytest.MonkeyPatch,
    rows: int,
    shape: tuple[int, int],
    transposed: bool,
    added: str,
    threads: int,
) -> None:
    """Also with more numbers than are rearranged at once; each row is independent of the others."""
    width, wide = shape
    x, weight = draw(rows, width, dtype=torch.bfloat16), draw(wide, width, dtype=torch.bfloat16, seed=1)
    shapes = {"nothing": (0,), "a bias": (wide,), "rows": (rows, wide)}
    more = None if added == "nothing" else draw(*shapes[added], dtype=torch.bfloat16, seed=2)
    if transposed:
        weight = weight.T.contiguous().T
    if not kernels.accept_weight(weight):
        pytest.skip("this processor does not multiply pairs of bf16, or better than that")
    monkeypatch_module.setattr(kernels, "_threads", lambda numbers: threads)
    found = kernels.product(x, weight, more)
    expected = x.double() @ weight.double().T
    close(found, expected if more is None else expected + more.double(), 2**-8)
    of_some = more[rows // 2 :] if added == "rows" and more is not None else more
    assert torch.equal(kernels.product(x[rows // 2 :], weight, of_some), found[rows // 2 :])
    close(kernels.product(found, weight.T), found.double() @ weight.double(), 2**-8)


@DTYPES
@settings(max_examples=40, deadline=None)
@given(
    owners=st.lists(st.integers(-1, 3), min_size=1, max_size=20),
    ranks=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    size=st.sampled_from([16, 48, 64]),
    width=st.sampled_from([16, 80]),
)
def test_each_row_gets_the_low_rank_update_that_it_chose(
    kernels: Kernels, dtype: torch.dtype, error: float, owners: list[int], ranks: list[int], size: int, width: int
) -> None:
    # Row i has the update owners[i]; -1: none.
    x, y = draw(len(owners), size, dtype=dtype), draw(len(owners), width, dtype=dtype, seed=1)
    expected, updates = y.double(), []
    for number in sorted(set(owners) - {-1}):
        A, B = draw(ranks[number], size, dtype=dtype, seed=2), draw(ranks[number], width, dtype=dtype, seed=number)
        rows = [row for row, owner in enumerate(owners) if owner == number]
        updates.append(RowUpdate(rows, A, B, 0.5 + number))
        expected[rows] += (0.5 + number) * (x[rows].double() @ A.double().T) @ B.double()
    assert kernels.accept_row_updates(updates)
    if updates:
        kernels.row_updates(updates)(x, y)
    close(y, expected, error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_to_be_seen(kernels: Kernels, value: float) -> None:
    """A run that diverges must notice it."""
    x = draw(4, 32).bfloat16()
    x[1, 3] = value
    assert not kernels.rms_norm(x, x[0], 1e-5)[0][1].isfinite().all()
    assert not kernels.swiglu(x, x)[1].isfinite().all()
    assert not kernels.gelu(x)[1].isfinite().all()
    assert not kernels.gelu_back(x, x)[1].isfinite().all()
    heads = x.view(4, 1, 32)
    blocks = VisibilityBlocks.of(torch.ones(1, 16, 4, dtype=torch.bool), torch.tensor([4]), torch.tensor([0]))
    assert not kernels.attention(heads, heads, heads, blocks, 1.0)[0].isfinite().all()
    A, B, weight = draw(2, 32).bfloat16(), [draw(2, 32).bfloat16()], draw(32, 32).bfloat16()
    if kernels.accept_weight(weight):
        operands = GroupOperands([weight], [None], [Factors(A, B)], [Factors(A.clone(), [B[0].clone()])])
        h, (y,) = kernels.lora(x, x, operands)
        assert not y[1].isfinite().any()
        grad_x, _ = kernels.lora_back([x], x, h, operands, wants_x=True, wants_seen=False)
        assert grad_x is not None
        assert not grad_x[1].isfinite().any()
        assert not kernels.product(x, weight)[1].isfinite().any()


def test_what_they_do_not_take(kernels: Kernels) -> None:
    assert kernels.accept(torch.zeros(2, 16), torch.zeros(16))
    assert not kernels.accept(torch.zeros(2, 24))
    assert not kernels.accept(torch.zeros(2, 16), torch.zeros(16, dtype=torch.bfloat16))
    assert not kernels.accept(torch.zeros(2, 16, dtype=torch.float64))
    assert not kernels.accept_heads(torch.zeros(2, 1, 3, 32), *[torch.zeros(2, 1, 3, 32)] * 2)
    assert not kernels.accept_heads(torch.zeros(1, 1, 3, 48), *[torch.zeros(1, 1, 3, 48)] * 2)


# Without them.


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Any]:
    """A cache directory of its own, and no kernels loaded yet.

    They are compiled in a seventh of the time, since here they compute nothing: above, they are those that users have.
    """
    monkeypatch.setattr(kernels_module, "_FLAGS", (*kernels_module._FLAGS, "-O0"))
    monkeypatch.setenv("LORALIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORALIB_ENGINE", raising=False)
    compiled.cache_clear()
    yield tmp_path
    compiled.cache_clear()


def test_they_are_compiled_once_and_kept(kernels: Kernels, fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded() is not None
    (kept,) = (fresh / "cache").iterdir()
    compiled.cache_clear()
    monkeypatch.setattr("subprocess.run", None)
    assert loaded() is not None
    assert list((fresh / "cache").iterdir()) == [kept]


def test_what_is_kept_and_broken_is_made_again(kernels: Kernels, fresh: Any) -> None:
    assert loaded() is not None
    (kept,) = (fresh / "cache").iterdir()
    compiled.cache_clear()
    kept.unlink()  # a file that is mapped must not change
    kept.write_bytes(b"half a fi")
    assert loaded() is not None
    assert kept.stat().st_size > 100


def test_a_cache_directory_that_cannot_be_written_is_none(kernels: Kernels, fresh: Any) -> None:
    (fresh / "cache").write_text("a file", encoding="utf-8")
    assert loaded() is not None


@pytest.mark.skipif(os.name == "nt", reason="scripts as compilers are for POSIX")
def test_without_a_compiler_that_works_there_are_none(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    for compiler in (str(broken), "no-such-compiler"):
        monkeypatch.setenv("CC", compiler)
        compiled.cache_clear()
        assert loaded() is None
    assert not (fresh / "cache").exists()


def test_they_can_be_switched_off(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALIB_ENGINE", "torch")
    assert loaded() is None
