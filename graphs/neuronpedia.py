"""The JSON that the Neuronpedia, circuit-tracer and Anthropic graph viewers read: the writer (the reader is next door).

Knows the fields, node ids and rules of that format; knows nothing of the native file, of pruning or of models.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import numpy as np

from graphs.errors import InputError
from graphs.files import whole_file
from graphs.graph import MLP, PLACES, AttributionGraph, NodeKind
from graphs.names import node_ids
from graphs.neuronpedia_reader import PROBABILITY, pruning_thresholds, read_neuronpedia

__all__ = ["cantor", "read_neuronpedia", "to_neuronpedia", "upload_problems", "write_neuronpedia"]

FEATURE_TYPES = {
    NodeKind.FEATURE: "cross layer transcoder",
    NodeKind.ERROR: "mlp reconstruction error",
    NodeKind.EMBEDDING: "embedding",
    NodeKind.LOGIT: "logit",
}
SLUG = re.compile(r"[A-Za-z0-9_.-]+")
MIN_BYTES, MAX_BYTES = 1024, 100 * 1024**2


def to_neuronpedia(
    graph: AttributionGraph,
    *,
    slug: str | None = None,
    scan: str | None = None,
    feature_details: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the graph as the viewers' JSON object.

    `slug` names the graph (default: from the prompt), `scan` the model (default: `graph.model`); both match
    `[A-Za-z0-9_.-]+`. `feature_details` says where viewers find feature pages (`feature_json_base_url` or
    `neuronpedia_source_set`). A node's `influence` is the cumulative share at its rank: small is important.
    Raises InputError for a slug or scan of other characters.
    """
    links = [{"source": source, "target": target, "weight": weight} for source, target, weight in _links(graph)]
    return {**_without_links(graph, slug, scan, feature_details), "links": links}


def write_neuronpedia(
    graph: AttributionGraph,
    path: str | PathLike[str],
    *,
    slug: str | None = None,
    scan: str | None = None,
    feature_details: Mapping[str, str] | None = None,
) -> None:
    """Write `to_neuronpedia(graph, ...)` to a file, whole or not at all; links go straight to text, as they are many.

    Raises InputError where the viewers' limit of 100 MB is passed, the settings aren't JSON or the path can't be
    written.
    """
    document = _without_links(graph, slug, scan, feature_details)
    try:
        head = json.dumps(document, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as problem:
        raise InputError(
            f"write_neuronpedia(graph=...): its settings are not JSON ({problem}); use numbers, text, lists, dicts"
        ) from None
    links = ",".join([f'{{"source":"{s}","target":"{t}","weight":{weight!r}}}' for s, t, weight in _links(graph)])
    text = f'{head[:-1]},"links":[{links}]}}'.ljust(MIN_BYTES)
    if len(text) > MAX_BYTES:
        raise InputError(
            f"write_neuronpedia(graph=...): {len(text) / 1024**2:.0f} MB, viewers take at most 100 MB; "
            "prune the graph first"
        )
    with whole_file(path, call="write_neuronpedia") as draft:
        draft.write_text(text, encoding="ascii")


def upload_problems(document: Mapping[str, Any]) -> list[str]:
    """Return what the viewers' upload would refuse beyond the JSON schema, one line each; empty where all is well."""
    problems: list[str] = []
    counts = Counter(node["node_id"] for node in document["nodes"])
    problems += [f"node_id {node_id!r} occurs {n} times" for node_id, n in counts.items() if n > 1]
    for node in document["nodes"]:
        if node["feature_type"] == "logit" and not PROBABILITY.search(node["clerp"]):
            problems.append(f"logit {node['node_id']!r} has no (p=...) in its clerp")
    layers = [int(n["layer"]) for n in document["nodes"] if n["feature_type"] != "logit" and n["layer"] != "E"]
    if max(layers, default=0) == 0:
        problems.append("no node above layer 0 but the logits; keep more nodes (a higher node_threshold)")
    for key in ("slug", "scan"):
        if not SLUG.fullmatch(document["metadata"][key]):
            problems.append(f"{key} {document['metadata'][key]!r} has characters outside A-Z a-z 0-9 _ . -")
    if dangling := sum(link["source"] not in counts or link["target"] not in counts for link in document["links"]):
        problems.append(f"{dangling} links lead to nodes that do not exist")
    return problems


def _without_links(
    graph: AttributionGraph, slug: str | None, scan: str | None, details: Mapping[str, str] | None
) -> dict[str, Any]:
    slug, scan = _name("slug", slug, graph.prompt), _name("scan", scan, graph.model)
    return {
        "metadata": _metadata(graph, slug, scan, details),
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": _nodes(graph),
    }


def _metadata(graph: AttributionGraph, slug: str, scan: str, details: Mapping[str, str] | None) -> dict[str, Any]:
    settings = {key: value for key, value in graph.settings.items() if key != "pruning" and value is not None}
    thresholds = pruning_thresholds(graph.settings.get("pruning"))
    metadata: dict[str, Any] = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [graph.dictionaries] if graph.dictionaries else [],
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.prompt,
        "schema_version": 1,
        "info": {"generator": {"name": "circuits"}},
        "generation_settings": {**settings, "n_layers": graph.n_layers, "n_active_features": graph.n_active_features},
    }
    if graph.residual is not None:
        metadata["generation_settings"]["residual"] = graph.residual
    if details:
        metadata["feature_details"] = dict(details)
    if thresholds is not None:
        metadata["node_threshold"], metadata["pruning_settings"] = thresholds["node_threshold"], thresholds
    return metadata


def _nodes(graph: AttributionGraph) -> list[dict[str, Any]]:
    from graphs.influence import cumulative_influence, node_influence

    nodes, influence = graph.nodes, graph.influence
    if influence is None:
        influence = cumulative_influence(node_influence(graph))
    targets = graph.targets
    first = int(targets[np.argmax(nodes.probability[targets])]) if len(targets) else -1
    return [
        {
            "node_id": node_id,
            **_identity(graph, i, node_id),
            "ctx_idx": int(nodes.position[i]),
            "feature_type": FEATURE_TYPES[NodeKind(int(nodes.kind[i]))],
            "token_prob": float(nodes.probability[i]),
            "is_target_logit": i == first,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "influence": None if nodes.is_logit[i] else float(influence[i]),
            "activation": float(nodes.activation[i]) if nodes.is_feature[i] else None,
            **({"place": PLACES[nodes.places[i]]} if nodes.places[i] != MLP else {}),
        }
        for i, node_id in enumerate(node_ids(graph))
    ]


def _identity(graph: AttributionGraph, i: int, node_id: str) -> dict[str, Any]:
    """Return the fields whose form depends on the kind: feature, layer, jsNodeId, clerp."""
    nodes = graph.nodes
    kind, layer = NodeKind(int(nodes.kind[i])), int(nodes.layer[i])
    feature, position, label = int(nodes.feature[i]), int(nodes.position[i]), nodes.label[i]
    token = graph.tokens[position]
    if kind is NodeKind.FEATURE:
        place = "" if nodes.places[i] == MLP else f"-{PLACES[nodes.places[i]]}"
        fields = cantor(layer, feature), str(layer), f"{layer}_{feature}-0{place}", label
    elif kind is NodeKind.ERROR:
        fields = -1, str(layer), f"{layer}_-1-{position}", label or f'Err: {PLACES[nodes.places[i]]} "{token}"'
    elif kind is NodeKind.EMBEDDING:
        fields = position, "E", f"E_{feature}-{position}", f'Emb: "{label or token}"'
    else:
        clerp = f'Output "{label}" (p={nodes.probability[i]:.3f})'
        fields = feature, str(graph.n_layers + 1), f"L_{node_id.split('_')[1]}-{position}", clerp
    return dict(zip(("feature", "layer", "jsNodeId", "clerp"), fields, strict=True))


def _links(graph: AttributionGraph) -> Iterator[tuple[str, str, float]]:
    """Yield source id, target id and weight of every edge; ids are letters, digits, `_` and `-`."""
    ids = node_ids(graph)
    for source, target, weight in zip(
        graph.edge_sources.tolist(), graph.edge_targets.tolist(), graph.adjacency.data.tolist(), strict=True
    ):
        yield ids[source], ids[target], weight


def _name(which: str, given: str | None, default: str) -> str:
    if given is None:
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", default).strip("-")[:80] or "graph"
    if not SLUG.fullmatch(given):
        raise InputError(f"to_neuronpedia({which}={given!r}): only A-Z a-z 0-9 _ . - are allowed; rename it")
    return given


def cantor(layer: int, feature: int) -> int:
    """Return the viewers' one number for a feature, (L+f)(L+f+1)/2+f."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature
