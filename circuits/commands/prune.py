"""`circuits prune`: keep what matters of a stored graph."""

from __future__ import annotations

import argparse
from pathlib import Path

from circuits.commands.options import add_thresholds, print_json, thresholds


def configure(parser: argparse.ArgumentParser) -> None:
    """Name the command's arguments."""
    parser.add_argument("graph", type=Path, metavar="GRAPH", help="a stored graph: .safetensors, or a viewer's .json")
    add_thresholds(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write, in the format of its suffix (default: GRAPH-pruned.safetensors beside it)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Read, prune, write, report."""
    from circuits import outputs
    from circuits.display import show
    from circuits.report import as_json, report
    from graphs import prune

    path = arguments.output or arguments.graph.with_name(f"{arguments.graph.stem}-pruned.safetensors")
    name = outputs.format_of(path)
    graph = outputs.reads(arguments.graph)
    pruned = prune(graph, **thresholds(arguments))
    facts = report(graph, pruned)
    outputs.write(pruned, pruned, {path: name})
    if arguments.json:
        print_json({**as_json(facts), "settings": dict(pruned.settings), "files": {name: str(path)}})
    else:
        show(facts, files={path: "the pruned graph"})
