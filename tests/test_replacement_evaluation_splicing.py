"""Laws of spliced models: what rebuilds a site exactly changes nothing, and every run equals one made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from replacement.activation import ReLU
from replacement.crosscoder import Crosscoder
from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.evaluation.splicing import Splice, encode, reconstruct
from replacement.neurons import neurons
from replacement.sites import hook_name
from replacement.transcoder import Transcoder
from tests.tiny import FAMILIES, VOCABULARY

TOKENS = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(5))


def mirror(width: int) -> tuple[Tensor, Tensor]:
    """Weights of a ReLU dictionary that rebuilds everything: one feature for each sign of each coordinate."""
    both = torch.cat([torch.eye(width), -torch.eye(width)]).double()
    return both, torch.zeros(2 * width).double()


def perfect_sae(layer: int, site: str, width: int) -> Transcoder:
    rows, zeros = mirror(width)
    return Transcoder(
        layer=layer, read=site, write=site, W_enc=rows.clone(), b_enc=zeros, W_dec=rows.clone(), b_dec=zeros[:width],
        activation=ReLU(),
    )  # fmt: skip


def perfect_crosscoder(layers: tuple[int, ...], site: str, width: int) -> Crosscoder:
    rows, zeros = mirror(width * len(layers))
    return Crosscoder(
        parts=tuple(hook_name(layer, site) for layer in layers), site=site, W_enc=rows, b_enc=zeros,
        W_dec=rows.clone().unflatten(1, (len(layers), width)),
        b_dec=torch.zeros(len(layers), width).double(), activation=ReLU(),
    )  # fmt: skip


@pytest.mark.parametrize("keep_starts", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_in_place_of_the_mlps_change_nothing(tiny_model, family: str, keep_starts: bool) -> None:
    bridge = tiny_model(family, "neurons").bridge
    splice = Splice(bridge, neurons(bridge, torch.float64), keep_starts=keep_starts)
    clean = splice.original(TOKENS).logits
    assert torch.allclose(splice.replaced(TOKENS).logits, clean, atol=1e-9)
    for site in splice.writes:
        assert torch.allclose(splice.replaced(TOKENS, [site]).logits, clean, atol=1e-9)


@pytest.mark.parametrize("site", ["hook_resid_post", "hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_z"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_perfect_sae_changes_nothing_at_any_site(tiny_model, family: str, site: str) -> None:
    """A site is read and overwritten in the same run, heads side by side where it has some."""
    bridge = tiny_model(family, "neurons").bridge
    with torch.no_grad():
        shape = bridge.run_with_cache(TOKENS, return_cache_object=False)[1][hook_name(1, site)].shape[2:]
    dictionaries = DictionarySet({1: perfect_sae(1, site, shape.numel())}, "perfect")
    splice = Splice(bridge, dictionaries)
    assert torch.allclose(splice.replaced(TOKENS).logits, splice.original(TOKENS).logits, atol=1e-9)
    assert not torch.allclose(splice.ablated(TOKENS).logits, splice.original(TOKENS).logits, atol=1e-3)


def test_a_perfect_crosscoder_changes_nothing(tiny_model) -> None:
    """It reads layers above the lowest that it writes, so it reads the original's run."""
    bridge = tiny_model("llama", "neurons").bridge
    splice = Splice(bridge, DictionarySet({0: perfect_crosscoder((0, 1, 2), "hook_resid_post", 24)}, "perfect"))
    assert splice.writes == tuple(hook_name(layer, "hook_resid_post") for layer in range(3))
    assert torch.allclose(splice.replaced(TOKENS).logits, splice.original(TOKENS).logits, atol=1e-9)


def test_a_crosscoder_of_one_part_is_an_sae(tiny_model) -> None:
    """It reads where it writes, in the run that it is written into, beside dictionaries below it."""
    model = tiny_model("llama", "transcoder", "topk")
    generator = torch.Generator().manual_seed(0)
    rows, W_dec = (torch.randn(40, 24, generator=generator).double() for _ in range(2))
    bias, site = torch.randn(24, generator=generator).double(), "hook_mlp_out"
    one = Crosscoder(
        parts=(hook_name(2, site),), site=site, W_enc=rows, b_enc=torch.zeros(40).double(), W_dec=W_dec[:, None],
        b_dec=bias[None], activation=ReLU(),
    )  # fmt: skip
    sae = Transcoder(
        layer=2, read=site, write=site, W_enc=rows, b_enc=torch.zeros(40).double(), W_dec=W_dec, b_dec=bias,
        activation=ReLU(),
    )  # fmt: skip
    for below in ({}, {0: model.dictionaries.by_layer[0]}):
        ours, theirs = (Splice(model.bridge, DictionarySet({**below, 2: each}, "one")) for each in (one, sae))
        assert (ours.reads, ours.writes) == (theirs.reads, theirs.writes)
        assert torch.equal(ours.replaced(TOKENS).logits, theirs.replaced(TOKENS).logits)


def by_hand(bridge, dictionaries: DictionarySet, sites: tuple[str, ...], *, keep_starts: bool) -> Tensor:
    """Per-layer hooks written out: read, then write the sum of all writers."""
    seen: dict[int, Tensor] = {}

    def reader(layer: int):
        def hook(tensor: Tensor, hook: object) -> None:
            seen[layer] = tensor

        return hook

    def writer(layer: int):
        def hook(tensor: Tensor, hook: object) -> Tensor:
            own = dictionaries.by_layer[layer]
            value = own.b_dec + own.skip(seen[layer])
            for one in dictionaries.writers(layer):
                features = torch.arange(one.n_features)
                value = value + one.encode(seen[one.layer]) @ one.write_rows(features, layer)
            value = value.expand_as(tensor).clone()
            if keep_starts:
                value[:, 0] = tensor[:, 0]
            return value

        return hook

    hooks = [(hook_name(one.layer, one.read), reader(one.layer)) for one in dictionaries]
    hooks += [
        (hook_name(one.layer, one.write), writer(one.layer))
        for one in dictionaries
        if hook_name(one.layer, one.write) in sites
    ]
    with torch.no_grad():
        return bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)


@pytest.mark.parametrize("keep_starts", [True, False])
@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "cross_layer_transcoder"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_replaced_runs_equal_those_made_by_hand(tiny_model, family: str, kind: str, keep_starts: bool) -> None:
    model = tiny_model(family, kind)
    splice = Splice(model.bridge, model.dictionaries, keep_starts=keep_starts)
    for sites in (splice.writes, splice.writes[1:2], splice.writes[2:]):
        expected = by_hand(model.bridge, model.dictionaries, sites, keep_starts=keep_starts)
        assert torch.allclose(splice.replaced(TOKENS, sites).logits, expected, atol=1e-9)


def test_what_is_kept_is_what_stood_there_before_it_was_overwritten(tiny_model) -> None:
    model = tiny_model("llama", "cross_layer_transcoder")
    splice = Splice(model.bridge, model.dictionaries)
    site = splice.writes[0]
    clean, ours = splice.original(TOKENS, [site]), splice.replaced(TOKENS, keep=[site])
    assert torch.equal(clean.values[site], ours.values[site])


def test_reconstruction_sums_all_that_write_to_a_site(tiny_model) -> None:
    model = tiny_model("llama", "cross_layer_transcoder")
    splice = Splice(model.bridge, model.dictionaries)
    values = splice.original(TOKENS, {*splice.reads, *splice.writes}).values
    encodings = encode(model.dictionaries, values)
    expected = model.dictionaries.by_layer[2].b_dec + sum(
        encodings[one.layer] @ one.write_rows(torch.arange(one.n_features), 2) for one in model.dictionaries
    )
    assert torch.allclose(reconstruct(model.dictionaries, splice.writes[2], values, encodings), expected)


def test_a_site_that_the_model_lacks_is_refused(tiny_model) -> None:
    bridge = tiny_model("llama", "neurons").bridge
    with pytest.raises(InputError, match=r"blocks\.1\.hook_nowhere, which is no hook of this model"):
        Splice(bridge, DictionarySet({1: perfect_sae(1, "hook_nowhere", 24)}, "lost"))


def test_a_width_that_the_model_has_not_is_refused(tiny_model) -> None:
    splice = Splice(
        tiny_model("llama", "neurons").bridge, DictionarySet({1: perfect_sae(1, "hook_resid_post", 16)}, "x")
    )
    with pytest.raises(InputError, match=r"width 16 at blocks\.1\.hook_resid_post, where this model has 24; pass the"):
        splice.original(TOKENS, splice.reads)
    with pytest.raises(InputError, match="width 16"):
        splice.replaced(TOKENS)


def test_a_crosscoder_of_two_models_is_refused(tiny_model) -> None:
    rows, zeros = mirror(48)
    both = Crosscoder(
        parts=("a:blocks.0.hook_resid_post", "b:blocks.0.hook_resid_post"), site="hook_resid_post", W_enc=rows,
        b_enc=zeros, W_dec=rows.clone().unflatten(1, (2, 24)), b_dec=torch.zeros(2, 24).double(), activation=ReLU(),
    )  # fmt: skip
    with pytest.raises(InputError, match="a crosscoder of models a, b can't be spliced"):
        Splice(tiny_model("llama", "neurons").bridge, DictionarySet({0: both}, "diff"))
