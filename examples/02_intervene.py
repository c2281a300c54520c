"""Check a graph against the model itself: switch off the feature it blames, and see whether the answer falls.

    python examples/02_intervene.py

A graph is a claim about causes. An intervention tests it: each of the most influential features is set to zero in the
real model (attention patterns held, everything else recomputed), and the change of the answer's logit is printed beside
the graph's own influence.
"""

from __future__ import annotations

import argparse

from circuits import Intervention, attribute, intervene
from graphs import node_influence
from graphs.names import node_name
from replacement import ReplacementModel


def main(argv: list[str] | None = None) -> None:
    """Trace, switch features off one by one, print the changes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="the capital of the state containing Dallas is")
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--dictionaries")
    parser.add_argument("--features", type=int, default=8, help="how many to switch off")
    arguments = parser.parse_args(argv)

    model = ReplacementModel.load(arguments.model, dictionaries=arguments.dictionaries)
    logits = model.logits(arguments.prompt)[-1]
    answer = int(logits.argmax())
    graph = attribute(model, arguments.prompt, targets=[answer])
    influence = node_influence(graph) * graph.nodes.is_feature
    print(f"answer: {graph.nodes.label[graph.targets[0]]}, logit {logits[answer]:.2f}")
    print("influence   change of its logit   its rank then   feature switched off")
    for node in influence.argsort()[::-1][: arguments.features].tolist():
        layer, position, feature = (int(getattr(graph.nodes, name)[node]) for name in ("layer", "position", "feature"))
        changed = intervene(model, arguments.prompt, [Intervention(layer, position, feature, 0.0)])[-1]
        rank = 1 + int((changed > changed[answer]).sum())
        change = float(changed[answer] - logits[answer])
        name = f"{node_name(graph, node)} (L{layer} #{feature} at {graph.tokens[position].strip()})"
        print(f"{influence[node]:9.3f}   {change:19.2f}   {rank:13d}   {name}")


if __name__ == "__main__":
    main()
