"""Effects of nodes are what patching them does, and circuits of all nodes and of none are what they must be."""

from __future__ import annotations

import pytest
import torch

from circuits.effects import Nodes, faithfulness, indirect_effects, means, metric_of_circuit, spliced, strongest
from replacement import ReplacementModel
from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from tests.mixes import MIXES
from tests.tiny import FAMILIES

CLEAN = torch.tensor([[1, 5, 9, 14, 30], [1, 6, 11, 22, 7]])
PATCH = torch.tensor([[1, 5, 33, 14, 30], [1, 6, 40, 22, 7]])
KNOWN = [mix for mix in MIXES if "crosscoder" not in mix or "causal" in mix]
TABLE = [("llama", mix) for mix in KNOWN if mix != "nothing"]
TABLE += [(family, "sparse feature circuits") for family in FAMILIES if family != "llama"]


def metric(logits):
    return logits[:, -1, 7] - logits[:, -1, 8]


@pytest.fixture(scope="module")
def model_of(tiny_model):
    made = {}

    def model(family, mix) -> ReplacementModel:
        if (family, mix) not in made:
            bridge = tiny_model(family).bridge
            made[family, mix] = ReplacementModel(bridge, MIXES[mix](family, bridge), name=family)
        return made[family, mix]

    return model


@pytest.mark.parametrize(("family", "mix"), TABLE)
def test_splicing_changes_nothing(model_of, family, mix):
    model = model_of(family, mix)
    logits, values = spliced(model, CLEAN)
    torch.testing.assert_close(logits[0], model.logits(CLEAN[0]))
    local = model.local(CLEAN[0])
    for slot, at in values.features.items():
        found = local.features.activation[local.filed_at(slot)]
        torch.testing.assert_close(at[0][at[0] != 0], found)
    for index, slot in enumerate(local.slots):
        torch.testing.assert_close(values.errors[slot][0, 1:], local.errors[index, 1:])


@pytest.mark.parametrize(("family", "mix"), TABLE)
def test_attribution_patching_is_the_slope_at_the_clean_prompt(model_of, family, mix):
    """A node moved a little of the way to its patched value moves the metric by that share of its effect."""
    model, share = model_of(family, mix), 1e-3  # the bridge rounds its softmax to float32
    effects = indirect_effects(model, CLEAN, PATCH, metric)
    with torch.no_grad():
        _, before = spliced(model, CLEAN)
        _, after = spliced(model, PATCH)
        for kind in ("features", "errors"):
            for slot, effect in getattr(effects, kind).items():
                start, end = getattr(before, kind)[slot], getattr(after, kind)[slot]
                node = effect.abs().flatten().argmax()
                index = torch.unravel_index(node, effect.shape)

                def move(sign, slot=slot, kind=kind, start=start, end=end, index=index):
                    def edit(at, value):
                        if at != slot:
                            return value
                        value = value.clone()
                        way = (end - start)[:, *index]
                        value[:, *index] += sign * share * way
                        return value

                    return metric(spliced(model, CLEAN, **{kind: edit})[0]).mean()

                slope = (move(1) - move(-1)) / (2 * share)
                assert float(slope) == pytest.approx(float(effect[index]), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("mix", ["sae post", "sparse feature circuits", "clt and attention"])
def test_integrated_gradients_of_a_slot_add_up_to_patching_all_of_it(model_of, mix):
    model = model_of("llama", mix)
    effects = indirect_effects(model, CLEAN, PATCH, metric, method="ig", steps=100)
    with torch.no_grad():
        base, _ = spliced(model, CLEAN)
        _, after = spliced(model, PATCH)
        for slot in effects.features:
            to = Nodes(*({slot: part[slot]} for part in after))
            logits, _ = spliced(
                model,
                CLEAN,
                features=lambda at, value, to=to: to.features.get(at, value),
                errors=lambda at, value, to=to: to.errors.get(at, value),
            )
            whole = float((metric(logits) - metric(base)).mean())
            total = float(effects.features[slot].sum() + effects.errors[slot].sum())
            assert total == pytest.approx(whole, rel=1e-3, abs=1e-6)


def test_estimates_go_along_with_patching_each_node_alone(model_of):
    model = model_of("llama", "sae post")
    exact = indirect_effects(model, CLEAN, PATCH, metric, method="exact")
    for method in ("attribution", "ig"):
        found = indirect_effects(model, CLEAN, PATCH, metric, method=method)
        for slot in exact.features:
            pair = torch.stack([exact.features[slot].flatten(), found.features[slot].flatten()])
            assert torch.corrcoef(pair)[0, 1] > 0.7


@pytest.mark.parametrize(("family", "mix"), TABLE)
def test_all_nodes_are_wholly_faithful_and_none_not_at_all(model_of, family, mix):
    model = model_of(family, mix)
    held = means(model, torch.cat([CLEAN, PATCH]))
    effects = indirect_effects(model, CLEAN, PATCH, metric)
    every = strongest(effects, 10**9)
    whole = Nodes(*({slot: torch.ones_like(m) for slot, m in part.items()} for part in every))
    assert faithfulness(model, CLEAN, metric, whole, held)[1:] == pytest.approx((1.0, 0.0))
    none = strongest(effects, 0)
    assert faithfulness(model, CLEAN, metric, none, held) == pytest.approx((0, 0.0, 1.0))
    assert faithfulness(model, CLEAN, metric, strongest(effects, 9), held).nodes == 9
    assert not any(m.any() for m in strongest(effects, 9, errors=False).errors.values())


@pytest.mark.parametrize("method", ["attribution", "ig"])
def test_a_layer_without_dictionaries_is_a_layer_kept_whole(tiny_model, model_of, method):
    """What a circuit that is given the first layers for free does is what one of the upper layers' sets does."""
    model, bridge = model_of("llama", "sparse feature circuits"), tiny_model("llama").bridge
    upper = [
        DictionarySet({layer: one for layer, one in part.by_layer.items() if layer > 0}, part.name)
        for part in MIXES["sparse feature circuits"]("llama", bridge)
    ]
    found = {}
    for name, of in {"all": model, "upper": ReplacementModel(bridge, upper, name="llama")}.items():
        held = means(of, torch.cat([CLEAN, PATCH]))
        effects = indirect_effects(of, CLEAN, PATCH, metric, method=method)
        counted = Nodes(*({slot: v if slot.layer else 0 * v for slot, v in part.items()} for part in effects))
        circuit = strongest(counted, 12)
        free = Nodes(*({slot: m if slot.layer else ~m for slot, m in part.items()} for part in circuit))
        none = Nodes(*({slot: torch.full_like(m, not slot.layer) for slot, m in part.items()} for part in circuit))
        found[name] = [metric_of_circuit(of, CLEAN, metric, one, held) for one in (free, none)]
    assert found["upper"] == pytest.approx(found["all"], abs=1e-9)
    assert abs(found["all"][0] - found["all"][1]) > 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "shap"}, "needs one of attribution, ig, exact"),
        ({"patch": PATCH[:, :3]}, r"\[2, 5\] and \[2, 3\], needs two alike"),
    ],
)
def test_what_cannot_be_compared_is_refused(model_of, given, message):
    with pytest.raises(InputError, match=message):
        indirect_effects(model_of("llama", "sae post"), **({"clean": CLEAN, "patch": PATCH, "metric": metric} | given))


def test_an_acausal_crosscoder_has_no_single_place_to_patch(model_of):
    with pytest.raises(InputError, match="acausal crosscoder"):
        indirect_effects(model_of("llama", "crosscoder"), CLEAN, PATCH, metric)
