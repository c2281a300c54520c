"""Attribution graphs as data: load, prune, measure, convert and draw them with no model library imported.

Names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "graphs.errors": ("InputError",),
    "graphs.graph": ("AttributionGraph", "NodeKind", "NodeTable", "row_residual"),
    "graphs.influence": (
        "completeness_score",
        "cumulative_influence",
        "edge_influence",
        "node_influence",
        "replacement_score",
    ),
    "graphs.dot": ("render", "to_dot"),
    "graphs.neuronpedia": ("read_neuronpedia", "to_neuronpedia", "upload_problems", "write_neuronpedia"),
    "graphs.pruning": ("prune", "prune_masks"),
    "graphs.structure": ("Path", "components", "paths", "to_networkx", "write_graphml"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'graphs' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
