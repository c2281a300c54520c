"""A real model that this project did not make: transcoders are trained on it, stored, read back, and a story is traced.

Runs where the model and its stories lie beside the repository, and is skipped elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from replacement import formats
from replacement.dictionary import DictionarySet
from replacement.evaluation import evaluate_reconstruction
from replacement.pretrained.recipe.mlps import ReplaceableLlama
from replacement.training import Activations, TrainingConfig, plans, train
from replacement.training.kinds import MLP_IN, MLP_OUT, hook

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL, STORIES = SHARED / "models" / "stories260k", SHARED / "data" / "tinystories"
pytestmark = pytest.mark.skipif(not (MODEL.is_dir() and STORIES.is_dir()), reason=f"needs {MODEL} and {STORIES}")
PROMPT = "Once upon a time, there was a little girl named"


class StoryActivations:
    """Activations on pieces of stories of one length, BOS before each and left out."""

    def __init__(self, part: str, *, pieces: int = 16, length: int = 129, characters: int = 400_000) -> None:
        from transformers import AutoTokenizer, LlamaForCausalLM

        self.model = ReplaceableLlama(LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32))
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        text = (STORIES / f"{part}.txt").read_text(encoding="utf-8")[:characters].replace("<|endoftext|>", "\n")
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
        self.rows = torch.cat([torch.full((len(ids), 1), tokenizer.bos_token_id), ids], 1)
        self.pieces = pieces
        self.sites = tuple(hook(layer, site) for layer in range(len(self.model.blocks)) for site in (MLP_IN, MLP_OUT))

    @torch.no_grad()
    def batch(self, index: int) -> Activations:
        which = (torch.arange(self.pieces) + index * self.pieces) % len(self.rows)
        _, found = self.model.original(self.rows[which])
        return {name: part.unflatten(0, (self.pieces, -1))[:, 1:].flatten(0, 1) for name, part in found.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skip transcoders, 256 features a layer, trained for 160,000 tokens and stored in float16."""
    config = TrainingConfig(
        kind="skip_transcoder",
        n_features=256,
        k=16,
        start="clusters",
        tokens=160_000,
        batch_tokens=2048,
        learning_rate=4e-3,
    )
    source = StoryActivations("train")
    trainee = train(source, plans(config, len(source.model.blocks)), config=config, show_progress=False)
    dictionaries = trainee.dictionaries()
    folder = tmp_path_factory.mktemp("stories")
    formats.save(DictionarySet({d.layer: d for d in dictionaries}, "stories"), folder, dtype="float16")
    return folder


def test_transcoders_explain_a_foreign_model_on_held_out_stories(trained: Path) -> None:
    """FVU on unseen stories is below 0.45 in every layer with at most 16 active features, in the stored files."""
    source = StoryActivations("valid", characters=60_000)
    layers = range(len(source.model.blocks))
    batches = (source.batch(i) for i in range(6))
    pairs = (tuple([batch[hook(layer, site)] for layer in layers] for site in (MLP_IN, MLP_OUT)) for batch in batches)
    for figures in evaluate_reconstruction(formats.load(trained), pairs):
        assert figures.fvu < 0.45
        assert 1 < figures.l0 < 18


def test_a_story_is_traced_with_rows_that_add_up(trained: Path) -> None:
    """Every row's edges and bias sum to its target on a model and dictionaries that came from files."""
    circuits = pytest.importorskip("circuits")
    from replacement import ReplacementModel

    model = ReplacementModel.load(MODEL, dictionaries=trained)
    graph = circuits.attribute(model, PROMPT, max_features=200)
    assert graph.residual <= 1e-5
    assert len(graph.nodes) > 200
