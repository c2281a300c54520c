"""Laws of the loss: the mean square and its gradients are those of the plain expression."""

from __future__ import annotations

import torch

from replacement.training.missed import mean_square, total_square, unexplained
from replacement.training.parallel import ALONE


def test_the_mean_square_and_its_gradients_are_the_plain_ones() -> None:
    """Of parts of every shape that a site is written in: nested dictionaries, another one, a skip, a bias."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    shapes = ((7, 3, 5), (7, 3, 5), (7, 1, 5), (1, 1, 5))
    parts = [torch.randn(*s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    frozen = torch.randn(7, 1, 5, dtype=torch.float64, generator=generator)
    loss, error = mean_square(wanted, [*parts, frozen])
    plain = wanted[:, None] - sum(parts, start=frozen)
    torch.testing.assert_close(error, plain.detach())
    assert not error.requires_grad
    torch.testing.assert_close(loss, plain.pow(2).mean())
    found, expected = (torch.autograd.grad(3 * each, parts) for each in (loss, plain.pow(2).mean()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(total_square(plain), plain.pow(2).sum())
    nothing = torch.zeros(0, 1, 5, requires_grad=True)
    mean_square(nothing.detach()[:, 0], [nothing])[0].backward()
    assert nothing.grad is not None and nothing.grad.shape == nothing.shape


def test_what_is_unexplained_is_a_share_of_the_variance() -> None:
    """1 for the mean as an approximation, wherever the mean lies; 0 for what is exact."""
    wanted = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 100
    mean = wanted.mean(0)
    torch.testing.assert_close(unexplained(wanted - mean, wanted, ALONE.data), torch.tensor(1.0))
    assert unexplained(torch.zeros_like(wanted), wanted, ALONE.data) == 0
