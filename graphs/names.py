"""Words and identifiers for nodes: what people read, and the ids that viewers use.

Knows nothing of file formats or pictures.
"""

from __future__ import annotations

from graphs.graph import MLP, PLACES, AttributionGraph, NodeKind

_CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), 127, *range(128, 160), 0xFFFE, 0xFFFF]}
_CONTROL.update({ord("\n"): "⏎", ord("\r"): "⏎", ord("\t"): "⇥"})


def printable(text: str) -> str:
    """Return the text with control characters and lone surrogates made visible, fit for XML, DOT and a terminal."""
    return text.translate(_CONTROL).encode("utf-8", "backslashreplace").decode("utf-8")


def node_name(graph: AttributionGraph, node: int) -> str:
    """Return one node in words: its label, or a fallback such as `L3 #1204`; no position."""
    nodes = graph.nodes
    kind = NodeKind(int(nodes.kind[node]))
    if label := nodes.label[node]:
        return printable(label)
    if kind is NodeKind.FEATURE:
        return f"{where(graph, node)} #{int(nodes.feature[node])}"
    if kind is NodeKind.ERROR:
        return f"error {where(graph, node)}"
    if kind is NodeKind.EMBEDDING:
        return printable(_token(graph, node))
    return f"target {int(nodes.feature[node])}" if nodes.feature[node] >= 0 else "target"


def where(graph: AttributionGraph, node: int) -> str:
    """Return a feature's or error's layer, and its place where that is not the MLP: `L3`, `L3.attn`."""
    layer, place = int(graph.nodes.layer[node]), int(graph.nodes.places[node])
    return f"L{layer}" if place == MLP else f"L{layer}.{PLACES[place]}"


def node_names(graph: AttributionGraph) -> list[str]:
    """Return `node_name` of every node."""
    return [node_name(graph, node) for node in range(graph.n_nodes)]


def node_ids(graph: AttributionGraph) -> list[str]:
    """Return the viewers' `node_id` of every node, unique within the graph.

    Features `{layer}_{feature}_{position}`, errors `{layer}_-1_{position}`, embeddings `E_{token}_{position}`, targets
    `{n_layers+1}_{token}_{position}`; targets that are no token count down from -1. Where places of one layer share a
    number, the second gets `_2` behind it.
    """
    nodes, taken, ids = graph.nodes, set(), []
    for kind, layer, feature, position in zip(
        nodes.kind.tolist(), nodes.layer.tolist(), nodes.feature.tolist(), nodes.position.tolist(), strict=True
    ):
        head = {NodeKind.EMBEDDING: "E", NodeKind.LOGIT: str(graph.n_layers + 1)}.get(kind, str(layer))
        middle = -1 if kind == NodeKind.ERROR else feature
        name = f"{head}_{middle}_{position}"
        while name in taken and kind == NodeKind.LOGIT and middle < 0:
            middle -= 1
            name = f"{head}_{middle}_{position}"
        copy, unique = 1, name
        while unique in taken:
            copy += 1
            unique = f"{name}_{copy}"
        taken.add(unique)
        ids.append(unique)
    return ids


def _token(graph: AttributionGraph, node: int) -> str:
    position = int(graph.nodes.position[node])
    return graph.tokens[position] if position < len(graph.tokens) else f"token {int(graph.nodes.feature[node])}"
