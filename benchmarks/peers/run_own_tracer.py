"""One row of the tracing benchmark: this project's tracer, with its defaults."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from trace_row import Edges, Tool, node_codes, run

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from circuits import attribute
from graphs import AttributionGraph, NodeKind
from replacement import ReplacementModel


def load(options: argparse.Namespace) -> ReplacementModel:
    """The model with its dictionaries."""
    return ReplacementModel.load(options.model, dictionaries=options.dictionaries, device=options.device)


def trace(model: ReplacementModel, tokens: torch.Tensor, options: argparse.Namespace) -> AttributionGraph:
    """Its graph with its default targets."""
    batch = {} if options.batch is None else {"batch_size": options.batch}
    return attribute(model, tokens, max_features=options.rows, **batch)


def edges(graph: AttributionGraph) -> Edges:
    """Its edges; an embedding's token is left out of its code, as its position says it."""
    nodes = graph.nodes
    number = np.where(nodes.kind == NodeKind.EMBEDDING, -1, nodes.feature)
    codes = node_codes(nodes.kind.astype(np.int64), nodes.layer, nodes.position, number)
    rows = np.flatnonzero(nodes.is_feature | nodes.is_logit)
    return Edges(codes, rows, lambda index: graph.adjacency[index].toarray())


def figures(model: ReplacementModel, graph: AttributionGraph) -> dict[str, float]:
    """Sizes of its graph, how exactly rows add up, and the least that its rows have to multiply."""
    n_features = int(graph.nodes.is_feature.sum())
    sizes = {"n_active": graph.n_active_features, "n_features": n_features, "n_edges": graph.n_edges}
    sizes |= {"residual": graph.residual or 0.0, "drop": graph.settings["drop"]}
    return sizes | {"least_products": least_products(model, graph)}


def least_products(model: ReplacementModel, graph: AttributionGraph) -> float:
    """Multiply-adds of the rows, each swept alone over its causal prefix, with attention's values as full matrices.

    A row at position p passes n attentions (a feature of layer l: l + 1; a target: all). The first starts at one
    position: d^2 for W_O, d (p + 1) for the pattern, d^2 (p + 1) for W_V. Each further one: 2 d^2 (p + 1), and
    d (p + 1) (p + 2) / 2 for the pattern. Then d for every vector that a source below wrote within the prefix; active
    features are taken to be spread evenly. Norms, sums and everything else are not counted.
    """
    nodes, d = graph.nodes, model.weights.W_U.shape[0]
    rows = nodes.is_feature | nodes.is_logit
    layer, prefix = nodes.layer[rows].astype(float), nodes.position[rows] + 1.0
    attentions = np.minimum(layer + 1, graph.n_layers)
    sweep = (
        d * d + d * prefix + d * d * prefix + (attentions - 1) * (2 * d * d * prefix + d * prefix * (prefix + 1) / 2)
    )
    across = any(len(dictionary.write_layers) > 1 for dictionary in model.dictionaries)
    writes = layer * (layer + 1) / 2 if across else layer  # of one feature a layer, those below the row
    active = graph.n_active_features / (graph.n_layers * max(1, graph.n_positions - 1))
    written = active * writes * (prefix - 1) + (layer + 1) * prefix  # features; errors and embeddings
    return float((sweep + d * written).sum())


if __name__ == "__main__":
    run(Tool(load, lambda model, tokens: model.logits(tokens), trace, edges, figures))
