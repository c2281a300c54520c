"""How the embedded model `atlas` is made: facts, sentences, tokenizer, training, task table, model card.

`python -m replacement.pretrained.recipe train --out DIR` makes the model folder again; `tasks` prints its accuracies.
"""
