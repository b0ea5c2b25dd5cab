"""Audio to text.

    python decode.py                              # score the demo's test voices with exp/finetune: seconds
    python decode.py talk.wav interview.mp3       # transcribe files
    python decode.py --data LibriSpeech/test-clean --checkpoint exp/finetune-100h --method ctc

Both sides of a score are normalised alike (Unicode NFKC, upper case, no punctuation but the apostrophe); words are
words, CJK characters count one by one (MER).
"""
import argparse
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import data
import model
import run as running
from model import BLANK
from run import DEMO, UserError


# ---------------------------------------------------------------------------- errors

@dataclass(frozen=True)
class Errors:
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0              # in the reference
    alignment: tuple = ()       # of (reference word or "*", hypothesis word or "*")

    def __add__(self, other):
        return Errors(self.substitutions + other.substitutions, self.deletions + other.deletions,
                      self.insertions + other.insertions, self.words + other.words)

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


CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


def split_words(text):
    """Words of normalised text; Chinese and Japanese characters count as words of their own."""
    return re.findall(f"[{CJK}]|[^\\s{CJK}]+", data.normalise(text))


def word_errors(reference, hypothesis):
    """Errors of the cheapest alignment (Levenshtein), both texts normalised; with mixed scripts the rate is the MER."""
    ref, hyp = split_words(reference), split_words(hypothesis)
    cost = [list(range(len(hyp) + 1))]
    for i, r in enumerate(ref, 1):
        cost.append([i])
        for j, h in enumerate(hyp, 1):
            cost[i].append(min(cost[i - 1][j - 1] + (r != h), cost[i - 1][j] + 1, cost[i][j - 1] + 1))
    i, j, pairs = len(ref), len(hyp), []
    while i or j:  # walk back
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (ref[i - 1] != hyp[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((ref[i], hyp[j]))
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            pairs.append((ref[i], "*"))
        else:
            j -= 1
            pairs.append(("*", hyp[j]))
    return Errors(sum(r != h and "*" not in (r, h) for r, h in pairs), sum(h == "*" for _, h in pairs),
                  sum(r == "*" for r, _ in pairs), len(ref), tuple(pairs[::-1]))


# ---------------------------------------------------------------------------- search

@torch.no_grad()
def greedy_transducer(student, hidden, lengths, max_symbols=5):
    """hidden (B, T, d), lengths (B,) -> list of B label lists. Frame by frame for the whole batch at once; in a frame a
    row goes on emitting until blank wins or it has emitted `max_symbols`."""
    B, T, _ = hidden.shape
    encoded = student.joiner.encoder(hidden)
    labels = torch.full((B, 1), BLANK, device=hidden.device)
    predicted, state = student.predictor(labels)
    predicted = student.joiner.predictor(predicted[:, 0])
    history = []                                                       # (B,) labels, BLANK where a row emitted nothing
    for t in range(T):
        active = t < lengths
        for _ in range(max_symbols):
            label = student.joiner.out(torch.tanh(encoded[:, t] + predicted)).argmax(-1)
            active = active & (label != BLANK)
            if not active.any():
                break
            history.append(label.where(active, BLANK))
            new, new_state = student.predictor(label[:, None], state)
            state = student.predictor.select(active, new_state, state)
            predicted = torch.where(active[:, None], student.joiner.predictor(new[:, 0]), predicted)
    history = torch.stack(history, 1).tolist() if history else [[]] * B
    return [[x for x in row if x != BLANK] for row in history]


@torch.no_grad()
def greedy_ctc(student, hidden, lengths):
    """The best label of each frame, repetitions joined, blanks dropped."""
    best = student.ctc(hidden).argmax(-1)
    return [[x for x in row[:n].unique_consecutive().tolist() if x != BLANK] for row, n in zip(best, lengths.tolist())]


METHODS = {"transducer": greedy_transducer, "ctc": greedy_ctc}


@torch.no_grad()
def transcribe(student, tokenizer, batch, device, dtype=torch.float32, methods=("transducer",)):
    """Batch -> for each method a list of texts; the encoder runs once for all."""
    with running.autocast(device, dtype):
        hidden, lengths = student.encoder(batch.features.to(device), batch.feature_lengths.to(device))
    return [[tokenizer.decode(labels).strip() for labels in METHODS[method](student, hidden.float(), lengths)]
            for method in methods]


# ---------------------------------------------------------------------------- python decode.py

def load_recogniser(path, device):
    checkpoint = model.load_checkpoint(path)
    if "tokenizer" not in checkpoint:
        raise UserError(f"{path} comes from stage 1 and cannot write text yet; next: python finetune_rnnt.py --init "
                        f"{path}")
    return model.load_student(checkpoint).to(device).eval(), Tokenizer.from_str(checkpoint["tokenizer"])


@running.polite
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", nargs="*", metavar="AUDIO", help="files or folders to transcribe")
    parser.add_argument("--data", nargs="+", metavar="SOURCE",
                        help="transcribed audio to score on (default without AUDIO: the demo's test voices)")
    parser.add_argument("--checkpoint", type=Path, default=Path("exp/finetune"),
                        help="run directory or file (default %(default)s)")
    parser.add_argument("--method", choices=list(METHODS), default="transducer",
                        help="greedy search of either output (default %(default)s)")
    parser.add_argument("--batch-seconds", type=float, default=120,
                        help="seconds of audio decoded at once (default %(default)s)")
    parser.add_argument("--out", type=Path,
                        help="JSONL with text, errors and alignment of each utterance (default with --data: "
                             "CHECKPOINT/scores.jsonl)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read audio (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    if args.audio and (args.data or args.out):
        raise UserError("give either AUDIO to transcribe or --data (and --out) to score, not both")
    if args.workers < 0 or not args.batch_seconds > 0:
        raise UserError("--workers must not be negative and --batch-seconds must be above 0")

    device, dtype, why = running.choose_device(args.device)
    student, tokenizer = load_recogniser(args.checkpoint, device)
    print(f"{why}; {args.checkpoint}: {student.parameter_count / 1e6:.1f} M parameters, {tokenizer.get_vocab_size()} "
          f"tokens, greedy {args.method}", file=sys.stderr)
    failed = []
    utterances = data.load_sources(args.audio or args.data or [DEMO / "corpus/test"], not args.audio, failed)
    if not utterances:
        raise UserError("none of the audio could be read")
    out = args.out or (args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent) / "scores.jsonl"
    if not args.audio:
        try:  # now, not after an hour of decoding
            open(out, "a").close()
        except OSError as error:
            raise UserError(f"cannot write --out {out} ({error.strerror}); choose another file")
    loader = data.Loader(utterances, args.batch_seconds, workers=min(args.workers, len(utterances)))
    texts, compute, started = {}, 0.0, time.time()
    with tqdm(total=round(sum(u.seconds for u in utterances)), unit="s", desc="decoding", leave=False) as bar:
        for batch in loader.epoch():
            begin = time.time()
            if batch.ids:
                [hypotheses] = transcribe(student, tokenizer, batch, device, dtype, [args.method])
                texts.update(zip(batch.ids, hypotheses))
            compute += time.time() - begin
            failed += batch.failed
            for problem in batch.failed:
                tqdm.write(f"skipped: {problem}", file=sys.stderr)
            bar.update(round(batch.seconds))
    if not texts:
        raise UserError("none of the audio could be read")
    seconds = sum(u.seconds for u in utterances if u.id in texts)
    rtf = (f"RTF {compute / max(seconds, 1e-9):.4f} ({seconds:.0f} s of audio, {compute:.1f} s to compute, "
           f"{time.time() - started:.1f} s with reading)")
    if args.audio:
        for u in utterances:
            if u.id in texts:
                print(f"{u.path}\t{texts[u.id]}")
        print(rtf + (f"; {len(failed)} could not be used" if failed else ""), file=sys.stderr)
        return 0
    total, rows = Errors(), []
    for u in utterances:
        if u.id in texts:
            errors = word_errors(u.text, texts[u.id])
            total += errors
            rows.append({"id": u.id, "reference": u.text, "hypothesis": texts[u.id], **asdict(errors)})
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(total)
    print(rtf)
    print(f"normalised: NFKC, upper case, no punctuation but the apostrophe; {len(rows)} utterances, {len(failed)} "
          f"could not be used; alignments: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
