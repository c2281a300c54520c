"""Agreement with the reference tool's stored results, for every fixture in ../shared/fixtures."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from circuits import Direction, attribute, intervene
from graphs import NodeKind, completeness_score, prune, replacement_score
from replacement import ReplacementModel
from tests.conftest import SHARED

NAMES = sorted(path.parent.name for path in (SHARED / "fixtures").glob("*/graph.json"))
pytestmark = pytest.mark.skipif(not NAMES, reason="needs ../shared/fixtures")


@cache
def fixture(name: str) -> tuple[ReplacementModel, dict[str, Any], dict[str, torch.Tensor]]:
    folder = SHARED / "fixtures" / name
    record = json.loads((folder / "graph.json").read_text())
    model = ReplacementModel.load(folder / record["model_dir"], dictionaries=folder / record["transcoders_dir"])
    return model, record, load_file(folder / "graph.safetensors")


def tolerance(stored: dict[str, torch.Tensor]) -> float:
    return 2e-5 * float(stored["adjacency_matrix"].abs().max())


@cache
def traced(name: str):
    model, record, _ = fixture(name)
    return attribute(model, record["prompt"])


@pytest.mark.parametrize("name", NAMES)
def test_prompt_becomes_the_same_tokens(name):
    model, record, _ = fixture(name)
    assert model.tokenize(record["prompt"]).tolist() == record["input_tokens"]
    assert model.token_strings(model.tokenize(record["prompt"])) == record["input_token_strings"]


@pytest.mark.parametrize("name", NAMES)
def test_nodes_are_the_reference_tools(name):
    _, record, stored = fixture(name)
    nodes = traced(name).nodes
    features = nodes.select(nodes.is_feature)
    active = stored["active_features"][stored["selected_features"]].numpy()
    np.testing.assert_array_equal(np.stack([features.layer, features.position, features.feature], 1), active)
    np.testing.assert_allclose(features.activation, stored["activation_values"].numpy(), rtol=1e-4, atol=1e-5)
    targets = nodes.select(nodes.is_logit)
    assert targets.feature.tolist() == [target["vocab_idx"] for target in record["logit_targets"]]
    np.testing.assert_allclose(targets.probability, stored["logit_probabilities"].numpy(), atol=1e-5)


@pytest.mark.parametrize("engine", ["linear", "autograd"])
@pytest.mark.parametrize("name", NAMES)
def test_adjacency_agrees(name, engine):
    model, record, stored = fixture(name)
    graph = traced(name) if engine == "linear" else attribute(model, record["prompt"], engine=engine)
    dense = graph.dense_adjacency()
    assert np.abs(dense - stored["adjacency_matrix"].numpy()).max() <= tolerance(stored)
    assert graph.residual <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_scores_agree(name):
    _, record, _ = fixture(name)
    assert replacement_score(traced(name)) == pytest.approx(record["replacement_score"], abs=2e-5)
    assert completeness_score(traced(name)) == pytest.approx(record["completeness_score"], abs=2e-5)


@pytest.mark.parametrize(("nodes", "edges", "mask"), [(0.8, 0.98, "80_98"), (0.5, 0.9, "50_90")])
@pytest.mark.parametrize("name", NAMES)
def test_pruning_keeps_the_same_nodes_and_edges(name, nodes, edges, mask):
    _, _, stored = fixture(name)
    graph = traced(name)
    small = prune(graph, node_threshold=nodes, edge_threshold=edges)
    kept = np.flatnonzero(stored[f"node_mask_{mask}"].numpy())

    def keys(table) -> list[tuple]:
        columns = (table.kind, table.layer, table.position, table.feature)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    assert keys(small.nodes) == keys(graph.nodes.select(kept))
    where = np.full(graph.n_nodes, -1)
    where[kept] = np.arange(len(kept))
    expected = {(int(where[t]), int(where[s])) for t, s in stored[f"edge_mask_{mask}_idx"].tolist()}
    assert {(int(t), int(s)) for t, s in zip(*small.adjacency.tocoo().coords, strict=True)} == expected


@pytest.mark.parametrize("name", NAMES)
def test_max_features_selects_the_same_features(name):
    """Features are taken in order of influence, ranked anew after every batch_size * update_interval of them."""
    model, record, stored = fixture(name)
    if "partial" not in record:
        pytest.skip("no partial graph stored")
    partial = record["partial"]
    graph = attribute(
        model,
        record["prompt"],
        max_features=partial["max_feature_nodes"],
        batch_size=partial["batch_size"],
        update_interval=partial["update_interval"],
    )
    nodes = graph.nodes.select(graph.nodes.is_feature)
    expected = stored["active_features"][stored["partial_selected_features"]].numpy()
    np.testing.assert_array_equal(np.stack([nodes.layer, nodes.position, nodes.feature], 1), expected)
    kept = torch.cat([stored["partial_selected_features"], torch.arange(record["n_features"], record["n_nodes"])])
    columns = stored["adjacency_matrix"][kept][:, kept].numpy()
    assert np.abs(graph.dense_adjacency() - columns).max() <= tolerance(stored)
    assert graph.untraced.any() or partial["n_selected"] == record["n_features"]
    assert graph.residual <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_explicit_targets_agree(name):
    model, record, stored = fixture(name)
    if "targets_ids" not in stored:
        pytest.skip("no explicit targets stored")
    graph = attribute(model, record["prompt"], targets=stored["targets_ids"])
    rows = graph.dense_adjacency()[graph.targets]
    expected = stored["targets_ids_rows"].numpy()
    assert np.abs(rows[:, : expected.shape[1]] - expected).max() <= tolerance(stored)
    probabilities = stored["targets_ids_probabilities"].numpy()
    np.testing.assert_allclose(graph.nodes.probability[graph.targets], probabilities, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_custom_direction_agrees(name):
    model, record, stored = fixture(name)
    if "target_custom_vec" not in stored:
        pytest.skip("no custom target stored")
    graph = attribute(model, record["prompt"], targets=Direction(stored["target_custom_vec"].flatten(), "custom"))
    expected = stored["target_custom_row"].numpy().flatten()
    row = graph.dense_adjacency()[graph.targets[0]]
    n = min(len(row), len(expected)) - 1
    assert np.abs(row[:n] - expected[:n]).max() <= tolerance(stored)
    assert graph.nodes.kind[graph.targets].tolist() == [NodeKind.LOGIT]


@pytest.mark.parametrize("freeze", ["attention", "everything"])
@pytest.mark.parametrize("name", NAMES)
def test_interventions_agree(name, freeze):
    model, record, stored = fixture(name)
    key = {"attention": "intervention_logits_frozen_attn", "everything": "intervention_logits_constrained"}[freeze]
    if key not in stored:
        pytest.skip("no interventions stored")
    for one, expected in zip(record["interventions"], stored[key], strict=True):
        steering = [(one["layer"], one["pos"], one["feature"], one["value"])]
        logits = intervene(model, record["prompt"], steering, freeze=freeze)
        assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max() + 1e-5
