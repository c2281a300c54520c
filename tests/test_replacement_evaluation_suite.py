"""Laws of the suite: every figure equals its definition on all tokens at once, however the documents are batched."""

from __future__ import annotations

import pytest
import torch

from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.evaluation.downstream import next_hooks
from replacement.evaluation.splicing import Splice, encode, reconstruct
from replacement.evaluation.suite import evaluate, firing
from tests.test_replacement_evaluation_splicing import perfect_crosscoder
from tests.tiny import VOCABULARY

TOKENS = torch.randint(3, VOCABULARY, (5, 8), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("keep_starts", [True, False])
@pytest.mark.parametrize("kind", ["skip_transcoder", "cross_layer_transcoder"])
def test_streamed_figures_equal_their_definitions(tiny_model, kind: str, keep_starts: bool) -> None:
    model, first = tiny_model("llama", kind, "jumprelu"), int(keep_starts)
    splice = Splice(model.bridge, model.dictionaries, keep_starts=keep_starts)
    found = evaluate(splice, TOKENS.split(2))
    clean = splice.original(TOKENS, {*splice.reads, *splice.writes})
    values = {name: value[:, first:].flatten(0, 1) for name, value in clean.values.items()}
    encodings = encode(model.dictionaries, values)
    for one in found.dictionaries:
        fires = encodings[one.layer] != 0
        assert one.firing.l0 == pytest.approx(fires.sum().item() / len(fires))
        assert one.firing.dead == pytest.approx((~fires.any(0)).double().mean().item())
        assert one.firing.dense == pytest.approx((fires.double().mean(0) > 0.1).double().mean().item())
    for site in found.sites:
        y = values[site.site]
        error = y - reconstruct(model.dictionaries, site.site, values, encodings)
        assert site.reconstruction.fvu == pytest.approx((error.square().sum() / (y - y.mean(0)).square().sum()).item())
        assert site.reconstruction.nmse == pytest.approx((error.square().sum() / y.square().sum()).item())
        assert site.reconstruction.tokens == 5 * (8 - first)
    ours = splice.replaced(TOKENS)
    p, q = (run.logits[:, first:-1].softmax(-1).flatten(0, 1) for run in (clean, ours))
    assert found.replacement is not None
    assert found.replacement.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item())
    targets = TOKENS[:, first + 1 :].flatten()
    assert found.replacement.ce_replaced == pytest.approx(-q[torch.arange(len(q)), targets].log().mean().item())
    assert found.replacement.tokens == 5 * (7 - first)


def test_one_layer_downstream_equals_its_definition(tiny_model) -> None:
    model = tiny_model("llama", "transcoder")
    splice = Splice(model.bridge, model.dictionaries)
    found, hooks = evaluate(splice, TOKENS.split(3)).sites, next_hooks(splice.writes[1], 3)
    assert hooks == ("blocks.2.mlp.hook_out", "blocks.2.hook_resid_post")
    runs = splice.original(TOKENS, hooks), splice.replaced(TOKENS, [splice.writes[1]], hooks)
    for name, figures in zip(hooks, (found[1].downstream.mlp, found[1].downstream.residual), strict=True):
        y, ours = (run.values[name][:, 1:].flatten(0, 1) for run in runs)
        assert figures.nmse == pytest.approx(((y - ours).square().sum() / y.square().sum()).item())
        assert figures.cosine == pytest.approx(torch.cosine_similarity(y, ours).mean().item())
    assert found[2].downstream is None, "nothing is below the last layer"


def test_a_stream_is_judged_alike_as_it_leaves_a_block_and_as_it_enters_the_next() -> None:
    for layer in range(3):
        assert next_hooks(f"blocks.{layer}.hook_resid_post", 3) == next_hooks(f"blocks.{layer + 1}.hook_resid_pre", 3)
    assert next_hooks("blocks.0.hook_resid_pre", 3) == ("blocks.0.mlp.hook_out", "blocks.0.hook_resid_post")
    for site in ("hook_attn_out", "attn.hook_z", "hook_resid_mid", "mlp.hook_out", "hook_resid_post"):
        assert next_hooks(f"blocks.0.{site}", 2) == ("blocks.1.mlp.hook_out", "blocks.1.hook_resid_post")
        assert next_hooks(f"blocks.1.{site}", 2) is None


def test_single_sites_are_the_whole_where_there_is_one(tiny_model) -> None:
    """With a dictionary at one layer only, replacing that site is replacing all of them."""
    model = tiny_model("llama", "transcoder")
    one = Splice(model.bridge, DictionarySet({1: model.dictionaries.by_layer[1]}, "one"))
    found = evaluate(one, TOKENS.split(2))
    assert len(found.sites) == 1 and found.sites[0].replacement == found.replacement


def test_a_perfect_crosscoder_recovers_all(tiny_model) -> None:
    bridge = tiny_model("llama", "neurons").bridge
    splice = Splice(bridge, DictionarySet({0: perfect_crosscoder((0, 1, 2), "hook_resid_post", 24)}, "perfect"))
    found = evaluate(splice, TOKENS.split(2))
    assert found.replacement.ce_recovered == pytest.approx(1)
    assert found.replacement.kl == pytest.approx(0, abs=1e-9)
    assert all(site.reconstruction.fvu < 1e-12 for site in found.sites)
    assert len(found.dictionaries) == 1 and len(found.sites) == 3


def test_what_is_not_asked_for_is_not_run(tiny_model) -> None:
    model = tiny_model("llama", "transcoder")
    splice = Splice(model.bridge, model.dictionaries)
    found = evaluate(splice, TOKENS.split(2), replace=False)
    assert found.replacement is None and all(site.replacement is site.downstream is None for site in found.sites)
    assert evaluate(splice, TOKENS.split(2), every_site=False).replacement is not None


def test_firing_counts_tokens(tiny_model) -> None:
    model = tiny_model("llama", "transcoder", "topk")
    meters = firing(Splice(model.bridge, model.dictionaries), TOKENS.split(2))
    assert all(meter.fired.sum() == 7 * 35 and meter.tokens == 35 for meter in meters.values()), "TopK(7)"


def test_documents_without_a_next_token_are_refused(tiny_model) -> None:
    model = tiny_model("llama", "transcoder")
    with pytest.raises(InputError, match="got documents of 1 tokens; needs 3 or more"):
        evaluate(Splice(model.bridge, model.dictionaries), [TOKENS[:, :1]])
    with pytest.raises(InputError, match="got no tokens"):
        evaluate(Splice(model.bridge, model.dictionaries), [])
