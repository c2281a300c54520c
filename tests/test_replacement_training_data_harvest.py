"""Laws of harvesting: what comes out is what the model computes, at the same tokens everywhere, without those that
mislead."""

from __future__ import annotations

import pytest
import torch

from replacement.errors import InputError
from replacement.loading import load_bridge
from replacement.sites import hook_name
from replacement.training.data import BridgeActivations, JointActivations
from tests.tiny import FAMILIES

N_LAYERS, BOS = 3, 1
SITES = ("mlp.hook_in", "mlp.hook_out", "hook_resid_post", "attn.hook_z", "hook_attn_out")


class Fixed:
    """The same few rows of tokens in every batch but shifted by its number."""

    context, n_documents, fingerprint = 9, None, "fixed"

    def __init__(self, *, separators: bool = False) -> None:
        self.separators = separators

    def batch(self, index: int, documents: int) -> torch.Tensor:
        rows = 3 + (torch.arange(documents * self.context) * 7 + index).view(documents, -1) % 50
        rows[:, 0] = BOS
        if self.separators:
            rows[1, 4] = BOS
        return rows


@pytest.fixture(scope="module")
def bridge(tiny_folder):
    """`bridge(family)`: a model of its own that a test may break."""
    return lambda family, dtype=torch.float32: load_bridge(tiny_folder(family), dtype, "cpu")[0]


def all_sites(*names: str) -> list[str]:
    return [hook_name(layer, name) for layer in range(N_LAYERS) for name in names]


@pytest.mark.parametrize("family", FAMILIES)
def test_harvest_is_what_the_whole_model_computes(bridge, family: str):
    """Against the bridge's own cache, one site at a time; heads side by side."""
    model, sites = bridge(family, torch.float64), all_sites(*SITES)
    source = BridgeActivations(model, Fixed(), sites=sites, documents=4, drop_norm=None, dtype=torch.float64)
    found = source.batch(2)
    _, cache = model.run_with_cache(Fixed().batch(2, 4), return_cache_object=False)
    assert list(found) == sites
    for name in sites:
        expected = cache[name][:, 1:].flatten(2).flatten(0, 1)
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)


def test_no_layer_above_the_last_site_is_computed(bridge):
    model, calls = bridge("llama"), []
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, given, number=number: calls.append(number))
    model.unembed.register_forward_pre_hook(lambda module, given: calls.append("logits"))
    source = BridgeActivations(model, Fixed(), sites=["blocks.1.mlp.hook_out", "blocks.0.mlp.hook_in"], documents=4)
    source.batch(0)
    assert calls == [0, 1]
    assert not any(point.fwd_hooks for point in model.hook_dict.values())  # nothing is left behind
    assert model(Fixed().batch(0, 4)).isfinite().all() and calls == [0, 1, 0, 1, 2, "logits"]


def test_start_tokens_are_left_out_wherever_they_are(bridge):
    """They also stand between documents of a row."""
    model, tokens = bridge("llama"), Fixed(separators=True)
    kept, whole = (
        BridgeActivations(model, tokens, sites=all_sites("mlp.hook_in"), documents=4, drop_bos=drop, drop_norm=None)
        for drop in (True, False)
    )
    keep = (tokens.batch(0, 4) != BOS).flatten()
    for name, everything in whole.batch(0).items():
        assert torch.equal(kept.batch(0)[name], everything[keep])
    assert kept.counts == (3 * 31, 3 * 5, 0) and whole.counts == (36, 0, 0)


def test_tokens_of_very_high_norm_are_left_out_at_all_sites(bridge):
    """By the residual stream: what an MLP writes may vary as it likes."""
    model, tokens, sites = bridge("gpt2"), Fixed(), all_sites("mlp.hook_in", "mlp.hook_out")
    ids = tokens.batch(0, 4)
    plain = BridgeActivations(model, tokens, sites=sites, documents=4).batch(0)
    assert len(plain[sites[0]]) == 32
    huge = int(ids[2, 8])  # at the end of a row, so that attention takes it nowhere
    with torch.no_grad():
        model.embed.weight[huge] *= 1000
    keep = (ids != huge)[:, 1:].flatten()
    source = BridgeActivations(model, tokens, sites=sites, documents=4)
    found = source.batch(0)
    assert source.counts.high_norm == int((~keep).sum()) > 0
    assert {len(part) for part in found.values()} == {int(keep.sum())}
    everything = BridgeActivations(model, tokens, sites=sites, documents=4, drop_norm=None).batch(0)
    assert all(torch.equal(found[name], everything[name][keep]) for name in sites)
    with torch.no_grad():
        model.blocks[1].mlp.out.weight.zero_()
        model.blocks[1].mlp.out.bias.fill_(1e-8)  # a median near zero drops nothing
    source = BridgeActivations(model, tokens, sites=["blocks.1.mlp.hook_out"], documents=4, drop_norm=1e4)
    source.batch(0)
    assert source.counts.high_norm == 0


def test_a_batch_is_the_same_whenever_it_is_asked_for(bridge):
    source = BridgeActivations(bridge("llama"), Fixed(), sites=["blocks.0.mlp.hook_in"], documents=2)
    first = source.batch(1)["blocks.0.mlp.hook_in"]
    source.batch(0)
    assert torch.equal(source.batch(1)["blocks.0.mlp.hook_in"], first)
    half = BridgeActivations(source.bridge, Fixed(), sites=source.sites, documents=2, dtype=torch.bfloat16).batch(1)
    assert torch.equal(half["blocks.0.mlp.hook_in"], first.bfloat16())


def test_the_fingerprint_tells_apart_what_gives_other_activations(bridge):
    model = bridge("llama")
    settings = [{}, {"sites": ["blocks.1.mlp.hook_in"]}, {"documents": 3}, {"drop_bos": False}, {"drop_norm": None}]
    settings.append({"dtype": torch.bfloat16})
    prints = [
        BridgeActivations(model, Fixed(), **{"sites": ["blocks.0.mlp.hook_in"], "documents": 2, **one}).fingerprint
        for one in [*settings, {}]
    ]
    assert prints[0] == prints[-1] and len(set(prints)) == len(settings)
    with torch.no_grad():
        model.blocks[0].mlp.out.weight.mul_(1.5)
    changed = BridgeActivations(model, Fixed(), sites=["blocks.0.mlp.hook_in"], documents=2).fingerprint
    assert changed not in prints


def test_several_models_are_harvested_at_the_same_tokens(bridge):
    """A token that one model's filter drops is dropped for all."""
    base, tuned, sites = bridge("gpt2"), bridge("gpt2"), ["blocks.1.hook_resid_post"]
    ids = Fixed().batch(0, 4)
    with torch.no_grad():
        tuned.embed.weight[int(ids[2, 8])] *= 1000
    parts = {
        name: BridgeActivations(model, Fixed(), sites=sites, documents=4)
        for name, model in {"base": base, "tuned": tuned}.items()
    }
    joint = JointActivations(parts)
    assert joint.sites == ("base:blocks.1.hook_resid_post", "tuned:blocks.1.hook_resid_post")
    found, keep = joint.batch(0), (ids != ids[2, 8])[:, 1:].flatten()
    assert len(keep) > int(keep.sum()) == len(found[joint.sites[0]])
    assert torch.equal(found[joint.sites[0]], parts["base"].batch(0)[sites[0]][keep])
    assert torch.equal(found[joint.sites[1]], parts["tuned"].batch(0)[sites[0]])
    other = BridgeActivations(tuned, Fixed(), sites=sites, documents=3)
    with pytest.raises(InputError, match="needs the same tokens and number of documents"):
        JointActivations({"base": parts["base"], "tuned": other})


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("blocks.0.mlp.hook_inn", r"site 'blocks.0.mlp.hook_inn': the model .* does not have it; near: blocks.0.mlp.h"),
        ("blocks.7.mlp.hook_in", "does not have it; near: blocks.2.mlp.hook_in, blocks.1"),
        ("nonsense", "does not have it; its sites look like"),
        ("blocks.0.hook_mlp_in", "use_hook_mlp_in|never reached"),
        ("blocks.0.attn.hook_pattern", "needs a vector a token, got"),
    ],
)
def test_a_site_that_cannot_be_harvested_gets_one_line(bridge, site: str, message: str):
    with pytest.raises(InputError, match=message) as caught:
        BridgeActivations(bridge("llama"), Fixed(), sites=[site], documents=2).batch(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": []}, "needs at least one site"),
        ({"documents": 0}, "needs at least 1"),
        ({"drop_norm": 0.5}, "needs a number above 1, or None"),
    ],
)
def test_contradictions_are_told_at_construction(bridge, arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        BridgeActivations(bridge("llama"), Fixed(), **{"sites": ["blocks.0.mlp.hook_in"], "documents": 2, **arguments})


def test_activations_that_are_not_finite_are_told_with_site_and_batch(bridge):
    model = bridge("llama")
    with torch.no_grad():
        model.embed.weight[int(Fixed().batch(5, 2)[1, 3])] = float("nan")
    source = BridgeActivations(model, Fixed(), sites=["blocks.0.hook_resid_post"], documents=2)
    with pytest.raises(InputError, match=r"activations of blocks.0.hook_resid_post, batch 5: are not finite"):
        source.batch(5)


def test_norms_without_a_median_are_told_with_stream_and_batch(bridge):
    """Nothing is above NaN: the site itself is finite, and every token of very high norm would stay in."""
    model, site = bridge("llama"), "blocks.1.mlp.hook_in"
    with torch.no_grad():
        model.blocks[1].mlp.out.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"norms of blocks\.1\.hook_resid_post, batch 5: are not finite"):
        BridgeActivations(model, Fixed(), sites=[site], documents=2).batch(5)
    assert BridgeActivations(model, Fixed(), sites=[site], documents=2, drop_norm=None).batch(5)[site].isfinite().all()


def test_a_token_whose_norm_overflows_is_left_out_like_any_of_high_norm(bridge):
    """Its values are finite, their squares are not."""
    model, site = bridge("llama"), "blocks.1.mlp.hook_in"
    ids = Fixed().batch(0, 4)
    with torch.no_grad():
        model.embed.weight[int(ids[2, 8])] = 1e30
    source = BridgeActivations(model, Fixed(), sites=[site], documents=4)
    source.batch(0)
    assert source.counts.high_norm == int((ids == ids[2, 8]).sum())


def test_a_batch_with_no_token_left_is_told(bridge):
    class Empty(Fixed):
        def batch(self, index: int, documents: int) -> torch.Tensor:
            return torch.full((documents, self.context), BOS)

    source = BridgeActivations(bridge("llama"), Empty(), sites=["blocks.0.mlp.hook_in"], documents=2)
    with pytest.raises(InputError, match=r"no token of batch 3 is left of 18 \(18 start tokens, 0 of high norm\)"):
        source.batch(3)
