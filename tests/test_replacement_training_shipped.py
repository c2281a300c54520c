"""The dictionaries that ship with atlas are what their card says, on a small held-out sample."""

from __future__ import annotations

import pytest
import torch

from replacement import formats
from replacement.dictionary import DictionarySet
from replacement.evaluation import evaluate_replacement
from replacement.pretrained import directory
from replacement.pretrained.recipe.dictionaries import RECIPES, load_model
from replacement.pretrained.recipe.labels import LONGEST
from replacement.pretrained.recipe.mlps import ReplaceableLlama
from replacement.pretrained.recipe.quality import held_out, replaced_logits

FOLDER = directory("atlas") / "dictionaries"
LEAST_AGREEMENT = {"transcoders": 0.92, "skip_transcoders": 0.95, "clt": 0.95}
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the dictionaries are not in this checkout")


@pytest.fixture(scope="module")
def model() -> ReplaceableLlama:
    return load_model(directory("atlas"))


@pytest.fixture(params=sorted(RECIPES))
def stored(request: pytest.FixtureRequest) -> DictionarySet:
    return formats.load(FOLDER / request.param)


def test_the_replaced_model_answers_as_the_original(stored: DictionarySet, model: ReplaceableLlama) -> None:
    """Top-1 agreement on answer tokens with every MLP replaced, no error terms."""
    run = replaced_logits(model, stored)
    with torch.no_grad():
        found = evaluate_replacement(model.logits, run, run, ((b.tokens, b.answer) for b in held_out(128)))
    assert found["answer"].top1 >= LEAST_AGREEMENT[stored.name]
    assert found["answer"].tokens > 500


def test_every_feature_has_words(stored: DictionarySet) -> None:
    """Labels are short enough for a graph, and cities' features name their places; Texas in the sets of one layer each.

    The cross-layer set is smaller: it has such a feature for about half of the states.
    """
    for dictionary in stored:
        labels = [stored.label(dictionary.layer, feature) for feature in range(dictionary.n_features)]
        assert all(0 < len(label) <= LONGEST for label in labels)
    places = {words for of in stored.labels.values() for words in of.values() if words.startswith("city in ")}
    assert len(places) >= 40 and ("city in Texas" in places or stored.name == "clt")


def test_model_and_dictionaries_stay_small() -> None:
    """All shipped files together: 25 MB."""
    files = [path for path in directory("atlas").rglob("*") if path.is_file() and path.suffix != ".pt"]
    assert sum(path.stat().st_size for path in files) <= 25e6
