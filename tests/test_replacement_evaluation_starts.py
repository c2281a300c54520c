"""Laws of start tokens: evaluation leaves out those that training leaves out, at the start of a row and inside it."""

from __future__ import annotations

import pytest
import torch

from replacement.errors import InputError
from replacement.evaluation.sample import collect
from replacement.evaluation.splicing import Splice, encode, reconstruct
from replacement.evaluation.suite import evaluate, firing
from replacement.starts import start_tokens
from replacement.training.data.harvest import BridgeActivations
from tests.tiny import VOCABULARY

BOS = 1
TOKENS = torch.randint(3, VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(3))
TOKENS[:, 0] = BOS
TOKENS[torch.tensor([0, 1, 1, 3, 4]), torch.tensor([4, 2, 8, 5, 1])] = BOS
TEXT = TOKENS != BOS


class Rows:
    """The documents above as a source of tokens."""

    context, n_documents, fingerprint = 9, 6, "rows"

    def batch(self, index: int, documents: int) -> torch.Tensor:
        return TOKENS[:documents]


@pytest.fixture
def splice(tiny_model) -> Splice:
    model = tiny_model("llama", "cross_layer_transcoder", "jumprelu")
    return Splice(model.bridge, model.dictionaries)


def test_the_first_token_of_a_row_is_a_start_token_whatever_it_is() -> None:
    ids = torch.tensor([[5, 7, 1], [1, 1, 5]])
    assert start_tokens(ids, 1).tolist() == [[True, False, True], [True, True, False]]
    assert start_tokens(ids, None).tolist() == [[True, False, False]] * 2


def test_evaluation_counts_the_tokens_that_training_sees(splice: Splice) -> None:
    harvested = BridgeActivations(
        splice.bridge, Rows(), sites=splice.reads, documents=6, drop_norm=None, dtype=torch.float64
    ).batch(0)
    values = splice.original(TOKENS, splice.reads).values
    halves = collect(splice, TOKENS.split(4), {"even": lambda ids: ids % 2})
    for name, expected in harvested.items():
        assert torch.equal(values[name][splice.counted(TOKENS)], expected)
        assert torch.allclose(torch.cat([part.values[name] for part in halves]), expected)
    assert torch.equal(torch.cat([part.labels["even"] for part in halves]), TOKENS[TEXT] % 2)
    assert len(halves.fit.labels["even"]) == TEXT[:3].sum(), "a half is whole documents"
    for meter in firing(splice, TOKENS.split(4)).values():
        assert meter.tokens == TEXT.sum()


def test_start_tokens_count_in_no_figure(splice: Splice) -> None:
    """Activations at all other tokens, predictions from one of them to another: the definitions on all at once."""
    found, dictionaries = evaluate(splice, TOKENS.split(2), every_site=False), splice.dictionaries
    clean = splice.original(TOKENS, {*splice.reads, *splice.writes})
    values = {name: value[TEXT] for name, value in clean.values.items()}
    encodings = encode(dictionaries, values)
    for site in found.sites:
        y, error = values[site.site], reconstruct(dictionaries, site.site, values, encodings) - values[site.site]
        fvu = error.square().sum() / (y - y.mean(0)).square().sum()
        assert site.reconstruction.fvu == pytest.approx(fvu.item()) and site.reconstruction.tokens == TEXT.sum()
    for one in found.dictionaries:
        assert one.firing.l0 == pytest.approx((encodings[one.layer] != 0).sum(1).double().mean().item())
    both = TEXT[:, :-1] & TEXT[:, 1:]
    p, q = (run.logits[:, :-1][both].log_softmax(-1) for run in (clean, splice.replaced(TOKENS)))
    assert found.replacement is not None and found.replacement.tokens == both.sum()
    assert found.replacement.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())
    losses = -q.gather(1, TOKENS[:, 1:][both][:, None])
    assert found.replacement.ce_replaced == pytest.approx(losses.mean().item())


@pytest.mark.parametrize("keep_starts", [True, False])
def test_start_tokens_keep_the_models_own_values_where_they_are_kept(tiny_model, keep_starts: bool) -> None:
    """What a replaced or ablated site holds there is the original's, as far as nothing below it was replaced."""
    model = tiny_model("llama", "transcoder")
    splice = Splice(model.bridge, model.dictionaries, keep_starts=keep_starts)
    after, site = "blocks.0.hook_resid_post", splice.writes[0]
    own = splice.original(TOKENS, [after]).values[after]
    same = torch.isclose(splice.replaced(TOKENS, [site], [after]).values[after], own).all(-1)
    assert torch.equal(same, ~TEXT & keep_starts)
    ablated = splice.ablated(TOKENS).logits
    assert torch.allclose(ablated[:, 0], splice.original(TOKENS).logits[:, 0]) == keep_starts
    assert splice.counted(TOKENS).all() == (not keep_starts)


def test_documents_that_are_too_short_are_refused_with_the_least_length(tiny_model) -> None:
    model = tiny_model("llama", "transcoder")
    for keep_starts, replace, least in ((True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)):
        splice = Splice(model.bridge, model.dictionaries, keep_starts=keep_starts)
        assert evaluate(splice, [TOKENS[:, :least]], replace=replace).dictionaries
        if least > 1:
            with pytest.raises(InputError, match=f"got documents of {least - 1} tokens; needs {least} or more"):
                evaluate(splice, [TOKENS[:, : least - 1]], replace=replace)


def test_a_half_of_start_tokens_alone_is_refused(splice: Splice) -> None:
    with pytest.raises(InputError, match="one half of the documents holds start tokens alone; pass more data"):
        collect(splice, [torch.stack([torch.full((9,), BOS), TOKENS[0]])])
