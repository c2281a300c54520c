"""Laws of labels: a feature that is a concept gets the concept's name; every feature gets words."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from replacement.activation import ReLU
from replacement.pretrained.recipe.concepts import (
    ANSWER,
    PLACE,
    TOKEN,
    Annotations,
    annotate,
    concepts,
    places,
    word_groups,
)
from replacement.pretrained.recipe.corpus import Corpus
from replacement.pretrained.recipe.labels import LONGEST, label_features, profile
from replacement.pretrained.recipe.vocabulary import vocabulary, word_ids
from replacement.transcoder import Transcoder

VOCAB, N_PLACES = len(vocabulary()), len(places())


def seen_by_oracle(annotations: Annotations) -> torch.Tensor:
    """Inputs in which token, place and coming answer can be read off as one-hot blocks."""
    token = F.one_hot(annotations.token.flatten(), VOCAB)
    place = F.one_hot(annotations.place.flatten() % (N_PLACES + 1), N_PLACES + 1)
    answer = F.one_hot(annotations.answer.flatten() % (VOCAB + 1), VOCAB + 1)
    return torch.cat([token, place, answer], 1).float()


OFFSET = {TOKEN: 0, PLACE: VOCAB, ANSWER: VOCAB + N_PLACES + 1}


@pytest.fixture(scope="module")
def labels() -> dict[str, str]:
    """Labels of features that detect one concept each, by the concept's name."""
    wanted = (
        "Texas",
        "city in Texas",
        "state of the city: Texas",
        "say Austin",
        "say a state capital",
        "number 30..39",
        "month (French)",
        "name",
    )
    chosen = [next(c for c in concepts() if c.name == name) for name in wanted]
    width = VOCAB + N_PLACES + 1 + VOCAB + 1
    W_enc = torch.zeros(len(chosen) + 1, width)
    for row, concept in enumerate(chosen):
        W_enc[row, [OFFSET[concept.variable] + value for value in concept.values]] = 1
    for word in ("drink", "key", "Mary", "Bob"):
        W_enc[-1, word_ids()[word]] = 1
    dictionary = Transcoder(
        layer=0,
        read="mlp.hook_in",
        write="mlp.hook_out",
        W_enc=W_enc,
        b_enc=torch.zeros(len(W_enc)),
        W_dec=torch.randn(len(W_enc), 4, generator=torch.Generator().manual_seed(0)),
        b_dec=torch.zeros(4),
        activation=ReLU(),
    )
    found, corpus = profile(dictionary), Corpus(5)
    for index in range(12):
        annotations = annotate(*corpus.batch(128))
        found.add(dictionary, seen_by_oracle(annotations), annotations, count=index > 0)
    output = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    given = label_features(dictionary, found, output)
    return dict(zip((*wanted, "mixture"), given.values(), strict=True))


def test_a_feature_that_is_a_concept_gets_its_name(labels: dict[str, str]) -> None:
    for name, label in labels.items():
        if name != "mixture":
            assert label == name


def test_a_feature_without_a_concept_lists_what_it_fires_on(labels: dict[str, str]) -> None:
    assert all(word in labels["mixture"] for word in ("drink", "key", "Mary"))


def test_labels_fit_into_a_graph(labels: dict[str, str]) -> None:
    assert all(0 < len(label) <= LONGEST for label in labels.values())


def test_places_hold_to_the_end_of_the_sentence() -> None:
    """The place is known after its mention, also through its city, and forgotten at the full stop."""
    ids = word_ids()
    words = ["<bos>", "the", "capital", "of", "the", "state", "containing", "Dallas", "is", "Austin", ".", "Bob"]
    tokens = torch.tensor([[ids[word] for word in words]])
    answer = torch.zeros_like(tokens, dtype=torch.bool)
    answer[0, words.index("Austin")] = True
    found = annotate(tokens, answer)
    at = words.index("is")
    assert places()[found.place[0, at]] == "Texas"
    assert found.place[0, at - 1] == -1 and found.place[0, at - 2] == -1
    assert vocabulary()[found.answer[0, at]] == "Austin"
    assert (found.asked[0, 2 : at + 1] >= 0).all()


def test_concepts_have_words_and_members() -> None:
    names = [(c.name, c.variable) for c in concepts()]
    assert len(set(names)) == len(names)
    assert all(c.values and len(c.name) <= 60 for c in concepts())
    assert len(word_groups()["state"]) == 50
