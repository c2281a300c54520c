"""Is a cross-layer transcoder better than per-layer transcoders of as many parameters?

    python benchmarks/clt.py --work DIR [--seeds 0 1 2] [--floor 0.2]

For each seed both sets are trained for atlas by its recipe (about 15 CPU-minutes a set; kept in DIR, where a stopped
run goes on), then compared on documents that no training used: top-1 agreement and KL of the model with all MLPs
replaced, and mean replacement and completeness scores over 100 prompts. Prints a row a set and seed, and the difference
of each pair. `L0` is how many features fire at a token, the mean over layers. --floor trains the transcoders with
another floor under activations than their recipe's: the lower it is, the more features fire.
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
from replacement.pretrained.recipe.mlps import ReplaceableLlama
from replacement.pretrained.recipe.quality import held_out, replaced_logits
from replacement.substitution import Ablation
from replacement.training.kinds import MLP_IN, MLP_OUT, hook

SETS = ("transcoders", "clt")


class Row(NamedTuple):
    """What is compared of one set."""

    parameters: int  #: as trained, before features that hardly ever fire are dropped
    top1: float
    top1_answers: float
    kl: float
    replacement: float
    completeness: float
    l0: float


def main() -> None:
    """Train what is not there yet, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--floor", type=float, help="of the transcoders, instead of their recipe's")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipes = {name: RECIPES[name] for name in SETS}
    if given.floor is not None:
        usual = recipes["transcoders"]
        lower = dataclasses.replace(usual.reconstruction, floor=given.floor)
        recipes["transcoders"] = dataclasses.replace(usual, reconstruction=lower)
    print(
        f"{'set':<14}{'seed':>5}{'parameters':>12}{'top-1':>9}{'answers':>9}{'KL':>9}{'repl.':>8}{'compl.':>8}{'L0':>6}"
    )
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
    sizes = _parameters(recipe, stored), every.top1, answers.top1, every.kl
    return Row(*sizes, scores.replacement, scores.completeness, _l0(model, stored))


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    stages = tuple(dataclasses.replace(stage, seed=stage.seed + 100 * seed) for stage in recipe.end_to_end)
    return Recipe(dataclasses.replace(recipe.reconstruction, seed=seed), stages)


@torch.no_grad()
def _l0(model: ReplaceableLlama, stored: DictionarySet) -> float:
    """Features that fire at a token of held-out documents, the start left out; mean over dictionaries."""
    fired = tokens = 0
    for batch in held_out(1024):
        _, found = model.original(batch.tokens[:, :-1])
        inside = torch.ones_like(batch.tokens[:, :-1], dtype=torch.bool)
        inside[:, 0] = False
        tokens += int(inside.sum())
        for dictionary in stored:
            x = found[hook(dictionary.layer, MLP_IN)][inside.flatten()]
            fired += int((dictionary.encode(x) > 0).sum())
    return fired / tokens / len(list(stored))


def _parameters(recipe: Recipe, stored: DictionarySet) -> int:
    dictionaries, total = list(stored), 0
    for index, dictionary in enumerate(dictionaries):
        per_feature = dictionary.d_in + 1 + len(dictionary.write_layers) * dictionary.d_out
        total += recipe.reconstruction.of(index, len(dictionaries)).width * per_feature + dictionary.d_out
    return total


def _show(name: str, seed: int, parameters: str, row: Row) -> None:
    shares = f"{100 * row.top1:>8.2f}%{100 * row.top1_answers:>8.2f}%"
    print(
        f"{name:<14}{seed:>5}{parameters}{shares}{row.kl:>9.4f}{row.replacement:>8.3f}{row.completeness:>8.3f}{row.l0:>6.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
