"""Laws of the transposed sweep: its shortcuts change nothing, and bfloat16 products change little."""

from __future__ import annotations

import pytest
import torch

from replacement import columns, contributions, sweep
from replacement.contributions import LinearEngine
from tests.tiny import FAMILIES, PROMPT

SHORTCUTS = {
    "few keys at once": [(sweep, "KEYS", 3)],
    "one matrix": [(columns, "FEW", 10_000)],
    "a matrix a position": [(columns, "FEW", 0)],
    "a column a target": [(columns, "COLUMNS", 1)],
    "no table": [(sweep, "TABLE_BYTES", 0)],
    "nothing kept": [(contributions, "KEPT_BYTES", 0)],
    "a position's rows at once": [(contributions, "GATHERED_BYTES", 0)],
    "neither table nor kept": [(sweep, "TABLE_BYTES", 0), (contributions, "KEPT_BYTES", 0)],
}


def rows_of_all(model, **given):
    """Rows of every feature and of a direction at the end, one slot after the other."""
    local = model.local(PROMPT)
    engine, found = LinearEngine(local, **given), []
    for depth in local.features.depth.unique():
        (targets,) = local.feature_targets((local.features.depth == depth).nonzero()[:, 0])
        found.append(torch.cat([part.flatten(1) for part in engine.rows(targets)[:3]], 1))
    return torch.cat(found)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "cross_layer_transcoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shortcuts_change_nothing(tiny_model, monkeypatch, family, kind, shortcut):
    model = tiny_model(family, kind, "relu", "float64")
    usual = rows_of_all(model)
    for module, name, value in SHORTCUTS[shortcut]:
        monkeypatch.setattr(module, name, value)
    torch.testing.assert_close(rows_of_all(model), usual, rtol=0, atol=1e-12 * float(usual.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_may_come_in_any_order(tiny_model, family):
    local = (model := tiny_model(family, "skip_transcoder", "relu", "float64")).local(PROMPT)
    index = (local.features.layer == 2).nonzero()[:, 0]
    mixed = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    engine = model.engine(local, "linear")
    for usual, other in zip(*(engine.rows(*local.feature_targets(i)) for i in (index, mixed)), strict=True):
        torch.testing.assert_close(other, usual[mixed - index[0]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_products_stay_near(tiny_model, family):
    """An eighth bit after the point a product; what no attention is on does not change at all."""
    model = tiny_model(family, "transcoder", "relu", "float32")
    exact, rounded = rows_of_all(model), rows_of_all(model, products=torch.bfloat16)
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-6 < error < 2e-2


def test_a_sweep_leaves_its_targets_alone(tiny_model):
    """Also one target, whose transpose is its own memory."""
    local = (model := tiny_model("llama", "skip_transcoder", "relu", "float64")).local(PROMPT)
    (targets,) = local.feature_targets((local.features.layer == 2).nonzero()[:1, 0])
    before = targets.rows.clone()
    engine = model.engine(local, "linear")
    first, again = engine.rows(targets), engine.rows(targets)
    assert torch.equal(targets.rows, before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("targets", range(1, 100))
def test_products_have_few_columns_of_no_target(targets):
    assert targets <= columns.width(targets) <= 1.5 * targets
    assert columns.width(targets) in (targets, -(-targets // columns.COLUMNS) * columns.COLUMNS)
