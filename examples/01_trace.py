"""Trace a prompt in Python: from text to a pruned graph, its scores, its strongest paths, and its files.

    python examples/01_trace.py
    python examples/01_trace.py "the opposite of hot is" --model atlas --out somewhere

The command `circuits trace` does the same and says more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from circuits import attribute
from graphs import completeness_score, paths, prune, render, replacement_score, write_neuronpedia
from replacement import ReplacementModel


def main(argv: list[str] | None = None) -> None:
    """Trace, prune, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="the capital of the state containing Dallas is")
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--dictionaries")
    parser.add_argument("--out", type=Path, default=Path("circuits-out/example"))
    arguments = parser.parse_args(argv)

    model = ReplacementModel.load(arguments.model, dictionaries=arguments.dictionaries)
    graph = attribute(model, arguments.prompt)
    print(f"{graph.n_nodes} nodes, {graph.n_edges} edges; rows add up to {graph.residual:.0e}")
    print(f"replacement score {replacement_score(graph):.3f}, completeness score {completeness_score(graph):.3f}")

    # a row of the adjacency is a target, a column a source: who wrote what into the first target
    target = graph.targets[0]
    row = graph.adjacency[[target]].tocoo()
    strongest = max(zip(row.data, row.coords[1], strict=True), key=lambda edge: abs(edge[0]))
    print(f"strongest edge into {graph.nodes.label[target]!r}: {strongest[0]:+.3f} from node {strongest[1]}")

    small = prune(graph, node_threshold=0.8, edge_threshold=0.98)
    print(f"pruned to {small.n_nodes} nodes, {small.n_edges} edges")
    for path in paths(small, k=5):
        words = [small.nodes.label[node] or f"node {node}" for node in path.nodes]
        print(f"{path.share:7.1%}  {' -> '.join(words)}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    graph.save(arguments.out / "graph.safetensors")  # the whole graph: AttributionGraph.load reads it again
    write_neuronpedia(small, arguments.out / "graph.json")  # for viewers
    render(small, arguments.out / "graph.dot")  # .svg and .png where Graphviz is installed
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
