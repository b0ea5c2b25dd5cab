"""Audio to text.

    python decode.py                              # score the demo's test voices with exp/finetune: seconds
    python decode.py talk.wav interview.mp3       # transcribe files of any length
    python decode.py talk.wav --output talk.srt   # or .vtt, .ctm, .jsonl with the words' times, .txt
    python decode.py --checkpoint exp/finetune-stream --stream talk.wav                     # as it hears
    arecord -q -t raw -f S16_LE -r 16000 | python decode.py --checkpoint exp/finetune-stream --stream -
    python decode.py --data LibriSpeech/test-clean --checkpoint exp/finetune-100h --beam 8 --lm books.txt

Both sides of a score are normalised alike (Unicode NFKC, upper case, no punctuation but the apostrophe); words are
words, CJK characters count one by one (MER).
"""
import argparse
import functools
import itertools
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

import data
import model
import run as running
from data import HOP, SAMPLE_RATE, WINDOW
from losses import lattice_posterior
from run import DEMO, UserError
from search import GREEDY, SPACE, BeamTransducer, CausalLM, Fusion, Hypothesis, NGram


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


# ---------------------------------------------------------------------------- audio to hidden states to labels

FRAME = 4 * HOP                     # samples, 40 ms: an encoder frame
SECONDS = FRAME / SAMPLE_RATE
LOOK_AHEAD = HOP + WINDOW // 2      # samples behind a chunk that its last frame hears: 22.5 ms
MARGIN = 50                         # encoder frames heard beyond a cut that is no pause: 2 s
PAUSE = 0.25                        # log-mel units below the median, 4 dB: what is quieter is a pause


@torch.no_grad()
def hear_chunks(student, audio, chunk, device, dtype=torch.float32):
    """A streaming student hears 16 kHz audio as it comes, tensors (S_i,) -> hidden states (1, T_i, d) of each chunk as
    soon as its last sample is there, in bounded memory; the same as those of the masked pass over the whole."""
    samples, skip, past = torch.zeros(0), 0, None           # the first `skip` frames of `samples` were heard before:
    for block in itertools.chain(audio, [None]):            # what the convolutions of the subsampling look back on
        samples = samples if block is None else torch.cat([samples, block])
        while len(samples) >= (end := (skip + chunk) * FRAME + LOOK_AHEAD) or (
                block is None and len(samples) >= skip * FRAME + 2 * HOP):      # at the end, half a frame is a frame
            features = data.log_mel(samples[:end])[None].to(device)
            with running.autocast(device, dtype):
                x, _ = student.encoder.subsampling(features, torch.tensor([features.shape[1]], device=device))
                hidden, past = student.encoder.stream(x[:, skip:skip + chunk], past)
            yield hidden.float()
            done, skip = skip + chunk, min(2, skip + chunk)
            samples = samples[(done - skip) * FRAME:]


@torch.no_grad()
def hear_pieces(student, audio, device, dtype=torch.float32):
    """A student that hears whole utterances hears a recording of any length, tensors (S_i,) of 16 kHz, in bounded
    memory -> (hidden states (1, T_i, d), whether a pause lies before them) of pieces that follow one another.

    Pieces are about as long as the utterances it was trained on, cut where it is quietest. Where even that is no pause
    both sides hear MARGIN beyond the cut: hidden states are joined there, not texts, so no word is lost or doubled.
    """
    typical = student.config.seconds / SECONDS
    low, high = round(typical / 2), round(typical * 1.6)
    samples, skip, pause = torch.zeros(0), 0, True          # the first `skip` frames of `samples` are only context
    for block in itertools.chain(audio, [None]):
        samples = samples if block is None else torch.cat([samples, block])
        beyond = 0 if block is None else MARGIN
        while (enough := len(samples) >= (skip + high + beyond) * FRAME) or (
                block is None and len(samples) >= skip * FRAME + 2 * HOP):
            features = data.log_mel(samples[:(skip + high + MARGIN) * FRAME])
            cut, quiet, end = None, True, None
            if enough:
                loudness = F.avg_pool1d(features.mean(1)[None], 31, 4, 15)[0]                  # 0.3 s around each frame
                cut = skip + low + loudness[skip + low:skip + high].argmin().item()
                quiet = bool(loudness[cut] < loudness[skip:skip + high].median() - PAUSE)
                end = 4 * (cut if quiet else cut + MARGIN)
            features = features[None, :end].to(device)
            with running.autocast(device, dtype):
                hidden, _ = student.encoder(features, torch.tensor([features.shape[1]], device=device), 0)
            yield hidden[:, skip:cut].float(), pause
            pause, skip = quiet, 0 if quiet else min(MARGIN, cut)
            samples = samples[(cut - skip) * FRAME:] if enough else torch.zeros(0)


@torch.no_grad()
def run_search(student, batch, device, dtype, searches, chunk=None):
    """Batch -> for each search and each utterance its Hypotheses, best first; the encoder runs once for all."""
    with running.autocast(device, dtype):
        hidden, lengths = student.encoder(batch.features.to(device), batch.feature_lengths.to(device), chunk)
    for one in searches:
        one.advance(hidden.float(), lengths)
    return [one.results() for one in searches]


def transcribe(student, tokenizer, batch, device, dtype=torch.float32, methods=("transducer",)):
    """Batch -> for each method a list of texts, by greedy search."""
    searches = [GREEDY[method](student, len(batch.ids)) for method in methods]
    return [[text_of(words_of(tokenizer, best.tokens)) for best, *_ in results]
            for results in run_search(student, batch, device, dtype, searches)]


# ---------------------------------------------------------------------------- labels to words to files

class Word(NamedTuple):
    """Seconds are those at which the student emitted the word's tokens; it is as sure as its least sure token."""
    word: str
    start: float
    end: float
    confidence: float


def words_of(tokenizer, tokens):
    """Tokens of a hypothesis -> list of Word."""
    words = []
    for label, frame, probability in tokens:
        piece, end = tokenizer.id_to_token(label).replace("<unk>", ""), round((frame + 1) * SECONDS, 2)
        if piece.startswith(SPACE) or not words:
            words.append(Word(piece.removeprefix(SPACE), round(frame * SECONDS, 2), end, probability))
        else:
            words[-1] = Word(words[-1].word + piece, words[-1].start, end, min(words[-1].confidence, probability))
    return [word for word in words if word.word]


def text_of(words):
    return " ".join(w.word for w in words)


def subtitles(words, point):
    """The body of .srt (point ",") and .vtt ("."): cut at pauses of a second, after 80 letters or 6 seconds; a cue
    stays at least a second, unless the next one comes."""
    def clock(seconds):
        minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
        return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
    cues = []
    for word in words:
        if not cues or (word.start - cues[-1][-1].end > 1 or word.end - cues[-1][0].start > 6
                        or len(text_of(cues[-1])) + len(word.word) >= 80):
            cues.append([])
        cues[-1].append(word)
    ends = [max(cue[-1].end, min(cue[0].start + 1, after[0].start)) for cue, after in zip(cues, cues[1:])]
    ends += [max(cue[-1].end, cue[0].start + 1) for cue in cues[-1:]]
    return "\n".join(f"{number}\n{clock(cue[0].start)} --> {clock(end)}\n{text_of(cue)}\n"
                     for number, (cue, end) in enumerate(zip(cues, ends), 1))


def render(kind, transcripts):
    """Text of an output file. transcripts: list of (Utterance, [(score, list of Word), ...] best first)."""
    lines = []
    for u, ranked in transcripts:
        words = ranked[0][1]
        if kind == ".txt":
            lines.append(f"{u.path}\t{text_of(words)}")
        elif kind == ".ctm":
            lines += [f"{u.id.replace(' ', '_')} 1 {w.start:.2f} {w.end - w.start:.2f} {w.word} {w.confidence:.3f}"
                      for w in words]
        elif kind == ".jsonl":  # also a manifest that data.py reads: pseudo-labels
            lines.append(json.dumps({"audio_filepath": str(Path(u.path).absolute()), "id": u.id,
                                     "text": text_of(words), "words": [w._asdict() for w in words],
                                     "nbest": [{"score": score, "text": text_of(w)} for score, w in ranked]},
                                    ensure_ascii=False))
        else:
            lines.append(subtitles(words, ",") if kind == ".srt" else "WEBVTT\n\n" + subtitles(words, "."))
    return "".join(line + "\n" for line in lines)


def plot(path, student, tokenizer, u, tokens, chunk):
    """Log-mel with the emitted tokens over time, and below the posterior of their lattice."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
    features, device = data.log_mel(data.load_audio(u.path)), student.ctc.weight.device
    figure = Figure((max(6, 2.5 * u.seconds), 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.imshow(features.T.numpy(), origin="lower", aspect="auto", extent=(0, u.seconds, 0, features.shape[1]))
    for i, token in enumerate(tokens):
        above.text((token.frame + 0.5) * SECONDS, 75 - 6 * (i % 4), tokenizer.id_to_token(token.label), color="white",
                   ha="center")
    above.set(title=u.path, ylabel="log-mel bin")
    if tokens:
        targets = torch.tensor([token.label for token in tokens])
        with torch.no_grad():
            hidden, _ = student.encoder(features[None].to(device), torch.tensor([len(features)], device=device), chunk)
            logits = student.joiner(hidden, student.predict(targets[None].to(device)))[0]
        below.imshow(lattice_posterior(logits, targets).T.numpy(), origin="lower", aspect="auto",
                     extent=(0, len(logits) * SECONDS, -0.5, len(tokens) + 0.5))
    below.set(xlabel="seconds", ylabel="labels emitted so far")
    figure.savefig(path)


# ---------------------------------------------------------------------------- python decode.py

def load_recogniser(path, device):
    checkpoint = model.load_checkpoint(path)
    if "tokenizer" not in checkpoint:
        raise UserError(f"{path} comes from stage 1 and cannot write text yet; next: python finetune_rnnt.py --init "
                        f"{path}")
    return model.load_student(checkpoint).to(device).eval(), Tokenizer.from_str(checkpoint["tokenizer"])


def choose_chunk(config, args):
    """Frames heard at once, 0 for everything: what --chunk asks for, else what the student was trained with."""
    chunk = config.chunk if args.chunk is None else args.chunk
    if chunk == model.RANDOM:
        chunk = 16 if args.stream else 0
    if args.stream and not chunk or chunk and not config.chunk:
        raise UserError(f"{args.checkpoint} {config.listening}; streaming needs a --chunk above 0 and a student "
                        f"trained with pretrain_kd.py --chunk 16 (or --chunk random)")
    return chunk


def recognise(utterances, student, new_search, chunk, args, device, dtype, failed):
    """-> ({id: its Hypotheses}, seconds it took to compute). What is much longer than the training utterances is heard
    piece by piece, the rest in batches; what cannot be read is named and added to `failed`."""
    limit = 3 * student.config.seconds
    short, long = ([u for u in utterances if (u.seconds > limit) == which] for which in (False, True))
    loader = data.Loader(short, args.batch_seconds, workers=min(args.workers, len(short)))
    found, compute = {}, 0.0

    def skip(problems):
        failed.extend(problems)
        for problem in problems:
            tqdm.write(f"skipped: {problem}", file=sys.stderr)

    with tqdm(total=round(sum(u.seconds for u in utterances)), unit="s", desc="decoding", leave=False) as bar:
        for batch in loader.epoch():
            begin = time.time()
            if batch.ids:
                [results] = run_search(student, batch, device, dtype, [new_search(len(batch.ids))], chunk)
                found.update(zip(batch.ids, results))
            compute += time.time() - begin
            skip(batch.failed)
            bar.update(round(batch.seconds))
        for u in long:
            begin = time.time()
            try:
                found[u.id] = recognise_long(student, data.stream_audio(u.path), new_search, chunk, device, dtype, bar)
            except UserError as error:
                skip([str(error)])
            compute += time.time() - begin
    if not found:
        raise UserError("none of the audio could be read")
    return found, compute


def recognise_long(student, audio, new_search, chunk, device, dtype, bar):
    """-> [Hypothesis] of a recording of any length. After a pause the search begins anew, as after an utterance; over
    chunks and over other cuts it goes on."""
    heard = (((hidden, False) for hidden in hear_chunks(student, audio, chunk, device, dtype)) if chunk else
             hear_pieces(student, audio, device, dtype))
    whole, one, frames = Hypothesis([]), new_search(1), 0

    def finish():
        [[best, *_]] = one.results()
        whole.tokens += best.tokens
        whole.score += best.score

    for hidden, pause in heard:
        if pause and frames:
            finish()
            one = new_search(1)
            one.frame = frames
        one.advance(hidden, torch.tensor([hidden.shape[1]], device=device))
        frames += hidden.shape[1]
        bar.update(hidden.shape[1] * SECONDS)
    finish()
    return [whole]


def raw_audio(file, chunk):
    """16-bit mono PCM, 16 kHz -> float32 tensors: first what a chunk hears beyond its end, then chunk by chunk."""
    for samples in itertools.chain([LOOK_AHEAD], itertools.repeat(chunk * FRAME)):
        block = file.read(2 * samples)
        yield torch.from_numpy(numpy.frombuffer(block[:len(block) // 2 * 2], "<i2") / numpy.float32(32768))
        if len(block) < 2 * samples:
            return


def stream(source, student, tokenizer, new_search, chunk, device, dtype):
    """Print what is new after each chunk: when it was emitted, the latency (to hear the chunk + to compute), text."""
    one, waiting, frames, compute = new_search(1), 1000 * (chunk * FRAME + LOOK_AHEAD) / SAMPLE_RATE, 0, []
    started = time.time()

    def arriving(pieces):
        nonlocal started
        for piece in pieces:
            started = time.time()
            yield piece

    pieces = raw_audio(sys.stdin.buffer, chunk) if source == "-" else data.stream_audio(source)
    for hidden in hear_chunks(student, arriving(pieces), chunk, device, dtype):
        one.advance(hidden, torch.tensor([hidden.shape[1]], device=device))
        tokens, one.said[0] = one.said[0], []                           # told and forgotten: a stream may never end
        compute.append(1000 * (time.time() - started))
        started, frames = time.time(), frames + hidden.shape[1]
        if tokens:
            text = "".join(tokenizer.id_to_token(token.label) for token in tokens).replace(SPACE, " ")
            print(f"{tokens[0].frame * SECONDS:9.2f} -{(tokens[-1].frame + 1) * SECONDS:9.2f} s   latency {waiting:.1f}"
                  f" + {compute[-1]:.1f} ms  {text}", flush=True)
    if not frames:
        raise UserError(f"{source}: shorter than 40 ms, nothing to hear")
    compute = torch.tensor(compute)
    print(f"{frames * SECONDS:.1f} s in {len(compute)} chunks of {40 * chunk} ms; latency: {waiting:.1f} ms to hear a "
          f"chunk and what its last frame hears beyond, {compute.mean():.1f} ms to compute ({compute.max():.1f} at "
          f"most); RTF {compute.sum() / (1000 * frames * SECONDS):.4f}", file=sys.stderr)
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", nargs="*", metavar="AUDIO", help="files or folders to transcribe")
    parser.add_argument("--data", nargs="+", metavar="SOURCE",
                        help="transcribed audio to score on (default without AUDIO: the demo's test voices)")
    parser.add_argument("--stream", metavar="FILE",
                        help="print partial results as a streaming student hears FILE, or - for raw 16 kHz 16-bit mono "
                             "PCM on standard input")
    parser.add_argument("--checkpoint", type=Path, default=Path("exp/finetune"),
                        help="run directory or file (default %(default)s)")
    parser.add_argument("--chunk", type=int, metavar="FRAMES",
                        help="frames of 40 ms that a streaming student hears at once, 0: everything (default: as "
                             "trained; if with --chunk random, 16 for --stream, else 0)")
    parser.add_argument("--method", choices=list(GREEDY), default="transducer",
                        help="output of the student (default %(default)s)")
    parser.add_argument("--beam", type=int, metavar="K",
                        help="beam search of the transducer with K hypotheses, 4 to 8 are plenty; .jsonl has them all "
                             "(default: greedy search)")
    parser.add_argument("--lm", metavar="FILE|NAME",
                        help="with --beam, a language model: a text file to count a word 3-gram from, or the name or "
                             "folder of a causal one of transformers")
    parser.add_argument("--lm-weight", type=float, default=0.3, help="of its log-probabilities (default %(default)s)")
    parser.add_argument("--word-bonus", type=float, default=4.0,
                        help="added to them, or few words would win: about what a word costs (default %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png",
                        help="draw log-mel, emitted tokens and the lattice's posterior of one short AUDIO (matplotlib)")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="text as .txt, .srt or .vtt; .ctm or .jsonl with times and confidences of words; with "
                             "--data a .jsonl of errors and alignments (default CHECKPOINT/scores.jsonl)")
    parser.add_argument("--batch-seconds", type=float, default=120,
                        help="seconds of audio decoded at once (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read audio (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    if bool(args.audio) + bool(args.data) + bool(args.stream) > 1:
        raise UserError("give either AUDIO to transcribe or --data to score or --stream, not both")
    if args.workers < 0 or not args.batch_seconds > 0 or (args.chunk or 0) < 0:
        raise UserError("--workers and --chunk must not be negative and --batch-seconds must be above 0")
    if args.beam is not None and (args.beam < 1 or args.method == "ctc" or args.stream):
        raise UserError("--beam must be above 0 and goes with the transducer and without --stream, whose text is final")
    if args.stream and args.output or args.plot and not args.audio:
        raise UserError("--output and --plot are for AUDIO; --stream prints, so > FILE keeps its text")
    if args.lm and not args.beam:
        raise UserError("--lm needs a beam search; add --beam 8")
    kinds = [".jsonl", ".txt", ".srt", ".vtt", ".ctm"] if args.audio else [".jsonl"]
    if args.output and args.output.suffix not in kinds:
        raise UserError(f"--output {args.output}: its name must end in {' or '.join(kinds)}")
    if not args.audio and not args.output:
        args.output = (args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent) / "scores.jsonl"
    return args


@running.polite
def main(argv=None):
    args = parse(argv)
    device, dtype, why = running.choose_device(args.device)
    student, tokenizer = load_recogniser(args.checkpoint, device)
    chunk, failed = choose_chunk(student.config, args), []
    print(f"{why}; {args.checkpoint}: {student.parameter_count / 1e6:.1f} M parameters, {student.config.listening}, "
          f"{tokenizer.get_vocab_size()} tokens, {f'beam {args.beam}' if args.beam else 'greedy'} {args.method}",
          file=sys.stderr)
    new_search = functools.partial(GREEDY[args.method], student)
    if args.beam:
        lm = args.lm and (NGram(args.lm) if Path(args.lm).is_file() else CausalLM(args.lm, device))
        fusion = lm and Fusion(tokenizer, lm, args.lm_weight, args.word_bonus, device)
        new_search = functools.partial(BeamTransducer, student, beam=args.beam, fusion=fusion)
    if args.stream:
        return stream(args.stream, student, tokenizer, new_search, chunk, device, dtype)
    utterances = data.load_sources(args.audio or args.data or [DEMO / "corpus/test"], not args.audio, failed)
    if not utterances:
        raise UserError("none of the audio could be read")
    if args.output:
        if args.output.suffix in (".srt", ".vtt") and len(utterances) > 1:
            raise UserError(f"--output {args.output}: subtitles are for one recording, found {len(utterances)}; give "
                            f"one or write .jsonl or .ctm")
        try:  # now, not after an hour of decoding
            open(args.output, "a").close()
        except OSError as error:
            raise UserError(f"cannot write --output {args.output} ({error.strerror}); choose another file")
    started = time.time()
    found, compute = recognise(utterances, student, new_search, chunk, args, device, dtype, failed)
    utterances = [u for u in utterances if u.id in found]
    seconds = sum(u.seconds for u in utterances)
    rtf = (f"RTF {compute / max(seconds, 1e-9):.4f} ({seconds:.0f} s of audio, {compute:.1f} s to compute, "
           f"{time.time() - started:.1f} s with reading)")
    transcripts = [(u, [(h.score, words_of(tokenizer, h.tokens)) for h in found[u.id]]) for u in utterances]
    if args.audio:
        print(render(".txt", transcripts), end="")
        if args.output:
            args.output.write_text(render(args.output.suffix, transcripts), encoding="utf-8")
        if args.plot:
            plot(args.plot, student, tokenizer, utterances[0], found[utterances[0].id][0].tokens, chunk)
        print(rtf + (f"; {len(failed)} could not be used" if failed else ""), file=sys.stderr)
    else:
        print(f"{score(transcripts, args.output)}\n{rtf}")
        print(f"normalised: NFKC, upper case, no punctuation but the apostrophe; {len(utterances)} utterances, "
              f"{len(failed)} could not be used; alignments: {args.output}")
    return 0


def score(transcripts, output):
    """Write errors and alignment of each utterance to `output` -> Errors of all."""
    total = Errors()
    with open(output, "w", encoding="utf-8") as file:
        for u, [(_, words), *_] in transcripts:
            errors = word_errors(u.text, text_of(words))
            total += errors
            row = {"id": u.id, "reference": u.text, "hypothesis": text_of(words), **asdict(errors)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return total


if __name__ == "__main__":
    sys.exit(main())
