"""Laws of what is measured: which documents, which prompts, and what is refused before the long work."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from circuits.labels import read_labels
from circuits.quality import PROMPT_TOKENS, Documents, measure
from circuits.scored_prompts import read_scored_prompts
from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.evaluation.stability import shared_layers
from tests.test_replacement_evaluation_splicing import perfect_crosscoder, perfect_sae
from tests.tiny import CONTEXT, PROMPT


class Rows:
    """Rows that say which batch they were drawn for; a start token, 1, inside of some."""

    context, n_documents = 30, None

    def batch(self, index: int, documents: int) -> torch.Tensor:
        found = torch.arange(documents)[:, None] + 1000 * (index + 1) + torch.zeros(30, dtype=torch.long)
        found[:, 0] = 1
        found[1::3, 5] = found[2::3, 1] = 1
        return found


def test_prompts_hold_one_document() -> None:
    """The beginning of a row ends before the next start token; a row that begins with two of them gives none."""
    found = Documents(Rows(), tokens=900, vocabulary=10).beginnings(7, 1)
    assert [len(one) for one in found] == [PROMPT_TOKENS, 5] * 3 + [PROMPT_TOKENS]
    assert all((one[1:] != 1).all() and one[0] == 1 for one in found)
    assert [len(one) for one in Documents(Rows(), tokens=900, vocabulary=10).beginnings(3)] == [PROMPT_TOKENS] * 3


def test_documents_do_not_depend_on_the_memory_that_a_set_takes() -> None:
    """Not even where a source draws every batch from a seed of its own, as atlas's generator does."""
    made = [Documents(Rows(), tokens=30 * 150, vocabulary=10, features=many) for many in (0, 300_000, 10**9)]
    assert [one.batch for one in made] == [64, 4, 1]
    whole, *others = (torch.cat(list(one)) for one in made)
    assert len(whole) == 150 and all(torch.equal(whole, one) for one in others)
    assert all(max(len(part) for part in one) <= one.batch for one in made)


class Words:
    """Rows of words of the tiny models."""

    context, n_documents = 8, None

    def batch(self, index: int, documents: int) -> torch.Tensor:
        return torch.randint(3, 60, (documents, 8), generator=torch.Generator().manual_seed(index))


def too_late(what: str, done: int, total: int) -> None:
    """For what is refused before the long work."""
    raise AssertionError(f"{what} began")


def words(context: int = 8) -> Documents:
    source = Words()
    source.context = context
    return Documents(source, tokens=64, vocabulary=60)


def test_a_set_of_other_sites_is_refused_for_stability(tiny_model) -> None:
    """Also where rows are as wide; sets that share some layers are compared there."""
    model = tiny_model("llama", "transcoder")
    ours = model.dictionaries
    for other in (
        DictionarySet({1: perfect_sae(1, "hook_resid_post", 24)}, "sae"),
        DictionarySet({1: perfect_sae(1, "hook_mlp_out", 24)}, "outputs"),
        DictionarySet({0: perfect_crosscoder((0, 1), "hook_mlp_out", 24)}, "crosscoder"),
        tiny_model("llama", "cross_layer_transcoder").dictionaries,
    ):
        with pytest.raises(InputError, match=r"stability of .* against .*: layer . reads .* in the other; needs a set"):
            measure(model.bridge, ours, words(), model="tiny", measures=(), against=other, advance=too_late)
    assert shared_layers(ours, DictionarySet({2: ours.by_layer[2]}, "one")) == (2,)
    with pytest.raises(InputError, match="they share no layer"):
        shared_layers(DictionarySet({0: ours.by_layer[0]}, "a"), DictionarySet({1: ours.by_layer[1]}, "b"))


def test_a_layer_without_living_features_costs_no_other_layer_its_stability(tiny_model) -> None:
    model = tiny_model("llama", "transcoder")
    dead = deepcopy(model.dictionaries.by_layer[1])
    dead.b_enc.data.fill_(-1e9)
    against = DictionarySet({**model.dictionaries.by_layer, 1: dead}, "halfdead")
    found = measure(model.bridge, model.dictionaries, words(), model="tiny", measures=(), against=against)
    assert [one.layer for one in found.stability or ()] == [0, 2]
    assert all(one.figures.matched == pytest.approx(1, abs=1e-12) for one in found.stability or ())
    assert len(found.notes) == 1 and found.notes[0].startswith("halfdead, layer 1: stability: got ")
    alone = measure(model.bridge, DictionarySet({1: dead}, "dead"), words(), model="tiny", measures=(), against=against)
    assert alone.stability is None and len(alone.notes) == 1


def test_prompts_of_a_file_are_checked_where_they_stand(tiny_model, tmp_path: Path) -> None:
    """The line is named, blank ones counted; a byte order mark is no word."""
    bridge, path = tiny_model("llama", "transcoder").bridge, tmp_path / "prompts.txt"
    path.write_bytes(f"\ufeffw3 w4\r\n\r\n  {PROMPT}\n".encode())
    assert read_scored_prompts(path, bridge, name="tiny") == ["w3 w4", PROMPT]
    for line, said in (
        ("w3 nonsense", "'nonsense' is not in the vocabulary of tiny"),
        ("w3 " * CONTEXT, f"has {CONTEXT + 1} tokens"),
    ):
        path.write_text(f"w3 w4\n\n{line}\n")
        with pytest.raises(InputError, match=rf"prompts\.txt', line 3: {said}"):
            read_scored_prompts(path, bridge, name="tiny")
    for content, said in ((b"\n \n", "holds no prompt"), (b"\xff", "can't be read"), (None, "can't be read")):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(InputError, match=said):
            read_scored_prompts(path, bridge, name="tiny")


def test_what_cannot_be_measured_is_refused_before_the_model_runs(tiny_model) -> None:
    model = tiny_model("llama", "transcoder")
    usual = {"documents": words(), "model": "tiny", "advance": too_late}
    for given, said in (
        ({"prompts": ["w3", "w3 nonsense"]}, "prompt 2: 'nonsense' is not in the vocabulary of tiny"),
        ({"prompts": [torch.full((CONTEXT + 1,), 3)]}, f"prompt 1: has {CONTEXT + 1} tokens"),
        ({"documents": words(2)}, "got documents of 2 tokens; needs 3 or more"),
    ):
        with pytest.raises(InputError, match=said):
            measure(model.bridge, model.dictionaries, **(usual | given))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("{}", 'needs {"task"'),
        ('{"a": {"yes": ["w3", "w4"], "no": ["w5", "w4"]}}', "'a' has 'w4' in 'yes' and in 'no'; leave it in one"),
        ('{"a": {"yes": ["w3"], "no": []}}', "none of the 'no' words of 'a' is one token"),
    ],
)
def test_labels_that_label_nothing_or_contradict_themselves_are_refused(
    tiny_model, tmp_path: Path, labels: str, said: str
) -> None:
    (tmp_path / "labels.json").write_text(labels)
    with pytest.raises(InputError, match=said):
        read_labels(tmp_path / "labels.json", tiny_model("llama", "transcoder").bridge.tokenizer)
