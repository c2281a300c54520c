"""What the end-to-end stage does to the model and to its graphs, with and without the bridging term, on atlas.

    python benchmarks/end_to_end.py [--kind KIND ...] [--seeds 0 ...] [--weights 1 ...] [--prompts 100] [--json FILE]

Dictionaries of all layers learn to reconstruct for a few hundred steps, too few for the model to stand on them. Then,
from the same state and on the same documents, the end-to-end stage runs not at all, by KL alone, and by KL with the
bridging term (for kinds that write MLP outputs). A row each, measured on text that no stage saw. `KL`, `top-1`: the
model with all sites replaced, without error terms, against the original. `FVU` (mean over written sites) and `L0` (mean
over dictionaries): on the original's activations. `replacement`, `completeness`: mean scores of the prompts' graphs, of
kinds that have graphs; after them the mean difference from the state without the stage and its standard error, prompt
by prompt. `CPU s`: of the row's stage.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from circuits.scores import GraphScores, graph_scores  # noqa: E402
from replacement import ReplacementModel  # noqa: E402
from replacement.dictionary import DictionarySet  # noqa: E402
from replacement.evaluation.splicing import Splice  # noqa: E402
from replacement.evaluation.suite import evaluate  # noqa: E402
from replacement.formats.drafts import write_whole  # noqa: E402
from replacement.loading import load_bridge  # noqa: E402
from replacement.training import EndToEndConfig, Trainee, TrainingConfig, plans, train, train_end_to_end  # noqa: E402
from replacement.training.bridge import ReplaceableBridge  # noqa: E402
from replacement.training.data import BridgeActivations, open_tokens  # noqa: E402
from replacement.training.kinds import sites  # noqa: E402

GRAPHED = ("transcoder", "skip_transcoder", "clt")
"""Kinds that write MLP outputs, and so have graphs."""
KINDS = (*GRAPHED, "sae", "causal_crosscoder", "crosscoder")
SETTINGS: dict[str, Any] = {
    "n_features": 512,
    "k": 8,
    "batch_tokens": 512,
    "tokens": 150 * 512,
    "buffer_bytes": 32_000_000,
}
STAGE: dict[str, Any] = {"steps": 60, "documents": 8, "learning_rate": 1e-3, "warmup_steps": 5}
CONTEXT, HELD_OUT, PROMPT_TOKENS = 64, 128, 12  # tokens of a document; documents measured on; tokens of a prompt
WITHOUT, KL_ALONE = "not at all", "KL alone"


class Row(NamedTuple):
    """One state of the dictionaries of one kind and seed, on held-out text."""

    kl: float  #: KL(original || replaced), nats
    top1: float  #: share of tokens where both say the same
    fvu: float  #: mean over written sites
    l0: float  #: mean over dictionaries
    scores: GraphScores | None  #: None for kinds without graphs
    seconds: float  #: CPU time of the stage


def stages(kind: str, weights: Sequence[float]) -> dict[str, EndToEndConfig | None]:
    """What is done to the state that the reconstruction stage leaves, by name."""
    found: dict[str, EndToEndConfig | None] = {WITHOUT: None, KL_ALONE: EndToEndConfig(**STAGE)}
    for weight in weights if kind in GRAPHED else ():
        found[f"bridging {weight:g}"] = EndToEndConfig(**STAGE, bridging_weight=weight)
    return found


def measured(bridge: Any, kind: str, seed: int, *, weights: Sequence[float], prompts: int) -> Iterator[tuple[str, Row]]:
    """Train one kind by every stage; a row each."""
    config = TrainingConfig(kind=kind, **SETTINGS, seed=seed)
    planned = plans(config, len(bridge.blocks))
    tokens = open_tokens("atlas", model=bridge, context=CONTEXT, seed=seed)
    clock = time.process_time()
    source = BridgeActivations(bridge, tokens, sites=sites(planned), documents=64)
    state = train(source, planned, config=config, show_progress=False)

    model = ReplaceableBridge(bridge, sites(planned))
    batches = model.batches(tokens, STAGE["documents"])
    for name, stage in stages(kind, weights).items():
        trainee = copy.deepcopy(state)
        if stage is not None:
            clock = time.process_time()
            train_end_to_end(model, trainee, batches, config=stage, show_progress=False)
        yield name, _row(bridge, trainee, time.process_time() - clock, prompts if kind in GRAPHED else 0)


def _row(bridge: Any, trainee: Trainee, seconds: float, prompts: int) -> Row:
    found = DictionarySet({one.layer: one for one in trainee.dictionaries()}, "trained")
    unseen = open_tokens("atlas", model=bridge, context=CONTEXT, split="held_out")
    every = evaluate(Splice(bridge, found), (unseen.batch(i, 64) for i in range(HELD_OUT // 64)), every_site=False)
    fvu = [one.reconstruction.fvu for one in every.sites]
    l0 = [one.firing.l0 for one in every.dictionaries]
    scores = None
    if prompts:
        beginnings = unseen.batch(HELD_OUT, prompts)[:, :PROMPT_TOKENS]
        scores = graph_scores(ReplacementModel(bridge, found, name="atlas"), beginnings, max_features=None)
    assert every.replacement is not None
    return Row(every.replacement.kl, every.replacement.top1, _mean(fvu), _mean(l0), scores, seconds)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _against(ours: Sequence[float], before: Sequence[float]) -> str:
    """Mean of the differences, and its standard error."""
    moved = [a - b for a, b in zip(ours, before, strict=True)]
    mean = _mean(moved)
    spread = math.sqrt(sum((one - mean) ** 2 for one in moved) / max(1, len(moved) - 1) / len(moved))
    return f"{mean:+.3f} ± {spread:.3f}"


Rows = Mapping[tuple[str, int, str], Row]
"""By kind, seed and stage."""


def show(rows: Rows) -> None:
    """Print one table."""
    table = Table(
        title=f"{SETTINGS['n_features']} features, k {SETTINGS['k']}, all layers of atlas; "
        f"{SETTINGS['tokens'] // SETTINGS['batch_tokens']} steps, then {STAGE['steps']} end to end"
    )
    for name in ("kind", "seed", "stage", "KL", "top-1", "FVU", "L0", "replacement", "completeness", "CPU s"):
        table.add_column(name, justify="left" if name in ("kind", "stage") else "right", no_wrap=True)
    for (kind, seed, stage), row in rows.items():
        if stage == WITHOUT:
            table.add_section()
        cells = [
            f"{row.kl:.4f}",
            f"{row.top1:.2%}",
            f"{row.fvu:.4f}",
            f"{row.l0:.1f}",
            *_scores(rows, kind, seed, stage),
        ]
        table.add_row(kind if stage == WITHOUT else "", str(seed), stage, *cells, f"{row.seconds:.0f}")
    Console(width=150).print(table)


def _scores(rows: Rows, kind: str, seed: int, stage: str) -> tuple[str, str]:
    ours, before = rows[kind, seed, stage].scores, rows[kind, seed, WITHOUT].scores
    if ours is None or before is None:
        return "", ""
    means = ours.replacement, ours.completeness
    if stage == WITHOUT:
        return f"{means[0]:.3f}", f"{means[1]:.3f}"
    pairs = zip(zip(*ours.prompts, strict=True), zip(*before.prompts, strict=True), strict=True)
    one, other = (f"{mean:.3f} ({_against(*pair)})" for mean, pair in zip(means, pairs, strict=True))
    return one, other


def store(path: Path, rows: Rows) -> None:
    """Write figures, without those of single prompts."""
    found = [
        {"kind": kind, "seed": seed, "stage": stage}
        | {name: value for name, value in row._asdict().items() if name != "scores"}
        | ({"replacement": row.scores.replacement, "completeness": row.scores.completeness} if row.scores else {})
        for (kind, seed, stage), row in rows.items()
    ]
    write_whole(path, (json.dumps({"settings": SETTINGS, "stage": STAGE, "rows": found}, indent=1) + "\n").encode())


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0], help="of the bridging term; a row each")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--json", type=Path, help="file for raw figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bridge, _ = load_bridge("atlas", torch.float32, "cpu")
    rows = dict[tuple[str, int, str], Row]()
    for kind in given.kind:
        for seed in given.seeds:
            for stage, row in measured(bridge, kind, seed, weights=given.weights, prompts=given.prompts):
                rows[kind, seed, stage] = row
                scores = _scores(rows, kind, seed, stage)
                print(f"{kind} {seed} {stage}: {row._replace(scores=None)} {scores}", file=sys.stderr, flush=True)
                if given.json is not None:
                    store(given.json, rows)
    show(rows)


if __name__ == "__main__":
    main()
