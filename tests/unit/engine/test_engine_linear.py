"""Packed linear layers: right at any number of rows, and compiled for few of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from crossdock.engine.native import linear
from crossdock.engine.native.linear import PackedLinear, make_linear


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 32, generator=torch.Generator().manual_seed(0))


def packed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    layer = make_linear(weight, bias)
    if not isinstance(layer, PackedLinear):
        pytest.skip("this torch has no oneDNN")
    return layer


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 33, 100, 257])
def test_padding_changes_no_result(weight: torch.Tensor, rows: int) -> None:
    bias = torch.randn(48, generator=torch.Generator().manual_seed(1))
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(2))
    residual = torch.randn(rows, 48, generator=torch.Generator().manual_seed(3))
    wanted = functional.linear(x, weight, bias)
    with torch.inference_mode():
        layer = packed(weight, bias)
        assert torch.allclose(layer(x), wanted, atol=1e-4)
        assert torch.allclose(layer.add_to(x, residual.clone()), residual + wanted, atol=1e-4)


def test_rows_of_every_length_reach_the_product_in_few_sizes(weight: torch.Tensor) -> None:
    """oneDNN keeps compiled code for each, so a worker would grow with every new length."""
    layer = packed(weight)
    sizes: set[int] = set()
    for name in ("_linear", "_linear_add"):
        product = getattr(layer, name)

        def noted(x: torch.Tensor, *rest: object, product: object = product) -> torch.Tensor:
            sizes.add(len(x))
            return product(x, *rest)  # type: ignore[operator]

        setattr(layer, name, noted)
    with torch.inference_mode():
        for rows in range(1, 2049):
            x = torch.zeros(rows, 32)
            assert len(layer(x)) == len(layer.add_to(x, torch.zeros(rows, 48))) == rows
    assert len(sizes) == 72  # 1 to 16, then 8 an octave
    assert all(linear.padded_rows(size) == size for size in sizes)


def test_padding_adds_an_eighth_at_most() -> None:
    for rows in range(1, 5000):
        assert rows <= linear.padded_rows(rows) <= rows * 1.125
