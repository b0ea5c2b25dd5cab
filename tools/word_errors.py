"""Word errors: what has to be substituted, deleted and inserted to turn one text into another.

Both texts are normalised alike; words are words, Chinese and Japanese characters count one by one.
"""

import re
from dataclasses import dataclass

import numpy

from data import normalise

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # for [...] of a regular expression


@dataclass(frozen=True)
class Errors:
    """Counts that can be added up; the alignment is that of one utterance."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0  # in the reference
    alignment: tuple = ()  # of (reference word or "*", hypothesis word or "*")

    def __add__(self, other):
        return Errors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.words + other.words,
        )

    @property
    def total(self):
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self):
        """percent"""
        return 100 * self.total / max(1, self.words)

    def __str__(self):
        kinds = f"{self.insertions} ins, {self.deletions} del, {self.substitutions} sub"
        return f"%WER {self.rate:.2f} [ {self.total} / {self.words}, {kinds} ]"


def split_words(text):
    """Words of a normalised text; Chinese and Japanese characters count as words of their own."""
    return re.findall(f"[{CJK}]|[^\\s{CJK}]+", normalise(text))


def word_errors(reference, hypothesis):
    """Errors of the cheapest alignment of two texts; with mixed scripts the rate is the MER."""
    reference = split_words(reference)
    pairs = align(reference, split_words(hypothesis))
    substitutions = 0
    deletions = 0
    insertions = 0
    for expected, found in pairs:
        if found == "*":
            deletions += 1
        elif expected == "*":
            insertions += 1
        elif expected != found:
            substitutions += 1
    return Errors(substitutions, deletions, insertions, len(reference), tuple(pairs))


def align(reference, hypothesis):
    """Levenshtein's alignment of two lists of words -> list of pairs, "*" where one has nothing

    Row by row in numpy. For the way back two bits of each cell are kept, so that 10,000 words each
    take 25 MB.
    """
    numbers = {}
    for word in hypothesis:
        numbers.setdefault(word, len(numbers))
    found = numpy.array([numbers[word] for word in hypothesis], dtype=numpy.int32)
    columns = numpy.arange(len(hypothesis) + 1, dtype=numpy.int32)
    costs = columns  # of aligning no reference word with the first 0, 1, 2 ... of the hypothesis
    paired = []
    deleted = []
    for word in reference:
        diagonal = costs[:-1] + (found != numbers.get(word, -1))
        down = costs + 1
        best = down.copy()
        best[1:] = numpy.minimum(best[1:], diagonal)
        # Insertions: a cell costs at most one more than its left neighbour.
        costs = numpy.minimum.accumulate(best - columns) + columns
        paired.append(numpy.packbits(costs[1:] == diagonal))
        deleted.append(numpy.packbits(costs == down))

    # Walk back from the last cell.
    pairs = []
    j = len(hypothesis)
    for i in reversed(range(len(reference))):
        can_pair = numpy.unpackbits(paired[i])
        can_delete = numpy.unpackbits(deleted[i])
        while j > 0 and not can_pair[j - 1] and not can_delete[j]:
            j -= 1
            pairs.append(("*", hypothesis[j]))
        if j > 0 and can_pair[j - 1]:
            j -= 1
            pairs.append((reference[i], hypothesis[j]))
        else:
            pairs.append((reference[i], "*"))
    for word in reversed(hypothesis[:j]):
        pairs.append(("*", word))
    return pairs[::-1]
