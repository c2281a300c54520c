"""Makes, labels and measures the dictionaries that ship with the embedded model.

`python -m replacement.pretrained.recipe dictionaries` trains all sets for a model folder; with `--evaluate` it prints
the figures of stored ones, read back from their float16 files. Knows the settings; the training itself is
`replacement.training`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM

from replacement import formats
from replacement.activation import Activation, JumpReLU
from replacement.cross_layer import CrossLayerTranscoder
from replacement.dictionary import Dictionary, DictionarySet, LearnedDictionary
from replacement.encoding import Linear
from replacement.errors import InputError
from replacement.pretrained import directory
from replacement.pretrained.recipe.concepts import annotate
from replacement.pretrained.recipe.corpus import Corpus
from replacement.pretrained.recipe.labels import Profile, label_features, profile
from replacement.pretrained.recipe.mlps import CorpusActivations, ReplaceableLlama, corpus_documents
from replacement.pretrained.recipe.quality import measure, table
from replacement.training import EndToEndConfig, Trainee, TrainingConfig, plans, train, train_end_to_end
from replacement.training.kinds import MLP_IN, hook
from replacement.transcoder import Transcoder

RECONSTRUCTION_SEED, END_TO_END_SEED, PROFILE_SEED = 20_000_000, 40_000_000, 60_000_000
"""First seeds of the documents of each stage; all different from each other, the model's and the held-out ones."""
_PROFILE_DOCUMENTS, _BATCH = 8192, 64
_LEAST_FIRES = 4
"""Strong activations over the profile's documents that a feature needs to be kept."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of one set."""

    reconstruction: TrainingConfig
    end_to_end: tuple[EndToEndConfig, ...]  #: stages, one after the other on documents of their own


_RECONSTRUCTION = TrainingConfig(
    n_features=1536,
    prefixes=(512,),
    k=(4, 4, 6, 6, 6, 6),
    floor=0.3,
    start="clusters",
    tokens=1_500_000,
    buffer_bytes=100_000_000,
)
_OTHER_SHARE = 0.15  # what a sentence asks for counts more than how it goes on
_END_TO_END = (
    EndToEndConfig(steps=1000, learning_rate=1e-3, aux_weight=0.0, other_share=_OTHER_SHARE),
    EndToEndConfig(
        steps=1400, learning_rate=1e-3, aux_weight=0.0, other_share=_OTHER_SHARE, reconstruction_weight=10.0
    ),
)
_WIDEN = EndToEndConfig(
    steps=700,
    learning_rate=1e-3,
    aux_weight=0.0,
    other_share=_OTHER_SHARE,
    reconstruction_weight=3.0,
    threshold_memory=0.9,
    layers=(5,),
    widen=0.3,
    k=24,
    input_noise=0.15,
)
"""The last layer's narrow features miss cities that no two-hop sentence held in training; this stage widens them."""
RECIPES = {
    "transcoders": Recipe(_RECONSTRUCTION, (*_END_TO_END, _WIDEN)),
    "clt": Recipe(
        # a feature of layer 0 costs 7 d, one of layer 5 costs 2 d; with a lower floor as many fire as in the others
        dataclasses.replace(
            _RECONSTRUCTION, kind="clt", n_features=(840, 704, 616, 560, 560, 680), prefixes=(224,), floor=0.15
        ),
        (*_END_TO_END, _WIDEN),
    ),
    "skip_transcoders": Recipe(
        # a skip that learns from the start takes what features would have stood for: 31 states had one, not 50
        dataclasses.replace(_RECONSTRUCTION, kind="skip_transcoder", skip_starts=1.0),
        (*_END_TO_END, _WIDEN),
    ),
}
"""The sets that ship, by folder name."""


def load_model(folder: Path) -> ReplaceableLlama:
    """The model of a Hugging Face folder; raises `InputError` where there is none."""
    if not (folder / "config.json").is_file():
        raise InputError(f"dictionaries(model={str(folder)!r}): no config.json there; needs a model folder")
    return ReplaceableLlama(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))


def make(model: ReplaceableLlama, recipe: Recipe, out: Path, *, work: Path, show_progress: bool = True) -> None:
    """Train one set through all stages, drop features that hardly ever fire, label the rest, write the folder.

    work: folder of the stages' checkpoints; a stopped run goes on from them.
    """
    work.mkdir(parents=True, exist_ok=True)
    fast = ReplaceableLlama(model.model, precision=torch.bfloat16)
    source = CorpusActivations(fast, first_seed=RECONSTRUCTION_SEED)
    trainee = train(
        source,
        plans(recipe.reconstruction, len(model.blocks)),
        config=recipe.reconstruction,
        checkpoint=work / "reconstruction.safetensors",
        show_progress=show_progress,
    )
    for stage, config in enumerate(recipe.end_to_end):
        train_end_to_end(
            fast,
            trainee,
            partial(corpus_documents, documents=config.documents, first_seed=END_TO_END_SEED + 1_000_000 * stage),
            config=config,
            checkpoint=work / f"end_to_end_{stage}.safetensors",
            show_progress=show_progress,
        )
    finish(model, trainee, recipe, out)


def finish(model: ReplaceableLlama, trainee: Trainee, recipe: Recipe, out: Path) -> None:
    """Drop features that hardly ever fire, label the rest, write the folder."""
    dictionaries = trainee.dictionaries()
    kept, labels, dropped = {}, {}, {}
    for dictionary, found in zip(dictionaries, _profiles(model, dictionaries), strict=True):
        alive = (found.fires[0].sum(1) >= _LEAST_FIRES).nonzero().flatten()
        layer = dictionary.layer
        kept[layer] = keep_features(dictionary, alive)
        dropped[layer] = dictionary.n_features - len(alive)
        labels[layer] = label_features(kept[layer], found.rows(alive), _output(model))
    metadata = {
        "reconstruction": dataclasses.asdict(recipe.reconstruction),
        **{f"end_to_end_{i}": dataclasses.asdict(config) for i, config in enumerate(recipe.end_to_end)},
        "dropped_because_too_rare": dropped,
    }
    formats.save(DictionarySet(kept, out.name, labels, metadata), out, dtype="float16")


def relabel(model: ReplaceableLlama, folder: Path) -> None:
    """Make the labels of a stored set anew."""
    stored = formats.load(folder)
    labels = {
        dictionary.layer: label_features(dictionary, found, _output(model))
        for dictionary, found in zip(stored, _profiles(model, list(stored)), strict=True)
    }
    formats.save(dataclasses.replace(stored, labels=labels), folder, dtype="float16")


@torch.no_grad()
def _profiles(model: ReplaceableLlama, dictionaries: Sequence[Dictionary]) -> list[Profile]:
    """What every layer's features fire on, from one pass a batch over documents of their own."""
    found = [profile(dictionary) for dictionary in dictionaries]
    for index in range(_PROFILE_DOCUMENTS // _BATCH):
        batch = Corpus(PROFILE_SEED + index).batch(_BATCH)
        _, activations = model.original(batch.tokens[:, :-1])
        annotations = annotate(batch.tokens, batch.answer)
        for each, dictionary in zip(found, dictionaries, strict=True):
            count = index >= _PROFILE_DOCUMENTS // _BATCH // 8  # the first eighth finds the peaks
            each.add(dictionary, activations[hook(dictionary.layer, MLP_IN)], annotations, count=count)
    return found


def keep_features(dictionary: LearnedDictionary, features: Int[Tensor, " n"]) -> LearnedDictionary:
    """The dictionary without all other features: the same map where those never fire.

    Raises `InputError` where features are not one encoder row each.
    """
    if not isinstance(dictionary.encoding, Linear):
        raise InputError(
            f"keep_features(layer {dictionary.layer}): its encoder is {dictionary.encoding.name}, and its features "
            "belong together; pass one with a linear encoder"
        )
    given: dict[str, Any] = {name: getattr(dictionary, name) for name in ("layer", "read", "write")}
    given |= {name: getattr(dictionary, name).detach()[features] for name in ("W_enc", "b_enc", "W_dec")}
    given |= {"b_dec": dictionary.b_dec.detach(), "activation": _activation_of(dictionary, features)}
    if isinstance(dictionary, CrossLayerTranscoder):
        return CrossLayerTranscoder(**given)
    return Transcoder(**given, W_skip=None if dictionary.W_skip is None else dictionary.W_skip.detach())


def _activation_of(dictionary: LearnedDictionary, features: Int[Tensor, " n"]) -> Activation:
    activation = dictionary.activation
    if isinstance(activation, JumpReLU) and activation.threshold.ndim:
        return JumpReLU(activation.threshold.detach()[features])
    return activation


def _output(model: ReplaceableLlama) -> Float[Tensor, "d_model vocab"]:
    unembed = model.model.lm_head.weight
    return model.model.model.norm.weight[:, None] * (unembed - unembed.mean(0)).T


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `dictionaries` to the recipe's command line; its function is the default `run`."""
    parser = commands.add_parser("dictionaries", help="train, label or evaluate the model's dictionaries")
    parser.add_argument("--model", type=Path, help="model folder (default: the one that ships)")
    parser.add_argument("--out", type=Path, help="folder of the sets (default: `dictionaries` in the model folder)")
    parser.add_argument("--set", choices=sorted(RECIPES), help="one set only (default: all)")
    parser.add_argument(
        "--work", type=Path, default=Path("dictionaries.work"), help="folder of checkpoints (default: %(default)s)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--evaluate", action="store_true", help="train nothing: print the figures of the stored sets")
    what.add_argument("--label", action="store_true", help="train nothing: make the labels of the stored sets anew")
    what.add_argument(
        "--card", action="store_true", help="train nothing: measure the stored sets and write their README.md"
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Carry out the `dictionaries` command."""
    torch.set_num_threads(1)
    folder = given.model or directory("atlas")
    out = given.out or folder / "dictionaries"
    model = load_model(folder)
    for name in [given.set] if given.set else RECIPES:
        if given.label:
            relabel(model, out / name)
        elif not (given.evaluate or given.card):
            make(model, RECIPES[name], out / name, work=given.work / name)
        figures = table(measure(model, formats.load(out / name)))
        print(f"\n## {name}\n\n{figures}", flush=True)
        if not given.evaluate:
            write_card(out, name, figures)
    return 0


def write_card(out: Path, name: str, figures: str) -> None:
    """Write the README of one set (settings, figures) and the one of the folder (how to read them)."""
    stored = formats.load(out / name)
    size = sum(path.stat().st_size for path in (out / name).iterdir() if path.name != "README.md")
    recipe = {stage: of for stage, of in stored.metadata.items() if stage.startswith(("reconstruction", "end_to_end"))}
    lines = [f"# {name} of atlas\n", "What the figures mean is said in the README one folder up.\n"]
    lines += [f"- {stage}: " + ", ".join(f"{k} {v}" for k, v in dict(of).items()) for stage, of in recipe.items()]
    gone = ", ".join(str(n) for n in stored.metadata.get("dropped_because_too_rare", {}).values())
    lines += [f"- dropped after training, by layer: {gone}", f"- size on disk: {size / 1e6:.1f} MB\n", figures]
    (out / name / "README.md").write_text("\n".join(lines), encoding="utf-8")
    (out / "README.md").write_text(_CARD, encoding="utf-8")
    print(f"wrote {out / name / 'README.md'}", file=sys.stderr)


_CARD = f"""# Dictionaries of atlas

Per-layer transcoders with and without a skip connection, which read an MLP's input (`mlp.hook_in`) and write its output
(`mlp.hook_out`), and a cross-layer transcoder, which writes the outputs of all later MLPs too. Made by
`python -m replacement.pretrained.recipe dictionaries` on generated text:

1. features start at clusters of tokens (k-means and Ward's linkage on the MLP's inputs and outputs), each with a linear
   detector of its cluster: 512 coarse clusters and 1,024 fine ones a layer;
2. all layers learn to reconstruct their MLPs (BatchTopK with a floor under each feature's activation, AuxK; the coarse
   features must also reconstruct alone; the cross-layer transcoder has as many parameters as the transcoders, so fewer
   features, most of them in early layers); skip connections stay at zero, so that they take nothing from the features;
3. the model with *all* MLPs replaced learns the original's next-token distribution, on all answer tokens and a sample
   of the others; skip connections learn from here on;
4. the last layer's features are widened (biases up, no floor, noise on their inputs) and trained on: narrow ones missed
   cities that no two-hop sentence held in training;
5. features with fewer than {_LEAST_FIRES} strong activations in {_PROFILE_DOCUMENTS:,} documents are dropped, so widths
   differ by layer.

No label, fact or state was seen in training: clusters are found in activations alone. Each set is what one run of the
command gives, with settings that were chosen on earlier states of the model: stage 4's with a third of the questions
about held-out (H2) cities in sight, the skip set's as the best of four (floors 0.2, 0.3 and 0.4 with a skip that learns
from the start, and this one) by figures like those below, the cross-layer set's as the best of seven (widths by layer,
floors 0.15 to 0.3) by top-1 agreement and replacement score. So these figures, and those of the cities, carry a slight
selection.

Figures in each set's README: float16 files as they ship, read back; documents of the corpus with seeds that no training
of dictionaries used. FVU, L0, dead fraction and state features on 8,192 documents (516,096 tokens, BOS left out); dead
means no fire at any of them. Agreement, KL and cross-entropy on 1,024 of them (65,536 positions), with the MLP replaced
at every position, also at BOS. F1 of a feature as a detector of a state: 2 hits / (fires + positives), for the best
feature of any layer. "Among all tokens" counts firing on the state's own name and attributes as wrong.

Labels (`labels.json`) say what a feature's strong activation coincides with on the corpus (`recipe/labels.py`): a
description, not a proof. `python -m replacement.pretrained.recipe dictionaries --evaluate` prints these figures.
"""
