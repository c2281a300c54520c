"""Which attention heads carried an edge: every edge of a graph split by head.

An edge's value runs over many paths, through any number of attention layers. Each path is credited to the last head on
it, the one that moved it to the position where its target reads; paths that no attention is on are credited to none.
The shares add up to the edge. After Kamath et al. 2025 ("Tracing Attention Computation Through Feature Interactions"),
who split edges between neighbouring layers by head; frozen patterns only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialize
from scipy.sparse import csr_array
from torch import Tensor

from circuits.targets import Spec, Target, as_specs, from_start, reads, resolve
from graphs.files import whole_file
from graphs.graph import AttributionGraph, NodeKind
from replacement.contributions import enter
from replacement.errors import InputError
from replacement.features import Targets
from replacement.linear import apply_norm
from replacement.linearised import Linearisation
from replacement.local import LocalModel
from replacement.model import ReplacementModel
from replacement.sites import Place, Slot

SOURCES_AT_ONCE = 64  #: sources that are carried up together


class HeadLoadings(NamedTuple):
    """What each head carried of each edge; rows sum to the edges."""

    target: Int[np.ndarray, " n_edges"]  #: node
    source: Int[np.ndarray, " n_edges"]  #: node
    loadings: csr_array  #: [n_edges, n_layers * n_heads + 1]: layer-major heads, the last column without attention
    n_heads: int

    def save(self, path: str | PathLike[str]) -> None:
        """Write the loadings to a safetensors file, as CSR beside the edges' nodes, whole or not at all."""
        tensors = {"target": self.target, "source": self.source, "loadings.values": self.loadings.data}
        tensors |= {"loadings.indices": self.loadings.indices, "loadings.indptr": self.loadings.indptr}
        tensors |= {"n_heads": np.array([self.n_heads]), "shape": np.array(self.loadings.shape)}
        with whole_file(path, call="save") as draft:
            draft.write_bytes(serialize({name: np.ascontiguousarray(value) for name, value in tensors.items()}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> HeadLoadings:
        """Read what `save` wrote; raises InputError for any other file."""
        try:
            stored = load_file(path)
            values = tuple(stored[f"loadings.{name}"] for name in ("values", "indices", "indptr"))
            loadings = csr_array(values, shape=tuple(stored["shape"].tolist()))
            return cls(stored["target"], stored["source"], loadings, int(stored["n_heads"][0]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"load(path={str(path)!r}): holds no head loadings ({reason}); split again") from error

    def top(self, edge: int, *, k: int = 3) -> list[tuple[int, int, float]]:
        """The k largest loadings of an edge as (layer, head, value), largest size first; (-1, -1) is no attention."""
        row = self.loadings[[edge]].toarray()[0]
        order = np.argsort(-np.abs(row), kind="stable")[:k]
        none = row.size - 1
        return [
            ((-1, -1) if i == none else divmod(int(i), self.n_heads)) + (float(row[i]),) for i in order if row[i] != 0
        ]


def head_loadings(
    model: ReplacementModel,
    graph: AttributionGraph,
    *,
    edges: Iterable[int] | None = None,
    targets: Spec | Sequence[Spec] | None = None,
) -> HeadLoadings:
    """Split edges of a graph by the head that carried them: `A[t, s] = none + sum over layers and heads`.

    With `g` the target's gradient by attention-free paths and `x_s` what the source's write makes of the stream, head h
    of layer l carries `g_l^T O_h A_h x_s V_h`, the post-norm and the norm before attention frozen like the patterns.

    model, graph: the graph, whole or pruned, and the model that it was traced on; its prompt is run once more.
    edges: indices into `graph.adjacency.data`; None for all.
    targets: what the graph explains, as given to `attribute`; needed only where that was a feature or a direction.
    Raises InputError for a graph of another model, or attention that is not frozen.
    """
    settings = graph.settings
    if settings.get("attention", "frozen") != "frozen":
        raise InputError("head_loadings(graph=...): follows attention's gradient; trace with attention='frozen'")
    rule = Linearisation(mlp=settings.get("mlp", "relp"), steps=settings.get("ig_steps", 10))
    tokens = torch.from_numpy(graph.token_ids.copy())
    local = model.local(tokens, trace_bos=bool(settings.get("trace_bos")), linearisation=rule)
    wanted = np.arange(graph.n_edges) if edges is None else np.asarray(list(edges), dtype=np.int64)
    target, source = graph.edge_targets[wanted], graph.edge_sources[wanted]
    with torch.no_grad():
        rows = _Rows(local, graph, _targets(model, local, graph, targets))
        loadings = _split(local, rows, target, source)
    _require_whole(loadings, graph.adjacency.data[wanted])
    return HeadLoadings(target, source, loadings, model.weights.blocks[0].W_O.shape[0])


def _split(
    local: LocalModel, rows: _Rows, target: Int[np.ndarray, " n_edges"], source: Int[np.ndarray, " n_edges"]
) -> csr_array:
    """The loadings of edges between two lists of nodes."""
    n_heads = local.path.weights.blocks[0].W_O.shape[0]
    pulls = {int(node): _pull(local, rows.reads(int(node))) for node in np.unique(target)}
    sources = np.unique(source)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # edge, column, value
    for start in range(0, len(sources), SOURCES_AT_ONCE):
        chunk = sources[start : start + SOURCES_AT_ONCE]
        writes = [rows.writes(int(node)) for node in chunk]
        streams = _carried(local, writes)
        for node, pull in pulls.items():
            here = np.flatnonzero((target == node) & np.isin(source, chunk))
            at = np.searchsorted(chunk, source[here])
            for layer, values in pull.heads.items():
                pattern = local.forward.blocks[layer].pattern[:, pull.position]
                read = streams[layer][torch.from_numpy(at).to(pattern.device)]
                carried = torch.einsum("hk,hd,skd->sh", pattern, values, read).double().cpu().numpy()
                edge, head = carried.nonzero()
                parts.append((here[edge], layer * n_heads + head, carried[edge, head]))
            direct = np.array([_direct(local, writes[i], pull) for i in at])
            alone = np.flatnonzero(direct)
            parts.append((here[alone], np.full(len(alone), local.n_layers * n_heads), direct[alone]))
    shape = len(target), local.n_layers * n_heads + 1
    if not parts:
        return csr_array(shape)
    edges, columns, found = (np.concatenate(of) for of in zip(*parts, strict=True))
    return csr_array((found, (edges, columns)), shape=shape)


def _require_whole(loadings: csr_array, weights: Float[np.ndarray, " n_edges"]) -> None:
    """Raise InputError unless the parts add up to the edges, as they don't for another model or other targets."""
    gap = np.abs(loadings.sum(1) - weights)
    if len(weights) and gap.max() > 1e-3 * np.abs(weights).max():
        raise InputError(
            "head_loadings: the parts do not add up to the graph's edges; pass the model, dictionaries and targets "
            "that it was traced with"
        )


def _targets(
    model: ReplacementModel, local: LocalModel, graph: AttributionGraph, given: Spec | Sequence[Spec] | None
) -> list[Target]:
    """The graph's targets, from what was given, or from what its header and nodes say."""
    said = graph.settings.get("targets") if given is None else given
    specs = from_start(as_specs(said), local.n_positions)
    found: list[Target] = []
    for number, node in enumerate(graph.targets.tolist()):
        token, position = int(graph.nodes.feature[node]), int(graph.nodes.position[node])
        if specs is None and token < 0:
            raise InputError("head_loadings(targets=None): the graph explains what is no token; pass what it was")
        if specs is not None and number >= len(specs):
            raise InputError("head_loadings(targets=...): the graph has more targets than were given; pass all")
        spec: list[Spec] = [token] if specs is None else [specs[number]]
        found += resolve(model, local, spec, position=position, max_logits=1, logit_probability=1.0)
    return found


class _Pull(NamedTuple):
    """A target's gradients by paths that no attention is on; all lie at the target's own position."""

    position: int
    heads: dict[int, Float[Tensor, "heads d_model"]]  # at attention's normed input, by layer and head
    slots: list[tuple[Slot | None, Float[Tensor, " d_model"]]]  # in the stream


class _Rows:
    """What nodes of a graph read and write in the local model."""

    def __init__(self, local: LocalModel, graph: AttributionGraph, targets: list[Target]) -> None:
        self.local, self.nodes, self.targets = local, graph.nodes, targets
        self.first = int(graph.n_nodes - graph.nodes.is_logit.sum())
        table = local.features
        keys = zip(*(column.tolist() for column in table[:4]), strict=True)
        self.index = {key: number for number, key in enumerate(keys)}

    def _feature(self, node: int) -> int:
        nodes = self.nodes
        key = (nodes.layer[node], nodes.places[node], nodes.position[node], nodes.feature[node])
        if key not in self.index:
            raise InputError("head_loadings(model=...): lacks features of the graph; pass the model it was traced on")
        return self.index[key]

    def reads(self, node: int) -> list[Targets]:
        if self.nodes.kind[node] == NodeKind.FEATURE:
            return self.local.feature_targets(torch.tensor([self._feature(node)]).to(self.local.forward.tokens))
        return reads(self.local, [self.targets[node - self.first]])

    def writes(self, node: int) -> dict[Slot | None, Float[Tensor, "pos d_model"]]:
        """What a source writes, by slot, at the slot's site; None stands for the embeddings."""
        local, nodes, position = self.local, self.nodes, int(self.nodes.position[node])
        blank = torch.zeros_like(local.forward.embedding)
        if nodes.kind[node] == NodeKind.EMBEDDING:
            blank[position] = local.forward.embedding[position]
            return {None: blank}
        if nodes.kind[node] == NodeKind.ERROR:
            slot = Slot(int(nodes.layer[node]), Place(int(nodes.places[node])))
            if slot not in local.slots:
                raise InputError("head_loadings(model=...): lacks errors of the graph; pass the model it was traced on")
            blank[position] = local.errors[local.slots.index(slot), position]
            return {slot: blank}
        index = self._feature(node)
        found: dict[Slot | None, Tensor] = {}
        for slot, writers in local.writes.items():
            for written in writers:
                if 0 <= (row := index - written.first) < len(written.feature):
                    found[slot] = blank.clone()
                    found[slot][position] = written.vectors(slice(row, row + 1))[0]
        return found


def _pull(local: LocalModel, targets: list[Targets]) -> _Pull:
    path, position = local.path, targets[0].positions
    heads: dict[int, Tensor] = {}
    slots: list[tuple[Slot | None, Tensor]] = []
    for one in targets:
        entry, _ = enter(local, one)
        for slot, gradient in path.direct(entry):
            if not entry.only_attention:
                slots.append((slot, gradient[0]))
                if slot is None or slot.place is not Place.ATTENTION or slot in path.written:
                    continue
                gradient = path.transpose_write(slot.layer, "attn.hook_out", gradient, position)
            assert slot is not None
            values = path.head_values(slot.layer, gradient)[0]
            heads[slot.layer] = heads[slot.layer] + values if slot.layer in heads else values
    return _Pull(int(position[0]), heads, slots)


def _carried(local: LocalModel, writes: list[dict[Slot | None, Tensor]]) -> list[Float[Tensor, "n pos d_model"]]:
    """What each source's writes make of attention's normed input, by layer."""
    each = []
    for one in writes:
        at_slots = {slot: vectors for slot, vectors in one.items() if slot is not None}
        each.append(list(local.carry(at_slots, one.get(None)))[:-1])
    blocks = zip(local.path.weights.blocks, local.forward.blocks, strict=True)
    return [
        apply_norm(weights.ln1, block.ln1_scale, torch.stack(of_layer), bias=False)
        for (weights, block), of_layer in zip(blocks, zip(*each, strict=True), strict=True)
    ]


def _direct(local: LocalModel, writes: dict[Slot | None, Tensor], pull: _Pull) -> float:
    total = 0.0
    for slot, gradient in pull.slots:
        if slot in writes:
            if slot is not None:
                where = torch.tensor([pull.position], device=gradient.device)
                gradient = local.path.transpose_write(slot.layer, local.write_site(slot), gradient[None], where)[0]
            total += float(gradient.double() @ writes[slot][pull.position].double())
    return total
