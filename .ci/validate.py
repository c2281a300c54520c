"""Checks what `circuits trace` wrote: python validate.py FOLDER ANSWER.json [SCHEMAS]."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from graphs import AttributionGraph, prune, read_neuronpedia, row_residual, upload_problems


def main(folder: Path, answer: Path, schemas: Path) -> None:
    """Reload every file, hold it against the others, and against the viewers' rules."""
    whole = AttributionGraph.load(folder / "graph.safetensors")
    assert row_residual(whole) <= 1e-5, f"rows don't add up: {row_residual(whole)}"
    small = prune(whole)

    document = json.loads((folder / "graph.json").read_text())
    assert not upload_problems(document), upload_problems(document)
    assert len(document["nodes"]) == small.n_nodes == read_neuronpedia(folder / "graph.json").n_nodes
    if (schemas / "graph-schema.json").is_file():
        import jsonschema

        jsonschema.validate(document, json.loads((schemas / "graph-schema.json").read_text()))
        print("graph.json is valid against the schema")

    assert "digraph" in (folder / "graph.dot").read_text()
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tcanon", str(folder / "graph.dot")], check=True, stdout=subprocess.DEVNULL)
        assert "<svg" in (folder / "graph.svg").read_text()
        print("Graphviz reads graph.dot")
    else:
        print("Graphviz is not installed: graph.dot not parsed, no picture")

    said = json.loads(answer.read_text())
    best = said["predictions"][0]
    assert best["token"].strip() == "Austin", best
    assert said["pruned"]["nodes"] == small.n_nodes
    print(f"Austin {best['probability']:.1%}; {said['routes'][0]['words']}")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
