"""What is written is what viewers take; what any tool wrote can be read."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphs import InputError, prune, read_neuronpedia, to_neuronpedia, upload_problems, write_neuronpedia
from graphs.neuronpedia import cantor
from graphs.neuronpedia_reader import uncantor
from tests.reference_graphs import FIXTURES, SHARED, fixture_graph, random_graph


def read(document, tmp_path):
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(document))
    return read_neuronpedia(path)


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_nodes_and_links_equal_the_reference_tool_s(folder):
    """The same nodes, links and weights for 0.8 / 0.98, but for the new ids of error nodes."""
    graph, _, _ = fixture_graph(folder)
    theirs = json.loads((folder / "graph_files" / f"{folder.name}.json").read_text())
    ours = to_neuronpedia(prune(graph), slug=folder.name, scan="test")
    key = _identity
    expected, found = {key(n): n for n in theirs["nodes"]}, {key(n): n for n in ours["nodes"]}
    assert set(expected) == set(found) and len(ours["nodes"]) == len(theirs["nodes"])
    for identity, node in expected.items():
        mine = found[identity]
        for name in ("feature", "layer", "ctx_idx", "feature_type", "is_target_logit"):
            assert mine[name] == node[name]
        for name in ("influence", "activation", "token_prob"):
            assert mine[name] == pytest.approx(node[name], abs=2e-6) if node[name] is not None else mine[name] is None
        if node["feature_type"] != "mlp reconstruction error":
            assert (mine["node_id"], mine["jsNodeId"]) == (node["node_id"], node["jsNodeId"])
        if node["feature_type"] == "logit":
            assert mine["clerp"] == node["clerp"]
    new = {expected[i]["node_id"]: found[i]["node_id"] for i in expected}
    assert len(new) == len(theirs["nodes"]), "the fixture's own ids collide"
    links = {(new[x["source"]], new[x["target"]]): x["weight"] for x in theirs["links"]}
    mine = {(x["source"], x["target"]): x["weight"] for x in ours["links"]}
    assert set(links) == set(mine)
    assert all(mine[pair] == pytest.approx(weight, abs=1e-5) for pair, weight in links.items())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("density", [0.0, 0.6])
def test_the_file_holds_the_object(tmp_path, dtype, density):
    """Links are written without the object in between; the file is the same, byte for byte."""
    graph = random_graph(3, n_features=40, density=density, dtype=dtype)
    write_neuronpedia(graph, tmp_path / "graph.json", slug="a", feature_details={"neuronpedia_source_set": "b"})
    document = to_neuronpedia(graph, slug="a", feature_details={"neuronpedia_source_set": "b"})
    assert (tmp_path / "graph.json").read_text() == json.dumps(document, separators=(",", ":"))


def _identity(node):
    kind = node["feature_type"]
    number = node["node_id"].split("_")[1] if "error" not in kind else node["layer"]
    return kind, node["layer"], number, node["ctx_idx"]


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_the_reference_tool_s_files_are_read_as_its_pruned_graph(folder):
    graph, _, _ = fixture_graph(folder)
    expected, found = prune(graph), read_neuronpedia(folder / "graph_files" / f"{folder.name}.json")
    for name in ("kind", "layer", "position", "feature"):
        assert (getattr(found.nodes, name) == getattr(expected.nodes, name)).all()
    np.testing.assert_allclose(found.nodes.probability, expected.nodes.probability, atol=1e-6)
    np.testing.assert_allclose(found.nodes.activation, expected.nodes.activation, atol=1e-6)
    np.testing.assert_allclose(found.dense_adjacency(), expected.dense_adjacency(), atol=1e-6)
    assert found.n_layers == graph.n_layers and (found.token_ids == graph.token_ids).all()
    prune(found)


@pytest.mark.parametrize("pruned", [False, True])
def test_writing_then_reading_gives_the_same_graph(pruned, tmp_path):
    graph = random_graph(5, n_features=30)
    graph = prune(graph) if pruned else graph
    write_neuronpedia(graph, tmp_path / "x.json")
    found = read_neuronpedia(tmp_path / "x.json")
    for name in ("kind", "layer", "position", "feature", "activation", "probability"):
        assert (getattr(found.nodes, name) == getattr(graph.nodes, name)).all()
    assert (found.dense_adjacency() == graph.dense_adjacency()).all()
    assert (found.nodes.label[-2:] == graph.nodes.label[-2:] and "a label" in found.nodes.label) or pruned
    assert (found.n_layers, found.prompt, found.tokens) == (graph.n_layers, graph.prompt, graph.tokens)
    assert found.n_active_features == graph.n_active_features and found.dictionaries == graph.dictionaries
    assert found.residual is None
    if pruned:
        kept = ~graph.nodes.is_logit
        np.testing.assert_allclose(found.influence[kept], graph.influence[kept])
        assert found.settings["pruning"] == {"node_threshold": 0.8, "edge_threshold": 0.98}


def _documents():
    graph = random_graph(5, n_features=30)
    odd = replace(graph, nodes=replace(graph.nodes, feature=np.where(graph.nodes.is_logit, -1, graph.nodes.feature)))
    return {
        "full": to_neuronpedia(graph),
        "pruned": to_neuronpedia(prune(graph), slug="a.b_c-1", scan="m"),
        "targets that are no tokens": to_neuronpedia(odd),
        "feature pages": to_neuronpedia(graph, feature_details={"neuronpedia_source_set": "x"}),
    }


@pytest.mark.parametrize("name", list(_documents()))
def test_documents_keep_the_rules_beyond_the_schema(name):
    document = _documents()[name]
    assert upload_problems(document) == []
    assert set(document) == {"metadata", "qParams", "nodes", "links"}
    json.dumps(document, allow_nan=False)


@pytest.mark.skipif(not (SHARED / "schemas").is_dir(), reason="needs the schema")
@pytest.mark.parametrize("name", list(_documents()))
def test_documents_are_valid_against_the_viewers_schema(name):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((SHARED / "schemas" / "graph-schema.json").read_text())
    jsonschema.validate(_documents()[name], schema)


def test_ids_and_labels_take_the_new_form():
    graph = prune(random_graph(5, n_features=30))
    document = to_neuronpedia(graph)
    nodes = {node["feature_type"]: node for node in document["nodes"]}
    position = graph.n_positions - 1
    logit = nodes["logit"]
    token = int(graph.nodes.feature[-1])
    assert (
        logit["node_id"] == f"{graph.n_layers + 1}_{token}_{position}" and logit["jsNodeId"] == f"L_{token}-{position}"
    )
    assert logit["clerp"] == f'Output " answer1" (p={graph.nodes.probability[-1]:.3f})'
    error = nodes["mlp reconstruction error"]
    assert error["node_id"] == f"{error['layer']}_-1_{error['ctx_idx']}" and error["feature"] == -1
    assert nodes["embedding"]["layer"] == "E" and nodes["embedding"]["feature"] == nodes["embedding"]["ctx_idx"]
    feature = nodes["cross layer transcoder"]
    layer, index, _ = map(int, feature["node_id"].split("_"))
    assert feature["feature"] == cantor(layer, index) and feature["jsNodeId"] == f"{layer}_{index}-0"


@given(layer=st.integers(0, 200), feature=st.integers(0, 2**24))
def test_cantor_numbers_are_undone(layer, feature):
    assert uncantor(cantor(layer, feature)) == (layer, feature)


def test_what_viewers_would_refuse_is_listed():
    document = to_neuronpedia(random_graph(5))
    document["metadata"]["scan"] = "a/b"
    document["nodes"].append(document["nodes"][0])
    document["nodes"][-2]["clerp"] = "Austin"
    document["links"][0]["source"] = "nobody"
    problems = " | ".join(upload_problems(document))
    for part in ("occurs 2 times", "has no (p=...)", "scan 'a/b' has characters", "1 links lead to nodes that do not"):
        assert part in problems
    one_layer = random_graph(5, n_layers=1)
    assert "no node above layer 0" in upload_problems(to_neuronpedia(one_layer))[0]


@pytest.mark.parametrize("which", ["slug", "scan"])
def test_names_with_other_characters_are_refused(which):
    with pytest.raises(
        InputError, match=rf"to_neuronpedia\({which}='a b'\): only A-Z a-z 0-9 _ . - are allowed; rename it"
    ):
        to_neuronpedia(random_graph(), **{which: "a b"})


def test_small_files_are_as_large_as_viewers_need(tmp_path):
    write_neuronpedia(random_graph(n_layers=1, n_positions=2, n_features=0, n_targets=1), tmp_path / "x.json")
    assert (tmp_path / "x.json").stat().st_size >= 1024


# ------------------------------------------------------------------------------------------- other tools' documents


def _old(**metadata):
    """A document of the older kind: raw feature ids, old error ids, probabilities in the label only."""
    node = {"layer": "0", "ctx_idx": 1, "jsNodeId": "x", "clerp": ""}
    return {
        "metadata": {"slug": "s", "scan": "m", "prompt_tokens": ["<s>", " a"], "prompt": " a", **metadata},
        "qParams": {},
        "nodes": [
            {**node, "node_id": "E_7_1", "feature": 1, "layer": "E", "feature_type": "embedding"},
            {**node, "node_id": "0_2_1", "feature": 5, "feature_type": "cross layer transcoder", "clerp": "words"},
            {**node, "node_id": "0_2_1", "feature": -1, "layer": "2", "feature_type": "mlp reconstruction error"},
            {**node, "node_id": "3_9_1", "feature": 9, "layer": 3, "feature_type": "cross layer transcoder"},
            {
                **node,
                "node_id": "5_4_1",
                "feature": 4,
                "layer": "5",
                "feature_type": "logit",
                "clerp": 'Output " x" (p=0.75)',
            },
            {**node, "node_id": "5_8_1", "feature": 8, "layer": "5", "feature_type": "logit", "clerp": '" y" (p=5e-2)'},
        ],
        "links": [
            {"source": "E_7_1", "target": "0_2_1", "weight": 2},
            {"source": "0_2_1", "target": "3_9_1", "weight": 1.0},
            {"source": "0_2_1", "target": "3_9_1", "weight": -3.0},
            {"source": "0_2_1", "target": "5_4_1", "weight": 4.0},
            {"source": "3_9_1", "target": "5_4_1", "weight": 5.0},
            {"source": "gone", "target": "5_4_1", "weight": 6.0},
        ],
    }


def test_old_files_are_read_with_error_ids_that_collide(tmp_path):
    graph = read(_old(), tmp_path)
    feature, later, error, token, target, other = range(6)
    assert graph.nodes.kind.tolist() == [0, 0, 1, 2, 3, 3] and graph.nodes.layer.tolist() == [0, 3, 2, -1, 4, 4]
    weights = graph.dense_adjacency()
    assert weights[feature, token] == 2 and weights[later, feature] == 1 and weights[later, error] == -3
    assert weights[target, feature] == 4 and weights[target, error] == 0 and weights[target, later] == 5
    assert graph.nodes.probability[[target, other]].tolist() == [0.75, 0.05]
    assert graph.nodes.label == ("words", "", "", "", " x", " y")
    assert graph.settings["dropped_links"] == 1 and graph.settings["ambiguous_links"] == 1
    assert graph.token_ids.tolist() == [-1, 7] and graph.influence is None and graph.n_layers == 4
    prune(graph)


def test_files_without_probabilities_weigh_their_targets_equally(tmp_path):
    document = _old()
    for node in document["nodes"]:
        node["clerp"] = "plain"
    graph = read(document, tmp_path)
    assert graph.nodes.probability[graph.targets].tolist() == [0.5, 0.5]
    assert "equal" in graph.settings["probabilities"]


@pytest.mark.parametrize("record", [5, {}, {"node_threshold": 0.8}, {"node_threshold": "x", "edge_threshold": [1]}])
def test_a_pruning_record_that_is_none_is_left_out(record, tmp_path):
    """It comes from a file: of this format, or of the native one, whose settings are free."""
    graph = replace(random_graph(5), settings={"pruning": record})
    assert "pruning_settings" not in to_neuronpedia(graph)["metadata"]
    found = read(_old(generation_settings={"pruning": record}, pruning_settings=record), tmp_path)
    assert "pruning" not in found.settings and "pruning_settings" not in to_neuronpedia(found)["metadata"]


def test_settings_that_are_not_json_are_refused_before_anything_is_written(tmp_path):
    graph = read(_old(generation_settings={"far": float("1e300")}), tmp_path)
    with pytest.raises(InputError, match=r"write_neuronpedia\(graph=...\): its settings are not JSON"):
        write_neuronpedia(replace(graph, settings={"far": float("inf")}), tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_a_number_of_layers_beyond_sense_is_not_believed(tmp_path):
    graph = read(_old(generation_settings={"n_layers": 10**9}), tmp_path)
    write_neuronpedia(graph, tmp_path / "again.json")
    assert read_neuronpedia(tmp_path / "again.json").n_layers == graph.n_layers == 4


def test_a_probability_of_two_dots_is_no_probability(tmp_path):
    document = _old()
    document["nodes"][4]["clerp"] = '" x" (p=0..5)'
    assert read(document, tmp_path).nodes.probability.tolist()[-2:] == [0.0, 0.05]


def test_feature_numbers_come_from_cantor_where_the_id_has_none(tmp_path):
    document = _old(schema_version=1)
    document["nodes"][3] |= {"node_id": "node-three", "feature": cantor(3, 1234)}
    document["links"] = [{"source": "node-three", "target": "5_4_1", "weight": 1}]
    assert read(document, tmp_path).nodes.feature[1] == 1234


def _broken():
    def change(place, value):
        document = _old()
        *path, last = place
        part = document
        for key in path:
            part = part[key]
        if value is KeyError:
            del part[last]
        else:
            part[last] = value
        return document

    return {
        "no nodes": (change(["nodes"], KeyError), "the document has no 'nodes' of type list"),
        "no metadata": (change(["metadata"], []), "the document has no 'metadata' of type dict"),
        "no tokens": (change(["metadata", "prompt_tokens"], KeyError), "metadata has no 'prompt_tokens'"),
        "token numbers": (change(["metadata", "prompt_tokens"], [1]), "prompt_tokens must be text"),
        "a number as node": (change(["nodes", 1], 3), "node 1 is not a JSON object"),
        "no type": (change(["nodes", 0, "feature_type"], None), "node 'E_7_1' has no 'feature_type' of type str"),
        "negative probability": (
            change(["nodes", 4, "token_prob"], -0.5),
            "has probability -0.5, needs a finite number",
        ),
        "endless probability": (change(["nodes", 4, "clerp"], '" x" (p=1e999)'), "has probability inf, needs a finite"),
        "far position": (
            change(["nodes", 0, "ctx_idx"], 10**12),
            "is at position 1000000000000, the prompt has 2 tokens",
        ),
        "layer in words": (change(["nodes", 1, "layer"], "first"), "has no whole number 'layer'"),
        "high layer": (change(["nodes", 1, "layer"], 10**8), "has layer 100000000"),
        "activation in words": (
            change(["nodes", 1, "activation"], "much"),
            "has a 'activation' that is no finite number",
        ),
        "same id twice": (change(["nodes", 3, "node_id"], "E_7_1"), "node_id 'E_7_1' occurs 2 times"),
        "no weight": (change(["links", 0, "weight"], KeyError), "link 0 has no weight"),
        "huge weight": (change(["links", 0, "weight"], 10**400), "link 0 has a 'weight' that is no finite number"),
        "a link from a number": (change(["links", 0, "source"], 3), "link 0 has no 'source' of type str"),
    }


@pytest.mark.parametrize("name", list(_broken()))
def test_a_broken_document_is_refused_in_one_line(name, tmp_path):
    document, message = _broken()[name]
    with pytest.raises(InputError, match=r"read_neuronpedia\(path='.*graph.json'\): .*; pass a graph in the") as caught:
        read(document, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100000, b'{"metadata": NaN}', b"3"])
def test_what_is_no_json_is_refused(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"read_neuronpedia\(path=.*: (not JSON|the document is not a JSON object)"):
        read_neuronpedia(tmp_path / "x.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file; pass the path of a graph's JSON"):
        read_neuronpedia(tmp_path / "none.json")


JSON = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_any_changed_field_gives_a_graph_or_an_input_error(data, value, tmp_path):
    document = copy.deepcopy(_old(schema_version=1))
    part = data.draw(st.sampled_from([document, document["metadata"], *document["nodes"], *document["links"]]))
    part[data.draw(st.sampled_from(sorted(part)))] = value
    try:
        prune(read(document, tmp_path))
    except InputError as refusal:
        assert "\n" not in str(refusal)
