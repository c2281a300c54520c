"""`circuits diff-models` on atlas and atlas fine-tuned: do the changed facts' features come out on top?

Two criteria, each beside its chance, the share of all features that fire which meet it:

- *fires*: at least half of its squared activation, on held-out text that was neither trained nor ranked on, is at
  positions where the base model's likeliest next token is a change's old answer and the tuned model's is the new one;
- *says*: of the tokens that its base row raises most by the direct path to the logits, three, one is the old answer of
  a change, and of its tuned row's three, one is the new answer of that change.

Precision of the first k features of the tuned model's list, and of the same features ordered by relative norm alone.

    python -m replacement.pretrained.recipe finetune --out runs/tuned
    python benchmarks/diff_models.py --tuned runs/tuned --out runs/diff
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from circuits.model_diff import BASE, TUNED, diff_models, held_out_pairs, load_crosscoder, measure
from replacement.crosscoder import Crosscoder
from replacement.evaluation.model_diff import exclusive
from replacement.loading import load_bridge
from replacement.pretrained.recipe.finetune import changes
from replacement.pretrained.recipe.vocabulary import word_ids
from replacement.sites import read_weights
from replacement.training.data import open_tokens

RANKED_TOKENS, JUDGED_TOKENS, JUDGED_SEED = 15_000, 20_000, 5
HALF, SAID = 0.5, 3
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


def fires(crosscoder: Crosscoder, bridges: dict, place: str) -> tuple[Tensor, Tensor]:
    """Share of each feature's squared activation at changed answers, and whether it fires at all."""
    source = open_tokens("atlas-changed", model=bridges[BASE], context=64, split="held_out", seed=JUDGED_SEED)
    at, whole = torch.zeros(2, crosscoder.n_features)
    for held in held_out_pairs(bridges, source, place, JUDGED_TOKENS):
        with torch.no_grad():
            f = crosscoder.encode(torch.cat([held.base, held.tuned], 1)).pow(2)
        whole += f.sum(0)
        at += f[changed_positions(bridges, held.ids).flatten()[held.where] >= 0].sum(0)
    return at / whole.clamp_min(1e-12), whole > 0


def says(crosscoder: Crosscoder, bridges: dict) -> list[set[int]]:
    """The changes, counted from 0, that each feature's two rows say."""
    raised = []
    for part, name in enumerate((BASE, TUNED)):
        weights = read_weights(bridges[name], torch.float32)
        effect = (crosscoder.W_dec[:, part].detach() * weights.ln_final.weight) @ weights.W_U
        raised.append(effect.topk(SAID).indices.tolist())
    answers = [(word_ids()[change.before], word_ids()[change.after]) for change in changes()]
    return [
        {number for number, (before, after) in enumerate(answers) if before in base and after in tuned}
        for base, tuned in zip(*raised, strict=True)
    ]


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
        name: load_bridge(model, torch.float32, "cpu")[0] for name, model in ((BASE, "atlas"), (TUNED, given.tuned))
    }
    compared = diff_models(
        bridges, names=("atlas", given.tuned), out=given.out, layer=given.layer, crosscoder=given.crosscoder,
        held_out=RANKED_TOKENS,
    )  # fmt: skip
    crosscoder = load_crosscoder(Path(compared.crosscoder))
    source = open_tokens("atlas-changed", model=bridges[BASE], context=64, split="held_out")
    ranked = measure(crosscoder, bridges, source, compared.site, RANKED_TOKENS)
    share, alive = fires(crosscoder, bridges, compared.site)
    said = says(crosscoder, bridges)
    right = {"fires": share >= HALF, "says": torch.tensor([bool(one) for one in said])}
    orders = {
        "listed": [i for i in exclusive(ranked).tolist() if alive[i]],
        "by norm": [i for i in ranked.relative_norm.argsort(descending=True).tolist() if alive[i]],
    }
    counts = ", ".join(f"{count} {kind}" for kind, count in compared.counts.items())
    print(f"{compared.site}: {int(alive.sum())} features fire, L0 {compared.l0:.1f}; {counts}")
    for what, meets in right.items():
        print(f"{what}: {int(meets[alive].sum())} features, chance {float(meets[alive].float().mean()):.1%}")
        for name, order in orders.items():
            figures = (f"@{min(k, len(order))} {float(meets[order[:k]].float().mean()):.0%}" for k in AT)
            print(f"  precision, {name:8s} {'  '.join(figures)}")
    told = set().union(*(said[i] for i in orders["listed"]))
    print(f"changes that the list says: {len(told)} of {len(changes())}")
    for i in orders["listed"][: AT[-1]]:
        about = ", ".join(f"{changes()[n].place}: {changes()[n].before} -> {changes()[n].after}" for n in said[i])
        nu = f"nu_r {ranked.of_tuned.reconstruction[i]:.2f} nu_e {ranked.of_tuned.error[i]:.2f}"
        print(
            f"{i:6d} {ranked.kinds[i]:10s} at changed answers {share[i]:.0%}  cos {ranked.cosine[i]:.2f} {nu}  {about}"
        )


if __name__ == "__main__":
    main()
