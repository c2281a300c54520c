"""What an attribution graph is: a node table, sparse signed edges, and the sums that prove the edges complete.

Knows nothing of models, of how edges were computed, nor of influence, pruning or file formats (other files here).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from graphs.errors import InputError

if TYPE_CHECKING:
    from os import PathLike

    import networkx

PLACES = ("pre", "attn", "mid", "mlp", "post")
"""Where in a block a node stands, in the order of computation: the stream before attention, attention's output, the
stream after it, the MLP, the stream after that.
"""
MLP = PLACES.index("mlp")
PIECE = 2**18
"""Edges whose sums are taken at once: their copy in float64 stays in the processor's cache."""
TINY = 1e-30
"""Smallest scale that a row's residual is divided by, so that an all-zero row has residual 0."""


class NodeKind(enum.IntEnum):
    """What a node stands for; the order is the order of the kinds in a graph."""

    FEATURE = 0
    """One active feature of a dictionary at one position."""
    ERROR = 1
    """What the dictionaries missed at one written layer and position; has no inputs."""
    EMBEDDING = 2
    """The embedding of one prompt token; has no inputs."""
    LOGIT = 3
    """A traced target: a token's logit, or a difference, a feature, a direction."""


@dataclass(frozen=True, eq=False)
class NodeTable:
    """One row per node, as arrays of equal length; the arrays are read-only."""

    kind: Int[np.ndarray, " n_nodes"]
    """`NodeKind` as int8."""
    layer: Int[np.ndarray, " n_nodes"]
    """Layer of the model; -1 for embeddings, n_layers for targets. int32."""
    position: Int[np.ndarray, " n_nodes"]
    """Token position in the prompt. int32."""
    feature: Int[np.ndarray, " n_nodes"]
    """Feature index; vocabulary id for embeddings and logits; -1 for errors and targets that are no token. int64."""
    activation: Float[np.ndarray, " n_nodes"]
    """The feature's activation, 0 for other kinds. float64."""
    probability: Float[np.ndarray, " n_nodes"]
    """The weight p of a target, 0 for other kinds. float64."""
    label: tuple[str, ...]
    """Words for the node, "" where there are none."""
    place: Int[np.ndarray, " n_nodes"] | None = None
    """Index into `PLACES` of what a feature or an error stands for; int8, given None all stand for MLPs."""

    def __post_init__(self) -> None:
        dtypes = {"kind": np.int8, "layer": np.int32, "position": np.int32, "feature": np.int64, "place": np.int8}
        if self.place is None:
            object.__setattr__(self, "place", np.full(len(self.kind), MLP))
        for name in ("kind", "layer", "position", "feature", "activation", "probability", "place"):
            object.__setattr__(self, name, _frozen(getattr(self, name), dtypes.get(name, np.float64)))
        object.__setattr__(self, "label", tuple(self.label))
        for column in fields(self):
            shape = np.shape(getattr(self, column.name)) if column.name != "label" else (len(self.label),)
            if shape != (len(self),):
                raise InputError(
                    f"NodeTable({column.name}=...): got shape {shape}, needs one value per node ({len(self)}); "
                    "give every column the same length"
                )
        if len(self) and (self.kind.min() < 0 or self.kind.max() > NodeKind.LOGIT):
            raise InputError(
                f"NodeTable(kind=...): got {set(self.kind.tolist())}, needs the values of NodeKind, 0 to 3"
            )
        if len(self) and not ((self.places >= 0) & (self.places < len(PLACES))).all():
            raise InputError(
                f"NodeTable(place=...): got {set(self.places.tolist())}, needs 0 to {len(PLACES) - 1}, as in PLACES"
            )
        for name in ("activation", "probability"):
            if not np.isfinite(getattr(self, name)).all():
                raise InputError(f"NodeTable({name}=...): got NaN or infinity, needs finite numbers; check the model")
        if (self.probability < 0).any():
            raise InputError(f"NodeTable(probability=...): got {self.probability.min()}, needs weights of 0 or more")

    def __len__(self) -> int:
        return len(self.kind)

    def select(self, index: Bool[np.ndarray, " n_nodes"] | Int[np.ndarray, " n_kept"]) -> NodeTable:
        """Return the rows that a mask or an index array names, in the index's order."""
        index = np.asarray(index)
        rows = np.flatnonzero(index) if index.dtype == bool else index
        columns = {c.name: getattr(self, c.name)[rows] for c in fields(self) if c.name != "label"}
        return NodeTable(**columns, label=tuple(self.label[i] for i in rows.tolist()))

    @property
    def places(self) -> Int[np.ndarray, " n_nodes"]:
        """The column `place`, which is always there."""
        assert self.place is not None
        return self.place

    @property
    def depth(self) -> Int[np.ndarray, " n_nodes"]:
        """A number that grows in the order of computation: every edge of a traced graph leads to a larger one."""
        return self.layer.astype(np.int64) * len(PLACES) + np.where(self.is_feature | self.is_error, self.places, 0)

    @property
    def is_feature(self) -> Bool[np.ndarray, " n_nodes"]:
        return self.kind == NodeKind.FEATURE

    @property
    def is_error(self) -> Bool[np.ndarray, " n_nodes"]:
        return self.kind == NodeKind.ERROR

    @property
    def is_embedding(self) -> Bool[np.ndarray, " n_nodes"]:
        return self.kind == NodeKind.EMBEDDING

    @property
    def is_logit(self) -> Bool[np.ndarray, " n_nodes"]:
        return self.kind == NodeKind.LOGIT

    @property
    def has_inputs(self) -> Bool[np.ndarray, " n_nodes"]:
        """True for the kinds that other nodes can influence: features and targets."""
        return self.is_feature | self.is_logit


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Who wrote what into whom on one prompt, with the proof that nothing is missing.

    `adjacency[t, s]` is the gradient of t's pre-activation times what s contributes, on the model with attention
    patterns and normalisation scales frozen. **Law**: `adjacency.sum(1) + bias + bos + untraced + dropped ==
    pre_activation` for every node with inputs. It is a law of the full graph; pruning drops edges, and a pruned graph
    keeps the full graph's `residual`.

    Full graphs hold their nodes in the reference order: features by (layer, place, position, feature), errors by
    (layer, place, position), embeddings by position, then the targets. Pruned graphs keep that order.
    """

    nodes: NodeTable
    adjacency: csr_array
    """[n_nodes, n_nodes], rows are targets, columns sources, signed weights, float32 or float64; no explicit zeros."""
    bias: Float[np.ndarray, " n_nodes"]
    """Sum of all constant terms of the row; 0 for nodes that have no row, as in the next three. float64.

    For features of an SAE at the output of an MLP or attention, also what the linearisation of that part misses; for
    those of an acausal crosscoder, also what they read in later layers.
    """
    bos: Float[np.ndarray, " n_nodes"]
    """What is written at position 0, which by the field's convention has no feature nodes."""
    untraced: Float[np.ndarray, " n_nodes"]
    """What active features that are no nodes of this graph contribute (left out by `max_features`)."""
    pre_activation: Float[np.ndarray, " n_nodes"]
    """The node's own value before its nonlinearity, from the forward pass."""
    prompt: str
    tokens: tuple[str, ...]
    """The prompt's tokens as text, one per position."""
    token_ids: Int[np.ndarray, " n_positions"]
    n_layers: int
    model: str
    dictionaries: str
    n_active_features: int
    """Features that were active on the prompt, whether or not they are nodes."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: how the graph was made (thresholds, engine, dtype, ...)."""
    residual: float | None = None
    """Largest relative residual of the law on the full graph (`row_residual`); None where unknown (foreign files)."""
    influence: Float[np.ndarray, " n_nodes"] | None = None
    """Cumulative share of influence at each node's rank in the graph it was pruned from (small is important)."""
    dropped: Float[np.ndarray, " n_nodes"] | None = None
    """Sum of the edges too small to be kept (`settings["drop"]`); None where all were kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "adjacency", _canonical(self.adjacency, len(self.nodes)))
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "token_ids", _frozen(self.token_ids, np.int64))
        object.__setattr__(self, "settings", dict(self.settings))
        for name in ("bias", "bos", "untraced", "pre_activation", "influence", "dropped"):
            values = getattr(self, name)
            if values is None and name in ("influence", "dropped"):
                continue
            values = _frozen(values, np.float64)
            if values.shape != (len(self.nodes),):
                raise InputError(
                    f"AttributionGraph({name}=...): got shape {values.shape}, needs one value for each of the "
                    f"{len(self.nodes)} nodes"
                )
            if not np.isfinite(values).all():
                raise InputError(
                    f"AttributionGraph({name}=...): got NaN or infinity, needs finite numbers; check the model"
                )
            object.__setattr__(self, name, values)
        if self.token_ids.shape != (len(self.tokens),):
            raise InputError(
                f"AttributionGraph(token_ids=...): got shape {self.token_ids.shape}, needs one id for each of the "
                f"{len(self.tokens)} tokens"
            )

    @property
    def n_nodes(self) -> int:
        return len(self.nodes)

    @property
    def n_edges(self) -> int:
        return int(self.adjacency.nnz)

    @property
    def n_positions(self) -> int:
        return len(self.tokens)

    @property
    def edge_sources(self) -> Int[np.ndarray, " n_edges"]:
        """The source node of each edge, aligned with `adjacency.data`."""
        return self.adjacency.indices

    @property
    def edge_targets(self) -> Int[np.ndarray, " n_edges"]:
        """The target node of each edge, aligned with `adjacency.data`."""
        return np.repeat(np.arange(self.n_nodes, dtype=self.adjacency.indices.dtype), np.diff(self.adjacency.indptr))

    def sum_rows(
        self, values: Float[np.ndarray, " n_edges"], *, absolute: bool = False
    ) -> Float[np.ndarray, " n_nodes"]:
        """Return per node the sum over its incoming edges of `values` (aligned with `adjacency.data`), in float64.

        absolute: sum absolute values.
        """
        sums, starts = np.zeros(self.n_nodes), self.adjacency.indptr
        filled = np.flatnonzero(np.diff(starts))
        ends = starts[filled + 1]
        done = 0
        while done < len(filled):  # a piece at a time: in float64 all edges would take twice the graph's own memory
            first = starts[filled[done]]
            until = max(done + 1, int(np.searchsorted(ends, first + PIECE, side="right")))
            piece = values[first : ends[until - 1]].astype(np.float64)
            if absolute:
                np.abs(piece, out=piece)
            sums[filled[done:until]] = np.add.reduceat(piece, starts[filled[done:until]] - first)
            done = until
        return sums

    @property
    def targets(self) -> Int[np.ndarray, " n_targets"]:
        """Indices of the traced targets, in the graph's order."""
        return np.flatnonzero(self.nodes.is_logit)

    def dense_adjacency(self) -> Float[np.ndarray, "n_nodes n_nodes"]:
        """Return the edges as a dense matrix in the graph's node order (rows of errors and embeddings are zero)."""
        return self.adjacency.toarray()

    def subgraph(
        self, node_mask: Bool[np.ndarray, " n_nodes"], edge_mask: Bool[np.ndarray, " n_edges"] | None = None
    ) -> AttributionGraph:
        """Return the graph of the nodes that `node_mask` keeps, with the edges between them.

        `edge_mask`, aligned with `adjacency.data`, keeps only some of those edges. Sums, residual and settings stay.
        """
        node_mask = np.asarray(node_mask, dtype=bool)
        edges, lengths = self.adjacency, np.diff(self.adjacency.indptr)
        keep = np.repeat(node_mask, lengths)
        keep &= node_mask[edges.indices]
        if edge_mask is not None:
            keep &= edge_mask
        kept_index = (np.cumsum(node_mask) - 1).astype(edges.indices.dtype)  # grows with the index: rows stay sorted
        n_kept, starts = int(node_mask.sum()), np.zeros(int(node_mask.sum()) + 1, dtype=edges.indptr.dtype)
        np.cumsum(self.sum_rows(keep)[node_mask], out=starts[1:])
        parts = (edges.data[keep], kept_index[edges.indices[keep]], starts)
        adjacency = csr_array(parts, shape=(n_kept, n_kept))
        names = ("bias", "bos", "untraced", "pre_activation", "influence", "dropped")
        per_node = {name: values[node_mask] for name in names if (values := getattr(self, name)) is not None}
        return replace(self, nodes=self.nodes.select(node_mask), adjacency=adjacency, **per_node)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the graph to one safetensors file; the file appears whole or not at all."""
        from graphs.storage import save

        save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> AttributionGraph:
        """Read a graph that `save` wrote, checking everything; runs no code from the file."""
        from graphs.storage import load

        return load(path)

    def to_networkx(self) -> networkx.DiGraph:
        """Return a networkx DiGraph with edges from source to target (see `graphs.structure.to_networkx`)."""
        from graphs.structure import to_networkx

        return to_networkx(self)


def row_residual(graph: AttributionGraph) -> float:
    """Return the largest relative residual of the law over the nodes with inputs.

    max over rows t of |sum_s A[t, s] + bias_t + bos_t + untraced_t + dropped_t - pre_t| / scale_t, with scale_t the
    row's own size max(|pre_t|, sum_s |A[t, s]|), or the median row's where that is larger: a target whose value is next
    to nothing because its terms cancel inside one source carries the rounding of a full row all the same.
    """
    rows = graph.nodes.has_inputs
    if not rows.any():
        return 0.0
    totals = graph.sum_rows(graph.adjacency.data)
    sizes = graph.sum_rows(graph.adjacency.data, absolute=True)
    totals = totals + graph.bias + graph.bos + graph.untraced + (0.0 if graph.dropped is None else graph.dropped)
    missing = np.abs(totals - graph.pre_activation)[rows]
    scale = np.maximum(np.abs(graph.pre_activation), sizes)[rows]
    return float((missing / np.maximum(np.maximum(scale, np.median(scale)), TINY)).max())


def _frozen(values: Any, dtype: Any) -> np.ndarray:
    view = np.asarray(values, dtype=dtype).view()
    view.flags.writeable = False
    return view


def _canonical(adjacency: Any, n_nodes: int) -> csr_array:
    """Return sorted CSR without duplicates or zeros, leaving the caller's matrix as it was."""
    matrix = csr_array(adjacency)
    if matrix.shape != (n_nodes, n_nodes):
        raise InputError(f"AttributionGraph(adjacency=...): got shape {matrix.shape}, needs ({n_nodes}, {n_nodes})")
    if matrix.dtype not in (np.float32, np.float64):
        raise InputError(f"AttributionGraph(adjacency=...): got {matrix.dtype} weights, needs float32 or float64")
    if not np.isfinite([matrix.data.min(initial=0), matrix.data.max(initial=0)]).all():  # no mask as long as the edges
        raise InputError("AttributionGraph(adjacency=...): got NaN or infinity, needs finite weights; check the model")
    if not matrix.has_canonical_format or not matrix.data.all():
        matrix = matrix.copy()
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
    return matrix
