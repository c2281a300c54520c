"""One row of the tracing benchmark: this project's tracer, with its defaults."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from trace_row import Edges, Tool, node_codes, run

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from circuits import attribute
from graphs import AttributionGraph, NodeKind
from replacement import ReplacementModel, columns


def load(options: argparse.Namespace) -> ReplacementModel:
    """The model with its dictionaries."""
    return ReplacementModel.load(options.model, dictionaries=options.dictionaries, device=options.device)


def trace(model: ReplacementModel, tokens: torch.Tensor, options: argparse.Namespace) -> AttributionGraph:
    """Its graph with its default targets; asked for a batch, as circuit-tracer makes it: no edge is dropped."""
    alike = {} if options.batch is None else {"batch_size": options.batch, "drop": 0}
    return attribute(model, tokens, max_features=options.rows, **alike)


def edges(graph: AttributionGraph) -> Edges:
    """Its edges; an embedding's token is left out of its code, as its position says it."""
    nodes = graph.nodes
    number = np.where(nodes.kind == NodeKind.EMBEDDING, -1, nodes.feature)
    codes = node_codes(nodes.kind.astype(np.int64), nodes.layer, nodes.position, number)
    rows = np.flatnonzero(nodes.is_feature | nodes.is_logit)
    return Edges(codes, rows, lambda index: graph.adjacency[index].toarray())


def figures(model: ReplacementModel, graph: AttributionGraph) -> dict[str, float]:
    """Sizes of its graph, and how exactly rows add up."""
    n_features = int(graph.nodes.is_feature.sum())
    sizes = {"n_active": graph.n_active_features, "n_features": n_features, "n_edges": graph.n_edges}
    return sizes | {"residual": graph.residual or 0.0, "drop": graph.settings["drop"]}


def products(model: ReplacementModel, tokens: torch.Tensor, options: argparse.Namespace) -> float:
    """Multiply-adds of all matrix products of one trace, counted as they are made, but for columns of no target."""

    def of_product(into: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
        return 2 * math.prod(a) * b[-1]

    in_place = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), of_product)
    columns.COLUMNS = 1
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        trace(model, tokens, options)
    return counter.get_total_flops() / 2


if __name__ == "__main__":
    run(Tool(load, lambda model, tokens: model.logits(tokens), trace, edges, figures, products))
