"""The native graph file: one safetensors file with a JSON header. No pickle: reading it runs no code from it.

Tensors hold the node table, the CSR edges and the per-node sums; the header (metadata key `graph`) holds the schema
version and everything that is text. Knows nothing of viewers' formats.
"""

from __future__ import annotations

import json
import stat
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_array

from graphs.errors import InputError
from graphs.files import whole_file
from graphs.graph import AttributionGraph, NodeKind, NodeTable

FORMAT = "attribution-graph"
VERSION = 1
SUMS = ("bias", "bos", "untraced", "pre_activation")
NODE_COLUMNS = {
    "kind": "I8",
    "layer": "I32",
    "position": "I32",
    "feature": "I64",
    "activation": "F64",
    "probability": "F64",
    "place": "I8",
}
OPTIONAL = ("influence", "dropped", "nodes.place")  # tensors that a file may lack; the last came with a later release
HEADER_TYPES: dict[str, Any] = {
    "prompt": str,
    "tokens": list,
    "labels": list,
    "n_layers": int,
    "n_active_features": int,
    "model": str,
    "dictionaries": str,
    "settings": dict,
    "residual": (int, float, type(None)),
}


def save(graph: AttributionGraph, path: str | PathLike[str]) -> None:
    """Write the graph to one file, whole or not at all; equal graphs give equal bytes.

    Raises InputError where the path can't be written or `settings` isn't JSON.
    """
    nodes, adjacency = graph.nodes, graph.adjacency
    tensors = {f"nodes.{name}": getattr(nodes, name) for name in NODE_COLUMNS}
    tensors |= {name: getattr(graph, name) for name in SUMS}
    tensors["token_ids"] = graph.token_ids
    tensors["adjacency.weights"] = adjacency.data
    tensors["adjacency.indices"] = adjacency.indices.astype(np.int32, copy=False)
    tensors["adjacency.indptr"] = adjacency.indptr.astype(np.int64, copy=False)
    tensors |= {name: values for name in ("influence", "dropped") if (values := getattr(graph, name)) is not None}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "labels": list(nodes.label),
        "tokens": list(graph.tokens),
        "settings": dict(graph.settings),
        **{key: getattr(graph, key) for key in HEADER_TYPES if key not in ("labels", "tokens", "settings")},
    }
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise InputError(
            f"save(graph=...): its settings are not JSON ({problem}); use numbers, text, lists, dicts"
        ) from None
    with whole_file(path, call="save") as draft:
        mode = stat.S_IMODE(draft.stat().st_mode)
        try:
            whole = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
            save_file(whole, draft, metadata={"graph": text})
        except SafetensorError as problem:  # its way to say that the disk is full
            raise OSError(str(problem)) from problem
        draft.chmod(mode)  # the library makes files that only their owner can read


def load(path: str | PathLike[str]) -> AttributionGraph:
    """Read a graph that `save` wrote and check all of it; raises InputError that names the file and what is wrong."""
    source = Path(path)
    if not source.is_file():
        _refuse(source, "no such file" if not source.exists() else "not a file", "pass the path of a stored graph")
    try:
        with safe_open(str(source), framework="np") as stored:
            header = _header(source, stored.metadata() or {})
            tensors = _tensors(source, stored)
    except (SafetensorError, OSError) as problem:
        _refuse(source, f"not a whole safetensors file ({str(problem).splitlines()[0]})", "trace the prompt again")
    _check(source, header, tensors)
    n_nodes = len(tensors["nodes.kind"])
    edges = (tensors["adjacency.weights"], tensors["adjacency.indices"], tensors["adjacency.indptr"])
    try:
        columns = {name: tensors.get(f"nodes.{name}") for name in NODE_COLUMNS}
        nodes = NodeTable(**columns, label=tuple(header["labels"]))  # type: ignore[arg-type]
        return AttributionGraph(
            nodes=nodes,
            adjacency=csr_array(edges, shape=(n_nodes, n_nodes)),
            bias=tensors["bias"],
            bos=tensors["bos"],
            untraced=tensors["untraced"],
            pre_activation=tensors["pre_activation"],
            tokens=tuple(header["tokens"]),
            token_ids=tensors["token_ids"],
            influence=tensors.get("influence"),
            dropped=tensors.get("dropped"),
            **{key: header[key] for key in HEADER_TYPES if key not in ("labels", "tokens")},
        )
    except ValueError as problem:
        _refuse(source, str(problem), "trace the prompt again")


def _header(source: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "graph" not in metadata:
        _refuse(source, "a safetensors file without a graph header", "pass a file that AttributionGraph.save wrote")
    try:
        header = json.loads(metadata["graph"], parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:
        _refuse(source, f"its header is not JSON ({problem})", "trace the prompt again")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        _refuse(source, "its header is not that of a graph", "pass a file that AttributionGraph.save wrote")
    if header.get("version") != VERSION:
        _refuse(
            source, f"schema version {header.get('version')!r}, this release reads {VERSION}", "trace the prompt again"
        )
    for key, kinds in HEADER_TYPES.items():
        if not isinstance(header.get(key), kinds) or isinstance(header.get(key), bool) or key not in header:
            _refuse(source, f"header field {key!r} is missing or of the wrong type", "trace the prompt again")
    if not all(isinstance(text, str) for key in ("tokens", "labels") for text in header[key]):
        _refuse(source, "tokens and labels must be text", "trace the prompt again")
    return header


def _tensors(source: Path, stored: Any) -> dict[str, np.ndarray]:
    """Read the known tensors after checking that each has its dtype and is a vector."""
    expected: dict[str, tuple[str, ...]] = {name: ("F64",) for name in SUMS}
    expected |= {f"nodes.{name}": (dtype,) for name, dtype in NODE_COLUMNS.items()}
    expected |= {"token_ids": ("I64",), "influence": ("F64",), "dropped": ("F64",), "adjacency.weights": ("F32", "F64")}
    expected |= {"adjacency.indices": ("I32",), "adjacency.indptr": ("I64",)}
    names = set(stored.keys())
    missing = sorted(set(expected) - names - set(OPTIONAL))
    if missing or names - set(expected):
        what = f"lacks {missing[0]!r}" if missing else f"has an unknown tensor {min(names - set(expected))!r}"
        _refuse(source, what, "trace the prompt again")
    for name in sorted(names):
        piece = stored.get_slice(name)
        if piece.get_dtype() not in expected[name] or len(piece.get_shape()) != 1:
            found = f"{piece.get_dtype()}{list(piece.get_shape())}"
            what = f"{name!r} is {found}, needs a vector of {' or '.join(expected[name])}"
            _refuse(source, what, "trace the prompt again")
    return {name: stored.get_tensor(name) for name in names}


def _check(source: Path, header: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Check what the constructors take on trust: index ranges and agreement between parts."""
    kind, layer, position = (tensors[f"nodes.{name}"] for name in ("kind", "layer", "position"))
    n_nodes, indptr, indices = len(kind), tensors["adjacency.indptr"], tensors["adjacency.indices"]
    n_layers, n_positions = header["n_layers"], len(header["tokens"])
    lengths = np.diff(indptr)
    rules = [
        (len(header["labels"]) == n_nodes, f"{len(header['labels'])} labels for {n_nodes} nodes"),
        (len(layer) == n_nodes and len(position) == n_nodes, "node columns of unequal length"),
        (len(tensors["token_ids"]) == n_positions, f"{len(tensors['token_ids'])} token ids for {n_positions} tokens"),
        (0 <= n_layers < 2**31, f"n_layers is {n_layers}"),
        (header["n_active_features"] >= 0, f"n_active_features is {header['n_active_features']}"),
        (bool(((kind >= 0) & (kind <= NodeKind.LOGIT)).all()), "a node kind outside 0 to 3"),
        (bool(((layer >= -1) & (layer <= n_layers)).all()), f"a node's layer outside -1 to {n_layers}"),
        (bool(((position >= 0) & (position < n_positions)).all()), f"a node's position outside 0 to {n_positions - 1}"),
        (len(indptr) == n_nodes + 1 and indptr[0] == 0, f"row pointers that don't fit {n_nodes} nodes"),
        (bool((lengths >= 0).all()) and indptr[-1:] == len(indices), "row pointers that don't fit the edges"),
        (len(tensors["adjacency.weights"]) == len(indices), "unequal numbers of weights and indices"),
        (bool(((indices >= 0) & (indices < n_nodes)).all()), f"an edge from a node outside 0 to {n_nodes - 1}"),
    ]
    for holds, what in rules:
        if not holds:
            _refuse(source, what, "trace the prompt again")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse(source: Path, what: str, repair: str) -> NoReturn:
    raise InputError(f"load(path={str(source)!r}): {what}; {repair}")
