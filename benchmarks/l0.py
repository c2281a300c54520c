"""How near penalties come to the wanted L0 in short training runs on atlas, at other sizes than `kinds.py` has.

    python benchmarks/l0.py [--kind KIND ...] [--size FEATURES,K ...] [--json FILE] [--work DIR]

Many features a token out of few, and one or two a token: where a penalty alone overshoots, or stops before it is there.
Runs and columns are those of `kinds.py`; all that a row does not name is as there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.kinds import BATCHES, SETTINGS, Figures, measured, open_data  # noqa: E402
from replacement.formats.drafts import write_whole  # noqa: E402
from replacement.training import TrainingConfig  # noqa: E402
from replacement.training.config import KINDS  # noqa: E402

SIZES = ("256,64", "256,48", "512,16", "512,2", "64,1")
PENALTIES = {
    "relu": {"sparsity": "relu"},
    "jumprelu": {"sparsity": "jumprelu"},
    "jumprelu quadratic": {"sparsity": "jumprelu", "penalty": "quadratic"},
    "gated": {"sparsity": "gated"},
}
WITHIN = 0.1  # of the wanted L0, in every dictionary


def show(rows: Mapping[str, Figures]) -> None:
    """Print one table."""
    table = Table(title=f"{SETTINGS['tokens'] // SETTINGS['batch_tokens']} steps, layers 2 and 3 of atlas")
    for name in ("kind, penalty, features,k", "FVU", "worst", "L0", "off", "dead", "CPU s"):
        table.add_column(name, justify="right" if "," not in name else "left")
    for name, row in rows.items():
        cells = f"{row.fvu:.4f}", f"{row.worst:.4f}", f"{row.l0:.2f}", f"{row.off:.1%}", f"{row.dead:.1%}"
        table.add_row(name, *cells, f"{row.seconds:.1f}")
    Console(width=120).print(table)
    beyond = [name for name, row in rows.items() if row.off > WITHIN]
    print(f"{len(beyond)} of {len(rows)} beyond {WITHIN:.0%}: {'; '.join(beyond) or 'none'}")


def main() -> None:
    """Run, print and store the chosen rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--size", nargs="+", default=SIZES, metavar="FEATURES,K")
    parser.add_argument("--json", type=Path, help="file for raw figures; rows of other runs stay in it")
    parser.add_argument("--work", type=Path, help="folder that keeps the activations (280 MB)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = dict[str, Figures]()
    with tempfile.TemporaryDirectory() as scratch:
        data = open_data(options.work or Path(scratch) / "activations", layers=SETTINGS["layers"], batches=BATCHES)
        for size in options.size:
            features, k = map(int, size.split(","))
            for kind in options.kind:
                for penalty, changes in PENALTIES.items():
                    given = {**SETTINGS, "kind": kind, "n_features": features, "k": k, **changes}
                    name = f"{kind} {penalty} {size}"
                    rows[name] = measured(TrainingConfig(**given), data)
                    print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    if options.json is not None:
        held = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
        held |= {name: row._asdict() for name, row in rows.items()}
        write_whole(options.json, (json.dumps(held, indent=1) + "\n").encode())
    show(rows)


if __name__ == "__main__":
    main()
