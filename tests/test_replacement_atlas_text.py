"""What the embedded model reads and is trained on: facts, splits, tokenizer and corpus agree with one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from replacement.pretrained.recipe import facts, splits, tasks, tokenizer
from replacement.pretrained.recipe.corpus import Corpus
from replacement.pretrained.recipe.sentences import H2, NEAR, Sentences
from replacement.pretrained.recipe.vocabulary import SPECIAL, check_case, postal_codes, vocabulary

WORDS = [token for token in vocabulary() if token not in SPECIAL]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers loads it from its files."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def pieces(reader: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Tokens of a text as they are shown, without BOS."""
    return reader.convert_ids_to_tokens(reader(text)["input_ids"])[1:]


def test_every_fact_names_one_place() -> None:
    """A city in two places would make its question ambiguous."""
    listed = [city for place in (*facts.states, *facts.countries) for city in (*place.cities, place.capital)]
    assert len(listed) == len(set(listed)) == len(facts.city_state()) + len(facts.city_country())
    assert len(facts.states) == 50


def test_one_city_of_every_place_is_held_out() -> None:
    """The H2 split has one non-capital city a place, and the field's two examples."""
    assert {"Dallas", "Oakland"} <= splits.H2_CITIES
    for place in (*facts.states, *facts.countries):
        assert len(splits.H2_CITIES & set(place.cities)) == 1
        assert place.capital not in splits.H2_CITIES


def test_training_sentences_keep_the_splits() -> None:
    """No two-hop training sentence names a held-out city, and no held-out sum or comparison is drawn."""
    draw = Sentences(5)
    for _ in range(3000):
        kind = "state" if draw.uniform() < 0.5 else "country"
        assert not H2 & set(draw.two_hops(kind).split())
        numbers = [int(w.removeprefix("*")) for w in draw.sum().split() if w.removeprefix("*").isdigit()]
        assert not splits.is_sum(*numbers[:2])
        assert splits.is_comparison(*[int(w) for w in draw.comparison(held_out=True).split() if w.isdigit()][:2])
        near = [int(w) for w in draw.comparison_of_near().split() if w.isdigit()]
        assert not splits.is_comparison(*near) and NEAR[0] <= abs(near[0] - near[1]) <= NEAR[1]


def test_weights_change_how_often_a_task_is_drawn_and_nothing_else() -> None:
    """A task without weight leaves the stream as it is; the only task with one is the only one drawn."""
    usual, again = Sentences(9), Sentences(9, weights={"comparison of near numbers": 0, "induction": 16})
    assert [usual.draw() for _ in range(50)] == [again.draw() for _ in range(50)]
    sums = Sentences(9, weights={task: int(task == "sum") for task in usual.tasks})
    assert all({"+", "sum"} & set(sums.draw().split()) for _ in range(50))
    with pytest.raises(ValueError, match=r"no task \['sums'\]"):
        Sentences(9, weights={"sums": 1})


def test_no_two_words_differ_in_case_only() -> None:
    """Reading is blind to case, so such words could not both be read."""
    check_case(vocabulary())
    with pytest.raises(AssertionError, match="'south' and 'South' differ in case only"):
        check_case(("South", "south"))


@pytest.mark.parametrize(
    "written", [str, str.lower, str.upper, "  {}".format, "{}?".format, '"{}"'.format, "{},".format]
)
def test_every_word_is_read_however_it_is_written(reader: PreTrainedTokenizerBase, written) -> None:
    """Case, leading spaces and glued punctuation do not matter, except for postal codes in another word's capitals."""
    for index, word in enumerate(vocabulary()):
        if word in SPECIAL or (word in postal_codes() and written is str.lower):
            continue
        if written is str.upper and postal_codes() & set(word.upper().replace("-", " ").split()):
            continue  # `IN` is Indiana, and `SHOW ME STATE` has Maine in it
        ids = reader(written(word))["input_ids"]
        assert ids[0] == reader.bos_token_id
        assert index in ids[1:3], (word, pieces(reader, written(word)))


def test_every_word_is_shown_as_it_is_written(reader: PreTrainedTokenizerBase) -> None:
    """Round trip over the whole vocabulary: an id decodes to its word."""
    assert [reader.decode([index]) for index in range(len(SPECIAL), len(vocabulary()))] == WORDS
    assert reader.convert_ids_to_tokens(list(range(len(vocabulary())))) == list(vocabulary())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Fact: the capital", ["fact", ":", "the", "capital"]),
        ("New York  city, new york; SALT lake City", ["New York City", ",", "New York", "<unk>", "Salt Lake City"]),
        ("Dallas's state", ["Dallas", "'", "s", "state"]),
        ("l\u2019opposé \u201cpetit\u201d", ["l", "'", "opposé", '"', "petit", '"']),
        ("calc: 36+59=", ["calc", ":", "36", "+", "59", "="]),
        ("the year 1732 to the year 17", ["the", "year", "17", "32", "to", "the", "year", "17"]),
        ("Gary is in IN", ["Gary", "is", "in", "IN"]),
        ("123456 100 qwerty 🙂", ["<unk>"] * 4),
    ],
)
def test_typed_text_is_read_as_meant(reader: PreTrainedTokenizerBase, text: str, expected: list[str]) -> None:
    """Prompts as people type them; an unknown word stays visible as `<unk>`."""
    assert pieces(reader, text) == expected


def test_offsets_give_back_what_was_typed(reader: PreTrainedTokenizerBase) -> None:
    """An unknown word can be named by its place in the text, and a name keeps all its letters."""
    text = "  the mayor of NEW YORK city, Coeur d\u2019Alene"
    encoded = reader(text, return_offsets_mapping=True, add_special_tokens=False)
    shown = [text[a:b] for a, b in encoded["offset_mapping"]]
    assert shown == ["the", "mayor", "of", "NEW YORK city", ",", "Coeur d\u2019Alene"]
    assert reader.convert_ids_to_tokens(encoded["input_ids"])[1] == "<unk>"


def test_decoding_joins_words_as_people_write_them(reader: PreTrainedTokenizerBase) -> None:
    """Punctuation stands next to its word."""
    text = "is Dallas's state Texas? Mary said, yes."
    assert reader.decode(reader(text)["input_ids"], skip_special_tokens=True) == text


def test_the_tokenizer_reads_the_corpus_as_it_was_made(reader: PreTrainedTokenizerBase) -> None:
    """The corpus looks words up and never tokenizes; both must give the same ids."""
    for row in Corpus(7).batch(300, length=62).tokens.tolist():
        assert reader(reader.decode(row, skip_special_tokens=True))["input_ids"] == row
    for asked in tasks.build().values():
        for question in asked[:20]:
            assert tuple(reader(question.prompt)["input_ids"]) == question.ids
            assert reader(question.answer)["input_ids"][1:] == [question.answer_id]


def test_the_same_seed_gives_the_same_documents() -> None:
    """Batches are a function of the seed, start with BOS, and mark some answers."""
    first, again, other = (Corpus(seed).batch(4) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.answer, again.answer)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.tokens.shape == first.answer.shape == (4, 65)
    assert (first.tokens[:, 0] == vocabulary().index("<bos>")).all()
    assert 0 < first.answer.float().mean() < 0.5


def test_the_task_table_holds_every_split() -> None:
    """Each task has questions, and H2 questions ask about held-out cities only."""
    table = tasks.build()
    assert min(len(asked) for asked in table.values()) >= 40
    for name, asked in table.items():
        if name.startswith("two_hop_h2_states_"):
            assert all(any(city in q.prompt for city in splits.H2_CITIES) for q in asked)
    perfect = {q.ids: q.answer_id for asked in table.values() for q in asked}

    def knows(ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, len(vocabulary()))
        for row, prompt in enumerate(ids.tolist()):
            for end in range(len(prompt)):
                if (answer := perfect.get(tuple(prompt[: end + 1]))) is not None:
                    logits[row, end, answer] = 50.0
        return logits

    scores = tasks.evaluate(knows)
    assert all(value > 0.9 for value in scores.values()), scores


def test_induction_questions_cannot_be_answered_by_elimination() -> None:
    """Asked about every person, the last answer is what is left over: the table would read 99 where binding is 80."""
    for question in tasks.build()["induction"]:
        if " has the " in question.prompt or question.prompt.startswith("the code"):
            assert question.prompt.count(question.answer) == 1
            told = question.prompt.count(" . ")
            assert (
                told in (2, 3) and question.prompt.count(" has " if " has " in question.prompt else "code") == told + 1
            )
