"""From a prompt to its attribution graph: which rows to compute, in which order, and how they become a graph.

The engine (`replacement.contributions`) computes rows, `circuits.targets` says what the last ones are; this file owns
the order of features when not all are traced, and the assembly of node table and sparse rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack
from torch import Tensor

from circuits.rows import check_drop, chosen_drop, store
from circuits.selection import partial_influence
from circuits.targets import Feature, Spec, Target, as_specs, depth, from_start, last_position, reads, resolve
from graphs.graph import MLP, AttributionGraph, NodeKind, NodeTable, row_residual
from replacement.contributions import Contributions, Engine, total_rows
from replacement.crosscoder import Crosscoder
from replacement.errors import InputError
from replacement.linearised import Linearisation
from replacement.local import LocalModel
from replacement.model import ReplacementModel
from replacement.sites import Place, Slot

SWEEP_BYTES = 256 * 2**20  #: what one sweep's working arrays may take
MAX_RESIDUAL = 0.01  #: relative residual beyond which rows are wrong, not rounded, in float32 and float64

Progress = Callable[[int, int], None]


def attribute(
    model: ReplacementModel,
    prompt: str | Int[Tensor, " pos"],
    *,
    targets: Spec | Sequence[Spec] | None = None,
    position: int | None = None,
    max_features: int | None = 7500,
    max_logits: int = 10,
    logit_probability: float = 0.95,
    engine: str = "linear",
    trace_bos: bool = False,
    mlp: str = "relp",
    attention: str = "frozen",
    ig_steps: int = 10,
    batch_size: int = 512,
    update_interval: int = 4,
    drop: float | None = None,
    progress: Progress | None = None,
) -> AttributionGraph:
    """The attribution graph of a prompt: `A[t, s] = w_t^T J(t <- s) v_s` (Ameisen et al. 2025, "Circuit Tracing").

    prompt: text, or a 1-D tensor of token ids.
    targets: what to explain: a token (`" Austin"` or an id), a difference (`"Austin - Sacramento"`), a feature
        (`"L3#1204@7"`), a `Direction` or a vector at the last norm's output, or a list of those; None: the smallest
        set of tokens that holds `logit_probability` of the distribution, at most `max_logits`.
    position: where tokens and directions are predicted; None: the last position. What follows the last position that
        any target reads cannot matter, and is left out of the graph.
    max_features: trace the inputs of at most this many features, taken in order of influence; None: of all. Features
        left out are no nodes; what they contribute is kept as a sum (`graph.untraced`).
    engine: "linear" (matrix products) or "autograd" (the reference, slow).
    trace_bos: trace position 0 like any other; by the field's convention it has no features and no errors.
    mlp, attention, ig_steps: what passes where no dictionary stands; see `Linearisation`.
    batch_size, update_interval: features are ranked anew after every `batch_size * update_interval` of them; a
        sweep takes at most `batch_size` targets.
    drop: leave out the smallest edges of each row, of at most this share of its absolute sum together (`graph.dropped`
        keeps what they contribute); None: 0 up to `rows.WHOLE_ENTRIES` rows times sources, `rows.LARGE_DROP` beyond.
    progress: called with (rows done, rows in all).
    Raises InputError for a prompt, target or setting that cannot be used, and where rows do not add up because the
    architecture has paths that are not known here.
    """
    check_settings(max_features, max_logits, logit_probability, batch_size, update_interval, drop)
    with torch.no_grad():
        rule = Linearisation(mlp=mlp, attention=attention, steps=ig_steps)
        tracer = prepare(
            model, prompt, targets=targets, position=position, max_logits=max_logits, engine=engine,
            logit_probability=logit_probability, trace_bos=trace_bos, linearisation=rule, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
        tracer.run(max_features, batch_size * update_interval, drop)
        settings: dict[str, Any] = {"engine": engine, "dtype": str(model.dtype).removeprefix("torch.")}
        settings |= {"max_features": max_features, "max_logits": max_logits, "logit_probability": logit_probability}
        settings |= {"trace_bos": trace_bos, "drop": tracer.drop, "dropped_share": tracer.dropped_share}
        settings |= _as_asked(model, targets) | _how_linearised(tracer.local)
        tokens = model.tokenize(prompt)
        text = prompt if isinstance(prompt, str) else model.bridge.tokenizer.decode(tokens.tolist())
        graph = assemble(model, tracer, text, settings)
    _require_whole_rows(model, graph)
    return graph


def prepare(
    model: ReplacementModel,
    prompt: str | Int[Tensor, " pos"],
    *,
    targets: Spec | Sequence[Spec] | None,
    position: int | None,
    max_logits: int,
    logit_probability: float,
    engine: str,
    trace_bos: bool,
    linearisation: Linearisation,
    batch_size: int,
    progress: Progress | None = None,
) -> Tracer:
    """All that comes before the first row, arguments as in `attribute`: one forward pass, features, targets."""
    tokens, specs = model.tokenize(prompt), as_specs(targets)
    last = last_position(specs, position, len(tokens))
    specs, at = from_start(specs, len(tokens)), (-1 if position is None else position) % len(tokens)
    local = model.local(tokens[: last + 1], trace_bos=trace_bos, linearisation=linearisation)
    resolved = resolve(
        model, local, specs, position=min(at, last), max_logits=max_logits, logit_probability=logit_probability
    )
    return Tracer(local, model.engine(local, engine), resolved, batch_size, progress)


def _as_asked(model: ReplacementModel, targets: Spec | Sequence[Spec] | None) -> dict[str, Any]:
    """What the graph's header says of what was asked for, where that is text or numbers."""
    said: dict[str, Any] = {"sets": list(model.loaded_from)} if model.loaded_from else {}
    specs = as_specs(targets)
    if specs is not None and all(isinstance(spec, str | int | Feature) for spec in specs):
        said["targets"] = [str(spec) if isinstance(spec, Feature) else spec for spec in specs]
    return said


def _how_linearised(local: LocalModel) -> dict[str, Any]:
    """What the graph's header says of parts of the model that no dictionary replaces."""
    rule = local.linearisation
    said: dict[str, Any] = {"attention": rule.attention}
    if local.linearised:
        said |= {"mlp": rule.mlp, "linearised_mlps": local.linearised} | (
            {"ig_steps": rule.steps} if rule.mlp == "ig" else {}
        )
    if any(isinstance(dictionary, Crosscoder) for dictionary in local.coverage):
        said["acausal"] = "a crosscoder's feature stands at every layer it writes; reads of later layers are its bias"
    return said


def check_settings(
    max_features: int | None,
    max_logits: int,
    logit_probability: float,
    batch_size: int,
    update_interval: int,
    drop: float | None,
) -> None:
    """Raise InputError for a setting that `attribute` cannot use."""
    check_drop(drop)
    for name, value in (("max_logits", max_logits), ("batch_size", batch_size), ("update_interval", update_interval)):
        if not _is_whole(value) or value < 1:
            raise InputError(f"attribute({name}={value!r}): must be at least 1, a whole number")
    if max_features is not None and (not _is_whole(max_features) or max_features < 0):
        raise InputError(f"attribute(max_features={max_features!r}): must be 0 or more; pass None for all")
    if not isinstance(logit_probability, int | float) or not 0 < logit_probability <= 1:
        raise InputError(
            f"attribute(logit_probability={logit_probability}): must be in (0, 1]; for 95 percent pass 0.95"
        )


def _require_whole_rows(model: ReplacementModel, graph: AttributionGraph) -> None:
    """Raise InputError where rows do not add up; half precision rounds the model's own stream, and is let through."""
    if model.dtype == model.compute_dtype and graph.residual is not None and graph.residual > MAX_RESIDUAL:
        raise InputError(
            f"attribute(engine={graph.settings['engine']!r}): rows miss their targets by up to {graph.residual:.0%} of "
            f"their size; the linear path does not know {model.name}'s architecture, and its graph would be wrong"
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Tracer:
    """Computes rows, targets first, and keeps them sparse; columns are features, errors, embeddings in that order."""

    def __init__(
        self, local: LocalModel, engine: Engine, targets: list[Target], batch_size: int, progress: Progress | None
    ) -> None:
        self.local, self.engine, self.targets, self.progress = local, engine, targets, progress
        self.depths = [depth(local, target) for target in targets]
        self.depth = local.features.depth.cpu().numpy()
        self.reachable = int((self.depth < max(self.depths)).sum())  # features are sorted by depth
        self.batch_size = min(batch_size, _sweep_batch(local))
        self.rows: list[csr_array] = []
        self.constants: list[Float[np.ndarray, "rows 3"]] = []  # bias, bos, dropped
        self.drop = self.dropped_share = 0.0  # asked for, and the largest of a row
        self.order: list[int] = []  # which feature each row after the targets' belongs to

    def chosen_drop(self, drop: float | None, wanted: int) -> float:
        """The bound on what rows drop, the default one where None is asked for."""
        n_sources = len(self.depth) + (len(self.local.slots) + 1) * self.local.n_positions
        return chosen_drop(drop, n_rows=len(self.targets) + wanted, n_sources=n_sources)

    def run(self, max_features: int | None, update_every: int, drop: float | None) -> None:
        """Rows of all targets, then of features until there are `max_features`."""
        wanted = self.wanted(max_features)
        self.drop = self.chosen_drop(drop, wanted)
        self.trace_targets()
        while len(self.order) < wanted:
            room = wanted - len(self.order)
            chosen = np.arange(self.reachable) if wanted == self.reachable else self.rank()[: min(update_every, room)]
            for batch in self.batches(np.sort(chosen)):
                self.trace(batch)
                if self.progress is not None:
                    self.progress(len(self.order), wanted)

    def wanted(self, max_features: int | None) -> int:
        """How many features get a row."""
        return self.reachable if max_features is None else min(max_features, self.reachable)

    def trace(self, features: Int[np.ndarray, " batch"]) -> None:
        """Rows of features of one depth."""
        index = torch.from_numpy(features).to(self.local.forward.tokens)
        self._keep(total_rows(self.engine, self.local.feature_targets(index)))
        self.order += features.tolist()

    def trace_targets(self) -> None:
        """Rows of all targets."""
        done: dict[int, tuple[csr_array, np.ndarray]] = {}
        for at in sorted(set(self.depths)):
            index = [i for i, found in enumerate(self.depths) if found == at]
            for start in range(0, len(index), self.batch_size):
                part = index[start : start + self.batch_size]
                self._keep(total_rows(self.engine, reads(self.local, [self.targets[i] for i in part])))
                rows, constants = self.rows.pop(), self.constants.pop()
                done |= {i: (rows[[row]], constants[[row]]) for row, i in enumerate(part)}
        for i in range(len(self.targets)):
            self.rows.append(done[i][0])
            self.constants.append(done[i][1])

    def rank(self) -> Int[np.ndarray, " n"]:
        """Features without a row, most influential first, by the rows known so far."""
        weights = np.array([target.weight for target in self.targets])
        order = np.array(self.order, dtype=int)
        depths = np.concatenate([self.depths, self.depth[order]])
        influence = partial_influence(vstack(self.rows, format="csr"), depths, order, weights)
        influence = influence[: self.reachable]
        influence[self.order] = -1.0
        return np.argsort(-influence, kind="stable")[: self.reachable - len(self.order)]

    def batches(self, features: Int[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " batch"]]:
        """Batches of one depth each, in the features' order (depth, position), so that prefixes stay short."""
        depths = self.depth[features]
        for at in np.unique(depths):
            alike = features[depths == at]
            for start in range(0, len(alike), self.batch_size):
                yield alike[start : start + self.batch_size]

    def _keep(self, result: Contributions) -> None:
        dense = torch.cat([result.features, result.errors.flatten(1), result.embeddings], 1)
        stored = store(dense.cpu().numpy(), drop=self.drop)
        self.rows.append(stored.kept)
        self.dropped_share = max(self.dropped_share, stored.share)
        constants = torch.stack([result.bias, result.bos], 1).double().cpu().numpy()
        self.constants.append(np.column_stack([constants, stored.dropped]))


def _sweep_batch(local: LocalModel) -> int:
    """How many targets one sweep can carry within SWEEP_BYTES."""
    return max(1, SWEEP_BYTES // sweep_bytes(local))


def sweep_bytes(local: LocalModel) -> int:
    """What one target takes of a sweep's working arrays."""
    block = local.path.weights.blocks[0]
    heads = block.W_O.shape[0] * block.W_O.shape[1]
    hidden = max((mlp.c_in.shape[1] for mlp in local.path.mlps.values()), default=0)
    patterns = block.W_O.shape[0] * local.n_positions if local.path.attentions is not None else 0
    width = local.n_positions * (4 * local.forward.embedding.shape[1] + 3 * (heads + hidden + patterns))
    sources = len(local.features.layer) + (len(local.slots) + 1) * local.n_positions
    return (width + 2 * sources) * local.forward.embedding.element_size()


def assemble(model: ReplacementModel, tracer: Tracer, prompt: str, settings: dict[str, Any]) -> AttributionGraph:
    """Node table in the reference order and the square sparse matrix."""
    local, targets = tracer.local, tracer.targets
    order = np.array(tracer.order, dtype=int)
    selected = np.sort(order)
    nodes = _nodes(model, local, targets, selected)
    n_features, n_nodes = len(selected), len(nodes)
    rows = vstack(tracer.rows, format="csr")
    n_all = len(local.features.layer)
    unselected = np.ones(rows.shape[1], dtype=bool)
    unselected[selected] = unselected[n_all:] = False
    untraced = rows @ unselected.astype(np.float64)
    rows = rows[:, ~unselected]
    # where each computed row goes: targets are the last nodes, features keep their place in the table
    place = np.concatenate([np.arange(n_nodes - len(targets), n_nodes), np.searchsorted(selected, order)])
    rows.resize(rows.shape[0], n_nodes)
    coo = rows.tocoo()
    adjacency = csr_array((coo.data, (place[coo.coords[0]], coo.coords[1])), shape=(n_nodes, n_nodes))
    constants = np.concatenate(tracer.constants)
    columns = np.zeros((4, n_nodes))
    columns[:, place] = *constants.T, untraced
    pre_activation = np.zeros(n_nodes)
    pre_activation[:n_features] = nodes.activation[:n_features]
    pre_activation[n_nodes - len(targets) :] = [target.value for target in targets]
    tokens = local.forward.tokens
    graph = AttributionGraph(
        nodes=nodes,
        adjacency=adjacency,
        bias=columns[0],
        bos=columns[1],
        untraced=columns[3],
        dropped=columns[2] if tracer.drop else None,
        pre_activation=pre_activation,
        prompt=prompt,
        tokens=tuple(model.token_strings(tokens)),
        token_ids=tokens.cpu().numpy(),
        n_layers=local.n_layers,
        model=model.name,
        dictionaries=model.coverage.name,
        n_active_features=n_all,
        settings=settings,
    )
    return replace(graph, residual=row_residual(graph))


def _nodes(model: ReplacementModel, local: LocalModel, targets: list[Target], selected: np.ndarray) -> NodeTable:
    """Features, errors (slot-major), embeddings, targets."""
    n_pos, n_targets, n_errors = local.n_positions, len(targets), len(local.slots) * local.n_positions
    layer, place, position, feature, activation = (column.cpu().numpy()[selected] for column in local.features)
    positions, zeros = np.arange(n_pos), np.zeros(n_errors + n_pos + n_targets)
    tokens = local.forward.tokens
    features = zip(layer.tolist(), place.tolist(), feature.tolist(), strict=True)
    slots = np.array(local.slots, dtype=int).reshape(-1, 2)
    at_layer, at_place = np.repeat(slots, n_pos, axis=0).T
    return NodeTable(
        kind=np.repeat(
            [NodeKind.FEATURE, NodeKind.ERROR, NodeKind.EMBEDDING, NodeKind.LOGIT],
            [len(selected), n_errors, n_pos, n_targets],
        ),
        layer=np.concatenate([layer, at_layer, np.full(n_pos, -1), np.full(n_targets, local.n_layers)]),
        place=np.concatenate([place, at_place, np.full(n_pos + n_targets, MLP)]),
        position=np.concatenate(
            [position, np.tile(positions, len(local.slots)), positions, [t.position for t in targets]]
        ),
        feature=np.concatenate(
            [feature, np.full(n_errors, -1), tokens.cpu().numpy(), [target.token for target in targets]]
        ),
        activation=np.concatenate([activation, zeros]),
        probability=np.concatenate([np.zeros(len(selected) + n_errors + n_pos), [t.weight for t in targets]]),
        label=(
            *(model.coverage.label(Slot(layer, Place(place)), feature) for layer, place, feature in features),
            *[""] * n_errors,
            *model.token_strings(tokens),
            *(target.label for target in targets),
        ),
    )
