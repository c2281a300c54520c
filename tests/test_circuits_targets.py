"""Targets: the same scalar however it is written, and one line where it cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits import Direction, Feature, Intervention, attribute, intervene
from replacement.errors import InputError
from tests.tiny import PROMPT


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


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], r"attribute\(targets=\[\]\): is empty"),
        ("w99", "'w99' is not in the vocabulary"),
        ("w7 w9", r"target 'w7 w9': is several tokens \(w7 | w9\)"),
        (" ", "target ' ': is empty"),
        (60, "target 60: token ids of llama are 0 to 59"),
        ("w7 - w99", "'w99' is not in the vocabulary"),
        ("L9#1@2", "target L9#1@2: no such feature in random skip_transcoder; layers 0 to 2"),
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
    ],
)
def test_bad_interventions_are_refused_in_one_line(model, one, message):
    with pytest.raises(InputError, match=message):
        intervene(model, PROMPT, [one])
    with pytest.raises(InputError, match="needs one of nothing, attention, everything"):
        intervene(model, PROMPT, [], freeze="all")
