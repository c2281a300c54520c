"""Targets: the same scalar however it is written, and one line where it cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GraniteConfig

from circuits import Direction, Feature, Intervention, attribute, intervene
from circuits.heads import head_loadings
from replacement import ReplacementModel
from replacement.errors import InputError
from tests.tiny import _SIZES, FAMILIES, PROMPT, save_tiny_model


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", "skip_transcoder", "relu", "float64")


def rows(graph):
    """The targets' rows, without the columns of the targets themselves."""
    return graph.dense_adjacency()[graph.targets][:, : graph.n_nodes - len(graph.targets)]


def test_default_targets_are_the_smallest_set_that_holds_the_probability(model):
    probabilities = model.logits(PROMPT)[-1].softmax(-1)
    for share in (0.1, 0.5, 0.9):
        graph = attribute(model, PROMPT, logit_probability=share, max_logits=60)
        p = graph.nodes.probability[graph.targets]
        np.testing.assert_allclose(p, np.sort(probabilities.numpy())[::-1][: len(p)])
        assert p.sum() >= share > p[:-1].sum()
    assert len(attribute(model, PROMPT, logit_probability=1.0, max_logits=4).targets) == 4


def test_a_difference_of_tokens_is_the_difference_of_their_rows(model):
    """The mean of W_U, taken off a single token, cancels."""
    difference, both = (rows(attribute(model, PROMPT, targets=t)) for t in ("w7 - w9", [" w7", 9]))
    np.testing.assert_allclose(difference[0], both[0] - both[1], atol=1e-12)


def test_a_token_is_its_demeaned_unembedding_as_a_direction(model):
    W_U = model.weights.W_U
    vector = W_U[:, 7] - W_U.mean(-1)
    token, direction = (rows(attribute(model, PROMPT, targets=t)) for t in ("w7", Direction(vector, "seven")))
    np.testing.assert_allclose(token, direction, atol=1e-12)
    np.testing.assert_allclose(rows(attribute(model, PROMPT, targets=vector)), direction, atol=1e-12)


def test_a_feature_target_is_the_feature_row(model):
    full = attribute(model, PROMPT)
    nodes = full.nodes
    index = int(np.flatnonzero(nodes.is_feature & (nodes.layer == 2) & (nodes.position == 4))[0])
    name = f"L2#{nodes.feature[index]}@4"
    for spec in (name, name.replace("#", " #").replace("@", " @"), Feature(2, int(nodes.feature[index]), 4)):
        graph = attribute(model, PROMPT, targets=spec)
        assert graph.n_positions == 5, "what follows the target cannot matter to it"
        below = graph.nodes.is_feature
        assert set(graph.nodes.layer[below].tolist()) == {0, 1}
        found = rows(graph)[0]
        expected = full.dense_adjacency()[index]
        where = {
            key: expected[i]
            for i, key in enumerate(
                zip(
                    nodes.kind.tolist(),
                    nodes.layer.tolist(),
                    nodes.position.tolist(),
                    nodes.feature.tolist(),
                    strict=True,
                )
            )
        }
        table = graph.nodes
        keys = zip(
            table.kind.tolist(), table.layer.tolist(), table.position.tolist(), table.feature.tolist(), strict=True
        )
        np.testing.assert_allclose(found, [where[key] for key in list(keys)[: len(found)]], atol=1e-12)
        assert graph.residual < 1e-10


def test_a_position_is_the_prompt_cut_there(model):
    tokens = model.tokenize(PROMPT)
    at, cut = attribute(model, PROMPT, position=4), attribute(model, tokens[:5])
    np.testing.assert_allclose(at.dense_adjacency(), cut.dense_adjacency(), atol=1e-12)
    from_end = attribute(model, PROMPT, position=-4)
    np.testing.assert_allclose(from_end.dense_adjacency(), cut.dense_adjacency(), atol=1e-12)


def test_targets_of_several_layers_keep_their_order(model):
    full = attribute(model, PROMPT)
    active = [full.nodes.select(full.nodes.is_feature & (full.nodes.layer == layer)) for layer in (1, 2)]
    one, two = (f"L{t.layer[-1]}#{t.feature[-1]}@{t.position[-1]}" for t in active)
    graph = attribute(model, PROMPT, targets=[two, " w7", one])
    assert [graph.nodes.label[t] for t in graph.targets][1] == "w7"
    alone = attribute(model, PROMPT, targets=one)
    n = int(alone.nodes.is_feature.sum())
    np.testing.assert_allclose(rows(graph)[2][:n], rows(alone)[0][:n], atol=1e-12)
    assert not rows(graph)[2][n : int(graph.nodes.is_feature.sum())].any()


@pytest.mark.parametrize("max_features", [0, 1, 17, 60])
def test_max_features_keeps_rows_whole(model, max_features):
    """The rows that are there are those of the full graph; the rest is summed, so they still add up."""
    full, part = (
        attribute(model, PROMPT),
        attribute(model, PROMPT, max_features=max_features, batch_size=4, update_interval=2),
    )
    assert part.nodes.is_feature.sum() == max_features < full.nodes.is_feature.sum() == part.n_active_features
    assert part.residual < 1e-10
    n_full, n_part = int(full.nodes.is_feature.sum()), max_features
    np.testing.assert_allclose(
        part.dense_adjacency()[n_part:, n_part:], full.dense_adjacency()[n_full:, n_full:], atol=1e-12
    )


def test_a_feature_position_from_the_end_is_counted_before_the_prompt_is_cut(model):
    table = attribute(model, PROMPT).nodes
    index = int(np.flatnonzero(table.is_feature & (table.layer == 2) & (table.position == 5))[0])
    first, last = (attribute(model, PROMPT, targets=f"L2#{table.feature[index]}@{p}") for p in (5, -3))
    assert last.pre_activation[-1] == first.pre_activation[-1] == pytest.approx(table.activation[index])
    assert (last.dense_adjacency() == first.dense_adjacency()).all()


@pytest.mark.parametrize("one", [5, np.int64(5), torch.tensor(5), torch.tensor([5]), [torch.tensor(5)], np.array([5])])
def test_a_token_id_is_any_whole_number(model, one):
    graph = attribute(model, PROMPT, targets=one, max_features=0)
    assert graph.nodes.feature[graph.targets].tolist() == [5]


@pytest.mark.parametrize("trace_bos", [False, True])
@pytest.mark.parametrize("prompt", ["<bos>", "w5", torch.tensor([5])])
def test_the_shortest_prompts_are_traced(model, prompt, trace_bos):
    linear, reference = (attribute(model, prompt, trace_bos=trace_bos, engine=e) for e in ("linear", "autograd"))
    np.testing.assert_allclose(linear.dense_adjacency(), reference.dense_adjacency(), atol=1e-12)
    assert linear.residual < 1e-10 and linear.n_edges


def test_an_architecture_whose_rows_do_not_add_up_is_refused(tmp_path, monkeypatch):
    """Granite scales what its blocks write, which the linear path does not know."""
    config = GraniteConfig(**_SIZES, num_key_value_heads=2, residual_multiplier=0.3, embedding_multiplier=3.0)
    monkeypatch.setitem(FAMILIES, "granite", lambda: config)
    granite = ReplacementModel.load(save_tiny_model("granite", tmp_path), dictionaries="neurons")
    with pytest.raises(InputError, match=r"attribute\(engine='linear'\): rows miss their targets by up to \d+%"):
        attribute(granite, PROMPT)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], r"attribute\(targets=\[\]\): is empty"),
        (torch.tensor([], dtype=torch.long), r"attribute\(targets=\[\]\): is empty"),
        (3.7, r"attribute\(targets=...\): got a float, needs a token"),
        ([True], "got a bool, needs a token"),
        ([None], "got a NoneType, needs a token"),
        ([(2, 1, 5)], "got a tuple, needs a token"),
        (torch.zeros(2, 2, dtype=torch.long), "got a Tensor, needs a token"),
        (torch.zeros(2, 24), r"needs a finite vector of width 24, got shape \[2, 24\]"),
        (Direction([0.0] * 24), "needs a finite vector of width 24, got a list"),
        (
            Direction(torch.ones(24), weight=-1.0),
            "target 'direction': has weight -1.0, needs a finite number, 0 or more",
        ),
        (f"L{'1' * 5000}#1@1", "is not in the vocabulary"),
        ("w99", "'w99' is not in the vocabulary"),
        ("w7 w9", r"target 'w7 w9': is several tokens \(w7 | w9\)"),
        (" ", "target ' ': is empty"),
        (60, "target 60: token ids of llama are 0 to 59"),
        ("w7 - w99", "'w99' is not in the vocabulary"),
        ("L9#1@2", "target L9#1@2: no such feature in random skip_transcoder; layers are 0 to 2"),
        ("L1#99@2", "target L1#99@2: no such feature"),
        ("L1#1@99", "position 99: the prompt has positions 0 to 7"),
        ("L1#1@0", r"target L1#1@0: is not active there; it is (at positions|nowhere)"),
        (Direction(torch.zeros(5), "short"), "target 'short': needs a finite vector of width 24, got shape"),
    ],
)
def test_bad_targets_are_refused_in_one_line(model, targets, message):
    with pytest.raises(InputError, match=message) as raised:
        attribute(model, PROMPT, targets=targets)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_features": -1}, r"attribute\(max_features=-1\): must be 0 or more"),
        ({"max_logits": 0}, r"attribute\(max_logits=0\): must be at least 1"),
        ({"logit_probability": 95}, r"must be in \(0, 1\]; for 95 percent pass 0.95"),
        ({"batch_size": 0}, r"attribute\(batch_size=0\): must be at least 1"),
        ({"max_features": 2.5}, r"attribute\(max_features=2.5\): must be 0 or more"),
        ({"batch_size": 1.5}, r"attribute\(batch_size=1.5\): must be at least 1, a whole number"),
        ({"position": 2.0}, "position 2.0: the prompt has positions 0 to 7"),
        ({"position": 2, "targets": "L1#1@2"}, "position 2: features bring their own"),
        ({"position": 8}, "position 8: the prompt has positions 0 to 7"),
        ({"engine": "warp"}, "engine 'warp': needs one of linear, autograd"),
    ],
)
def test_bad_settings_are_refused_in_one_line(model, settings, message):
    with pytest.raises(InputError, match=message):
        attribute(model, PROMPT, **settings)


# ---- interventions


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "cross_layer_transcoder", "neurons"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
def test_direct_effects_are_the_edges(tiny_model, family, kind):
    """With everything frozen, setting a feature to zero moves a target's logit by minus its edge (before any
    soft-cap)."""
    model = tiny_model(family, kind, "relu", "float64")
    graph = attribute(model, PROMPT, targets=["w7 - w9"])
    nodes, row = graph.nodes, graph.dense_adjacency()[graph.targets[0]]
    cap = model.weights.logit_soft_cap
    before = uncapped(model.logits(PROMPT)[-1], cap)
    for source in np.flatnonzero(nodes.is_feature)[::41]:
        one = Intervention(int(nodes.layer[source]), int(nodes.position[source]), int(nodes.feature[source]), 0.0)
        after = uncapped(intervene(model, PROMPT, [one], freeze="everything")[-1], cap)
        moved = (after - before)[7] - (after - before)[9]
        assert float(moved) == pytest.approx(-row[source], abs=1e-9)


def uncapped(logits, cap):
    return logits if cap is None else cap * torch.atanh(logits / cap)


@pytest.mark.parametrize("freeze", ["nothing", "attention", "everything"])
def test_setting_a_feature_to_its_value_changes_nothing(model, freeze):
    table = model.local(PROMPT).features
    same = [
        tuple(column[i].item() for column in (table.layer, table.position, table.feature, table.activation))
        for i in (3, 40)
    ]
    torch.testing.assert_close(intervene(model, PROMPT, same, freeze=freeze), model.logits(PROMPT), rtol=0, atol=1e-9)


@pytest.mark.parametrize("freeze", ["nothing", "attention", "everything"])
def test_a_feature_set_twice_gets_the_last_value(model, freeze):
    table = model.local(PROMPT).features
    feature = tuple(int(column[40]) for column in (table.layer, table.position, table.feature))
    once, twice = (
        intervene(model, PROMPT, [(*feature, v) for v in values], freeze=freeze) for values in ([0.0], [2.0, 0.0])
    )
    torch.testing.assert_close(twice, once, rtol=0, atol=0)


def test_the_last_layers_features_act_the_same_whatever_is_frozen(model):
    """Above the last MLP only the final norm is left, so attention frozen or not is all one."""
    table = model.local(PROMPT).features
    i = int((table.layer == 2).nonzero()[-1])
    one = (2, int(table.position[i]), int(table.feature[i]), 0.0)
    free, frozen = (intervene(model, PROMPT, [one], freeze=freeze) for freeze in ("nothing", "attention"))
    torch.testing.assert_close(free, frozen, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ((9, 1, 1, 0.0), "layers are 0 to 2"),
        ((1, 99, 1, 0.0), "positions of this prompt are 0 to 7"),
        ((1, 1, 99, 0.0), "features of layer 1 are 0 to 29"),
        ((1, 1, 1, float("nan")), "needs a finite value"),
        ((1, 1), r"intervene\(\(1, 1\)\): needs \(layer, position, feature, value\)"),
        ((1, 1.5, 1, 0.0), "the first three whole numbers"),
    ],
)
def test_bad_interventions_are_refused_in_one_line(model, one, message):
    with pytest.raises(InputError, match=message):
        intervene(model, PROMPT, [one])
    with pytest.raises(InputError, match="needs one of nothing, attention, everything"):
        intervene(model, PROMPT, [], freeze="all")


def test_freezing_attention_that_cannot_be_held_is_refused(tiny_folder, tmp_path):
    """GPT-Neo's attention ignores edits of its pattern hook: freezing it would freeze nothing, in silence. Its full
    gradient needs nothing held."""
    import shutil

    from transformers import AutoModelForCausalLM, GPTNeoConfig

    folder = shutil.copytree(tiny_folder("gpt2"), tmp_path / "neo")
    config = GPTNeoConfig(
        vocab_size=60, hidden_size=24, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = ReplacementModel.load(folder, dictionaries="neurons")
    assert attribute(model, PROMPT).residual < 1e-5
    with pytest.raises(InputError, match=r"intervene\(freeze='attention'\): needs attention patterns that can be held"):
        intervene(model, PROMPT, [(0, 1, 1, 0.0)])
    with pytest.raises(InputError, match="engine 'autograd': needs attention patterns that can be held"):
        attribute(model, PROMPT, engine="autograd")
    intervene(model, PROMPT, [(0, 1, 1, 0.0)], freeze="everything")
    linear, reference = (attribute(model, PROMPT, attention="gradient", engine=how) for how in ("linear", "autograd"))
    assert linear.residual < 1e-5
    scale = np.abs(reference.adjacency.data).max()
    np.testing.assert_allclose(linear.dense_adjacency(), reference.dense_adjacency(), atol=1e-5 * scale)
    for graph in (attribute(model, PROMPT), linear):
        split = head_loadings(model, graph)
        np.testing.assert_allclose(split.loadings.sum(1), graph.adjacency.data, atol=1e-5 * scale)
