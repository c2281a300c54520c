"""Which attention heads carried an edge: every edge of a graph split by head.

An edge's value runs over many paths, through any number of attention layers. Each path is credited to the last head on
it, the one that moved it to the position where its target reads; paths that no attention is on are credited to none.
The shares add up to the edge. After Kamath et al. 2025 ("Tracing Attention Computation Through Feature Interactions"),
who split edges between neighbouring layers by head. Where a graph follows attention's full gradient, a head carries
what comes by its queries and keys too. How attention is linearised is known to `replacement.linear` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialize
from scipy.sparse import csr_array
from torch import Tensor

from circuits.targets import Spec, Target, as_specs, depth, from_start, reads, resolve
from graphs.files import whole_file
from graphs.graph import AttributionGraph, NodeKind
from replacement.contributions import enter
from replacement.errors import InputError
from replacement.features import Targets
from replacement.linearised import Linearisation
from replacement.local import LocalModel
from replacement.model import ReplacementModel
from replacement.sites import Place, Slot

CARRIED_BYTES = 16 * 2**20  #: of streams, one for each source that is carried up at once
EDGES_AT_ONCE = 4096  #: whose targets' gradients meet what their sources make of heads


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

    With g the target's gradient by attention-free paths, at its position t, and x_s what the source's write makes of
    attention's normed input, head h of layer l carries `g_l^T O_h (A_h V_h x_s)[t]`; where attention has its full
    gradient, `g_l^T O_h (A_h V_h x_s + dA_h V_h x)[t]`, with dA_h what x_s does to the head's pattern by its query at t
    and its keys up to t. The post-norm and the norm before attention are frozen.

    model, graph: the graph, whole or pruned, and the model that it was traced on; its prompt is run once more.
    edges: indices into `graph.adjacency.data`; None for all.
    targets: what the graph explains, as given to `attribute`; needed only where that was a feature or a direction.
    Raises InputError for a graph of another model, or for attention's full gradient in a model that does not show what
    each head gives to the output map.
    """
    settings, default = graph.settings, Linearisation()
    rule = Linearisation(
        mlp=settings.get("mlp", default.mlp),
        attention=settings.get("attention", default.attention),
        steps=settings.get("ig_steps", default.steps),
    )
    tokens = torch.from_numpy(graph.token_ids.copy())
    local = model.local(tokens, trace_bos=bool(settings.get("trace_bos")), linearisation=rule)
    wanted = np.arange(graph.n_edges) if edges is None else np.asarray(list(edges), dtype=np.int64)
    target, source = graph.edge_targets[wanted], graph.edge_sources[wanted]
    with torch.no_grad():
        nodes = _Nodes(local, graph, _targets(model, local, graph, targets))
        loadings = _split(nodes, target, source)
    _require_whole(loadings, graph.adjacency.data[wanted])
    return HeadLoadings(target, source, loadings, model.weights.blocks[0].W_O.shape[0])


def _split(nodes: _Nodes, target: Int[np.ndarray, " n_edges"], source: Int[np.ndarray, " n_edges"]) -> csr_array:
    """The loadings of edges between two lists of nodes."""
    local = nodes.local
    embedding, n_heads = local.forward.embedding, local.path.weights.blocks[0].W_O.shape[0]
    targets, of_target = np.unique(target, return_inverse=True)
    sources, of_source = np.unique(source, return_inverse=True)
    pulled = _pull(nodes, targets)
    order = np.argsort(of_source, kind="stable")
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # edge, column, value
    at_once = max(1, CARRIED_BYTES // (embedding.numel() * embedding.element_size()))
    for start in range(0, len(sources), at_once):
        written = _Written(nodes, sources[start : start + at_once])
        first, stop = np.searchsorted(of_source[order], [start, start + at_once])
        edges = order[first:stop]
        ends = (torch.from_numpy(of[edges]).to(embedding.device) for of in (of_target, of_source - start))
        for layer, index, values in _carried(local, pulled, written, *ends):
            edge, head = values.nonzero()
            parts.append((edges[index[edge]], layer * n_heads + head, values[edge, head]))
    shape = len(target), local.n_layers * n_heads + 1
    if not parts:
        return csr_array(shape)
    at, columns, found = (np.concatenate(of) for of in zip(*parts, strict=True))
    return csr_array((found, (at, columns)), shape=shape)


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


class _Nodes:
    """What nodes of a graph read and write in the local model."""

    def __init__(self, local: LocalModel, graph: AttributionGraph, targets: list[Target]) -> None:
        self.local, self.table, self.targets = local, graph.nodes, targets
        self.first = int(graph.n_nodes - graph.nodes.is_logit.sum())
        keys = zip(*(column.tolist() for column in local.features[:4]), strict=True)
        self.index = {key: number for number, key in enumerate(keys)}

    def feature(self, node: int) -> int:
        """Which of the active features a node is."""
        table = self.table
        key = (table.layer[node], table.places[node], table.position[node], table.feature[node])
        if key not in self.index:
            raise InputError("head_loadings(model=...): lacks features of the graph; pass the model it was traced on")
        return self.index[key]

    def error(self, node: int) -> int:
        """Which of the errors' slots a node stands at."""
        slot = Slot(int(self.table.layer[node]), Place(int(self.table.places[node])))
        if slot not in self.local.slots:
            raise InputError("head_loadings(model=...): lacks errors of the graph; pass the model it was traced on")
        return self.local.slots.index(slot)

    def reads(self, nodes: Int[np.ndarray, " n"]) -> list[tuple[list[int], list[Targets]]]:
        """What nodes read, those of one depth together: which of the nodes, and their targets, to be added up."""
        features: dict[int, list[tuple[int, int]]] = {}
        others: dict[int, list[tuple[int, Target]]] = {}
        for number, node in enumerate(nodes.tolist()):
            if self.table.kind[node] == NodeKind.FEATURE:
                index = self.feature(node)
                features.setdefault(int(self.local.features.depth[index]), []).append((number, index))
            else:
                target = self.targets[node - self.first]
                others.setdefault(depth(self.local, target), []).append((number, target))
        like = self.local.forward.tokens
        found = [
            ([number for number, _ in of], self.local.feature_targets(torch.tensor([i for _, i in of]).to(like)))
            for of in features.values()
        ]
        return found + [
            ([number for number, _ in of], reads(self.local, [one for _, one in of])) for of in others.values()
        ]


class _Written:
    """What some sources write, each at its own position."""

    def __init__(self, nodes: _Nodes, sources: Int[np.ndarray, " n"]) -> None:
        self.local, kinds = nodes.local, nodes.table.kind[sources]
        device = self.local.forward.tokens.device

        def column(values: list[int]) -> Int[Tensor, " n"]:
            return torch.tensor(values, dtype=torch.long, device=device)

        pairs = list(zip(sources.tolist(), kinds.tolist(), strict=True))
        self.position = column(nodes.table.position[sources].tolist())
        self.feature = column([nodes.feature(node) if kind == NodeKind.FEATURE else -1 for node, kind in pairs])
        self.error = column([nodes.error(node) if kind == NodeKind.ERROR else -1 for node, kind in pairs])
        self.embedding = column([kind == NodeKind.EMBEDDING for _, kind in pairs]).bool()

    def vectors(self, slot: Slot | None) -> Float[Tensor, "n d_model"] | None:
        """What each writes at a slot's site, or None: as embedding; None where none does."""
        local, embedding = self.local, self.local.forward.embedding
        found, any_does = embedding.new_zeros(len(self.position), embedding.shape[1]), False

        def put(at: Tensor, vectors: Callable[[], Tensor]) -> None:
            nonlocal any_does
            if at.any():
                found[at], any_does = vectors(), True

        if slot is None:
            put(self.embedding, lambda: embedding[self.position[self.embedding]])
        elif slot in local.slots:
            number = local.slots.index(slot)
            at_slot = self.error == number
            put(at_slot, lambda: local.errors[number, self.position[at_slot]])
            for writes in local.writes.get(slot, ()):
                row = self.feature - writes.first
                own = (self.feature >= 0) & (row >= 0) & (row < len(writes.feature))
                put(own, lambda of=writes, row=row[own]: of.vectors(row))  # type: ignore[misc]
        return found if any_does else None

    def stream(self, slot: Slot | None) -> Float[Tensor, "n pos d_model"] | None:
        """The same at the positions where they stand."""
        if (vectors := self.vectors(slot)) is None:
            return None
        n, n_positions = len(vectors), self.local.n_positions
        found = vectors.new_zeros(n, n_positions, vectors.shape[1])
        found[torch.arange(n, device=vectors.device), self.position] = vectors
        return found


class _Pulled(NamedTuple):
    """Targets' gradients by paths that no attention is on; all lie at each target's own position."""

    position: Int[Tensor, " n"]
    heads: dict[int, Float[Tensor, "n heads d_head"]]  # at what heads give to the output map, by layer
    writes: dict[Slot | None, Float[Tensor, "n d_model"]]  # at the site of a slot; None: at the embeddings


def _pull(nodes: _Nodes, targets: Int[np.ndarray, " n"]) -> _Pulled:
    local, path = nodes.local, nodes.local.path
    found = _Pulled(torch.zeros(len(targets), dtype=torch.long, device=local.forward.tokens.device), {}, {})
    for numbers, parts in nodes.reads(targets):
        at = torch.tensor(numbers, device=found.position.device)
        found.position[at] = parts[0].positions

        def add(to: dict[Any, Tensor], key: Slot | int | None, gradient: Tensor, at: Tensor = at) -> None:
            if key not in to:
                to[key] = gradient.new_zeros(len(targets), *gradient.shape[1:])
            to[key].index_add_(0, at, gradient)

        for one in parts:
            entry, _ = enter(local, one)
            for slot, gradient in path.direct(entry):
                if not entry.only_attention:
                    if slot is None:
                        add(found.writes, None, gradient)
                    elif slot in local.slots:
                        at_site = path.transpose_write(slot.layer, local.write_site(slot), gradient, one.positions)
                        add(found.writes, slot, at_site)
                    if slot is None or slot.place is not Place.ATTENTION or slot in path.written:
                        continue
                    gradient = path.transpose_write(slot.layer, "attn.hook_out", gradient, one.positions)
                assert slot is not None
                add(found.heads, slot.layer, path.at_heads(slot.layer, gradient))
    return found


def _carried(
    local: LocalModel,
    pulled: _Pulled,
    written: _Written,
    target: Int[Tensor, " n_edges"],
    source: Int[Tensor, " n_edges"],
) -> Iterator[tuple[int, Int[np.ndarray, " n"], Float[np.ndarray, "n heads"]]]:
    """Parts of edges, to be added up: a layer, which edges, and what each head carried; beyond the last layer, one
    column: what came without attention."""
    position = pulled.position[target]

    def meet(gradients: Tensor, vectors: Tensor, index: Tensor, *where: Tensor) -> Iterator[tuple[Any, Any]]:
        for some in index.split(EDGES_AT_ONCE):
            found = (gradients[target[some]] * vectors[source[some], *(at[some] for at in where)]).sum(-1)
            yield some.cpu().numpy(), found.double().cpu().numpy()

    alone = (position == written.position[source]).nonzero()[:, 0]
    for slot, gradients in pulled.writes.items():
        if (vectors := written.vectors(slot)) is not None:
            for index, values in meet(gradients, vectors, alone):
                yield local.n_layers, index, values[:, None]
    for layer, stream in zip(range(local.n_layers), local.carry(written.stream, written.stream(None)), strict=False):
        if layer in pulled.heads:
            gradients = pulled.heads[layer]
            outputs = local.path.head_outputs(layer, stream.expand(len(written.position), -1, -1)).transpose(1, 2)
            reached = gradients.flatten(1).any(1)[target].nonzero()[:, 0]
            for index, values in meet(gradients, outputs, reached, position):
                yield layer, index, values
