"""Search: from the student's hidden states to labels.

A search is fed hidden states piece by piece, a batch at once or a stream as it comes, and keeps its place in between:

    search = GreedyTransducer(student, B)
    search.advance(hidden, lengths)             # (B, T, d), (B,), as often as there is more
    search.results()                            # for each of the B rows its Hypotheses, best first
"""
import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F

from data import normalise
from losses import BLANK, valid_mask
from run import UserError

SPACE = "\u2581"                # how the tokenizer marks the start of a word


class Token(NamedTuple):
    label: int
    frame: int                  # encoder frame of 40 ms at which it was emitted
    probability: float          # of this label there, given the audio and the labels before


@dataclass
class Hypothesis:
    tokens: list                # of Token
    score: float = 0.0          # log-probability


AHEAD = 4                       # frames that greedy search looks at at once


class GreedyTransducer:
    """The best label of each frame, until blank is the best or `max_symbols` were emitted; for the whole batch at once.

    Every row has its own place: it looks at the next AHEAD frames, passes those that say blank and emits the label of
    the first that does not ("label looping", arXiv 2406.06220): fewer steps than frames and labels together. Scores are
    those of the one path.
    """

    @torch.no_grad()
    def __init__(self, student, B=1, max_symbols=5):
        self.student, self.max_symbols, self.frame = student, max_symbols, 0
        device = student.ctc.weight.device
        out, self.state = student.predictor(torch.full((B, 1), BLANK, device=device))
        self.predicted = student.joiner.predictor(out[:, 0])
        self.said, self.score = [[] for _ in range(B)], torch.zeros(B, device=device)

    @torch.no_grad()
    def advance(self, hidden, lengths):
        joiner, predictor = self.student.joiner, self.student.predictor
        encoded = F.pad(joiner.encoder(hidden), (0, 0, 0, AHEAD))
        now, count = torch.zeros_like(lengths), torch.zeros_like(lengths)    # a row's frame, its labels in that frame
        while len(rows := (now < lengths).nonzero()[:, 0]):
            frames = now[rows, None] + torch.arange(AHEAD, device=hidden.device)                       # (rows, AHEAD)
            logits = joiner.join(encoded[rows[:, None], frames], self.predicted[rows, None])
            best, label = logits.log_softmax(-1).max(-1)
            inside = frames < lengths[rows, None]
            speaks = (label != BLANK) & inside
            silent = inside & (speaks.cumsum(1) == 0)                           # up to the first label
            passed = silent.sum(1)
            self.score[rows] += (best * silent).sum(1)
            now[rows] += passed
            count[rows] *= passed == 0
            # ---- those that emit
            at = speaks.any(1).nonzero()[:, 0]
            rows, label, best = rows[at], label[at, passed[at]], best[at, passed[at]]
            if not len(rows):
                continue
            for row, frame, x, p in zip(*(x.tolist() for x in (rows, now[rows], label, best.exp()))):
                self.said[row].append(Token(x, self.frame + frame, p))
            self.score[rows] += best
            out, self.state[rows] = predictor(label[:, None], self.state[rows])
            self.predicted[rows] = joiner.predictor(out[:, 0])
            full = count[rows] + 1 == self.max_symbols
            now[rows], count[rows] = now[rows] + full, (count[rows] + 1) * ~full
        self.frame += hidden.shape[1]

    def results(self):
        return [[Hypothesis(tokens, score)] for tokens, score in zip(self.said, self.score.tolist())]


class GreedyCTC:
    """The best label of each frame, repetitions joined, blanks dropped."""

    def __init__(self, student, B=1):
        self.student, self.frame = student, 0
        self.said, self.score, self.before = [[] for _ in range(B)], [0.0] * B, [BLANK] * B

    @torch.no_grad()
    def advance(self, hidden, lengths):
        best, labels = self.student.ctc(hidden).log_softmax(-1).max(-1)
        for b, n in enumerate(lengths.tolist()):
            for t, (label, probability) in enumerate(zip(labels[b, :n].tolist(), best[b, :n].exp().tolist())):
                if label not in (BLANK, self.before[b]):
                    self.said[b].append(Token(label, self.frame + t, probability))
                self.before[b] = label
            self.score[b] += best[b, :n].sum().item()
        self.frame += hidden.shape[1]

    def results(self):
        return [[Hypothesis(tokens, score)] for tokens, score in zip(self.said, self.score)]


GREEDY = {"transducer": GreedyTransducer, "ctc": GreedyCTC}


class BeamTransducer:
    """The `beam` best hypotheses of each row, all rows at once, frame by frame: within a frame a hypothesis emits up to
    `max_symbols` labels and then blank; those that have said the same become one, their probabilities added. So a score
    is log P(labels | audio) over all alignments that stayed in the beam, plus `fusion`'s log-probability of the words.
    The results are ranked by score per label, else the shortest would win too often.

    A label sequence is known by a 64-bit rolling hash of it. Tokens tell the frames of its likeliest path.
    """

    @torch.no_grad()
    def __init__(self, student, B=1, beam=4, max_symbols=5, fusion=None):
        self.student, self.beam, self.max_symbols, self.fusion, self.frame = student, beam, max_symbols, fusion, 0
        device = student.ctc.weight.device
        out, state = student.predictor(torch.full((B * beam, 1), BLANK, device=device))
        self.predicted = student.joiner.predictor(out[:, 0]).view(B, beam, -1)
        self.state = state.view(B, beam, *state.shape[1:])
        self.score = torch.full((B, beam), -torch.inf, device=device)
        self.score[:, 0] = 0.0                                                  # one beginning, not `beam` equal ones
        self.key = torch.zeros(B, beam, dtype=torch.long, device=device)
        self.due = torch.zeros(B, beam, device=device)                          # what the last word adds at its end
        self.text = numpy.full((B, beam), None)         # what the language model needs to know of each hypothesis
        self.said = [[[] for _ in range(beam)] for _ in range(B)]

    @torch.no_grad()
    def advance(self, hidden, lengths):
        B, T, _ = hidden.shape
        encoded, trail = self.student.joiner.encoder(hidden), []
        for t in range(T):
            trail.append(self.step(encoded[:, t, None], t < lengths))
        # ---- walk back: which labels lead to each of the hypotheses now in the beam, (T, B, beam, max_symbols)
        now, back = torch.arange(self.beam, device=hidden.device).expand(B, -1), []
        for parent, labels, sure in reversed(trail):
            pick = now[..., None].expand(-1, -1, self.max_symbols)
            back.append((labels.gather(1, pick), sure.gather(1, pick)))
            now = parent.gather(1, now)
        labels, sure = (torch.stack(x[::-1]) for x in zip(*back))
        said = [[list(self.said[b][k]) for k in row] for b, row in enumerate(now.tolist())]
        at = (labels != BLANK).nonzero()
        for (t, b, k, _), label, p in zip(at.tolist(), labels[tuple(at.T)].tolist(), sure[tuple(at.T)].exp().tolist()):
            said[b][k].append(Token(label, self.frame + t, p))
        self.said, self.frame = said, self.frame + T

    def step(self, encoded, alive):
        """One frame, encoded (B, 1, J), of the rows that are alive (B,) -> for each hypothesis (B, beam) its parent
        and the labels it emitted here with their log-probabilities (B, beam, max_symbols)."""
        (B, K), S, device = self.score.shape, self.max_symbols, alive.device
        rows, columns = torch.arange(B, device=device)[:, None], torch.arange(K, device=device).expand(B, K)
        # what belongs to a hypothesis, (B, K, ...), in few tensors: key, parent, labels; what is due, labels' log_probs
        ints = F.pad(torch.stack([self.key, columns], 2), (0, S))
        floats = F.pad(self.due[..., None], (0, S))
        score, predicted, state, text = self.score, self.predicted, self.state, self.text
        done = []                                                               # after their blank
        for s in range(S + 1):
            log_probs = self.student.joiner.join(encoded, predicted).log_softmax(-1)                   # (B, K, V)
            blank = log_probs[..., BLANK].masked_fill(~alive[:, None], 0)       # behind the end only blank, for nothing
            done.append((score + blank, ints, floats, predicted, state, text))
            if s == S:
                break
            grown = score[..., None] + log_probs
            if self.fusion:
                grown += floats[..., :1] * self.fusion.starts
            grown[..., BLANK] = -torch.inf
            # a score only sinks, so what is below the best that are done cannot come back
            worst = torch.cat([x[0] for x in done], 1).topk(K)[0][:, -1:]
            score, choice = grown.flatten(1).topk(K)
            live = (score > worst) & alive[:, None]
            if not live.any():
                break
            origin, label = choice // log_probs.shape[-1], choice % log_probs.shape[-1]
            score = score.masked_fill(~live, -torch.inf)
            ints, floats, predicted, state = (x[rows, origin] for x in (ints, floats, predicted, state))
            ints[..., 0] = ints[..., 0] * 1_000_003 + label
            ints[..., 2 + s], floats[..., 1 + s] = label, log_probs[rows, origin, label]
            out, state[live] = self.student.predictor(label[live][:, None], state[live])
            predicted[live] = self.student.joiner.predictor(out[:, 0])
            if self.fusion:
                text, floats[..., 0][live] = self.fusion.extend(pick(text, origin), live, label)
        score, ints, floats, predicted, state = (torch.cat(x, 1) for x in list(zip(*done))[:5])
        if len(done) > 1:
            # ---- those that have said the same become one, of which the best is remembered
            score, order = score.sort(1, descending=True)
            key = ints[..., 0].gather(1, order)
            same = key[:, :, None] == key[:, None]
            score = score[:, None].expand_as(same).masked_fill(~same, -torch.inf).logsumexp(2)
            score, columns = score.masked_fill(same.tril(-1).any(2), -torch.inf).topk(K)
            columns = order.gather(1, columns)
            ints, floats, predicted, state = (x[rows, columns] for x in (ints, floats, predicted, state))
            if self.fusion:
                self.text = pick(numpy.concatenate([x[5] for x in done], 1), columns)
        self.score, self.key, self.due = score, ints[..., 0], floats[..., 0]
        self.predicted, self.state = predicted, state
        return ints[..., 1], ints[..., 2:], floats[..., 1:]

    def results(self):
        final = self.score + self.due
        rows = [[Hypothesis(said, score) for said, score in zip(*row) if score > -math.inf]
                for row in zip(self.said, final.tolist())]
        return [sorted(row, key=lambda h: h.score / (len(h.tokens) + 1), reverse=True) for row in rows]


def pick(x, columns):
    """x[b, columns[b, k]] (B, K) of an array of Python objects."""
    return numpy.take_along_axis(x, columns.cpu().numpy(), 1)


# ---------------------------------------------------------------------------- language models

class Fusion:
    """Shallow fusion: weight * (log P(word | words before) + bonus), added to a hypothesis when its word is over;
    without a bonus few words would win. By words, because no language model shares the student's tokens.

    lm(list of (words before, word)) -> list of log P(word | words before), 0 for no word
    """

    def __init__(self, tokenizer, lm, weight, bonus, device="cpu"):
        self.lm, self.weight, self.bonus, self.device = lm, weight, bonus, device
        self.pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        self.starts = torch.tensor([piece.startswith(SPACE) for piece in self.pieces], device=device)

    def extend(self, text, live, label):
        """text (B, K) of (words, unfinished word), or None at the start; live (B, K); label (B, K), what the live ones
        say now -> text, what each live one's last word will add."""
        text = text.copy()
        places = [tuple(place) for place in live.nonzero().tolist()]
        for (b, k), piece in zip(places, (self.pieces[i] for i in label[live].tolist())):
            words, word = text[b, k] or ((), "")
            if piece.startswith(SPACE) and word:
                words, word = words + (word,), ""
            text[b, k] = words, word + piece.removeprefix(SPACE)
        queries = [text[place] for place in places]
        scores = [p + self.bonus * bool(word) for p, (_, word) in zip(self.lm(queries), queries)]
        return text, self.weight * torch.tensor(scores, device=self.device)


class NGram:
    """Word n-gram counted from a text file, smoothed after Witten and Bell (1991): with c counts and t(h) the number of
    different words behind h, P(w | h) = (c(hw) + t(h) P(w | h')) / (c(h) + t(h)), where h' is h without its first word.
    """

    def __init__(self, path, order=3):
        self.order, self.count, self.total, self.kinds = order, Counter(), Counter(), Counter()
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                words = ("<s>",) * (order - 1) + tuple(normalise(line).split())
                self.count.update(words[i - n:i + 1] for i in range(order - 1, len(words)) for n in range(order))
        for gram, count in self.count.items():
            self.total[gram[:-1]] += count
            self.kinds[gram[:-1]] += 1

    def __call__(self, queries):
        return [self.log_p(("<s>",) * (self.order - 1) + words, word) if word else 0.0 for words, word in queries]

    def log_p(self, words, word):
        p = 1 / (1 + self.kinds[()])                                            # a word never seen: one more kind
        for n in range(self.order):
            h = words[len(words) - n:]
            if t := self.kinds[h]:
                p = (self.count[h + (word,)] + t * p) / (self.total[h] + t)
        return math.log(p)


class CausalLM:
    """A transformers causal language model: log P of a text with the word less log P of the text without it, in its own
    tokens; in lower case, which most of them have read most of."""

    def __init__(self, name, device, context=32):
        import transformers  # takes seconds, so only who needs it waits
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(name).to(device).eval()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--lm {name}: {str(error).strip().splitlines()[0]} - give a text file to count an n-gram "
                            f"from or a transformers causal language model")
        self.context, self.known = context, {}

    def __call__(self, queries):
        texts = [(" ".join(before[-self.context:]), " ".join((*before[-self.context:], word)).strip())
                 for before, word in queries]
        if len(self.known) > 100_000:  # a long recording must not fill the memory
            self.known.clear()
        new = sorted({text for pair in texts for text in pair} - self.known.keys())
        self.known.update(zip(new, self.log_p(new)) if new else ())
        return [self.known[longer] - self.known[shorter] for shorter, longer in texts]

    @torch.no_grad()
    def log_p(self, texts):
        start = [self.tokenizer.bos_token_id or self.tokenizer.eos_token_id or 0]
        ids = [torch.tensor(start + self.tokenizer(text.lower(), add_special_tokens=False).input_ids) for text in texts]
        lengths = torch.tensor([len(x) for x in ids], device=self.model.device)
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.model.device)
        valid = valid_mask(lengths, ids.shape[1])
        log_probs = self.model(ids, attention_mask=valid.long()).logits.float().log_softmax(-1)[:, :-1]
        return (log_probs.gather(2, ids[:, 1:, None])[..., 0] * valid[:, 1:]).sum(1).tolist()
