"""Is a cross-layer transcoder better than per-layer transcoders of as many parameters?

    python benchmarks/clt.py --work DIR [--seeds 0 1 2] [--features 808 704 616 560 560 680] [--bridging 300]

For each seed both sets are trained for atlas by its recipe (about 15 CPU-minutes a set; kept in DIR, where a stopped
run goes on), then compared on documents that no training used: top-1 agreement and KL of the model with all MLPs
replaced, and mean replacement and completeness scores over 100 prompts. Prints a row a set and seed, and the difference
of each pair. --features gives the cross-layer transcoder's layers widths of their own, of as many parameters in all;
--bridging ends both sets with so many steps in which half of the MLPs, drawn anew each step, are the model's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch

from circuits.scores import graph_scores
from replacement import ReplacementModel, formats
from replacement.dictionary import DictionarySet
from replacement.evaluation import evaluate_replacement
from replacement.loading import load_bridge
from replacement.pretrained import directory
from replacement.pretrained.recipe.dictionaries import RECIPES, Recipe, load_model, make
from replacement.pretrained.recipe.quality import held_out, replaced_logits
from replacement.substitution import Ablation
from replacement.training import EndToEndConfig
from replacement.training.kinds import MLP_OUT, hook

SETS = ("transcoders", "clt")


class Row(NamedTuple):
    """What is compared of one set."""

    parameters: int  #: as trained, before features that hardly ever fire are dropped
    top1: float
    top1_answers: float
    kl: float
    replacement: float
    completeness: float


def main() -> None:
    """Train what is not there yet, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--features", type=int, nargs=6, help="of the cross-layer transcoder, by layer")
    parser.add_argument("--coarse", type=int, help="of these, nested in front; at most half of the fewest")
    parser.add_argument("--bridging", type=int, default=0, metavar="STEPS")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipes = {name: _changed(RECIPES[name], bridging=given.bridging) for name in SETS}
    if given.features:
        usual = recipes["clt"].reconstruction
        prefixes = (given.coarse,) if given.coarse else usual.prefixes
        widths = dataclasses.replace(usual, n_features=tuple(given.features), prefixes=prefixes)
        recipes["clt"] = dataclasses.replace(recipes["clt"], reconstruction=widths)
    print(f"{'set':<14}{'seed':>5}{'parameters':>12}{'top-1':>9}{'answers':>9}{'KL':>9}{'repl.':>8}{'compl.':>8}")
    for seed in given.seeds:
        rows = {name: measured(recipes[name], name, seed, work=given.work, prompts=given.prompts) for name in SETS}
        for name, row in rows.items():
            _show(name, seed, f"{row.parameters:>12,}", row)
        one, other = rows["transcoders"], rows["clt"]
        _show("difference", seed, " " * 12, Row(*(b - a for a, b in zip(one, other, strict=True))))


def measured(recipe: Recipe, name: str, seed: int, *, work: Path, prompts: int) -> Row:
    """Train (or read) one set and measure it."""
    folder = work / f"seed_{seed}" / name
    model = load_model(directory("atlas"))
    if not (folder / "config.json").is_file():
        make(model, _seeded(recipe, seed), folder, work=work / f"seed_{seed}" / f"{name}.work")
    stored, wanted = formats.load(folder), json.loads(json.dumps(dataclasses.asdict(_seeded(recipe, seed))))
    stages = {f"end_to_end_{i}": stage for i, stage in enumerate(wanted["end_to_end"])}
    stages["reconstruction"] = wanted["reconstruction"]
    if stages != {name: of for name, of in stored.metadata.items() if name in stages or name.startswith("end_to_end")}:
        raise SystemExit(f"{folder}: was made with other settings; pass another --work")
    written = [hook(layer, MLP_OUT) for layer in range(len(model.blocks))]
    figures = evaluate_replacement(
        model.logits,
        replaced_logits(model, stored),
        lambda tokens: model.replaced(tokens, None, Ablation(written)).detach(),
        ((batch.tokens, batch.answer) for batch in held_out(1024)),
    )
    bridge, _ = load_bridge("atlas", torch.float32, "cpu")
    beginnings = [batch.tokens[0, :24] for batch in held_out(64 * prompts)]
    scores = graph_scores(ReplacementModel(bridge, stored, name="atlas"), beginnings, max_features=None)
    every, answers = figures["all"], figures["answer"]
    return Row(_parameters(recipe, stored), every.top1, answers.top1, every.kl, scores.replacement, scores.completeness)


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    stages = tuple(dataclasses.replace(stage, seed=stage.seed + 100 * seed) for stage in recipe.end_to_end)
    return Recipe(dataclasses.replace(recipe.reconstruction, seed=seed), stages)


def _changed(recipe: Recipe, *, bridging: int) -> Recipe:
    last = EndToEndConfig(
        steps=bridging, learning_rate=5e-4, aux_weight=0.0, reconstruction_weight=10.0, bridging_weight=1.0,
        threshold_memory=0.9,
    )  # fmt: skip
    return recipe if not bridging else dataclasses.replace(recipe, end_to_end=(*recipe.end_to_end, last))


def _parameters(recipe: Recipe, stored: DictionarySet) -> int:
    dictionaries, total = list(stored), 0
    for index, dictionary in enumerate(dictionaries):
        per_feature = dictionary.d_in + 1 + len(dictionary.write_layers) * dictionary.d_out
        total += recipe.reconstruction.of(index, len(dictionaries)).width * per_feature + dictionary.d_out
    return total


def _show(name: str, seed: int, parameters: str, row: Row) -> None:
    shares = f"{100 * row.top1:>8.2f}%{100 * row.top1_answers:>8.2f}%"
    print(
        f"{name:<14}{seed:>5}{parameters}{shares}{row.kl:>9.4f}{row.replacement:>8.3f}{row.completeness:>8.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
