"""Read a graph that someone else published, prune it harder, and draw it: no model is needed.

    python examples/03_read_published_graph.py graph.json

Any graph in the JSON of the Neuronpedia, circuit-tracer and Anthropic viewers will do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from graphs import completeness_score, prune, read_neuronpedia, render, replacement_score


def main(argv: list[str] | None = None) -> None:
    """Read, prune, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--node-threshold", type=float, default=0.6)
    parser.add_argument("--out", type=Path, help="picture to write; the suffix is the format (default: GRAPH.dot)")
    arguments = parser.parse_args(argv)

    graph = read_neuronpedia(arguments.graph)
    small = prune(graph, node_threshold=arguments.node_threshold)
    print(f"{graph.prompt!r} on {graph.model}")
    for name, one in (("as published", graph), ("pruned", small)):
        scores = f"replacement {replacement_score(one):.3f}, completeness {completeness_score(one):.3f}"
        print(f"{name:>12}: {one.n_nodes} nodes, {one.n_edges} edges, {scores}")
    out = arguments.out or arguments.graph.with_suffix(".dot")
    render(small, out)
    print(f"drawn to {out}")


if __name__ == "__main__":
    main()
