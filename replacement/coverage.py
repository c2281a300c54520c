"""Which dictionary stands at which place of a model: one set, or several that share the model between them.

Checks that sets fit each other and the model; knows nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from replacement.crosscoder import Crosscoder
from replacement.dictionary import Dictionary, DictionarySet
from replacement.errors import InputError
from replacement.sites import MLP_READS, WRITES, Place, Slot


class Coverage:
    """Dictionaries by the slot that they read, which is also the first that they write.

    An acausal crosscoder stands at every layer that it reads, as one part a layer.
    """

    def __init__(self, sets: Sequence[DictionarySet]) -> None:
        """Put sets together; raises `InputError` where two want the same slot, or one site is not known."""
        self.sets = tuple(sets)
        self.name = " + ".join(each.name for each in self.sets) or "nothing"
        self.at: dict[Slot, Dictionary] = {}
        self._set_of: dict[Slot, DictionarySet] = {}
        for each in self.sets:
            for dictionary in each:
                for slot in slots_read(dictionary, each.name):
                    self._put(slot, dictionary, each)
        self.at = dict(sorted(self.at.items()))
        self.writes = self._write_sites()

    def _put(self, slot: Slot, dictionary: Dictionary, of: DictionarySet) -> None:
        if slot in self.at:
            raise InputError(
                f"dictionaries {of.name} and {self._set_of[slot].name}: both replace {dictionary.write} of layer "
                f"{slot.layer}; leave one out"
            )
        self.at[slot], self._set_of[slot] = dictionary, of

    def _write_sites(self) -> dict[Slot, str]:
        """The site that is written at each slot."""
        found: dict[Slot, str] = {}
        for dictionary in self:
            for layer in dictionary.write_layers:
                slot = Slot(layer, WRITES[dictionary.write])
                if found.setdefault(slot, dictionary.write) != dictionary.write:
                    raise InputError(
                        f"dictionaries {self.name}: layer {layer} is written at {found[slot]} and {dictionary.write}, "
                        "needs one site"
                    )
        for slot in found:
            sets = {
                each.name for each in self.sets for d in each if slot.layer in d.write_layers and slot.place == place(d)
            }
            if len(sets) > 1:
                raise InputError(
                    f"dictionaries {' and '.join(sorted(sets))}: both replace {found[slot]} of layer {slot.layer}; "
                    "leave one out"
                )
            kinds = {replaces_what_it_reads(d) for d in self if slot.layer in d.write_layers and slot.place == place(d)}
            if len(kinds) > 1:
                raise InputError(
                    f"dictionaries {self.name}: at {found[slot]} of layer {slot.layer} one replaces the MLP and one "
                    "its output; leave one out"
                )
        return dict(sorted(found.items()))

    def __iter__(self) -> Iterator[Dictionary]:
        """Each dictionary once, in the order of the slots that they read."""
        return iter(dict.fromkeys(self.at.values()))

    def writers(self, slot: Slot) -> list[tuple[Slot, Dictionary]]:
        """Dictionaries that write at a slot, each with the slot at which the features that do so are filed."""
        found = [d for d in self if place(d) == slot.place and slot.layer in d.write_layers]
        return [(slot if isinstance(d, Crosscoder) else Slot(d.layer, slot.place), d) for d in found]

    def label(self, slot: Slot, feature: int) -> str:
        """The feature's words, or "" where it has none."""
        of = self._set_of.get(slot)
        return "" if of is None else of.label(self.at[slot].layer, feature)


def place(dictionary: Dictionary) -> Place:
    """The place of a block where a dictionary stands."""
    return WRITES[dictionary.write]


def replaces_what_it_reads(dictionary: Dictionary) -> bool:
    """Whether it writes where it reads, as an SAE does, and not a part of the model that lies between."""
    return dictionary.read == dictionary.write


def slots_read(dictionary: Dictionary, name: str) -> list[Slot]:
    """Where a dictionary's features are filed; raises `InputError` for sites that can't be replaced."""
    where = f"dictionaries {name}, layer {dictionary.layer}"
    if dictionary.write not in WRITES:
        raise InputError(f"{where}: write site {dictionary.write!r} is not known; known: {', '.join(WRITES)}")
    if not replaces_what_it_reads(dictionary):
        if dictionary.read not in MLP_READS:
            raise InputError(f"{where}: read site {dictionary.read!r} is not known; known: {', '.join(MLP_READS)}")
        if place(dictionary) is not Place.MLP:
            raise InputError(
                f"{where}: reads {dictionary.read} and writes {dictionary.write}; a dictionary writes where it reads, "
                "or reads an MLP's input and writes its output"
            )
    if isinstance(dictionary, Crosscoder):
        if len(dictionary.models) > 1:
            raise InputError(
                f"{where}: reads the models {' and '.join(dictionary.models)}; a trace is of one model, see "
                "`circuits diff-models`"
            )
        return [Slot(layer, place(dictionary)) for layer in dictionary.part_layers]
    return [Slot(dictionary.layer, place(dictionary))]
