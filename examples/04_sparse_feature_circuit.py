"""Find the few features that decide a contrast, and check that they suffice: sparse feature circuits.

    python examples/04_sparse_feature_circuit.py

After Marks et al. 2024: prompts come in pairs that differ in one thing, here the number of the subject. Each feature's
effect is what setting it to its value on the other prompt would do to the metric (estimated from gradients). The
circuit of the strongest is kept, every other feature and error is held at its mean, and the metric shows what is left.
"""

from __future__ import annotations

import argparse

import torch

from circuits.effects import faithfulness, indirect_effects, means, strongest
from circuits.targets import token_id
from replacement import ReplacementModel

PAIRS = [("The dog near the cats", "The dogs near the cats"), ("The bird near the horses", "The birds near the horses")]


def main(argv: list[str] | None = None) -> None:
    """Pick the strongest nodes, print them, and how faithful circuits of several sizes are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--dictionaries")
    parser.add_argument("--pair", nargs=2, action="append", metavar="PROMPT", help="two prompts of as many tokens")
    parser.add_argument("--answers", nargs=2, default=["runs", "run"], help="what they should go on with")
    arguments = parser.parse_args(argv)

    model = ReplacementModel.load(arguments.model, dictionaries=arguments.dictionaries)
    pairs = arguments.pair or PAIRS
    clean, patched = (torch.stack([model.tokenize(pair[side]) for pair in pairs]) for side in (0, 1))
    right, wrong = (token_id(model, answer) for answer in arguments.answers)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, right] - logits[:, -1, wrong]

    effects = indirect_effects(model, clean, patched, metric, method="ig")
    tokens = model.token_strings(clean[0])
    print("effect   feature")
    circuit = strongest(effects, 8, errors=False)
    found = [
        (float(effects.features[slot][position, feature]), slot, position, feature)
        for slot, members in circuit.features.items()
        for position, feature in members.nonzero().tolist()
    ]
    for effect, slot, position, feature in sorted(found, key=lambda one: -abs(one[0])):
        words = model.coverage.label(slot, feature) or "no label"
        print(f"{effect:+6.2f}   {words} (L{slot.layer} #{feature} at {tokens[position].strip()})")
    held = means(model, torch.cat([clean, patched]))
    print("nodes   faithfulness   left without them")
    for size in (3, 10, 30, 100):
        nodes, share, left = faithfulness(model, clean, metric, strongest(effects, size), held)
        print(f"{nodes:5d}   {share:12.2f}   {left:17.2f}")


if __name__ == "__main__":
    main()
