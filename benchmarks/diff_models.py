"""`circuits diff-models` on atlas and atlas fine-tuned: do the changed facts' features come out on top?

A feature counts as one of the changed facts where at least half of its squared activation, on held-out text that was
neither trained on nor ranked on, is at positions where the base model's likeliest next token is the old answer of a
change and the tuned model's is the new one. Precision of the first k features of the tuned model's list, beside chance:
the share of such features among all that fire.

    python -m replacement.pretrained.recipe finetune --out runs/tuned
    python benchmarks/diff_models.py --tuned runs/tuned --out runs/diff
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from circuits.model_diff import BASE, TUNED, diff_models, held_out_pairs, load_crosscoder, measure
from replacement.evaluation.model_diff import exclusive
from replacement.loading import load_bridge
from replacement.pretrained.recipe.finetune import changes
from replacement.pretrained.recipe.vocabulary import word_ids
from replacement.training.data import open_tokens

RANKED_TOKENS, JUDGED_TOKENS, JUDGED_SEED = 15_000, 30_000, 5
HALF = 0.5
AT = (1, 5, 10, 20)


def changed_positions(bridges: dict, ids: Tensor) -> Tensor:
    """Which change, counted from 0, shows at each position in both models' likeliest next tokens; -1 for none."""
    with torch.no_grad():
        says = {name: bridge(ids).argmax(-1) for name, bridge in bridges.items()}
    found = torch.full_like(ids, -1)
    for number, change in enumerate(changes()):
        before, after = word_ids()[change.before], word_ids()[change.after]
        found[(says[BASE] == before) & (says[TUNED] == after)] = number
    return found


def main() -> None:
    """Train, rank, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", required=True, help="folder that `recipe finetune` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the crosscoder")
    parser.add_argument("--crosscoder", type=Path, help="take this one, train none")
    parser.add_argument("--layer", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    bridges = {
        BASE: load_bridge("atlas", torch.float32, "cpu")[0],
        TUNED: load_bridge(given.tuned, torch.float32, "cpu")[0],
    }
    compared = diff_models(
        bridges, names=("atlas", given.tuned), out=given.out, layer=given.layer, crosscoder=given.crosscoder, top=20,
        held_out=RANKED_TOKENS,
    )  # fmt: skip
    crosscoder = load_crosscoder(Path(compared.crosscoder))
    source = open_tokens("atlas-changed", model=bridges[BASE], context=64, split="held_out")
    ranked = measure(crosscoder, bridges, source, compared.site, RANKED_TOKENS)
    other = open_tokens("atlas-changed", model=bridges[BASE], context=64, split="held_out", seed=JUDGED_SEED)
    mass = torch.zeros(len(changes()) + 1, crosscoder.n_features)  # the last row: no change
    tokens = 0
    for held in held_out_pairs(bridges, other, compared.site, JUDGED_TOKENS):
        with torch.no_grad():
            f = crosscoder.encode(torch.cat([held.base, held.tuned], 1)).pow(2)
        mass.index_add_(0, changed_positions(bridges, held.ids).flatten()[held.where] % len(mass), f)
        tokens += len(f)
    share = mass[:-1].sum(0) / mass.sum(0).clamp_min(1e-12)
    alive, right = mass.sum(0) > 0, share >= HALF
    order = [i for i in exclusive(ranked).tolist() if alive[i]]
    by_norm = [i for i in ranked.relative_norm.argsort(descending=True).tolist() if alive[i]]
    chance = float(right[alive].float().mean())
    print(
        f"{compared.site}: {int(alive.sum())} features fire on {tokens:,} tokens, L0 {compared.l0:.1f}; "
        f"{', '.join(f'{count} {kind}' for kind, count in compared.counts.items())}"
    )
    print(f"features of changed facts: {int(right[alive].sum())}, chance {chance:.1%}")
    print(f"{'first k':>8s} {'precision':>10s} {'by relative norm alone':>24s}")
    for k in AT:
        figures = [float(right[torch.tensor(one[:k])].float().mean()) for one in (order, by_norm)]
        print(f"{k:8d} {figures[0]:10.0%} {figures[1]:24.0%}")
    told = {int(mass[:-1, i].argmax()) for i in order[: AT[-1]] if right[i]}
    print(f"changes that the first {AT[-1]} tell of: {len(told)} of {len(changes())}")
    for one in compared.tuned_only:
        number = int(mass[:-1, one.feature].argmax())
        what = f"{changes()[number].place}: {changes()[number].before} -> {changes()[number].after}"
        says = f"{', '.join(one.promotes_base):40.40s} -> {', '.join(one.promotes_tuned):40.40s}"
        nu = f"nu_r {one.nu_reconstruction:.2f} nu_e {one.nu_error:.2f}"
        judged = what if right[one.feature] else ""
        print(f"{one.feature:6d} share {share[one.feature]:.2f} cos {one.cosine:.2f} {nu} {says} {judged}")


if __name__ == "__main__":
    main()
