"""Reads graphs in the viewers' JSON (Neuronpedia, circuit-tracer, Anthropic), whichever tool and year they come from.

Knows the old and new spellings of that format; trusts nothing in the file. Writing it is `graphs.neuronpedia`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from scipy.sparse import csr_array

from graphs.errors import InputError
from graphs.graph import MLP, PLACES, AttributionGraph, NodeKind, NodeTable

MAX_LAYERS = 2**16
PROBABILITY = re.compile(r"\(p=\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*\)")
_QUOTED = re.compile(r'["“](.*)["”]', re.DOTALL)
_COLUMNS = ("kind", "layer", "position", "feature", "activation", "place")
_KINDS = {"error": NodeKind.ERROR, "embedding": NodeKind.EMBEDDING, "logit": NodeKind.LOGIT}


def read_neuronpedia(path: str | PathLike[str]) -> AttributionGraph:
    """Read a graph in the viewers' JSON, from whichever tool wrote it.

    Takes old and new ids of error nodes, missing optional fields, and targets whose probability stands only in the
    label (`(p=0.98)`; equal weights where it stands nowhere). Links to unknown nodes are dropped, as viewers do, and
    counted in `settings["dropped_links"]`. Such files say nothing of biases, so `residual` is None and the sums are 0.
    Raises InputError that names the file and what is wrong.
    """
    source = Path(path)
    if not source.is_file():
        _refuse(source, "no such file" if not source.exists() else "not a file", "pass the path of a graph's JSON")
    try:
        document = json.loads(source.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:
        _refuse(source, f"not JSON ({problem})", "download it again")
    except OSError as problem:
        _refuse(source, f"can't be read ({problem.strerror})", "check its permissions")
    try:
        return _graph(document)
    except (_Wrong, InputError) as problem:
        _refuse(source, str(problem), "pass a graph in the Neuronpedia format")


def uncantor(number: int) -> tuple[int, int]:
    """Return (layer, feature) of the viewers' one number, the inverse of `cantor`."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def pruning_thresholds(record: Any) -> dict[str, float] | None:
    """Return the two thresholds that a pruning's record holds, None where it holds no such thing."""
    if not isinstance(record, dict):
        return None
    thresholds: dict[str, Any] = {key: record.get(key) for key in ("node_threshold", "edge_threshold")}
    numbers = (isinstance(value, int | float) and 0 <= value <= 1 for value in thresholds.values())
    return thresholds if all(numbers) else None


class _Wrong(Exception):
    """What is wrong with a document, before the file's name is put to it."""


def _graph(document: Any) -> AttributionGraph:
    metadata = _typed(document, "metadata", dict, "the document")
    tokens = _typed(metadata, "prompt_tokens", list, "metadata")
    if not all(isinstance(token, str) for token in tokens):
        raise _Wrong("metadata.prompt_tokens must be text")
    raw = _typed(document, "nodes", list, "the document")
    parsed = [_node(node, i, len(tokens), metadata.get("schema_version")) for i, node in enumerate(raw)]
    generation = metadata.get("generation_settings") if isinstance(metadata.get("generation_settings"), dict) else {}
    n_layers = _n_layers(parsed, generation)
    for node in parsed:
        if node["kind"] == NodeKind.LOGIT:
            node["layer"] = n_layers
    if any(node["layer"] > n_layers for node in parsed):
        raise _Wrong(f"a node's layer is above {n_layers}")
    parsed.sort(key=_reference_order)
    adjacency, counts = _adjacency(parsed, _typed(document, "links", list, "the document"))
    columns = {key: np.array([node[key] for node in parsed]) for key in _COLUMNS}
    settings: dict[str, Any] = {"format": "neuronpedia", **generation, **counts}
    settings.pop("pruning", None)
    if (thresholds := pruning_thresholds(metadata.get("pruning_settings"))) is not None:
        settings["pruning"] = thresholds
    ids = {node["position"]: node["feature"] for node in parsed if node["kind"] == NodeKind.EMBEDDING}
    zeros = np.zeros(len(parsed))
    influence = [node["influence"] for node in parsed if node["kind"] != NodeKind.LOGIT]
    known = bool(influence) and all(value is not None for value in influence)
    return AttributionGraph(
        nodes=NodeTable(
            **columns, probability=_probabilities(parsed, settings), label=tuple(node["label"] for node in parsed)
        ),
        adjacency=adjacency,
        bias=zeros,
        bos=zeros,
        untraced=zeros,
        pre_activation=zeros,
        prompt=str(metadata.get("prompt", "".join(tokens))),
        tokens=tuple(tokens),
        token_ids=np.array([ids.get(position, -1) for position in range(len(tokens))], dtype=np.int64),
        n_layers=n_layers,
        model=str(metadata.get("scan", "")),
        dictionaries=" ".join(map(str, _listed(metadata.get("transcoder_list")))),
        n_active_features=_whole(generation.get("n_active_features"), int((columns["kind"] == NodeKind.FEATURE).sum())),
        settings=settings,
        influence=np.array([1.0 if n["influence"] is None else n["influence"] for n in parsed]) if known else None,
    )


def _reference_order(node: Mapping[str, Any]) -> tuple[int, ...]:
    """Features by (layer, place, position, feature), errors, embeddings; targets stay in the file's order."""
    kind = node["kind"]
    if kind == NodeKind.LOGIT:
        return (kind,)
    feature = node["feature"] if kind == NodeKind.FEATURE else 0
    return (kind, node["layer"], node["place"], node["position"], feature)


def _node(node: Any, number: int, n_tokens: int, schema_version: Any) -> dict[str, Any]:
    """Return one node's fields in this package's terms; raises _Wrong for what can't be understood."""
    where = f"node {number}"
    node_id = _typed(node, "node_id", str, where)
    where = f"node {node_id!r}"
    text = _typed(node, "feature_type", str, where)
    kind = next((k for word, k in _KINDS.items() if word in text.lower()), NodeKind.FEATURE)
    position = _integer(node, "ctx_idx", where)
    if not 0 <= position < n_tokens:
        raise _Wrong(f"{where} is at position {position}, the prompt has {n_tokens} tokens")
    layer = -1 if kind == NodeKind.EMBEDDING else _integer(node, "layer", where)
    if not -1 <= layer <= MAX_LAYERS:
        raise _Wrong(f"{where} has layer {layer}")
    clerp = node.get("clerp") if isinstance(node.get("clerp"), str) else ""
    probability = _number(node, "token_prob", where) if kind == NodeKind.LOGIT else None
    if not probability and kind == NodeKind.LOGIT and (match := PROBABILITY.search(clerp)):
        probability = float(match[1])
    if probability is not None and not 0 <= probability < math.inf:
        raise _Wrong(f"{where} has probability {probability}, needs a finite number, 0 or more")
    return {
        "id": node_id,
        "kind": int(kind),
        "layer": layer,
        "position": position,
        "place": PLACES.index(node["place"]) if node.get("place") in PLACES else MLP,
        "feature": _feature(node, node_id, kind, layer, schema_version),
        "activation": (_number(node, "activation", where) or 0.0) if kind == NodeKind.FEATURE else 0.0,
        "probability": probability,
        "influence": _number(node, "influence", where),
        "label": _label(clerp, kind),
    }


def _feature(node: Mapping[str, Any], node_id: str, kind: NodeKind, layer: int, schema_version: Any) -> int:
    """Return the feature index or vocabulary id: the id's middle part, else `feature` (cantor's in schema 1)."""
    if kind == NodeKind.ERROR:
        return -1
    parts = node_id.split("_")
    if len(parts) >= 3 and re.fullmatch(r"-?[0-9]{1,18}", parts[1]):
        return max(int(parts[1]), -1)
    number = node.get("feature")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**62:
        return -1
    if kind == NodeKind.FEATURE and schema_version == 1 and uncantor(number)[0] == layer:
        return uncantor(number)[1]
    return number if kind != NodeKind.EMBEDDING else -1


def _label(clerp: str, kind: NodeKind) -> str:
    if kind == NodeKind.FEATURE or not clerp:
        return clerp
    if kind == NodeKind.ERROR:
        return ""
    quoted = _QUOTED.search(clerp)
    return quoted[1] if quoted else PROBABILITY.sub("", clerp).strip()


def _n_layers(parsed: list[dict[str, Any]], generation: Mapping[str, Any]) -> int:
    below = 1 + max((node["layer"] for node in parsed if node["kind"] != NodeKind.LOGIT), default=-1)
    top = max((node["layer"] - 1 for node in parsed if node["kind"] == NodeKind.LOGIT), default=0)
    told = _whole(generation.get("n_layers"), max(below, top))
    return max(told if told < MAX_LAYERS else top, below)


def _probabilities(parsed: list[dict[str, Any]], settings: dict[str, Any]) -> np.ndarray:
    """Return the targets' weights; equal ones, noted in the settings, where the file has none."""
    targets = [node for node in parsed if node["kind"] == NodeKind.LOGIT]
    if targets and not any(node["probability"] for node in targets):
        settings["probabilities"] = "equal: the file has none"
        return np.array([1 / len(targets) if node["kind"] == NodeKind.LOGIT else 0.0 for node in parsed])
    return np.array([node["probability"] or 0.0 for node in parsed])


def _adjacency(parsed: list[dict[str, Any]], links: list[Any]) -> tuple[csr_array, dict[str, int]]:
    """Return the edges and how many links were dropped or ambiguous.

    Old-style error ids `0_{L}_{pos}` may be those of layer 0's feature L. Then a link that comes twice is the feature's
    first and the error's second, as writers order them; one that comes once is the feature's, and counted as ambiguous
    where the target lies above the error's layer.
    """
    places: dict[str, list[int]] = {}
    for i, node in enumerate(parsed):
        places.setdefault(node["id"], []).append(i)
    for node_id, found in places.items():
        kinds = [parsed[i]["kind"] for i in found]
        if len(found) > 1 and kinds != [NodeKind.FEATURE, NodeKind.ERROR]:
            raise _Wrong(f"node_id {node_id!r} occurs {len(found)} times")
    edges: dict[tuple[int, int], float] = {}
    single: set[tuple[int, int]] = set()
    dropped = 0
    for number, link in enumerate(links):
        where = f"link {number}"
        sources = places.get(_typed(link, "source", str, where))
        targets = places.get(_typed(link, "target", str, where))
        weight = _number(link, "weight", where)
        if weight is None:
            raise _Wrong(f"{where} has no weight")
        if sources is None or targets is None:
            dropped += 1
            continue
        target, source = targets[0], sources[0]
        if len(sources) > 1 and (target, source) in edges:
            single.discard((target, source))
            source = sources[1]
        elif len(sources) > 1 and parsed[target]["layer"] > parsed[sources[1]]["layer"]:
            single.add((target, source))
        edges[target, source] = edges.get((target, source), 0.0) + weight
    size = (len(parsed), len(parsed))
    rows, columns = ([pair[axis] for pair in edges] for axis in (0, 1))
    values = np.fromiter(edges.values(), dtype=np.float64, count=len(edges))
    counts = {"dropped_links": dropped, "ambiguous_links": len(single)}
    return csr_array((values, (rows, columns)), shape=size), {key: n for key, n in counts.items() if n}


def _typed(container: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(container, dict):
        raise _Wrong(f"{where} is not a JSON object")
    if not isinstance(container.get(key), kind):
        raise _Wrong(f"{where} has no {key!r} of type {kind.__name__}")
    return container[key]


def _integer(container: Mapping[str, Any], key: str, where: str) -> int:
    value = container.get(key)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Wrong(f"{where} has no whole number {key!r}")
    return value


def _number(container: Mapping[str, Any], key: str, where: str) -> float | None:
    value = container.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise _Wrong(f"{where} has a {key!r} that is no finite number")
    return float(value)


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else default


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse(source: Path, what: str, repair: str) -> NoReturn:
    raise InputError(f"read_neuronpedia(path={str(source)!r}): {what}; {repair}")
