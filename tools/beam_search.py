"""Beam search of the transducer, and a word n-gram that may help it (shallow fusion)."""

import argparse
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data import WORD_START, normalise
from model import BLANK, Hypothesis, Token
from tools.command_line import UserError


# ---------------------------------------- search


@dataclass
class Beam:
    """K hypotheses of each of B rows. Two with the same labels have the same key, a 64-bit hash."""

    score: torch.Tensor  # (B, K) log-probability
    key: torch.Tensor  # (B, K)
    due: torch.Tensor  # (B, K) what the language model adds when the last word ends
    parent: torch.Tensor  # (B, K) which hypothesis it was before this frame
    labels: torch.Tensor  # (B, K, S) emitted in this frame, BLANK where there is none
    log_probs: torch.Tensor  # (B, K, S) of these labels
    predicted: torch.Tensor  # (B, K, J) the predictor's output, projected
    state: torch.Tensor  # (B, K, 2, P) of the predictor

    def pick(self, columns):
        """columns (B, K') -> the Beam of these hypotheses"""
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        return Beam(*[x[rows, columns] for x in vars(self).values()])


def join_beams(beams):
    """Beams of the same rows -> one Beam with the hypotheses of all"""
    fields = [vars(beam).values() for beam in beams]
    return Beam(*[torch.cat(tensors, dim=1) for tensors in zip(*fields)])


def merge_equals(beam, K):
    """The K best hypotheses after those with the same labels were made one, probabilities added."""
    score, order = beam.score.sort(dim=1, descending=True)
    key = beam.key.gather(1, order)
    same = key[:, :, None] == key[:, None]  # (B, N, N)
    score = score[:, None].expand_as(same).masked_fill(~same, -torch.inf).logsumexp(dim=2)
    # The best of each group stands for it, those behind it go.
    has_better = same.tril(-1).any(dim=2)
    score, columns = score.masked_fill(has_better, -torch.inf).topk(K)
    merged = beam.pick(order.gather(1, columns))
    return replace(merged, score=score)


class BeamTransducer:
    """The `beam` best hypotheses of each row, all rows at once, frame by frame.

    Within a frame a hypothesis emits up to `max_symbols` labels and then blank; those with the same
    labels become one. So a score is log P(labels | audio) over all alignments that stayed in the
    beam, plus what `fusion` adds for words. Results are ranked by score per label, or the shortest
    would win too often. The frames of tokens are those of the likeliest path.

    Fed like the greedy searches of decode.py: advance(hidden, lengths), results().
    """

    @torch.no_grad()
    def __init__(self, student, B=1, beam=4, max_symbols=5, fusion=None, first_frame=0):
        self.student = student
        self.max_symbols = max_symbols
        self.fusion = fusion
        self.frame = first_frame  # of the next hidden state
        device = student.ctc.weight.device
        K = beam
        predicted, state = student.predictor(torch.full((B * K, 1), BLANK, device=device))
        predicted = student.joiner.project_predicted(predicted[:, 0])
        score = torch.full((B, K), -torch.inf, device=device)
        score[:, 0] = 0.0  # one beginning, not K equal ones
        self.columns = torch.arange(K, device=device).expand(B, K)
        self.beam = Beam(
            score=score,
            key=torch.zeros(B, K, dtype=torch.long, device=device),
            due=torch.zeros(B, K, device=device),
            parent=self.columns,
            labels=torch.full((B, K, max_symbols), BLANK, device=device),
            log_probs=torch.zeros(B, K, max_symbols, device=device),
            predicted=predicted.view(B, K, -1),
            state=state.view(B, K, *state.shape[1:]),
        )
        self.texts = {0: ((), "")}  # key -> words and unfinished word, for the language model
        self.tokens = [[[] for _ in range(K)] for _ in range(B)]

    @torch.no_grad()
    def advance(self, hidden, lengths):
        """hidden (B, T, d), lengths (B,)"""
        encoded = self.student.joiner.project_hidden(hidden)
        frames = []
        for t in range(hidden.shape[1]):
            self.advance_frame(encoded[:, t, None], t < lengths)
            frames.append((self.beam.parent, self.beam.labels, self.beam.log_probs))
        self.collect_tokens(frames)
        self.frame += hidden.shape[1]

    def advance_frame(self, encoded, alive):
        """encoded (B, 1, J) of one frame, alive (B,): the rows that have not ended"""
        beam = replace(
            self.beam,
            parent=self.columns,
            labels=torch.full_like(self.beam.labels, BLANK),
            log_probs=torch.zeros_like(self.beam.log_probs),
        )
        finished = []
        for s in range(self.max_symbols + 1):
            log_probs = self.student.joiner.join(encoded, beam.predicted).log_softmax(-1)
            # After the end of a row there is only blank, for nothing.
            blank = log_probs[..., BLANK].masked_fill(~alive[:, None], 0.0)
            finished.append(replace(beam, score=beam.score + blank))
            if s == self.max_symbols:
                break
            # A score only sinks: what is below the K best that have finished cannot come back.
            scores = torch.cat([one.score for one in finished], dim=1)
            worst = scores.topk(len(self.columns[0])).values[:, -1:]
            beam, live = self.extend(beam, log_probs, s, worst, alive)
            if not live.any():
                break
        self.beam = finished[0]
        if len(finished) > 1:
            self.beam = merge_equals(join_beams(finished), len(self.columns[0]))
        if self.fusion:
            survivors = set(self.beam.key.flatten().tolist())
            self.texts = {key: text for key, text in self.texts.items() if key in survivors}

    def extend(self, beam, log_probs, s, worst, alive):
        """The K best ways to emit one more label, the frame's s-th, log_probs (B, K, V)
        -> Beam, live (B, K): which of them are better than `worst`"""
        V = log_probs.shape[-1]
        score = beam.score[..., None] + log_probs
        if self.fusion:
            score += beam.due[..., None] * self.fusion.starts
        score[..., BLANK] = -torch.inf
        score, choice = score.flatten(1).topk(len(self.columns[0]))
        live = (score > worst) & alive[:, None]
        origin = choice // V
        label = choice % V
        grown = beam.pick(origin)
        if not live.any():
            return grown, live

        rows = torch.arange(len(origin), device=origin.device)[:, None]
        before = grown.key
        grown.score = score.masked_fill(~live, -torch.inf)
        grown.key = before * 1_000_003 + label
        grown.labels[..., s] = label
        grown.log_probs[..., s] = log_probs[rows, origin, label]
        # The predictor and the language model read the label.
        emitted = label[live][:, None]
        predicted, grown.state[live] = self.student.predictor(emitted, grown.state[live])
        grown.predicted[live] = self.student.joiner.project_predicted(predicted[:, 0])
        if self.fusion:
            grown.due[live] = self.extend_texts(before[live], label[live], grown.key[live])
        return grown, live

    def extend_texts(self, before, labels, after):
        """Keys before, labels, keys after, all (N,) -> what the last word of each is worth, (N,)"""
        worth = []
        for old, label, new in zip(before.tolist(), labels.tolist(), after.tolist()):
            self.texts[new] = self.fusion.extend(self.texts[old], label)
            worth.append(self.fusion.worth(self.texts[new]))
        return torch.tensor(worth, device=labels.device)

    def collect_tokens(self, frames):
        """Walk back from the hypotheses in the beam: (parent, labels, log_probs) of each frame."""
        parents = [parent.tolist() for parent, _, _ in frames]
        labels = [emitted.tolist() for _, emitted, _ in frames]
        probabilities = [log_probs.exp().tolist() for _, _, log_probs in frames]
        collected = []
        for b, row in enumerate(self.tokens):
            collected.append([])
            for ancestor in range(len(row)):
                tokens = []
                for t in reversed(range(len(frames))):
                    emitted = zip(labels[t][b][ancestor], probabilities[t][b][ancestor])
                    for label, probability in reversed(list(emitted)):
                        if label != BLANK:
                            tokens.append(Token(label, self.frame + t, probability))
                    ancestor = parents[t][b][ancestor]
                collected[b].append(row[ancestor] + tokens[::-1])
        self.tokens = collected

    def results(self):
        """-> for each row its Hypotheses, best first"""
        scores = (self.beam.score + self.beam.due).tolist()
        results = []
        for row, row_scores in zip(self.tokens, scores):
            hypotheses = []
            for tokens, score in zip(row, row_scores):
                if score > -math.inf:
                    hypotheses.append(Hypothesis(tokens, score))
            results.append(sorted(hypotheses, key=score_per_label, reverse=True))
        return results


def score_per_label(hypothesis):
    return hypothesis.score / (len(hypothesis.tokens) + 1)


# ---------------------------------------- language model


class Fusion:
    """Shallow fusion: weight * (log P(word | words before) + bonus), added when a word has ended.

    Without a bonus few words would win. By words, because no language model shares the student's
    tokens. lm: function (tuple of words before, word) -> log P(word | words before)
    """

    def __init__(self, tokenizer, lm, weight, bonus, device="cpu"):
        self.lm = lm
        self.weight = weight
        self.bonus = bonus
        self.pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        starts = [piece.startswith(WORD_START) for piece in self.pieces]
        self.starts = torch.tensor(starts, device=device)  # (V,): labels that begin a word

    def extend(self, text, label):
        """(words, unfinished word), one more label -> the same"""
        words, word = text
        piece = self.pieces[label]
        if piece.startswith(WORD_START) and word:
            words = (*words, word)
            word = ""
        return words, word + piece.removeprefix(WORD_START)

    def worth(self, text):
        """What the unfinished word adds to the score if it ends here"""
        words, word = text
        if not word:
            return 0.0
        return self.weight * (self.lm(words, word) + self.bonus)


class NGram:
    """Word n-gram counted from a text file, smoothed after Witten and Bell (1991).

    With c counts and t(h) the number of different words after h,
    P(w | h) = (c(hw) + t(h) P(w | h')) / (c(h) + t(h)), where h' is h without its first word.
    """

    def __init__(self, path, order=3):
        self.order = order
        self.count = Counter()  # of tuples of up to `order` words
        self.total = Counter()  # of what follows a tuple
        self.kinds = Counter()  # t of a tuple
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                self.add_sentence(normalise(line).split())
        for gram, count in self.count.items():
            self.total[gram[:-1]] += count
            self.kinds[gram[:-1]] += 1
        if not self.count:
            raise UserError(f"--lm {path}: there are no words in it; give a text file")

    def add_sentence(self, words):
        before = self.order - 1
        words = ("<s>",) * before + tuple(words)
        for i in range(before, len(words)):
            for n in range(self.order):
                self.count[words[i - n : i + 1]] += 1

    def __call__(self, words, word):
        """tuple of the words before, word -> log P(word | words before)"""
        words = ("<s>",) * (self.order - 1) + words
        p = 1 / (1 + self.kinds[()])  # a word never seen counts as one more kind
        for n in range(self.order):
            history = words[len(words) - n :]
            kinds = self.kinds[history]
            if kinds:
                p = (self.count[(*history, word)] + kinds * p) / (self.total[history] + kinds)
        return math.log(p)


def text_file(name):
    """argparse type: a file that exists"""
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(
            f"no such file: {name}; give a text file to count word 3-grams from, a sentence a line"
        )
    return name
