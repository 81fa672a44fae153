"""The closed form of a change to a linear layer."""

from __future__ import annotations

import torch

from vitfold.compensation.ridge import RidgeSums, fit_change, no_sums


def sums_of(x: torch.Tensor, missing: torch.Tensor, weight: torch.Tensor) -> RidgeSums:
    found = no_sums(x.shape[1], missing.shape[1])
    for rows in zip(x.split(50), missing.split(50), weight.split(50), strict=True):
        found.add(*rows)
    return found


def test_a_change_that_explains_everything_is_found_again() -> None:
    draw = torch.Generator().manual_seed(0)
    x, change = torch.randn(400, 12, generator=draw), torch.randn(5, 13, generator=draw)
    missing = x @ change[:, :-1].T + change[:, -1]
    sums = sums_of(x, missing, torch.ones(400, 1))
    found = sums.change(1e-9)
    torch.testing.assert_close(found, change, atol=1e-3, rtol=1e-3)
    assert abs(sums.left(found)) < 1e-4


def test_the_sums_are_those_of_weighted_least_squares() -> None:
    draw = torch.Generator().manual_seed(1)
    x, missing = torch.randn(300, 6, generator=draw), torch.randn(300, 4, generator=draw)
    weight = torch.rand(300, 1, generator=draw) + 0.1
    rows = torch.cat((x, torch.ones(300, 1)), 1).double() * weight.sqrt()
    wanted = torch.linalg.lstsq(rows, missing.double() * weight.sqrt()).solution.T
    found = sums_of(x, missing, weight).change(0.0)
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-3)


def test_more_ridge_changes_less_and_leaves_the_bias_free() -> None:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(300, 6, generator=draw)
    missing = torch.full((300, 2), 3.0)
    sums = sums_of(x, missing, torch.ones(300, 1))
    gentle, firm = sums.change(0.01), sums.change(100.0)
    assert firm[:, :-1].norm() <= gentle[:, :-1].norm()
    torch.testing.assert_close(firm[:, -1], torch.full((2,), 3.0), atol=1e-2, rtol=1e-2)


def test_what_is_left_is_what_direct_evaluation_gives() -> None:
    draw = torch.Generator().manual_seed(3)
    x, missing, weight = (torch.randn(200, n, generator=draw) for n in (6, 4, 1))
    weight = weight.abs()
    change = torch.randn(4, 7, generator=draw) * 0.1
    rest = missing - x @ change[:, :-1].T - change[:, -1]
    direct = float((rest.square() * weight).sum() / (missing.square() * weight).sum())
    assert abs(sums_of(x, missing, weight).left(change) - direct) < 1e-4


def test_noise_alone_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(4)
    one, other = (
        sums_of(torch.randn(20, 12, generator=draw), torch.randn(20, 3, generator=draw), torch.ones(20, 1))
        for _ in range(2)
    )
    fit = fit_change(one, other, (1e-6,))
    assert fit.change is None
    assert (fit.ridge, fit.left) == (None, 1.0)
