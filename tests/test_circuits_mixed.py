"""The laws of the local model for every mix of dictionaries and every way to linearise what they leave."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from circuits import attribute
from circuits.effects import spliced
from circuits.intervention import intervene
from graphs import read_neuronpedia, write_neuronpedia
from graphs.graph import PLACES
from replacement import ReplacementModel
from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.linearised import Linearisation
from replacement.sites import Place, Slot
from tests.mixes import EVERY_RULE, RULES, TABLE, WHOLE_TABLE, graph_of, saes, some
from tests.tiny import FAMILIES, PROMPT, random_set


@pytest.mark.parametrize("trace_bos", [False, True])
@pytest.mark.parametrize(("family", "mix", "rule"), TABLE)
def test_errors_make_up_for_the_rest(mixed_model, family, mix, rule, trace_bos):
    model = mixed_model(family, mix)
    local = model.local(PROMPT, trace_bos=trace_bos, linearisation=RULES[rule])
    assert (local.logits() - model.logits(PROMPT)).abs().max() <= 1e-9


@pytest.mark.parametrize("trace_bos", [False, True])
@pytest.mark.parametrize(("family", "mix", "rule"), TABLE)
def test_rows_add_up_and_lead_upwards(mixed_model, family, mix, rule, trace_bos):
    graph = graph_of(mixed_model(family, mix), RULES[rule], trace_bos=trace_bos)
    assert graph.residual <= 1e-10
    target, source = graph.adjacency.tocoo().coords
    assert (graph.nodes.depth[source] < graph.nodes.depth[target]).all()
    assert (graph.nodes.position[source] <= graph.nodes.position[target]).all()
    assert mix == "nothing" or graph.nodes.is_feature.sum() > 20


@pytest.mark.parametrize(("family", "mix", "rule"), TABLE)
def test_engines_agree(mixed_model, family, mix, rule):
    """The sweep equals autograd on the hooked language model, which knows nothing of its coefficients."""
    model = mixed_model(family, mix)
    _expect_same_rows(*(graph_of(model, RULES[rule], engine) for engine in ("linear", "autograd")))


def _expect_same_rows(linear, reference):
    scale = np.abs(reference.dense_adjacency()).max()
    np.testing.assert_allclose(linear.dense_adjacency(), reference.dense_adjacency(), atol=1e-10 * scale)
    np.testing.assert_allclose(linear.bias, reference.bias, atol=1e-10 * scale)
    np.testing.assert_allclose(linear.bos, reference.bos, atol=1e-10 * scale)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(("family", "mix", "rule"), WHOLE_TABLE)
def test_the_whole_table(mixed_model, family, mix, rule):
    """The laws above, for every kind alone and every mix x every family x every linearisation of MLPs and attention.

    Autograd is asked for the rows of the logits and of the 20 features that matter most; `TABLE` compares all rows.
    """
    model, rule = mixed_model(family, mix), EVERY_RULE[rule]
    for trace_bos in (False, True):
        local = model.local(PROMPT, trace_bos=trace_bos, linearisation=rule)
        assert (local.logits() - model.logits(PROMPT)).abs().max() <= 1e-9
        assert graph_of(model, rule, trace_bos=trace_bos).residual <= 1e-10
    _expect_same_rows(*(graph_of(model, rule, engine, max_features=20) for engine in ("linear", "autograd")))


@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_leaves_no_error_and_stop_leaves_all(mixed_model, family):
    model = mixed_model(family, "nothing")
    relevance, stopped = graph_of(model, RULES["relp"]), graph_of(model, RULES["stop"])
    assert not relevance.nodes.is_error.any()
    assert stopped.nodes.is_error.sum() == 3 * stopped.n_positions
    averaged = model.local(PROMPT, linearisation=Linearisation(mlp="ig", steps=200))
    gradient = model.local(PROMPT, linearisation=Linearisation(mlp="jacobian"))
    constant = model.local(PROMPT, linearisation=Linearisation(mlp="stop"))
    assert averaged.errors.norm() < gradient.errors.norm(), "integrated gradients are complete, up to the biases"
    assert averaged.errors.norm() < constant.errors.norm()


def test_the_header_says_how_the_rest_was_linearised(mixed_model):
    settings = graph_of(mixed_model("llama", "mixed"), RULES["ig"]).settings
    assert settings["mlp"] == "ig" and settings["ig_steps"] == 4 and settings["attention"] == "frozen"
    assert settings["linearised_mlps"] == [1]
    assert "acausal" in graph_of(mixed_model("llama", "crosscoder"), RULES["relp"]).settings


def test_an_acausal_feature_stands_at_every_layer_that_it_writes(mixed_model):
    nodes = graph_of(mixed_model("llama", "crosscoder"), RULES["relp"]).nodes
    at = {(f, p): [] for f, p in zip(nodes.feature[nodes.is_feature], nodes.position[nodes.is_feature], strict=True)}
    for index in np.flatnonzero(nodes.is_feature):
        at[nodes.feature[index], nodes.position[index]].append((nodes.layer[index], nodes.activation[index]))
    assert at and all([layer for layer, _ in found] == [0, 1, 2] for found in at.values())
    assert all(len({value for _, value in found}) == 1 for found in at.values())


def test_a_feature_of_any_place_can_be_traced(mixed_model):
    model = mixed_model("llama", "sparse feature circuits")
    table = model.local(PROMPT).features
    for place, word in ((1, "attn"), (3, "mlp"), (4, "post")):
        index = int(((table.place == place) & (table.layer == 1)).nonzero()[0, 0])
        spec = f"L1.{word}#{int(table.feature[index])}@{int(table.position[index])}"
        graph = attribute(model, PROMPT, targets=spec)
        assert graph.residual <= 1e-10
        assert graph.pre_activation[-1] == pytest.approx(float(table.activation[index]))
        assert (graph.nodes.depth[graph.nodes.is_feature] < 5 + place).all()
    with pytest.raises(InputError, match=r"write L1\.attn#0 or L1\.mlp#0 or L1\.post#0"):
        attribute(model, PROMPT, targets="L1#0@3")


def test_stored_graphs_keep_places(mixed_model, tmp_path):
    graph = graph_of(mixed_model("llama", "sparse feature circuits"), RULES["relp"])
    write_neuronpedia(graph, tmp_path / "graph.json")
    viewed = read_neuronpedia(tmp_path / "graph.json")
    np.testing.assert_array_equal(viewed.nodes.places, graph.nodes.places)
    assert len({node["jsNodeId"] for node in json.loads((tmp_path / "graph.json").read_text())["nodes"]}) > 100
    graph.save(tmp_path / "graph.safetensors")
    again = type(graph).load(tmp_path / "graph.safetensors")
    np.testing.assert_array_equal(again.nodes.places, graph.nodes.places)
    assert set(again.nodes.places[again.nodes.is_feature]) == {1, 3, 4}


SETS = {
    "both replace hook_mlp_out of layer 0": lambda bridge: [
        saes("mlp.hook_out"), random_set("llama", "transcoder", "relu", bridge.cfg),
    ],
    "write site 'attn.hook_q' is not known": lambda bridge: [saes("attn.hook_q")],
    "layer 1 is written at": lambda bridge: [
        saes("mlp.hook_out", (1,)), some("llama", "cross_layer_transcoder", bridge, (0,)),
    ],
    "both replace hook_mlp_out of layer 1": lambda bridge: [
        saes("hook_mlp_out", (1,)), some("llama", "cross_layer_transcoder", bridge, (0,)),
    ],
    "layer 1 one replaces the MLP and one its output": lambda bridge: DictionarySet(
        some("llama", "cross_layer_transcoder", bridge, (0,)).by_layer | saes("hook_mlp_out", (1,)).by_layer, "both"
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", SETS)
def test_sets_that_do_not_go_together_say_so(tiny_model, message):
    bridge = tiny_model("llama").bridge
    with pytest.raises(InputError, match=message):
        ReplacementModel(bridge, SETS[message](bridge), name="m")


@pytest.mark.parametrize("freeze", ["nothing", "attention", "everything"])
@pytest.mark.parametrize(("family", "mix", "rule"), [row for row in TABLE if row[2] == "relp" and row[1] != "nothing"])
def test_a_feature_set_to_its_own_value_changes_nothing(mixed_model, family, mix, rule, freeze):
    model = mixed_model(family, mix)
    nodes = attribute(model, PROMPT).nodes
    for node in np.flatnonzero(nodes.is_feature)[::40]:
        where = int(nodes.layer[node]), int(nodes.position[node]), int(nodes.feature[node])
        same = intervene(model, PROMPT, [(*where, nodes.activation[node], PLACES[nodes.places[node]])], freeze=freeze)
        torch.testing.assert_close(same, model.logits(PROMPT), rtol=0, atol=1e-9)


def test_an_edited_middle_of_a_block_is_seen_by_its_end(mixed_model):
    """Brute force: the stream after a block is what its middle and its MLP add up to."""
    model = mixed_model("llama", "sae mid and post")
    tokens = model.tokenize(PROMPT)[None]
    bump = torch.zeros(1, tokens.shape[1], 24, dtype=torch.float64)
    bump[0, 3] = 1.0
    slot = Slot(0, Place.MID)
    with torch.no_grad():
        _, values = spliced(model, tokens, errors=lambda at, value: value + bump if at == slot else value)
    block, forward = model.bridge.blocks[0], model.local(PROMPT).forward.blocks[0]
    middle = forward.at["hook_resid_mid"] + bump[0]
    with torch.no_grad():
        end = middle + block.mlp.original_component(block.ln2.original_component(middle[None]))[0]
    expected = model.coverage.at[Slot(0, Place.POST)].encode(end)[1:]
    torch.testing.assert_close(values.features[Slot(0, Place.POST)][0, 1:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "mix", "rule"),
    [row for row in TABLE if row[0] != "gemma2" and row[1] != "nothing"],  # gemma2 caps logits
)
def test_a_direct_effect_on_logits_is_the_edge(mixed_model, family, mix, rule):
    """With everything held, switching a feature off changes a target by the edge from one to the other."""
    model = mixed_model(family, mix)
    graph = graph_of(model, RULES[rule], targets=[7, 11], trace_bos=True)
    before = model.logits(PROMPT)[-1]
    for node in np.flatnonzero(graph.nodes.is_feature)[::25]:
        where = int(graph.nodes.layer[node]), int(graph.nodes.position[node]), int(graph.nodes.feature[node])
        off = [(*where, 0.0, PLACES[graph.nodes.places[node]])]
        change = intervene(model, PROMPT, off, freeze="everything", linearisation=RULES[rule])[-1] - before
        for target, token in zip(graph.targets, (7, 11), strict=True):
            moved = float(change[token] - change.mean())
            assert moved == pytest.approx(-graph.adjacency[[target], [node]][0], abs=1e-9)
