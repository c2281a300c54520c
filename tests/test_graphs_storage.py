"""A stored graph comes back the same, in the same bytes, and a bad file is refused in one line."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from graphs import AttributionGraph, InputError, node_influence, prune
from tests.reference_graphs import random_graph


def variants() -> dict[str, AttributionGraph]:
    graph = random_graph(1)
    return {
        "full": graph,
        "float32": random_graph(2, dtype=np.float32),
        "pruned": prune(random_graph(3, n_features=30)),
        "no edges": random_graph(4, density=0.0),
        "no features": random_graph(5, n_features=0),
        "odd text": replace(graph, prompt='a "b"\n\x19\ud800 é 漢', settings={"nested": {"list": [1, None, "é"]}}),
        "unknown residual": replace(graph, residual=None),
    }


@pytest.mark.parametrize("name", list(variants()))
def test_a_stored_graph_comes_back_the_same_in_the_same_bytes(name, tmp_path):
    graph = variants()[name]
    graph.save(tmp_path / "a.graph")
    loaded = AttributionGraph.load(tmp_path / "a.graph")
    loaded.save(tmp_path / "b.graph")
    assert (tmp_path / "a.graph").read_bytes() == (tmp_path / "b.graph").read_bytes()
    assert (loaded.dense_adjacency() == graph.dense_adjacency()).all()
    assert loaded.adjacency.dtype == graph.adjacency.dtype
    assert (node_influence(loaded) == node_influence(graph)).all()
    for name in ("kind", "layer", "position", "feature", "activation", "probability"):
        assert (getattr(loaded.nodes, name) == getattr(graph.nodes, name)).all()
    for name in ("bias", "bos", "untraced", "pre_activation", "token_ids"):
        assert (getattr(loaded, name) == getattr(graph, name)).all()
    for name in ("prompt", "tokens", "n_layers", "model", "dictionaries", "n_active_features", "settings", "residual"):
        assert getattr(loaded, name) == getattr(graph, name)
    assert loaded.nodes.label == graph.nodes.label
    assert (loaded.influence is None) == (graph.influence is None)
    assert graph.influence is None or (loaded.influence == graph.influence).all()


def test_saving_replaces_a_file_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "x.graph"
    random_graph(1).save(path)
    random_graph(2).save(path)
    assert AttributionGraph.load(path).settings["seed"] == 2
    assert os.listdir(tmp_path) == ["x.graph"]


def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        random_graph().save(tmp_path / "x.graph")
    finally:
        os.umask(before)
    assert (tmp_path / "x.graph").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("graphs.storage.save_file", full)
    with pytest.raises(
        InputError, match=r"save\(path='.*'\): can't write there \(I/O error: No space left on device\)"
    ):
        random_graph().save(tmp_path / "x.graph")
    assert not os.listdir(tmp_path)


def test_settings_that_are_not_json_are_refused_before_anything_is_written(tmp_path):
    graph = replace(random_graph(), settings={"where": object()})
    with pytest.raises(
        InputError, match=r"save\(graph=...\): its settings are not JSON .*use numbers, text, lists, dicts"
    ):
        graph.save(tmp_path / "x.graph")
    with pytest.raises(InputError, match="not JSON"):
        replace(graph, settings={"loss": float("nan")}).save(tmp_path / "x.graph")
    assert not os.listdir(tmp_path)


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"save\(path='.*missing/x.graph'\): the folder .* does not exist; create it first"
    ):
        random_graph().save(tmp_path / "missing" / "x.graph")
    with pytest.raises(InputError, match=r"is a folder, needs a file; add a file name"):
        random_graph().save(tmp_path)
    with pytest.raises(InputError, match=r"can't write there \(File name too long\); choose another path"):
        random_graph().save(tmp_path / ("x" * 300))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"save\(path=.*the folder"):
        random_graph().save(tmp_path / "file" / "x.graph")


def altered(path, *, tensors=None, header=None, metadata=None):
    """Store the file again with some parts changed; a value of None removes the part."""
    with safe_open(str(path), framework="np") as stored:
        text = json.loads(stored.metadata()["graph"])
    values = load_file(path) | (tensors or {})
    text |= header or {}
    text = {key: value for key, value in text.items() if value != "REMOVED"}
    values = {key: value for key, value in values.items() if value is not None}
    save_file(values, path, metadata={"graph": json.dumps(text)} if metadata is None else metadata)


N = random_graph().n_nodes
HOSTILE = {
    "no header": ({"metadata": {}}, "without a graph header"),
    "header no JSON": ({"metadata": {"graph": "{oops"}}, "its header is not JSON"),
    "header nested": ({"metadata": {"graph": "[" * 100000}}, "its header is not JSON"),
    "header NaN": ({"header": {"residual": float("nan")}}, "its header is not JSON .*NaN"),
    "header a list": ({"metadata": {"graph": "[]"}}, "its header is not that of a graph"),
    "another format": ({"header": {"format": "sae"}}, "its header is not that of a graph"),
    "newer schema": ({"header": {"version": 2}}, "schema version 2, this release reads 1"),
    "no prompt": ({"header": {"prompt": "REMOVED"}}, "header field 'prompt' is missing or of the wrong type"),
    "true layers": ({"header": {"n_layers": True}}, "header field 'n_layers'"),
    "tokens numbers": ({"header": {"tokens": [1, 2, 3, 4]}}, "tokens and labels must be text"),
    "few tokens": ({"header": {"tokens": ["a"]}}, "token ids for 1 tokens"),
    "few labels": ({"header": {"labels": ["a"]}}, f"1 labels for {N} nodes"),
    "fewer layers": ({"header": {"n_layers": 1}}, "a node's layer outside -1 to 1"),
    "no bias": ({"tensors": {"bias": None}}, "lacks 'bias'"),
    "more": ({"tensors": {"evil": np.zeros(1)}}, "has an unknown tensor 'evil'"),
    "float16": ({"tensors": {"bias": np.zeros(N, np.float16)}}, r"'bias' is F16\[\d+\], needs a vector of F64"),
    "a matrix": ({"tensors": {"bias": np.zeros((N, 1))}}, r"'bias' is F64\[\d+, 1\]"),
    "short bias": ({"tensors": {"bias": np.zeros(N - 1)}}, "needs one value for each"),
    "NaN bias": ({"tensors": {"bias": np.full(N, np.nan)}}, "got NaN or infinity"),
    "short kind": ({"tensors": {"nodes.kind": np.zeros(3, np.int8)}}, "labels for 3 nodes"),
    "bad kind": ({"tensors": {"nodes.kind": np.full(N, 9, np.int8)}}, "a node kind outside 0 to 3"),
    "short layer": ({"tensors": {"nodes.layer": np.zeros(1, np.int32)}}, "node columns of unequal length"),
    "far position": ({"tensors": {"nodes.position": np.full(N, 99, np.int32)}}, "a node's position outside 0 to 3"),
    "few pointers": ({"tensors": {"adjacency.indptr": np.zeros(1, np.int64)}}, "row pointers that don't fit"),
    "no pointers": ({"tensors": {"adjacency.indptr": np.zeros(0, np.int64)}}, "row pointers that don't fit"),
    "falling pointers": ({"tensors": {"adjacency.indptr": np.r_[0, 5, 3, np.zeros(N - 2, np.int64)]}}, "row pointers"),
    "few weights": ({"tensors": {"adjacency.weights": np.zeros(1)}}, "unequal numbers of weights and indices"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_file_is_refused_in_one_line(name, tmp_path):
    change, message = HOSTILE[name]
    path = tmp_path / "x.graph"
    random_graph().save(path)
    altered(path, **change)
    with pytest.raises(InputError, match=rf"load\(path='.*x.graph'\): .*{message}") as caught:
        AttributionGraph.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1, 10**6])
def test_an_edge_from_nowhere_is_refused(value, tmp_path):
    path = tmp_path / "x.graph"
    random_graph().save(path)
    indices = load_file(path)["adjacency.indices"]
    indices[0] = value
    altered(path, tensors={"adjacency.indices": indices})
    with pytest.raises(InputError, match="an edge from a node outside 0 to"):
        AttributionGraph.load(path)


@pytest.mark.parametrize("length", [0, 3, 8, 100, 1000, -1])
def test_a_truncated_file_is_refused(length, tmp_path):
    path = tmp_path / "x.graph"
    random_graph().save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"load\(path=.*\): not a whole safetensors file .*; trace the prompt again"):
        AttributionGraph.load(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"load\(path='.*none.graph'\): no such file; pass the path of a stored graph"):
        AttributionGraph.load(tmp_path / "none.graph")
    with pytest.raises(InputError, match="not a file"):
        AttributionGraph.load(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), front=st.booleans())
def test_a_changed_byte_gives_a_graph_or_an_input_error(place, value, front, tmp_path):
    path = tmp_path / "x.graph"
    random_graph(n_features=4).save(path)
    content = bytearray(path.read_bytes())
    content[int(place * (min(3000, len(content)) if front else len(content)))] = value
    path.write_bytes(content)
    try:
        AttributionGraph.load(path)
    except InputError as refusal:
        assert "\n" not in str(refusal)
