"""What a trace will take: active features, rows, time and memory, from a few rows traced for real.

The forward pass and the encoding are the trace's own, so counts are exact. Time: some batches, spread over depths and
positions, are timed, and the rest is extrapolated by what a sweep's cost grows with. Memory: the sampled rows' density,
and what assembling and pruning the small graph that they make took. Nothing here is a constant of some machine.
"""

from __future__ import annotations

import inspect
import resource
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import nnls

from circuits.assembly import assemble
from circuits.attribution import attribute, check_settings, prepare
from circuits.reach import Reach
from circuits.report import report
from circuits.tracer import Tracer, sweep_bytes
from graphs import prune, to_neuronpedia
from graphs.graph import AttributionGraph
from replacement.linearised import Linearisation
from replacement.model import ReplacementModel

SAMPLES = 8  #: batches that are timed, of so many rows:
SAMPLE_ROWS = 64
FEW_ROWS = 2  #: and of so few, which show what a sweep costs that has next to no rows


@dataclass(frozen=True)
class Preflight:
    """What to expect of a trace, loading aside."""

    tokens: int
    active_features: int
    features_by_layer: tuple[int, ...]
    rows: int
    """Rows to compute: the targets' and those of the features that are traced."""
    edges: int
    """Entries of the graph."""
    tracing_seconds: float
    finishing_seconds: float
    """Pruning, reporting and writing."""
    loaded_bytes: int
    """What the process took at most so far, with model and dictionaries in memory."""
    rows_bytes: int
    """What the rows take while they are kept."""
    peak_bytes: int
    """Largest memory of the process, `loaded_bytes` among it; on a GPU the sweep's arrays are there, not here."""

    @property
    def seconds(self) -> float:
        """Time after loading."""
        return self.tracing_seconds + self.finishing_seconds

    def as_json(self) -> dict[str, Any]:
        """The fields, and their sum."""
        return {**asdict(self), "seconds": self.seconds}


class Batch(NamedTuple):
    """Features whose rows are computed in one sweep, and what its cost grows with."""

    features: Int[np.ndarray, " n"]
    prefix: int
    """Positions that the sweep carries."""
    layers: int
    """Layers that it goes through."""
    sources: int
    """Entries that its rows can have, all together."""
    columns: int
    """Entries of a dense row."""

    @property
    def cost(self) -> Float[np.ndarray, " terms"]:
        """The terms of its time, each with a constant of its own."""
        n, area = len(self.features), self.prefix * self.layers
        of_rows = (n * self.columns, n * area, n * area * self.prefix)
        terms = (1, self.layers, *of_rows, self.sources, self.sources * self.layers)
        return np.array(terms, dtype=float)


def preflight(model: ReplacementModel, prompt: str | torch.Tensor, **settings: Any) -> Preflight:
    """What `attribute(model, prompt, **settings)` and pruning its graph will take; raises what `attribute` does.

    Time and memory are estimates, meant to be within a factor of 2 of what an otherwise idle machine then shows.
    """
    bound = inspect.signature(attribute).bind(model, prompt, **settings)
    bound.apply_defaults()
    given = bound.arguments
    names = ("targets", "position", "max_logits", "logit_probability", "engine", "products", "trace_bos", "memory")
    check_settings(**given)
    with torch.no_grad():
        started = perf_counter()
        rule = Linearisation(mlp=given["mlp"], attention=given["attention"], steps=given["ig_steps"])
        tracer = prepare(model, prompt, linearisation=rule, **{name: given[name] for name in (*names, "batch_size")})
        tracer.drop = tracer.chosen_drop(given["drop"], tracer.wanted(given["max_features"]))
        tracer.trace_targets()
        begun, loaded = perf_counter() - started, _largest_memory()
        wanted = tracer.wanted(given["max_features"])
        update_every = given["batch_size"] * given["update_interval"] if wanted < tracer.reachable else None
        return _Pilot(model, tracer, wanted, update_every).expected(begun, loaded)


class _Pilot:
    """A few rows of a trace, and what they say of the rest."""

    def __init__(self, model: ReplacementModel, tracer: Tracer, wanted: int, update_every: int | None) -> None:
        """update_every: features between two rankings; None where all features are traced and none is ranked."""
        self.model, self.tracer, self.wanted, self.update_every = model, tracer, wanted, update_every
        self.n_targets, self.reach = len(tracer.targets), Reach(tracer.local)
        self.rank_samples: list[tuple[int, float]] = []  # entries of the rows known, seconds
        self.chosen = np.arange(wanted) if update_every is None else self._rank()
        self.batches = list(self._plan())

    def expected(self, begun: float, loaded: int) -> Preflight:
        """Sample and extrapolate; `begun`: seconds up to the first row, `loaded`: the process's bytes then."""
        tracer, local = self.tracer, self.tracer.local
        entry_bytes = local.forward.embedding.element_size() + 4  # a value and its column
        sweeping = begun + self._sweeping_seconds()
        stored = self._stored_entries()
        edges = int(stored * self._kept_share())
        assembling, finishing, assembly_bytes, finish_bytes = self._finishing(stored, edges)
        ranking, rank_bytes = (0.0, 0.0) if self.update_every is None else self._ranking(stored)
        rows, graph = stored * entry_bytes, edges * entry_bytes
        sweep = tracer.batch_size * sweep_bytes(local) if local.forward.embedding.device.type == "cpu" else 0
        peak = max(rows + sweep, rows + rank_bytes, rows + assembly_bytes, graph + finish_bytes)
        return Preflight(
            tokens=local.n_positions,
            active_features=len(local.features.layer),
            features_by_layer=tuple(torch.bincount(local.features.layer, minlength=local.n_layers).tolist()),
            rows=self.n_targets + self.wanted,
            edges=edges,
            tracing_seconds=sweeping + ranking + assembling,
            finishing_seconds=finishing,
            loaded_bytes=loaded,
            rows_bytes=rows,
            peak_bytes=int(loaded + peak),
        )

    # ---- rows

    def _plan(self) -> Iterator[Batch]:
        """The batches of the trace; which features follow on the first ranking is guessed to be the next in it."""
        every = self.update_every or max(1, self.wanted)
        for start in range(0, self.wanted, every):
            for features in self.tracer.batches(np.sort(self.chosen[start : start + every])):
                yield self._batch(features)

    def _batch(self, features: Int[np.ndarray, " n"]) -> Batch:
        local = self.tracer.local
        prefix = int(local.features.position[int(features[-1])]) + 1
        layers = int(local.features.layer[int(features[0])]) + 1
        columns = len(local.features.layer) + (len(local.slots) + 1) * local.n_positions
        return Batch(features, prefix, layers, int(self.reach.sources(features).sum()), columns)

    def _sweeping_seconds(self) -> float:
        """Time some batches, and extrapolate to all by `Batch.cost`, every term's constant 0 or more."""
        if not self.batches:
            return 0.0
        ordered = sorted(self.batches, key=lambda batch: (batch.layers, batch.prefix))
        at = np.cumsum([batch.cost[3] for batch in ordered])
        wanted = (np.arange(SAMPLES) + 0.5) / SAMPLES * at[-1]
        costs, seconds = [], []
        for batch in (ordered[i] for i in np.unique(np.searchsorted(at, wanted))):
            few = max(1, min(FEW_ROWS, len(batch.features) // 2))
            for part in (batch.features[-SAMPLE_ROWS:-few], batch.features[-few:]):
                if len(part):
                    started = perf_counter()
                    self.tracer.trace(part)
                    seconds.append(perf_counter() - started)
                    costs.append(self._batch(part).cost)
        terms, took = np.stack(costs), np.array(seconds)
        scale = np.maximum(terms.max(0), 1.0)
        constants, _ = nnls(terms / scale / took[:, None], np.ones(len(took)))  # relative errors count alike
        return float(sum(batch.cost @ (constants / scale) for batch in self.batches))

    def _density(self) -> float:
        """Entries of the sampled rows, as a share of those that they can have."""
        possible = int(self.reach.sources(self.tracer.order).sum())
        sampled = _entries(self.tracer, of_targets=False)
        return sampled / possible if possible else 0.0

    def _stored_entries(self) -> int:
        """Entries of all rows."""
        return _entries(self.tracer, of_targets=True) + int(
            self._density() * sum(batch.sources for batch in self.batches)
        )

    def _kept_share(self) -> float:
        """The share of the rows' entries that is left when features without a row are taken out."""
        if self.update_every is None or not len(self.chosen):
            return 1.0
        kept = self.reach.sources(self.chosen, among=self.chosen)
        return float(kept.sum() / self.reach.sources(self.chosen).sum())

    # ---- what follows the rows

    def _rank(self) -> Int[np.ndarray, " n"]:
        started = perf_counter()
        ranked = self.tracer.rank(self.wanted)
        self.rank_samples.append((_entries(self.tracer), perf_counter() - started))
        return ranked

    def _ranking(self, stored: int) -> tuple[float, float]:
        """Seconds of all rankings, and the bytes that the last one takes beside the rows."""
        peak = _peak_bytes(lambda: self.tracer.rank(self.wanted))
        self._rank()
        assert self.update_every is not None
        known = np.arange(0, self.wanted, self.update_every) / max(1, self.wanted) * stored
        return sum(_line(self.rank_samples, entries) for entries in known), peak / max(
            1, _entries(self.tracer)
        ) * stored

    def _finishing(self, stored: int, edges: int) -> tuple[float, float, float, float]:
        """Seconds to assemble and to finish the graph, and the bytes that each takes beside the rows or the graph."""
        tracer, entries = self.tracer, _entries(self.tracer)
        started = perf_counter()
        graph = _assembled(self.model, tracer)
        assembled = perf_counter()
        _finish(graph)
        finished = perf_counter()
        assembly = _peak_bytes(lambda: _assembled(self.model, tracer)) / max(1, entries)
        finish = _peak_bytes(lambda: _finish(graph)) / max(1, graph.n_edges)
        # sums grow with edges, structure and words with nodes, of which the sample has more for its edges: the mean
        nodes = len(graph.nodes) + self.wanted - len(tracer.order)
        larger = (edges / max(1, graph.n_edges) * nodes / len(graph.nodes)) ** 0.5
        more = stored / max(1, entries)
        return (assembled - started) * more, (finished - assembled) * larger, assembly * stored, finish * edges


def _finish(graph: AttributionGraph) -> None:
    """What follows on a graph in a command, but for the files."""
    pruned = prune(graph)
    report(graph, pruned)
    to_neuronpedia(pruned)


def _entries(tracer: Tracer, *, of_targets: bool | None = None) -> int:
    """Entries of the rows known, of targets' or features' alone where that is asked for."""
    return sum(block.rows.nnz for block in tracer.blocks if of_targets in (None, block.of_targets))


def _assembled(model: ReplacementModel, tracer: Tracer) -> AttributionGraph:
    """The graph of the rows known, which stay."""
    once = copy(tracer)
    once.blocks = [*tracer.blocks]
    return assemble(model, once, "", {})


def _line(samples: Sequence[tuple[float, float]], at: float) -> float:
    """The value at a size, by a line through the first and the last sample that neither falls nor starts below 0."""
    (x0, y0), (x1, y1) = samples[0], samples[-1]
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
    if not 0 < slope * x1 <= y1:
        slope = y1 / max(1, x1)
    return max(0.0, y1 + slope * (at - x1))


def _peak_bytes(call: Callable[[], object]) -> int:
    """What a call takes of memory at most, in Python's and numpy's arrays."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _largest_memory() -> int:
    """The most bytes that this process has taken so far."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
