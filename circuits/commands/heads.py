"""`circuits heads`: which attention heads carried the edges of a stored graph."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.commands.options import add, add_thresholds, print_json, thresholds

if TYPE_CHECKING:
    from circuits.heads import HeadLoadings
    from graphs import AttributionGraph

LOAD = "replacement.model:ReplacementModel.load"
HEADS_SHOWN = 4


def configure(parser: argparse.ArgumentParser) -> None:
    """Name the command's arguments."""
    parser.add_argument("graph", type=Path, metavar="GRAPH", help="a stored graph, .safetensors, as traced or pruned")
    parser.add_argument("--model", help="the model it was traced on (default: as the graph says)")
    parser.add_argument(
        "--dictionaries",
        action="append",
        metavar="SET",
        help="the sets it was traced with; repeat it for several (default: as the graph says)",
    )
    add(parser, LOAD, "--device", "a torch device such as cpu or cuda")
    parser.add_argument(
        "--target", action="append", metavar="T", help="what was traced, where that was a feature or a direction"
    )
    parser.add_argument("--edges", type=int, default=12, metavar="N", help="edges to show (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="store the loadings of all edges there")
    add_thresholds(parser, only_if_whole=True)


def run(arguments: argparse.Namespace) -> None:
    """Read, prune unless that was done, run the prompt once more, split, report."""
    from circuits.heads import head_loadings
    from circuits.outputs import pruned_form
    from graphs import AttributionGraph
    from graphs.influence import edge_influence
    from replacement import ReplacementModel
    from replacement.errors import InputError

    if arguments.edges < 1:
        raise InputError(f"--edges {arguments.edges}: needs a whole number, 1 or more")
    graph = AttributionGraph.load(arguments.graph)
    pruned = pruned_form(graph, thresholds(arguments))
    sets = arguments.dictionaries or graph.settings.get("sets") or [graph.dictionaries]
    dtype = str(graph.settings.get("dtype", "float32"))
    model = ReplacementModel.load(
        arguments.model or graph.model, dictionaries=sets, dtype=dtype, device=arguments.device
    )
    split = head_loadings(model, pruned, targets=arguments.target)
    if arguments.output is not None:
        split.save(arguments.output)
    scores = edge_influence(pruned)
    order = sorted(range(pruned.n_edges), key=lambda edge: -scores[edge])[: arguments.edges]
    rows = [_row(pruned, split, edge, float(scores[edge])) for edge in order]
    if arguments.json:
        stored = None if arguments.output is None else str(arguments.output)
        print_json({"edges": rows, "file": stored, "n_edges": pruned.n_edges})
        return
    _show(rows, arguments.output)


def _row(graph: AttributionGraph, split: HeadLoadings, edge: int, score: float) -> dict[str, Any]:
    from graphs.names import node_name, printable

    def named(node: int) -> str:
        at = printable(graph.tokens[int(graph.nodes.position[node])]).strip()
        name = node_name(graph, node).strip()
        return name if graph.nodes.is_embedding[node] or graph.nodes.is_logit[node] else f"{name} (at {at})"

    heads = [
        {"head": None if layer < 0 else f"L{layer}H{head}", "loading": value}
        for layer, head, value in split.top(edge, k=HEADS_SHOWN)
    ]
    weight = float(graph.adjacency.data[edge])
    source, target = named(int(split.source[edge])), named(int(split.target[edge]))
    return {"source": source, "target": target, "weight": weight, "influence": score, "heads": heads}


def _show(rows: list[dict[str, Any]], output: Path | None) -> None:
    from rich.table import Table

    from circuits.display import emit

    table = Table(box=None, pad_edge=False)
    for title, side in (("edge", "left"), ("weight", "right"), ("carried by", "left")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for row in rows:
        carried = "  ".join(f"{one['head'] or 'no head'} {one['loading']:+.3f}" for one in row["heads"])
        table.add_row(f"{row['source']} > {row['target']}", f"{row['weight']:+.3f}", carried)
    emit(table)
    emit("\neach path of an edge counts for the last head on it; the parts add up to the weight")
    if output is not None:
        emit(f"all edges: {output}")
