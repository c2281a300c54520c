"""Head loadings: the parts of an edge by head, for every mix of dictionaries and every way to linearise the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits import attribute
from circuits.heads import HeadLoadings, head_loadings
from circuits.targets import reads, resolve
from graphs import AttributionGraph
from replacement import LocalModel, ReplacementModel, autograd
from replacement.contributions import Engine, total_rows
from replacement.errors import InputError
from replacement.features import Targets
from replacement.sites import Place, Slot, hook_name, hooked
from tests.mixes import MIXES, RULES, TABLE, graph_of
from tests.tiny import ENCODERS, FAMILIES, PROMPT

N_HEADS, N_LAYERS = 4, 3
ALONE = [(family, "mixed", rule) for family in FAMILIES for rule in ("relp", "gradient")]
ALONE += [("llama", mix, "gradient") for mix in MIXES if mix != "mixed"]
ALONE += [("gemma2", "clt and attention", "gradient"), ("neox", "sae attention, after the norm", "gradient")]


@pytest.mark.parametrize(("family", "mix", "rule"), TABLE)
def test_head_loadings_add_up_to_the_edges(mixed_model, family, mix, rule):
    model = mixed_model(family, mix)
    graph = graph_of(model, RULES[rule], max_features=20)
    split = head_loadings(model, graph)
    scale = np.abs(graph.adjacency.data).max()
    np.testing.assert_allclose(split.loadings.sum(1), graph.adjacency.data, atol=1e-12 * scale)
    moved = graph.nodes.position[split.target] != graph.nodes.position[split.source]
    assert moved.any()
    assert not split.loadings[moved][:, [-1]].toarray().any(), "nothing but attention moves between positions"


@pytest.mark.parametrize("attention", ["frozen", "gradient"])
@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "cross_layer_transcoder", "neurons", *ENCODERS])
def test_head_loadings_add_up_in_single_precision(tiny_model, family, kind, attention):
    model = tiny_model(family, kind, "relu", "float32")
    graph = attribute(model, PROMPT, attention=attention)
    split = head_loadings(model, graph)
    assert np.abs(split.loadings.sum(1) - graph.adjacency.data).max() <= 1e-5 * np.abs(graph.adjacency.data).max()


def engine_with(
    model: ReplacementModel, local: LocalModel, monkeypatch: pytest.MonkeyPatch, let_by: tuple[int, int]
) -> Engine:
    """The reference engine, but gradients pass only one head of a layer (-1: none), and no attention above it."""

    def stop(layer: int):
        def hook(tensor, hook):
            by = [layer < let_by[0] or (layer, head) == let_by for head in range(N_HEADS)]
            return torch.where(torch.tensor(by)[:, None], tensor, tensor.detach())

        return hook_name(layer, "attn.hook_z"), hook

    def run(bridge, tokens, hooks):
        return hooked(bridge, tokens, [*hooks, *map(stop, range(N_LAYERS))])

    with monkeypatch.context() as patch:
        patch.setattr(autograd, "hooked", run)
        return model.engine(local, "autograd")


def targets_of(model: ReplacementModel, local: LocalModel, graph: AttributionGraph, node: int) -> list[Targets]:
    """What a node reads."""
    if graph.nodes.is_feature[node]:
        return local.feature_targets(torch.tensor([feature_index(local, graph, node)]))
    token = int(graph.nodes.feature[node])
    return reads(local, resolve(model, local, [token], position=7, max_logits=1, logit_probability=1.0))


def feature_index(local: LocalModel, graph: AttributionGraph, node: int) -> int:
    nodes = graph.nodes
    key = [nodes.layer[node], nodes.places[node], nodes.position[node], nodes.feature[node]]
    (index,) = (torch.stack(local.features[:4], 1) == torch.tensor([int(part) for part in key])).all(1).nonzero()[:, 0]
    return int(index)


def row_of(local: LocalModel, graph: AttributionGraph, engine: Engine, asked: list[Targets]) -> np.ndarray:
    """What each node contributes to a target."""
    found, nodes = total_rows(engine, asked), graph.nodes
    values = np.zeros(graph.n_nodes)
    for node in np.flatnonzero(~nodes.is_logit):
        position = int(nodes.position[node])
        if nodes.is_feature[node]:
            values[node] = found.features[0, feature_index(local, graph, node)]
        elif nodes.is_error[node]:
            slot = Slot(int(nodes.layer[node]), Place(int(nodes.places[node])))
            values[node] = found.errors[0, local.slots.index(slot), position]
        else:
            values[node] = found.embeddings[0, position]
    return values


@pytest.mark.parametrize(("family", "mix", "rule"), ALONE)
def test_a_head_s_loading_is_what_it_alone_carries(mixed_model, monkeypatch, family, mix, rule):
    """Brute force, by autograd on the language model: let gradients pass no attention above a layer, and one head in
    it; what reaches a target is more than with no head in it, by what that head carries."""
    model = mixed_model(family, mix)
    graph = graph_of(model, RULES[rule], targets=[7, 11], max_features=30)
    split, local = head_loadings(model, graph), model.local(PROMPT, linearisation=RULES[rule])
    heads = [(layer, head) for layer in range(N_LAYERS) for head in range(-1, N_HEADS)]
    engines = {let_by: engine_with(model, local, monkeypatch, let_by) for let_by in heads}
    features = [node for node in np.unique(split.target) if graph.nodes.is_feature[node]]
    scale = np.abs(graph.adjacency.data).max()
    for target in [*features[:: max(1, len(features) // 3)], graph.targets[0]]:
        edges, asked = np.flatnonzero(split.target == target), targets_of(model, local, graph, int(target))
        rows = {by: row_of(local, graph, engine, asked)[split.source[edges]] for by, engine in engines.items()}
        expected = [rows[layer, head] - rows[layer, -1] for layer, head in heads if head >= 0] + [rows[0, -1]]
        np.testing.assert_allclose(split.loadings[edges].toarray(), np.stack(expected, 1), atol=1e-10 * scale)
    assert np.abs(split.loadings[:, :-1]).max() > 1e-3 * scale, "some head carries something"


def test_queries_and_keys_change_what_heads_carry(mixed_model):
    model = mixed_model("llama", "nothing")
    frozen, full = (graph_of(model, RULES[rule], targets=[7], max_features=0) for rule in ("jacobian", "gradient"))
    by_token = [
        split.loadings[graph.nodes.is_embedding[split.source]].toarray()
        for graph, split in ((graph, head_loadings(model, graph)) for graph in (frozen, full))
    ]
    assert np.abs(by_token[0][:, :-1] - by_token[1][:, :-1]).max() > 0.01 * np.abs(by_token[0]).max()
    np.testing.assert_allclose(by_token[0][:, -1], by_token[1][:, -1], atol=1e-12)


def test_heads_that_the_model_does_not_show_are_said_so(mixed_model, monkeypatch):
    """Attention's full gradient goes through the model's own code, which need not say what each head gave."""
    model = mixed_model("llama", "mixed")
    names = {name: point for name, point in model.bridge.hook_dict.items() if not name.endswith("attn.hook_z")}
    monkeypatch.setattr(type(model.bridge), "hook_dict", names)
    graph = graph_of(model, RULES["gradient"], max_features=5)
    assert graph.residual <= 1e-10
    with pytest.raises(InputError, match="does not show what each head gives to the output map; use 'frozen'"):
        head_loadings(model, graph)


def test_stored_head_loadings_are_read_again(mixed_model, tmp_path):
    model = mixed_model("llama", "mixed")
    split = head_loadings(model, graph_of(model, RULES["relp"]), edges=range(9))
    split.save(tmp_path / "heads.safetensors")
    again = HeadLoadings.load(tmp_path / "heads.safetensors")
    np.testing.assert_array_equal(again.loadings.toarray(), split.loadings.toarray())
    np.testing.assert_array_equal(again.target, split.target)
    assert again.n_heads == N_HEADS
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(InputError, match="holds no head loadings"):
        HeadLoadings.load(tmp_path / "bad")


def test_heads_of_a_feature_s_graph_are_found_by_what_was_asked(mixed_model):
    """The header keeps the targets; a label says nothing of them, and parts that do not add up are refused."""
    model = mixed_model("llama", "sparse feature circuits")
    table = model.local(PROMPT).features
    index = int(((table.place == 4) & (table.layer == 1) & (table.position == 7)).nonzero()[0, 0])
    spec = f"L1.post#{int(table.feature[index])}@-1"
    graph = attribute(model, PROMPT, targets=spec)
    split = head_loadings(model, graph)
    np.testing.assert_allclose(split.loadings.sum(1), graph.adjacency.data, atol=1e-12)
    with pytest.raises(InputError, match="do not add up"):
        head_loadings(model, graph, targets=[5])
    with pytest.raises(InputError, match=r"needs the place of a dictionary in layer 1"):
        head_loadings(mixed_model("llama", "sae mlp"), graph)
    vector = torch.ones(24, dtype=torch.float64)
    with pytest.raises(InputError, match="pass what it was"):
        head_loadings(model, attribute(model, PROMPT, targets=vector))
