"""Laws of the baselines: each is the best of its kind, and a dictionary stands beside them on the same tokens."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.evaluation.baselines import principal_components, random_dictionary, strongest_neurons
from replacement.evaluation.comparison import compare_probes, compare_reconstruction
from replacement.evaluation.sample import collect
from replacement.evaluation.splicing import Splice
from replacement.evaluation.stability import stability, write_directions
from replacement.neurons import neurons
from tests.test_replacement_evaluation_splicing import perfect_crosscoder, perfect_sae
from tests.tiny import VOCABULARY

TOKENS = torch.randint(3, VOCABULARY, (60, 10), generator=torch.Generator().manual_seed(4))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_principal_components_of_one_site_are_pca(k: int) -> None:
    """What is missed is the sum of the smaller squared singular values."""
    x = (normal(80, 6, seed=0) @ normal(6, 6, seed=1) + 3).double()
    missed = (principal_components(x, x, k).approximate(x) - x).square().sum()
    values = torch.linalg.svdvals(x - x.mean(0))
    assert missed.item() == pytest.approx(values[k:].square().sum().item(), abs=1e-6)


def test_principal_components_between_sites_are_the_best_map_of_their_rank() -> None:
    """No map of rank 2 that gradient descent finds misses less."""
    x, y = normal(60, 5, seed=0).double(), normal(60, 4, seed=1).double()
    y = y + x @ normal(5, 4, seed=2).double()
    ours = (principal_components(x, y, 2).approximate(x) - y).square().sum().item()
    left, right = (normal(*shape, seed=3).double().requires_grad_() for shape in ((5, 2), (2, 4)))
    optimiser = torch.optim.Adam([left, right], lr=0.05)
    for _ in range(1500):
        optimiser.zero_grad()
        loss = ((x - x.mean(0)) @ left @ right - (y - y.mean(0))).square().sum()
        loss.backward()
        optimiser.step()
    assert ours == pytest.approx(loss.item(), rel=1e-4)


def test_a_random_dictionary_has_the_l0_it_is_asked_for_and_the_best_decoder() -> None:
    x, y = normal(1500, 6, seed=0).double(), normal(1500, 4, seed=1).double()
    one = random_dictionary(x, y, n_features=20, k=3, layer=0, read="a", write="b", ridge=1e-12)
    a = one.encode(x).detach()
    assert ((a != 0).sum(1) == 3).all() and one.W_dec.shape == (20, 4)
    best = torch.linalg.lstsq(a, y - y.mean(0)).solution
    assert torch.allclose(one.W_dec, best, atol=1e-6)
    with pytest.raises(InputError, match="needs at least 1 of each"):
        random_dictionary(x, y, n_features=20, k=0, layer=0, read="a", write="b")


def test_the_strongest_neurons_are_those_that_write_most(tiny_model) -> None:
    one = neurons(tiny_model("llama", "neurons").bridge, torch.float64).by_layer[0]
    x = normal(7, 24, seed=0).double()
    with torch.no_grad():
        whole, few = one.encode(x), strongest_neurons(one, x, 4)
        assert torch.equal(strongest_neurons(one, x, 40), whole)
        for token in range(7):
            written = [float((whole[token, i] * one.W_dec[i]).norm()) for i in range(40)]
            best = sorted(range(40), key=lambda i: -written[i])[:4]
            assert sorted(torch.nonzero(few[token]).flatten().tolist()) == sorted(best)


@pytest.mark.parametrize("sizes", [(5, 5), (4, 6), (6, 4)])
def test_stability_equals_brute_force(sizes: tuple[int, int]) -> None:
    a, b = normal(sizes[0], 7, seed=0), normal(sizes[1], 7, seed=1)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    found = stability(a, b)
    assert found.greedy == pytest.approx(cosines.amax(1).mean().item(), abs=1e-6)
    short, table = min(sizes), cosines if sizes[0] <= sizes[1] else cosines.T
    sums = [sum(table[i, j] for i, j in enumerate(order)) for order in permutations(range(max(sizes)), short)]
    assert found.matched == pytest.approx((max(sums) / short).item(), abs=1e-6)


def test_a_dictionary_is_stable_against_itself_in_another_order(tiny_model) -> None:
    rows = write_directions(tiny_model("llama", "cross_layer_transcoder").dictionaries.by_layer[0])
    assert rows.shape == (30, 3 * 24), "all layers side by side"
    found = stability(rows, rows[torch.randperm(30)] * 5)
    assert found.matched == pytest.approx(1, abs=1e-6) and found.shared == 1
    some = stability(rows, rows, alive_a=torch.tensor([1, 2]), alive_b=torch.tensor([2, 1, 4]))
    assert some.matched == pytest.approx(1, abs=1e-6) and some.features == (2, 3)
    with pytest.raises(InputError, match="rows of width 72 and 5"):
        stability(rows, torch.ones(3, 5))
    with pytest.raises(InputError, match="got 30 and 0 features"):
        stability(rows, torch.zeros(3, 72))


def test_a_sample_holds_whole_documents_in_two_halves(tiny_model) -> None:
    model = tiny_model("llama", "transcoder")
    splice = Splice(model.bridge, model.dictionaries)
    tasks = {"even": lambda tokens: tokens % 2, "none": lambda tokens: torch.full_like(tokens, -1)}
    halves = collect(splice, TOKENS.split(7), tasks, tokens=20 * 9)
    clean = splice.original(TOKENS[:20], splice.reads).values
    for part, rows in zip(halves, (slice(0, 10), slice(10, 20)), strict=True):
        assert torch.equal(part.labels["even"], (TOKENS[rows, 1:] % 2).flatten())
        for name in splice.reads:
            assert torch.allclose(part.values[name], clean[name][rows, 1:].flatten(0, 1))
    small = collect(splice, TOKENS.split(7), memory=4 * 9 * 24 * 8 * 6)
    assert len(small.fit.values[splice.reads[0]]) == 2 * 9, "six hooks of 24 float64 values a token: four documents"
    with pytest.raises(InputError, match="got 1 documents, needs 2 or more"):
        collect(splice, [TOKENS[:1]])


def test_dictionaries_stand_beside_their_baselines(tiny_model) -> None:
    """A perfect dictionary misses nothing; every baseline misses something at a small L0."""
    bridge = tiny_model("llama", "neurons").bridge
    for dictionaries in (
        DictionarySet({1: perfect_sae(1, "hook_resid_post", 24)}, "sae"),
        DictionarySet({0: perfect_crosscoder((0, 1), "hook_resid_post", 24)}, "crosscoder"),
    ):
        halves = collect(Splice(bridge, dictionaries), TOKENS.split(20))
        (row,) = compare_reconstruction(dictionaries, halves, neurons(bridge, torch.float64).by_layer)
        assert row.dictionary < 1e-9 and row.neurons is None
        assert row.l0 == 24 * len(dictionaries.by_layer[row.layer].write_layers) and row.components < 1e-9
    model = tiny_model("llama", "skip_transcoder", "topk")  # writes hook_mlp_out, which neurons do not
    halves = collect(Splice(model.bridge, model.dictionaries), TOKENS.split(20))
    rows = compare_reconstruction(model.dictionaries, halves)
    assert [row.l0 for row in rows] == [7, 7, 7]
    assert all(0 < row.components < 1 and 0 < row.random < row.dictionary for row in rows), "its weights are random"


def test_probes_cover_every_representation(tiny_model) -> None:
    """ "The token is above w30" is a function of the residual stream, so raw activations of the first layer know it."""
    bridge = tiny_model("llama", "neurons").bridge
    dictionaries = neurons(bridge, torch.float64)
    tasks = {"high": lambda tokens: (tokens > 30).long(), "rare": lambda tokens: (tokens == 3).long() - 1}
    halves = collect(Splice(bridge, dictionaries), TOKENS.split(20), tasks)
    rows = compare_probes(DictionarySet({0: dictionaries.by_layer[0]}, "n"), halves, dictionaries.by_layer, ks=(2,))
    assert {row.task for row in rows} == {"high"}, "tasks with too few examples are left out"
    expected = {"features", "random", "components", "raw", "difference in means"}
    assert {row.representation for row in rows} == expected, "neurons do not stand beside themselves"
    assert {row.k for row in rows if row.representation == "raw"} == {None}
    assert all(0 <= row.accuracy <= 1 and row.examples > 40 for row in rows)
    raw = next(row for row in rows if row.representation == "raw")
    assert raw.accuracy > 0.6
