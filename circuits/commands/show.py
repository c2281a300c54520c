"""`circuits show`: the summary of a stored graph."""

from __future__ import annotations

import argparse
from pathlib import Path

from circuits.commands.options import add_thresholds, print_json, thresholds


def configure(parser: argparse.ArgumentParser) -> None:
    """Name the command's arguments."""
    parser.add_argument("graph", type=Path, metavar="GRAPH", help="a stored graph: .safetensors, or a viewer's .json")
    add_thresholds(parser, only_if_whole=True)


def run(arguments: argparse.Namespace) -> None:
    """Read, prune unless that was done, report."""
    from circuits.display import show
    from circuits.outputs import pruned_form, reads
    from circuits.report import as_json, report

    graph = reads(arguments.graph)
    facts = report(graph, pruned_form(graph, thresholds(arguments)))
    if arguments.json:
        print_json({**as_json(facts), "settings": dict(graph.settings)})
    else:
        show(facts)
