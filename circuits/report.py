"""What a graph says, as numbers and words: sizes, scores, the features that matter and the routes to the answer.

Facts only: how they look on a terminal is `circuits.display`. Knows graphs; nothing of models, so that a stored graph
is reported like a fresh one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np

from graphs.graph import AttributionGraph, NodeKind
from graphs.influence import Flow, completeness_score, flow, node_influence, replacement_score
from graphs.names import node_name, printable
from graphs.structure import paths

CONSIDERED = 300
"""How many of the strongest node-by-node paths are read before they are put together by their words."""


class Prediction(NamedTuple):
    """One token that the model may say next."""

    token: str
    probability: float


class Size(NamedTuple):
    """How large a graph is, and how much of the model's computation it explains."""

    nodes: int
    features: int
    errors: int
    edges: int
    replacement_score: float
    """Tokens' share of what flows in from tokens and errors together."""
    completeness_score: float
    """Share of the nodes' inputs that no error wrote."""
    error_share: float
    """Share of all nodes' influence that error nodes hold."""


class Step(NamedTuple):
    """One stop of a route: a token, one feature, or like-named features of adjacent layers at one position."""

    words: str
    kind: str
    """token, feature, error or target."""
    layers: tuple[int, int]
    """First and last layer."""
    position: int
    token: str
    """The prompt's token at `position`."""
    named: bool
    """Whether the words are a label, not a number."""


class Route(NamedTuple):
    """Paths from a token to a target that read alike, put together."""

    steps: tuple[Step, ...]
    share: float
    """Share of the targets' influence in the pruned graph that runs along them."""
    sign: int
    """+1 where they push the target up, -1 where they push it down."""
    paths: int
    """How many node-by-node paths were put together."""

    def __str__(self) -> str:
        return " -> ".join(
            describe(step, before) for before, step in zip((None, *self.steps), self.steps, strict=False)
        )


class Source(NamedTuple):
    """One token of the prompt as a source of the answer."""

    token: str
    position: int
    share: float
    """Its share of the influence of all tokens in the pruned graph."""


class Theme(NamedTuple):
    """Features of one label, put together."""

    words: str
    share: float
    """Their share of the influence of all features in the pruned graph."""
    layers: tuple[int, int]
    tokens: tuple[str, ...]
    """The prompt's tokens over which they stand."""
    features: int


@dataclass(frozen=True)
class Report:
    """Everything that is said of a graph."""

    prompt: str
    tokens: tuple[str, ...]
    model: str
    dictionaries: str
    predictions: tuple[Prediction, ...]
    """The model's next tokens, most probable first; from a stored graph: its targets that are tokens."""
    targets: tuple[Prediction, ...]
    """What was traced, with its weight."""
    active_features: int
    residual: float | None
    """Largest relative gap between a row's sum and the value it explains; None where the file does not say."""
    products_error: float
    """Largest share of its inputs by which rounded products moved one of some rows; 0 where products were exact."""
    dropped_share: float
    """Largest share of a node's inputs that were too small to be kept as edges."""
    whole: Size | None
    """Before pruning; None where only the pruned graph is known."""
    pruned: Size
    thresholds: tuple[float, float] | None
    """Node and edge threshold; None where the graph was not pruned."""
    sources: tuple[Source, ...]
    """The prompt's tokens, most influential first."""
    themes: tuple[Theme, ...]
    routes: tuple[Route, ...]
    linearised: str
    """How parts of the model that no dictionary replaces became linear, in words; "" where there are none."""


def report(
    graph: AttributionGraph,
    pruned: AttributionGraph,
    *,
    predictions: tuple[Prediction, ...] | None = None,
    n_routes: int = 6,
    n_themes: int = 8,
) -> Report:
    """Put together what a graph and its pruned form say; pass the same graph twice where it is pruned already."""
    targets = tuple(
        Prediction(node_name(pruned, i), float(pruned.nodes.probability[i])) for i in pruned.targets.tolist()
    )
    if predictions is None:
        logits = [i for i in pruned.targets.tolist() if pruned.nodes.feature[i] >= 0]
        said = [Prediction(node_name(pruned, i), float(pruned.nodes.probability[i])) for i in logits]
        predictions = tuple(sorted(said, key=lambda one: -one.probability))
    pruning = pruned.settings.get("pruning")
    return Report(
        prompt=printable(graph.prompt),
        tokens=tuple(printable(token) for token in graph.tokens),
        model=printable(graph.model),
        dictionaries=printable(graph.dictionaries),
        predictions=predictions,
        targets=targets,
        active_features=graph.n_active_features,
        residual=graph.residual,
        products_error=_share(graph, "products_error"),
        dropped_share=_share(graph, "dropped_share"),
        whole=size(graph) if graph is not pruned else None,
        pruned=size(pruned),
        thresholds=(pruning["node_threshold"], pruning["edge_threshold"]) if pruning else None,
        sources=sources(pruned),
        themes=themes(pruned, k=n_themes),
        routes=routes(pruned, k=n_routes),
        linearised=linearised(graph),
    )


def _share(graph: AttributionGraph, name: str) -> float:
    return found if isinstance(found := graph.settings.get(name), float) else 0.0


def linearised(graph: AttributionGraph) -> str:
    """Return what the graph's header says of the parts of the model that no dictionary replaces, in words."""
    rules = {"relp": "layer-wise relevance", "jacobian": "gradient", "ig": "integrated gradients", "stop": "nothing"}
    settings, said = graph.settings, []
    if layers := settings.get("linearised_mlps"):
        every = len(layers) == graph.n_layers
        where = "all layers" if every else "layers " + ", ".join(str(layer) for layer in layers)
        said.append(f"MLPs of {where} by {rules.get(str(settings.get('mlp')), str(settings.get('mlp')))}")
    if settings.get("attention") == "gradient":
        said.append("attention by its full gradient")
    if settings.get("acausal"):
        said.append("acausal features stand at every layer they write")
    return printable("; ".join(said))


def size(graph: AttributionGraph) -> Size:
    """Return counts and scores of one graph."""
    known = flow(graph)
    return Size(
        nodes=graph.n_nodes,
        features=int(graph.nodes.is_feature.sum()),
        errors=int(graph.nodes.is_error.sum()),
        edges=graph.n_edges,
        replacement_score=replacement_score(graph, known=known),
        completeness_score=completeness_score(graph, known=known),
        error_share=error_share(graph, known=known),
    )


def error_share(graph: AttributionGraph, *, known: Flow | None = None) -> float:
    """Return the share of influence that error nodes hold, I_err / sum of I over all nodes; 0 without influence.

    `known` is `flow(graph)`, where it is at hand.
    """
    influence = (known or flow(graph)).influence
    total = float(influence.sum())
    return float(influence[graph.nodes.is_error].sum()) / total if total > 0 else 0.0


def sources(graph: AttributionGraph) -> tuple[Source, ...]:
    """Return the prompt's tokens by their embeddings' influence, most influential first."""
    tokens = np.flatnonzero(graph.nodes.is_embedding)
    influence = node_influence(graph)[tokens]
    total = float(influence.sum()) or 1.0
    positions = graph.nodes.position[tokens].tolist()
    found = [
        Source(_token(graph, at), at, share / total) for at, share in zip(positions, influence.tolist(), strict=True)
    ]
    return tuple(sorted(found, key=lambda source: (-source.share, source.position)))


def themes(graph: AttributionGraph, *, k: int) -> tuple[Theme, ...]:
    """Return the k labels whose features have most influence, most influential first."""
    influence = node_influence(graph)
    members: dict[str, list[int]] = defaultdict(list)
    for i in np.flatnonzero(graph.nodes.is_feature).tolist():
        members[node_name(graph, i)].append(i)
    total = float(influence[graph.nodes.is_feature].sum()) or 1.0
    found = []
    for words, nodes in members.items():
        layers = graph.nodes.layer[nodes]
        positions = sorted(
            set(graph.nodes.position[nodes].tolist()), key=lambda at: -_held(graph, influence, nodes, at)
        )
        found.append(
            Theme(
                words,
                float(influence[nodes].sum()) / total,
                (int(layers.min()), int(layers.max())),
                tuple(_token(graph, at) for at in positions),
                len(nodes),
            )
        )
    return tuple(sorted(found, key=lambda theme: (-theme.share, theme.words))[:k])


def routes(graph: AttributionGraph, *, k: int) -> tuple[Route, ...]:
    """Return the k strongest routes from tokens to targets; paths that read alike are one route."""
    groups: dict[tuple[Any, ...], list[tuple[tuple[Step, ...], float]]] = defaultdict(list)
    for path in paths(graph, k=CONSIDERED):
        steps = _steps(graph, path.nodes)
        key = (path.weight >= 0, *((step.words, step.kind, step.position) for step in steps))
        groups[key].append((steps, path.share))
    found = []
    for (positive, *_), alike in groups.items():
        steps = tuple(_spanning(stops) for stops in zip(*(steps for steps, _ in alike), strict=True))
        found.append(Route(steps, sum(share for _, share in alike), 1 if positive else -1, len(alike)))
    return tuple(sorted(found, key=lambda route: -route.share)[:k])


def as_json(value: Any) -> Any:
    """Return a report, or any part of one, as JSON values with the same names; routes also say themselves in words."""
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        words = {"words": str(value)} if isinstance(value, Route) else {}
        return words | {name: as_json(part) for name, part in value._asdict().items()}
    return [as_json(part) for part in value] if isinstance(value, tuple) else value


def describe(step: Step, before: Step | None) -> str:
    """Return a step in words, with its token where the step before stood over another one."""
    if step.kind in ("token", "target"):
        return step.words
    where = place(step, before)
    return f"{quoted(step)} ({where})" if where else quoted(step)


def quoted(step: Step) -> str:
    """Return a step's words, in quotes where they are a label."""
    return '"{}"'.format(step.words.replace('"', "'")) if step.named else step.words


def place(step: Step, before: Step | None) -> str:
    """Return where a step stands: its layers, and its token where the step before stood over another one."""
    first, last = step.layers
    where = [f"L{first}" if first == last else f"L{first}-{last}"] if step.named else []
    if before is None or before.position != step.position:
        where.append(f"at {step.token}")
    return " ".join(where)


def _steps(graph: AttributionGraph, nodes: tuple[int, ...]) -> tuple[Step, ...]:
    steps: list[Step] = []
    for step in (_step(graph, node) for node in nodes):
        last = steps[-1] if steps else None
        if last and (last.words, last.kind, last.position) == (step.words, step.kind, step.position):
            steps[-1] = _spanning((last, step))
        else:
            steps.append(step)
    return tuple(steps)


def _step(graph: AttributionGraph, node: int) -> Step:
    kinds = {
        NodeKind.FEATURE: "feature",
        NodeKind.ERROR: "error",
        NodeKind.EMBEDDING: "token",
        NodeKind.LOGIT: "target",
    }
    kind = NodeKind(int(graph.nodes.kind[node]))
    layer, position = int(graph.nodes.layer[node]), int(graph.nodes.position[node])
    words = node_name(graph, node).strip() or repr(node_name(graph, node))
    named = kind is NodeKind.FEATURE and bool(graph.nodes.label[node])
    return Step(words, kinds[kind], (layer, layer), position, _token(graph, position), named)


def _spanning(steps: tuple[Step, ...]) -> Step:
    """Steps that differ in their layers only, as one."""
    return steps[0]._replace(layers=(min(step.layers[0] for step in steps), max(step.layers[1] for step in steps)))


def _token(graph: AttributionGraph, position: int) -> str:
    text = printable(graph.tokens[position])
    return text.strip() or repr(text)


def _held(graph: AttributionGraph, influence: np.ndarray, nodes: list[int], position: int) -> float:
    return float(sum(influence[i] for i in nodes if graph.nodes.position[i] == position))
