"""Evaluation of the shipped model: the bridge's figures are those of the recipe's own path, and its labels are true."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from replacement import formats, pretrained
from replacement.evaluation import ReconstructionMeter, evaluate_replacement
from replacement.evaluation.splicing import Splice
from replacement.evaluation.suite import evaluate
from replacement.loading import load_bridge
from replacement.pretrained.recipe.corpus import Corpus
from replacement.pretrained.recipe.mlps import ReplaceableLlama
from replacement.pretrained.recipe.probes import probe_tasks
from replacement.pretrained.recipe.quality import replaced_logits
from replacement.pretrained.recipe.vocabulary import word_ids
from replacement.sites import hook_name


@pytest.fixture(scope="module")
def documents() -> torch.Tensor:
    return Corpus(90_000_000).batch(12).tokens[:, :-1]


def test_the_bridge_measures_what_the_recipe_measures(documents: torch.Tensor) -> None:
    """Two ways to read and replace MLPs, hooks of a bridge and functions of a Llama model, give the same figures."""
    folder = pretrained.directory("atlas")
    dictionaries = formats.load(formats.find("skip_transcoders", folder, "atlas"))
    bridge, _ = load_bridge("atlas", torch.float32, "cpu")
    splice = Splice(bridge, dictionaries, keep_starts=False)
    found = evaluate(splice, documents.split(5), every_site=False)
    llama = ReplaceableLlama(AutoModelForCausalLM.from_pretrained(folder, local_files_only=True))
    _, values = llama.original(documents)
    for one, site in zip(dictionaries, found.sites, strict=True):
        meter = ReconstructionMeter(one)
        meter.update(values[hook_name(one.layer, one.read)], values[hook_name(one.layer, one.write)])
        assert site.reconstruction.fvu == pytest.approx(meter.figures().fvu, rel=1e-4)
    expected = evaluate_replacement(
        llama.logits,
        replaced_logits(llama, dictionaries),
        lambda tokens: splice.ablated(tokens).logits,
        [(documents, torch.ones_like(documents, dtype=torch.bool))],
    )["all"]
    assert found.replacement is not None
    for name in ("top1", "kl", "ce_original", "ce_replaced", "ce_ablated", "ce_recovered"):
        assert getattr(found.replacement, name) == pytest.approx(getattr(expected, name), rel=1e-3), name


def test_probe_labels_are_true(documents: torch.Tensor) -> None:
    tasks, ids = probe_tasks(), word_ids()
    labels = {
        task: {
            word: int(label(torch.tensor([[ids[word]]]))) for word in ("Dallas", "Paris", "Texas", "46", "51", "the")
        }
        for task, label in tasks.items()
    }
    assert list(labels["is a city"].values()) == [1, 1, 0, 0, 0, 0]
    assert list(labels["city in a US state"].values()) == [1, 0, -1, -1, -1, -1]
    assert list(labels["state, not country"].values()) == [-1, -1, 1, -1, -1, -1]
    assert list(labels["even number"].values()) == [-1, -1, -1, 1, 0, -1]
    assert list(labels["number below 50"].values()) == [-1, -1, -1, 1, 0, -1]
    assert labels["city in Texas"]["Dallas"] == 1 and labels["city in Texas"]["Paris"] == -1
    for task, label in tasks.items():
        found = label(documents)
        assert found.shape == documents.shape and set(found.unique().tolist()) <= {-1, 0, 1}, task
        assert (found[:, 0] == -1).all(), "BOS has no property"


def test_a_sentence_is_about_the_place_that_was_named_in_it() -> None:
    sentences = "the capital of the state containing Dallas is Austin . the capital of France is Paris ."
    words = sentences.split()
    ids = word_ids()
    found = probe_tasks()["sentence about a US place"](torch.tensor([[ids["<bos>"], *(ids[word] for word in words)]]))[
        0
    ]
    after = dict(zip(["<bos>", *words], found.tolist(), strict=True))
    assert found[8] == 1 and found[9] == -1, "at `is` it is known; at Austin the place is named again"
    assert found[1] == -1 and after["France"] == -1 and found[15] == 0
