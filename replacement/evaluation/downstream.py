"""What replacing one site does to the next layer: cosine and NMSE one layer downstream.

Ameisen et al. 2025 ("Circuit Tracing", on mechanistic faithfulness) judge a local replacement by what the perturbation
does right below it. Sums are kept in float64. Knows nothing of how the run was made.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from replacement.evaluation.reconstruction import ErrorFigures, ErrorMeter
from replacement.sites import hook_name

ENTRY, MLP, RESIDUAL = "hook_resid_pre", "mlp.hook_out", "hook_resid_post"
_LAYER = re.compile(r"blocks\.(\d+)\.")


class DownstreamFigures(NamedTuple):
    """The block after a replaced site (`next_hooks`), against the original's."""

    mlp: ErrorFigures  #: of that block's MLP output
    residual: ErrorFigures  #: of the residual stream after that block


def next_hooks(site: str, n_layers: int) -> tuple[str, str] | None:
    """MLP output and residual stream of the first block that a site enters at its beginning; None without such a block.

    That is the block itself for `hook_resid_pre`, and the next one for every other site: a stream is judged alike under
    both of its names, as it leaves one block and as it enters the next. What a site does inside its own block
    (attention to the MLP behind it) is not looked at.
    """
    match = _LAYER.match(site)
    assert match, site
    layer = int(match[1]) + int(not site.endswith(f".{ENTRY}"))
    return (hook_name(layer, MLP), hook_name(layer, RESIDUAL)) if layer < n_layers else None


class DownstreamMeter:
    """Streams cosine and NMSE of the next block's MLP output and residual stream.

    `NMSE = sum |y - y'|^2 / sum |y|^2`, and the mean cosine of y and y', y in the original and y' in the run with one
    site replaced.
    """

    def __init__(self) -> None:
        self._mlp, self._residual = ErrorMeter(), ErrorMeter()

    def update(
        self,
        original: tuple[Float[Tensor, "tokens width"], Float[Tensor, "tokens width"]],
        replaced: tuple[Float[Tensor, "tokens width"], Float[Tensor, "tokens width"]],
    ) -> None:
        """Take in one batch: MLP output and residual of the next block, in both runs."""
        self._mlp.update(original[0], replaced[0])
        self._residual.update(original[1], replaced[1])

    def figures(self) -> DownstreamFigures:
        """Figures over everything taken in so far; raises `InputError` when that is nothing."""
        return DownstreamFigures(self._mlp.figures(), self._residual.figures())
