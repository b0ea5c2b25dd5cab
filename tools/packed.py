"""Millions of utterances in little more memory than their text, shared by all worker processes.

Three million objects in a list are 1.3 GB in small pieces. Python counts the references to an
object inside that object, so that a forked process which only reads them writes to them, and ends
up with a copy of them all. Here they stand serialised one behind the other in a single piece of
memory to which nobody writes. (The idea is Detectron2's, see
ppwwyyxx.com/blog/2022/Demystify-RAM-Usage-in-Multiprocess-DataLoader.)
"""

import pickle
from array import array
from collections.abc import Sequence

import numpy as np

from tools.sources import Utterance


class PackedUtterances(Sequence):
    """Reads like a list of Utterance, but cannot be changed: each access makes its object anew.

    seconds: (N,) in float64, the lengths of all N without making any object.
    """

    def __init__(self, utterances):
        self.rows = bytearray()
        self.ends = array("q", [0])  # row i is rows[ends[i] : ends[i + 1]]
        seconds = array("d")
        for u in utterances:
            self.rows += pickle.dumps((u.path, u.seconds, u.text, u.id, u.weight, u.offset))
            self.ends.append(len(self.rows))
            seconds.append(u.seconds)
        self.seconds = np.array(seconds)

    def __len__(self):
        return len(self.seconds)

    def __getitem__(self, index):
        chosen = range(len(self))[index]
        if isinstance(index, slice):
            return [self[i] for i in chosen]
        row = self.rows[self.ends[chosen] : self.ends[chosen + 1]]
        return Utterance(*pickle.loads(row))

    def __eq__(self, other):
        return list(self) == list(other)


def pack(utterances):
    """A list of Utterance, or one that is packed already -> PackedUtterances"""
    if isinstance(utterances, PackedUtterances):
        return utterances
    return PackedUtterances(utterances)
