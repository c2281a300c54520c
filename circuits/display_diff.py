"""How a comparison of two models looks on a terminal. Knows rich and the facts of `circuits.model_diff`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from circuits.display import FAINT, FEATURE, TITLE, emit
from replacement.evaluation.model_diff import ALIKE, ONLY, SHARED, SPECIFIC_ERROR, SPECIFIC_RECONSTRUCTION, Kind

if TYPE_CHECKING:
    from rich.console import RenderableType

    from circuits.model_diff import Comparison, Feature, LayerDifference, Parts

_MEANING = {
    Kind.SHARED: f"relative norm {SHARED[0]} to {SHARED[1]}, cosine of the two rows {ALIKE} or more",
    Kind.REWRITTEN: f"in both models, but the two rows' cosine is below {ALIKE}: one thing there, another here",
    Kind.MOSTLY_BASE: f"relative norm {ONLY} to {SHARED[0]}",
    Kind.MOSTLY_TUNED: f"relative norm {SHARED[1]} to {1 - ONLY}",
    Kind.BASE_ONLY: f"relative norm below {ONLY}",
    Kind.TUNED_ONLY: f"relative norm above {1 - ONLY}",
    Kind.DEAD: "fired at no token",
}
SHOWN = 2
"""Tokens shown of each list."""


def show_comparison(compared: Comparison, *, written: Path, took: str) -> None:
    """Print what two models share, what only one of them has, and what makes them predict other tokens."""
    head = Text(f"{compared.base} and {compared.tuned}", TITLE)
    about = f"{compared.tokens:,} held-out tokens of {compared.data}, at {compared.site}, L0 {compared.l0:.1f}"
    parts: list[RenderableType] = [
        Group(head, Text(about, FAINT)),
        _section("Where the two residual streams differ", _layers(compared.layers)),
        _section("Features", _counts(compared)),
    ]
    for title, kind, features in (
        ("What makes their predictions differ", None, compared.differing),
        ("Only the tuned model writes this", Kind.TUNED_ONLY, compared.tuned_only),
        ("Only the base model writes this", Kind.BASE_ONLY, compared.base_only),
    ):
        note = _parts(compared.divergence) if kind is None else _confirmed(compared, kind)
        parts.append(_section(title, _features(features) if features else Text("nothing", FAINT), note))
    closing = [Text(f"written: {written} and {compared.crosscoder}", FAINT), Text(took, FAINT)]
    emit(Group(*(Padding(part, (0, 0, 1, 0), expand=False) for part in parts), *closing))


def _parts(found: Parts) -> str:
    shares = {"features": found.features, "biases": found.bias, "what the crosscoder missed": found.error}
    said = ", ".join(f"{name} {value / found.total if found.total else 0.0:.0%}" for name, value in shares.items())
    return f"KL {found.total:.3g} nats a token: {said}; the largest own share first, share (1 - largest nu)"


def _confirmed(compared: Comparison, kind: Kind) -> str:
    own = f"{compared.confirmed[kind]} of {compared.counts[kind]}"
    return f"{own} have nu_r < {SPECIFIC_RECONSTRUCTION} and nu_e < {SPECIFIC_ERROR} (*)"


def _layers(layers: Sequence[LayerDifference]) -> Table:
    grid = _table(("layer", "typical token", "largest 1 %"))
    for one in layers:
        grid.add_row(str(one.layer), f"{one.typical:.1%}", f"{one.largest:.1%}")
    return grid


def _counts(compared: Comparison) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for kind, meaning in _MEANING.items():
        grid.add_row(str(kind), Text(f"{compared.counts[kind]:,}", justify="right"), Text(meaning, FAINT))
    return grid


def _features(features: Sequence[Feature]) -> Table:
    heads = ("", "share", "own", "kind", "norm", "cos", "nu_r", "nu_e", "fires", "base says", "tuned says", "most at")
    grid = _table(heads)
    for one in features:
        figures = (f"{x:.2f}" for x in (one.relative_norm, one.cosine, one.nu_reconstruction, one.nu_error))
        says = (", ".join(tokens[:SHOWN]) for tokens in (one.promotes_base, one.promotes_tuned))
        name = Text(f"{one.feature}{'*' if one.confirmed else ''}", FEATURE)
        grid.add_row(
            name, f"{one.share:.1%}", one.kind, *figures, f"{one.rate:.2%}", *says, Text(f"… {one.example}", FAINT)
        )
    return grid


def _table(heads: Sequence[str]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in heads:
        grid.add_column(overflow="fold")
    grid.add_row(*(Text(head, FAINT) for head in heads))
    return grid


def _section(title: str, body: RenderableType, note: str = "") -> Group:
    lines = [Text(title, TITLE)] + ([Text(note, FAINT)] if note else [])
    return Group(*lines, Padding(body, (0, 0, 0, 2), expand=False))
