"""`circuits export`: a stored graph in other formats."""

from __future__ import annotations

import argparse
from pathlib import Path

from circuits.commands.options import add_thresholds, print_json, thresholds


def configure(parser: argparse.ArgumentParser) -> None:
    """Name the command's arguments."""
    parser.add_argument("graph", type=Path, metavar="GRAPH", help="a stored graph: .safetensors, or a viewer's .json")
    parser.add_argument(
        "--format",
        required=True,
        metavar="LIST",
        help="svg, png, json, dot, graphml, native; several with commas. All but native hold the pruned graph",
    )
    parser.add_argument("--whole", action="store_true", help="do not prune a graph that was stored unpruned")
    add_thresholds(parser, only_if_whole=True)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="folder (default: the graph's own); files are named as the graph",
    )


def run(arguments: argparse.Namespace) -> None:
    """Read, prune unless that was done or is not wanted, write."""
    from circuits import outputs
    from circuits.display import show_files

    formats = outputs.parse_formats(arguments.format)
    folder = arguments.output or arguments.graph.parent
    outputs.check_folder(folder)
    graph = outputs.reads(arguments.graph)
    pruned = graph
    if not arguments.whole:
        pruned = outputs.pruned_form(graph, thresholds(arguments))
    files = outputs.names(folder, formats, arguments.graph.stem)
    outputs.check_overwrite(arguments.graph, files)
    outputs.write(graph, pruned, files)
    if arguments.json:
        print_json({"files": {name: str(path) for path, name in files.items()}})
    else:
        show_files({path: outputs.FORMATS[name].purpose for path, name in files.items()})
