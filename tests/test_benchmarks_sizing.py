"""The formulas of docs/sizing.md: the page holds what the script prints, and weights are those that training holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import sizing_formula
from replacement.training import TrainingConfig, plans

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sizing.md"


def test_the_page_holds_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sizing_formula.py"])
    sizing_formula.main()
    assert capsys.readouterr().out in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "layers", "written", "sites"), [("sae", 1, 1, 1), ("transcoder", 12, 1, 24), ("clt", 12, 6.5, 24)]
)
def test_weights_and_sites_are_those_of_the_plans(kind: str, layers: int, written: float, sites: int) -> None:
    planned = plans(TrainingConfig(kind=kind), layers)
    assert sum(len(plan.writes) for plan in planned) == written * len(planned)
    assert len({name for plan in planned for name in (*plan.reads, *plan.writes)}) == sites
    run = next(run for run in sizing_formula.runs() if (run.layers, run.written) == (layers, written))
    assert run.sites == sites and run.weights == sum(
        run.width * run.features * (len(plan.reads) + len(plan.writes)) for plan in planned
    )


def test_a_run_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Is the last row; contradictions are one line and exit code 2."""
    own = ["sizing_formula.py", "--own", "12", "768", "24576", "1", "124e6", "1", "1", "32768"]
    monkeypatch.setattr(sys, "argv", own)
    sizing_formula.main()
    *_, last = rows = capsys.readouterr().out.splitlines()
    assert last.split(" | ")[1:] == rows[3].split(" | ")[1:]
    monkeypatch.setattr(sys, "argv", [*own[:7], "3", "2", "32768"])
    with pytest.raises(SystemExit, match="2"):
        sizing_formula.main()
    assert "PROCESSES a multiple of SHARDS" in capsys.readouterr().err.splitlines()[-1]
