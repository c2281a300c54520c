"""`circuits diff-models` on atlas and atlas fine-tuned: do the changed facts' features come out on top?

Two criteria, the first beside its chance, the share of all features that fire which meet it:

- *fires*: at least half of its squared activation, on held-out text that was neither trained nor ranked on, is at
  positions where the base model's likeliest next token is a change's old answer and the tuned model's is the new one;
- *says*: of the tokens that its base row raises most by the direct path to the logits, three, one is the old answer of
  a change, and of its tuned row's three, one is the new answer of that change.

How many of the first features of the list fire so, and how many changes they say; beside them the same features ordered
by all of their share of the divergence, by relative norm, and by how much they write otherwise (mean square of what a
feature adds to the difference of the two streams). Every pair of models is compared by several crosscoders.

    for seed in 0 1 2; do python -m replacement.pretrained.recipe finetune --seed $seed --out runs/tuned-$seed; done
    python benchmarks/diff_models.py --tuned runs/tuned-* --out runs/diff --seeds 0 1
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.model_diff import BASE, TUNED, diff_models, held_out_pairs, load_crosscoder
from replacement.crosscoder import Crosscoder
from replacement.loading import load_bridge
from replacement.pretrained.recipe.finetune import changes
from replacement.pretrained.recipe.vocabulary import word_ids
from replacement.sites import read_weights
from replacement.training.data import open_tokens

RANKED_TOKENS, JUDGED_TOKENS, JUDGED_SEED = 15_000, 20_000, 5
HALF, SAID = 0.5, 3
AT = (1, 5, 10, 20)
EVERY = 512
"""Features of a crosscoder: all that fire are listed."""


class Judged(NamedTuple):
    """What text that was neither trained nor ranked on says of the features, and of the two models."""

    share: Tensor  #: of each feature's squared activation: what of it is at changed answers
    square: Tensor  #: sum of it
    tokens: float  #: share of the tokens that are changed answers
    stream: float  #: what of the squared difference of the two streams is at them
    divergence: float  #: what of the KL between the two models' next tokens is at them


def at_changes(bridges: dict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where a change shows in both models' likeliest next tokens, and KL(tuned, base) of these."""
    with torch.no_grad():
        said = {name: bridge(ids).log_softmax(-1) for name, bridge in bridges.items()}
    found = torch.zeros_like(ids, dtype=torch.bool)
    for change in changes():
        before, after = word_ids()[change.before], word_ids()[change.after]
        found |= (said[BASE].argmax(-1) == before) & (said[TUNED].argmax(-1) == after)
    return found, (said[TUNED].exp() * (said[TUNED] - said[BASE])).sum(-1)


def judged(crosscoder: Crosscoder, bridges: dict, place: str) -> Judged:
    """Where features fire and where the models differ, on the text to judge by."""
    source = open_tokens("atlas-changed", model=bridges[BASE], context=64, split="held_out", seed=JUDGED_SEED)
    at, whole = torch.zeros(2, crosscoder.n_features)
    sums = torch.zeros(2, 3)
    for held in held_out_pairs(bridges, source, place, JUDGED_TOKENS):
        with torch.no_grad():
            f = crosscoder.encode(torch.cat([held.base, held.tuned], 1)).pow(2)
        changed, kl = (one[held.keep] for one in at_changes(bridges, held.ids))
        figures = torch.stack([torch.ones_like(kl), (held.tuned - held.base).pow(2).sum(1), kl], 1)
        for i, one in enumerate((figures[changed], figures)):
            sums[i] += one.sum(0)
        whole += f.sum(0)
        at += f[changed].sum(0)
    return Judged(at / whole.clamp_min(1e-12), whole, *(sums[0] / sums[1]).tolist())


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


def judge(tuned: str, out: Path, *, seed: int, layer: int | None) -> None:
    """Train, rank, judge, print."""
    bridges = {name: load_bridge(model, torch.float32, "cpu")[0] for name, model in ((BASE, "atlas"), (TUNED, tuned))}
    compared = diff_models(
        bridges, names=("atlas", tuned), out=out, layer=layer, held_out=RANKED_TOKENS, top=EVERY, seed=seed,
        show_progress=False,
    )  # fmt: skip
    crosscoder = load_crosscoder(Path(compared.crosscoder))
    text = judged(crosscoder, bridges, compared.site)
    right, said, alive = text.share >= HALF, says(crosscoder, bridges), text.square > 0
    counts = ", ".join(f"{count} {kind}" for kind, count in compared.counts.items() if count)
    print(f"{tuned}, crosscoder {seed}: {compared.site}, L0 {compared.l0:.1f}; {counts}")
    parts = ", ".join(f"{name} {value:.4f}" for name, value in compared.divergence._asdict().items())
    chance = float(right[alive].float().mean())
    print(f"  nats a token: {parts}; {int(right.sum())} features fire at changes, chance {chance:.1%}")
    held = f"{text.tokens:.1%} of the tokens, {text.stream:.0%} of the squared difference of the streams"
    print(f"  at changed answers: {held}, {text.divergence:.0%} of the KL")
    rows = crosscoder.W_dec.detach()
    otherwise = ((rows[:, 1] - rows[:, 0]).pow(2).sum(1) * text.square).tolist()
    listed = [one for one in compared.differing if alive[one.feature]]
    orders = {
        "listed": listed,
        "by share of the divergence": sorted(listed, key=lambda one: -one.share),
        "by what they write otherwise": sorted(listed, key=lambda one: -otherwise[one.feature]),
        "by relative norm": sorted(listed, key=lambda one: -one.relative_norm),
    }
    for name, order in orders.items():
        firsts = [[one.feature for one in order[:k]] for k in AT]
        hits = "  ".join(f"{int(right[some].sum())} of {len(some)}" for some in firsts)
        told = "  ".join(f"{len(set().union(*(said[i] for i in some)))} of {len(changes())}" for some in firsts)
        print(f"  {name:28s}  fire at changes: {hits}   changes said: {told}")
    for one in listed[: AT[2]]:
        about = [changes()[n] for n in sorted(said[one.feature])]
        told = ", ".join(f"{change.place}: {change.before} -> {change.after}" for change in about)
        where = f"{one.share:6.1%} of the divergence, {one.own_share:5.1%} own"
        figures = f"cos {one.cosine:.2f} nu_r {one.nu_reconstruction:.2f} nu_e {one.nu_error:.2f}"
        fires = f"at changed answers {text.share[one.feature]:4.0%}"
        print(f"{one.feature:6d} {one.kind:12s} {where}, {fires}  {figures}  {told}", flush=True)


def main() -> None:
    """Judge every pair with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", required=True, nargs="+", help="folders that `recipe finetune` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the crosscoders; finished ones are taken")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the crosscoders (default: 0)")
    parser.add_argument("--layer", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for tuned in given.tuned:
        for seed in given.seeds:
            judge(tuned, given.out / f"{Path(tuned).name}-{seed}", seed=seed, layer=given.layer)


if __name__ == "__main__":
    main()
