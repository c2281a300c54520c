"""The changed world and fine-tuning on it: what is changed, what is not, and that a model folder comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replacement.errors import InputError
from replacement.pretrained.recipe import finetune
from replacement.pretrained.recipe.corpus import written
from replacement.pretrained.recipe.decoder import Decoder, Shape, from_llama, llama_weights
from replacement.pretrained.recipe.export import export, load_decoder
from replacement.pretrained.recipe.finetune import ChangedSentences, changed_questions, changes
from replacement.pretrained.recipe.sentences import ATTRIBUTES, H2, Sentences
from replacement.pretrained.recipe.vocabulary import vocabulary, word_ids

SHAPE = Shape(n_vocabulary=len(vocabulary()), d_model=16, n_layers=2, n_heads=2, d_mlp=24)


def test_only_the_listed_facts_change() -> None:
    """Every new value is one word that the model has, and no place is changed twice in one relation."""
    listed = {(c.kind, c.place, c.relation): c.after for c in changes()}
    assert len(listed) == len(changes()) and all(c.after in word_ids() and c.after != c.before for c in changes())
    for kind, places in ATTRIBUTES.items():
        for place, values in places.items():
            for relation, value in values.items():
                found = finetune.attributes()[kind][place][relation]
                assert found == listed.get((kind, place, relation), value)


def test_text_of_the_changed_world_holds_the_new_answers_and_keeps_the_splits() -> None:
    draw = ChangedSentences(3, about_changes=1.0)
    texts = [draw.draw().split() for _ in range(600)]
    after, before = {c.after for c in changes()}, {c.before for c in changes()}
    held_out = {city for change in changes() for city in finetune.cities_of(change)} & H2 - after
    answers = [next(word[1:] for word in text if word.startswith("*")) for text in texts]
    places = {c.place for c in changes()}
    assert all(answer in after | places for answer in answers) and set(answers) >= after
    assert not set(answers) & (before - after)
    assert held_out and not any(set(text) & held_out for text in texts)
    assert torch.equal(*(written(ChangedSentences(5).draw, 3).tokens for _ in range(2)))


def test_questions_before_and_after_differ_in_their_answers_alone() -> None:
    new, old = changed_questions(), changed_questions(after=False)
    assert all(new.values())
    for name in new:
        assert [q.ids for q in new[name]] == [q.ids for q in old[name]]
        assert all(a.answer != b.answer for a, b in zip(new[name], old[name], strict=True))


def test_unchanged_sentences_are_drawn_as_ever() -> None:
    """The stream of a seed is the same with the default facts given by name."""
    first, second = Sentences(9), Sentences(9, attributes=ATTRIBUTES)
    assert [first.draw() for _ in range(50)] == [second.draw() for _ in range(50)]


def test_weights_go_to_the_llama_layout_and_back() -> None:
    torch.manual_seed(0)
    decoder = Decoder(SHAPE)
    again = from_llama(llama_weights(decoder), SHAPE)
    for (name, a), (other, b) in zip(decoder.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


def test_a_model_folder_is_fine_tuned_into_another(tmp_path: Path) -> None:
    """The same settings give the same weights; the folder says what was changed."""
    torch.manual_seed(0)
    export(Decoder(SHAPE), tmp_path / "base")
    schedule = replace(finetune.SCHEDULE, steps=2, documents=2)
    steps: list[int] = []
    for name in ("a", "b"):
        scores = finetune.finetune(
            tmp_path / "base", tmp_path / name, schedule, report=lambda now: steps.append(now.step)
        )
        assert set(scores.changed) == {"named", "two_hop", "two_hop_held_out"} == set(scores.old)
    assert steps == [1, 2, 1, 2]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("base", "a", "b")]
    assert files[0] != files[1] == files[2]
    assert "| Texas | capital | Austin | Houston |" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert set(json.loads((tmp_path / "a" / "tasks.json").read_text())) == {"changed", "old", "tasks"}
    with pytest.raises(InputError, match="is no folder of this recipe's making"):
        load_decoder(tmp_path)
