"""The measures of a crosscoder over two models: closed forms against brute force, and laws of what they find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from replacement.activation import ReLU
from replacement.crosscoder import Crosscoder
from replacement.errors import InputError
from replacement.evaluation.divergence import DivergenceMeter
from replacement.evaluation.model_diff import Kind, LatentScaling, diff, kind_of, relative_norms
from replacement.training import TrainingConfig, plans, train

PARTS = ("base:blocks.1.hook_resid_post", "tuned:blocks.1.hook_resid_post")
WIDTH, FEATURES, TOKENS = 12, 6, 200


def crosscoder(W_dec: Tensor, parts: tuple[str, ...] = PARTS) -> Crosscoder:
    """A crosscoder with random encoders and the given decoder rows."""
    generator = torch.Generator().manual_seed(1)
    n, n_parts, width = W_dec.shape
    W_enc = torch.randn(n, n_parts * width, generator=generator)
    b_dec = torch.randn(n_parts, width, generator=generator)
    return Crosscoder(
        parts=parts,
        site="hook_resid_post",
        W_enc=W_enc,
        b_enc=torch.zeros(n),
        W_dec=W_dec,
        b_dec=b_dec,
        activation=ReLU(),
    )


@pytest.fixture
def random() -> tuple[Crosscoder, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(FEATURES, 2, WIDTH, generator=generator)
    base, tuned = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2))
    return crosscoder(W_dec), base, tuned


def test_betas_are_the_least_squares_fits(random) -> None:
    """One `lstsq` a feature and target, on the targets written out in full."""
    one, base, tuned = random
    sums = LatentScaling(one)
    for rows in torch.arange(TOKENS).split(64):  # streamed
        sums.add(base[rows], tuned[rows])
    reconstruction, error = sums.betas()
    x = torch.stack([base, tuned], 1).double()
    f = one.encode(torch.cat([base, tuned], 1)).detach().double()
    rows, bias = one.W_dec.detach().double(), one.b_dec.detach().double()
    written = torch.einsum("tn,nmd->tmd", f, rows)
    for feature in range(FEATURES):
        for own in range(2):
            unit = (f[:, feature, None] * rows[feature, own]).flatten()[:, None]
            for model in range(2):
                others = written[:, model] - f[:, feature, None] * rows[feature, model]
                left = x[:, model] - bias[model] - others
                for found, target in ((reconstruction, written[:, model]), (error, left)):
                    wanted = torch.linalg.lstsq(unit, target.flatten()[:, None]).solution.item()
                    assert found[own, model, feature].item() == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_a_feature_of_one_model_is_told_from_a_shared_and_a_rewritten_one() -> None:
    """Activations are planted: every feature writes along axes of its own, so that each figure is known beforehand."""
    axes = torch.eye(WIDTH)
    W_dec = torch.zeros(FEATURES, 2, WIDTH)
    W_dec[0, 0] = W_dec[0, 1] = axes[0]  # shared
    W_dec[1, 1] = 2 * axes[1]  # tuned only
    W_dec[2, 0] = 2 * axes[2]  # base only
    W_dec[3, 0], W_dec[3, 1] = axes[3], axes[4]  # rewritten
    W_dec[4, 1] = axes[5]  # looks tuned only, but the base model has it too (complete shrinkage)
    W_dec[5, 0], W_dec[5, 1] = axes[6], 0.5 * axes[6]  # mostly base
    one = crosscoder(W_dec)
    with torch.no_grad():
        one.W_enc.zero_()
        one.b_dec.zero_()
        for feature in range(FEATURES):  # read each from the model that has it
            part = 0 if feature in (0, 2, 3, 5) else 1
            row = W_dec[feature, part]
            one.W_enc[feature, part * WIDTH : (part + 1) * WIDTH] = row / row.pow(2).sum()
    f = torch.rand(TOKENS, FEATURES, generator=torch.Generator().manual_seed(2))
    base, tuned = (f @ W_dec[:, model] for model in range(2))
    base = base + f[:, 4, None] * axes[5]
    found = diff(one, [(base[:100], tuned[:100]), (base[100:], tuned[100:])])
    kinds = [Kind.SHARED, Kind.TUNED_ONLY, Kind.BASE_ONLY, Kind.REWRITTEN, Kind.TUNED_ONLY, Kind.MOSTLY_BASE]
    assert found.kinds == kinds
    assert found.is_specific(tuned=True).tolist() == [False, True, False, True, False, False]
    torch.testing.assert_close(found.of_tuned.error[:2], torch.tensor([1.0, 0.0]).double(), atol=1e-5, rtol=0)
    assert found.of_tuned.error[4].item() == pytest.approx(1, abs=1e-5) and found.of_tuned.reconstruction[4] == 0
    assert found.tokens == TOKENS and found.rate.tolist() == pytest.approx([1.0] * FEATURES)


def test_relative_norms_run_from_base_to_tuned() -> None:
    base = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    tuned = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [0.0, 0.5]])
    torch.testing.assert_close(relative_norms(base, tuned), torch.tensor([0.0, 1.0, 0.5, 0.25]))
    swapped = relative_norms(tuned, base)
    torch.testing.assert_close(swapped, 1 - relative_norms(base, tuned))
    assert [kind_of(x, 1.0) for x in (0.05, 0.3, 0.5, 0.7, 0.95)] == [
        Kind.BASE_ONLY, Kind.MOSTLY_BASE, Kind.SHARED, Kind.MOSTLY_TUNED, Kind.TUNED_ONLY
    ]  # fmt: skip
    assert kind_of(0.5, 0.1) is Kind.REWRITTEN and kind_of(0.95, 0.1) is Kind.TUNED_ONLY


def test_a_feature_that_never_fires_is_dead(random) -> None:
    one, base, tuned = random
    with torch.no_grad():
        one.b_enc[2] = -1e6
    found = diff(one, [(base, tuned)])
    assert found.kinds[2] is Kind.DEAD and not found.is_specific()[2] and found.rate[2] == 0


def test_mistakes_are_named(random) -> None:
    one = random[0]
    with pytest.raises(InputError, match="was given no token"):
        diff(one, [])
    alone = crosscoder(one.W_dec.detach(), ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"))
    with pytest.raises(InputError, match=r"has the parts blocks.0.hook_resid_post, .* needs a site of two models"):
        LatentScaling(alone)


class Twins:
    """Two models that share sixteen sparse directions; at one token in twenty the tuned one writes another direction.

    Such a token reads as direction 0 in the base model, and as direction 16, which nothing else uses, in the tuned one.
    """

    sites = PARTS

    def batch(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        rows = torch.eye(32)[:17]
        f = torch.rand(512, 17, generator=generator) * (torch.rand(512, 17, generator=generator) < 0.1)
        f[:, [0, 16]] = 0
        trigger = torch.rand(512, generator=generator) < 0.05
        base, tuned = f.clone(), f.clone()
        base[trigger, 0], tuned[trigger, 16] = 1.0, 1.0
        return dict(zip(PARTS, (base @ rows, tuned @ rows), strict=True)) | {"trigger": trigger}


def test_what_makes_the_tuned_model_say_something_else_comes_first() -> None:
    """Trained from data alone, the feature with most of the divergence fires where the planted change is."""
    config = TrainingConfig(
        kind="crosscoder", layers=(1,), n_features=32, k=3, tokens=512 * 300, batch_tokens=512, start="clusters",
        buffer_bytes=10_000_000,
    )  # fmt: skip
    source = Twins()
    one = train(source, plans(config, 2, models=("base", "tuned")), config=config, show_progress=False).dictionaries()[
        0
    ]
    assert isinstance(one, Crosscoder)
    sums, parts = LatentScaling(one), DivergenceMeter(one)
    held = [source.batch(10_000 + i) for i in range(4)]
    for batch in held:
        base, tuned = (batch[part][None] for part in PARTS)
        parts.add(base, tuned, torch.ones(1, 512, dtype=torch.bool), lambda x: 5 * x)  # a word for each direction
    fired = torch.cat([sums.add(*(batch[part] for part in PARTS)) for batch in held])
    found, trigger = sums.result(), torch.cat([batch["trigger"] for batch in held])
    first = int(parts.result().features.argmax())
    assert fired[trigger, first].pow(2).sum() > 0.9 * fired[:, first].pow(2).sum()
    assert bool(found.is_specific()[first]) and found.kinds[first] in (Kind.REWRITTEN, Kind.TUNED_ONLY)
    assert found.kinds.count(Kind.SHARED) >= 12
