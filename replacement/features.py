"""Tables of a prompt's active features: where they stand, what they write, and what is asked of the linear path.

Plain columns; `replacement.local` makes them, engines read them.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from replacement.dictionary import Dictionary
from replacement.sites import Place


class Features(NamedTuple):
    """Active features, sorted by layer, place, position, feature."""

    layer: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]

    @property
    def depth(self) -> Int[Tensor, " n"]:
        """A number that grows in the order of computation: a feature has only sources of smaller depth."""
        return self.layer * len(Place) + self.place


class Targets(NamedTuple):
    """Scalars whose sources are asked for, all read at one site (or, at `layer == n_layers`, after the last norm).

    A target's value is `rows . x[position] + biases`, with x the activations at the site.
    """

    layer: int
    site: str  # not used at layer == n_layers
    positions: Int[Tensor, " n"]
    rows: Float[Tensor, "n d_model"]
    biases: Float[Tensor, " n"]
    written: bool = False  # whether the site is written too, as by an SAE: what is read stood there before


class Writes(NamedTuple):
    """What the active features of one dictionary write at one slot, sorted by position."""

    first: int  # which feature of Features is the first; the others follow it
    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    writer: Dictionary
    layer: int

    def vectors(self, rows: slice | Int[Tensor, " n"] = slice(None)) -> Float[Tensor, "n d_model"]:
        """Activations times decoder rows, gathered anew at each call: all of them may not fit in memory at once."""
        return self.writer.write_rows(self.feature[rows], self.layer).mul_(self.activation[rows, None])
