"""The laws of the local replacement model, over kinds x families x activations x dtypes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from circuits import attribute
from replacement import ReplacementModel
from replacement.activation import JumpReLU, TopK
from replacement.contributions import LinearEngine
from replacement.encoding import Route
from replacement.errors import InputError
from replacement.neurons import neurons
from replacement.sites import Place, Slot
from tests.tiny import ENCODERS, FAMILIES, PROMPT, random_set

KINDS = ("transcoder", "skip_transcoder", "cross_layer_transcoder", "neurons", *ENCODERS)
ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu")
TABLE = [(family, kind, "relu") for family in FAMILIES for kind in KINDS[:4]]
TABLE += [("llama", kind, activation) for kind in KINDS[:3] for activation in ACTIVATIONS[1:]]
TABLE += [("llama", kind, activation) for kind in ENCODERS for activation in ("relu", "topk", "batchtopk")]
TABLE += [("gemma2", "switch", "jumprelu"), ("gpt2", "kronecker", "jumprelu")]
TABLE += [("gemma2", "skip_transcoder", activation) for activation in ACTIVATIONS[1:]]


@pytest.mark.parametrize("trace_bos", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
@pytest.mark.parametrize(("family", "kind", "activation"), TABLE)
def test_error_nodes_reproduce_the_logits(tiny_model, family, kind, activation, dtype, tolerance, trace_bos):
    """Every feature is recomputed from its encoder row on the linear stream; the errors make up for the rest."""
    model = tiny_model(family, kind, activation, dtype)
    difference = model.local(PROMPT, trace_bos=trace_bos).logits() - model.logits(PROMPT)
    assert difference.abs().max() <= tolerance


@pytest.mark.parametrize("trace_bos", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize(("family", "kind", "activation"), TABLE)
def test_every_row_adds_up_to_its_target(tiny_model, family, kind, activation, dtype, tolerance, trace_bos):
    graph = attribute(tiny_model(family, kind, activation, dtype), PROMPT, trace_bos=trace_bos)
    rows = graph.nodes.has_inputs
    total = graph.dense_adjacency().astype(np.float64).sum(1) + graph.bias + graph.bos + graph.untraced
    scale = np.maximum(np.abs(graph.dense_adjacency()).sum(1), np.abs(graph.pre_activation))[rows]
    missing = np.abs(total - graph.pre_activation)[rows]
    assert (missing <= tolerance * np.maximum(scale, np.median(scale))).all()
    assert graph.residual <= tolerance
    assert trace_bos == (not graph.bos.any())
    assert graph.n_edges > 100, "the graph is too small to say anything"


@pytest.mark.parametrize(("family", "kind", "activation"), TABLE)
def test_engines_agree(tiny_model, family, kind, activation):
    """The transposed sweep equals autograd on the hooked language model: edges, biases and bos."""
    model = tiny_model(family, kind, activation, "float64")
    linear, reference = (attribute(model, PROMPT, engine=engine) for engine in ("linear", "autograd"))
    scale = np.abs(reference.dense_adjacency()).max()
    np.testing.assert_allclose(linear.dense_adjacency(), reference.dense_adjacency(), atol=1e-10 * scale)
    np.testing.assert_allclose(linear.bias, reference.bias, atol=1e-10 * scale)
    np.testing.assert_allclose(linear.bos, reference.bos, atol=1e-10 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_agree_in_float32(tiny_model, family):
    model = tiny_model(family, "skip_transcoder", "relu", "float32")
    linear, reference = (attribute(model, PROMPT, engine=engine).dense_adjacency() for engine in ("linear", "autograd"))
    assert np.abs(linear - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_the_batch(tiny_model, kind):
    model = tiny_model("llama", kind, "relu", "float64")
    one, many = (attribute(model, PROMPT, batch_size=size).dense_adjacency() for size in (1, 64))
    np.testing.assert_allclose(one, many, atol=1e-12 * np.abs(many).max())


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_affine_on_the_active_set(tiny_model, kind, monkeypatch):
    """`a_i = w_i . x + b_i`, the contract that tracing needs; for all but neurons w_i is also autograd's gradient, of a
    switch encoder with its router held."""
    model = tiny_model("llama", kind, "relu", "float64")
    dictionary = model.dictionaries.by_layer[1]
    x = torch.randn(5, dictionary.d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    activations = dictionary.encode(x)
    token, feature = activations.nonzero(as_tuple=True)
    rows, biases = dictionary.encoder_rows(feature, x[token])
    torch.testing.assert_close((rows * x[token]).sum(-1) + biases, activations[token, feature])
    routes = dictionary.encoding.route(x) if kind == "switch" else None
    if kind != "neurons":
        for t, f, row in zip(token[:20].tolist(), feature[:20].tolist(), rows[:20], strict=True):
            at = x[t].clone().requires_grad_()
            if routes is not None:
                held = Route(routes.expert[t : t + 1], routes.probability[t : t + 1].detach())
                monkeypatch.setattr(dictionary.encoding, "route", lambda x, held=held: held)
            (gradient,) = torch.autograd.grad(dictionary.encode(at)[f], at)
            torch.testing.assert_close(row, gradient)


def test_an_edge_is_the_effect_of_removing_its_source(tiny_model):
    """Brute force, upwards: carry one feature's write through the frozen stream and read every later feature."""
    model = tiny_model("gemma2", "skip_transcoder", "relu", "float64")
    graph, local = attribute(model, PROMPT), model.local(PROMPT)
    dense, nodes = graph.dense_adjacency(), graph.nodes
    features = np.flatnonzero(nodes.is_feature)
    for source in features[:: max(1, len(features) // 12)].tolist():
        for layer, reads in _reads_of_a_write(model, local, source):
            index = np.flatnonzero((nodes.layer == layer) & nodes.is_feature)
            rows = model.dictionaries.by_layer[layer].W_enc[nodes.feature[index]]
            moved = (rows * reads[nodes.position[index]]).sum(-1)
            np.testing.assert_allclose(moved.numpy(), dense[index, source], atol=1e-10 * np.abs(dense).max())


def _reads_of_a_write(model, local, source):
    """What one feature's write changes at the read site of every later layer."""
    at, position = int(local.features.layer[source]), int(local.features.position[source])
    (writes,), path = local.writes[Slot(at, Place.MLP)], local.path
    change = torch.zeros_like(local.forward.embedding)
    for layer in range(at, model.n_layers):
        attention = path.attention(layer, change, bias=False)
        dictionary = model.dictionaries.by_layer[layer]
        reads = path.read(layer, dictionary.read, path.middle(layer, change, attention), bias=False)
        value = dictionary.skip(reads)
        if layer == at:
            value[position] += writes.vectors()[source - writes.first]
        else:
            yield layer, reads
        change = change + attention + path.write(layer, dictionary.write, value, bias=False)


def test_the_same_run_twice_gives_the_same_bytes(tiny_model, tmp_path):
    for name in ("a", "b"):
        attribute(tiny_model("llama", "skip_transcoder", "relu", "float32"), PROMPT).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_neighbouring_layers_do_not_see_each_other_upwards(tiny_model):
    """The graph is acyclic by layer, and no position sees a later one."""
    graph = attribute(tiny_model("llama", "transcoder", "relu", "float64"), PROMPT)
    target, source = graph.adjacency.tocoo().coords
    assert (graph.nodes.layer[source] < graph.nodes.layer[target]).all()
    assert (graph.nodes.position[source] <= graph.nodes.position[target]).all()


def test_linear_engine_is_the_default(tiny_model):
    model = tiny_model("llama", "transcoder", "relu", "float64")
    assert attribute(model, PROMPT).settings["engine"] == "linear"
    assert isinstance(model.engine(model.local(PROMPT), "linear"), LinearEngine)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("low", [JumpReLU(torch.full((30,), -0.4)), TopK(25)], ids=["negative thresholds", "wide topk"])
def test_features_with_negative_activations_obey_the_laws(tiny_model, kind, low):
    """JumpReLU below zero and TopK without ReLU let negative values through, as the reference tool's do."""
    dictionaries = random_set("llama", kind, "relu", tiny_model().bridge.cfg)
    for dictionary in dictionaries:
        dictionary.activation = copy.deepcopy(low)
    model = ReplacementModel(tiny_model().bridge, dictionaries, name="llama")
    linear, reference = (attribute(model, PROMPT, engine=engine) for engine in ("linear", "autograd"))
    assert (linear.nodes.activation[linear.nodes.is_feature] < 0).sum() > 20
    assert linear.residual <= 1e-10
    assert (model.local(PROMPT).logits() - model.logits(PROMPT)).abs().max() <= 1e-9
    np.testing.assert_allclose(linear.dense_adjacency(), reference.dense_adjacency(), atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_products_say_how_far_they_moved_rows(tiny_model, family):
    """What the header says bounds all rows here, where all are looked at; exact products say nothing."""
    model = tiny_model(family, "transcoder", "relu", "float32")
    exact, rounded = (attribute(model, PROMPT, products=how) for how in ("exact", "bfloat16"))
    right, found = exact.dense_adjacency(), rounded.dense_adjacency()
    sums = np.abs(right).sum(1)
    moved = (np.abs(found - right).sum(1)[sums > 0] / sums[sums > 0]).max()
    assert 1e-5 < rounded.settings["products_error"] <= 1.01 * moved < 0.1
    assert "products_error" not in exact.settings and rounded.residual <= moved


def test_rounded_products_are_refused_where_nothing_would_round(tiny_model):
    model = tiny_model("llama", "transcoder", "relu", "float32")
    for given in ({"attention": "gradient"}, {"engine": "autograd"}):
        with pytest.raises(InputError, match="products 'bfloat16'"):
            attribute(model, PROMPT, products="bfloat16", **given)


def test_neurons_of_another_precision_are_converted(tiny_model):
    bridge = tiny_model("llama", "neurons", "relu", "float32").bridge
    graph = attribute(ReplacementModel(bridge, neurons(bridge, torch.float64), name="llama"), PROMPT)
    assert graph.residual <= 1e-5
