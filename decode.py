"""Audio to text: hidden states -> labels -> words.

    python decode.py                             # score exp/finetune on the demo's test voices
    python decode.py talk.wav interview.mp3      # transcribe files of any length
    python decode.py talk.wav --output talk.srt  # or .vtt; .ctm, .jsonl with times of words; .txt
    python decode.py --data LibriSpeech/test-clean --checkpoint exp/100h --beam 8 --lm books.txt
    python decode.py --checkpoint exp/stream --stream talk.wav  # words as they come, or live:
    arecord -q -t raw -f S16_LE -r 16000 | python decode.py --checkpoint exp/stream --stream -

Both sides of a score are normalised alike (Unicode NFKC, upper case, no punctuation but the
apostrophe); words are words, CJK characters count one by one (MER).
"""

from tools import quiet_start  # noqa: F401  (first: Ctrl-C while the rest is imported)

import functools
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

import data
import model
from data import DEMO, FRAME_SECONDS, WORD_START
from model import BLANK, RANDOM_CHUNK, Hypothesis, Token
from tools.alignment_plot import plot_alignment
from tools.beam_search import BeamTransducer, Fusion, NGram, text_file
from tools.command_line import (
    Parser,
    UserError,
    count,
    not_negative,
    one_line_errors,
    positive_float,
    positive_int,
)
from tools.long_audio import encode_pieces
from tools.machine import autocast, choose_device
from tools.plot import picture
from tools.stream import encode_chunks, print_stream
from tools.subtitles import FORMATS, Word, text_of
from tools.word_errors import CJK, Errors, word_errors

AHEAD = 4  # frames that greedy search examines at once


# ---------------------------------------- audio to hidden


@torch.no_grad()
def search_batch(student, batch, searches, dtype=torch.float32, chunk=None):
    """Encode a batch once and feed its hidden states to each of the searches."""
    device = next(student.parameters()).device
    features = batch.features.to(device)
    lengths = batch.feature_lengths.to(device)
    with autocast(device, dtype):
        hidden, lengths = student.encoder(features, lengths, chunk)
    for search in searches:
        search.advance(hidden.float(), lengths)


# ---------------------------------------- hidden to labels

# A search reads hidden states piece by piece, a batch at once or a stream as it comes:
#
#     search = GreedyTransducer(student, B)
#     search.advance(hidden, lengths)  # (B, T, d), (B,), as often as there is more
#     search.results()  # for each of the B rows its Hypotheses, best first


class GreedyTransducer:
    """The best label of each frame, until blank is the best or `max_symbols` were emitted.

    For the whole batch at once ("label looping", arXiv 2406.06220): every row has its own frame. It
    examines the next AHEAD frames, passes those whose best label is blank and emits the label of
    the first other: fewer steps than frames and labels together. The score is that of the one path.
    """

    @torch.no_grad()
    def __init__(self, student, B=1, max_symbols=5, first_frame=0):
        self.student = student
        self.max_symbols = max_symbols
        self.frame = first_frame  # of the next hidden state
        device = student.ctc.weight.device
        predicted, self.state = student.predictor(torch.full((B, 1), BLANK, device=device))
        self.predicted = student.joiner.project_predicted(predicted[:, 0])  # (B, J)
        self.tokens = [[] for _ in range(B)]
        self.score = torch.zeros(B, device=device)

    @torch.no_grad()
    def advance(self, hidden, lengths):
        encoded = F.pad(
            self.student.joiner.project_hidden(hidden), (0, 0, 0, AHEAD)
        )  # (B, T + AHEAD, J)
        ahead = torch.arange(AHEAD, device=hidden.device)
        now = torch.zeros_like(lengths)  # each row's frame
        emitted = torch.zeros_like(lengths)  # labels in that frame
        while True:
            # 1. Examine the next frames of the rows that have some left, all (rows, AHEAD).
            rows = (now < lengths).nonzero()[:, 0]
            if len(rows) == 0:
                break
            frames = now[rows, None] + ahead
            inside = frames < lengths[rows, None]
            logits = self.student.joiner.join(
                encoded[rows[:, None], frames], self.predicted[rows, None]
            )
            log_probs, labels = logits.log_softmax(-1).max(-1)
            is_label = (labels != BLANK) & inside

            # 2. Pass the blanks before the first label.
            is_blank = inside & (is_label.cumsum(1) == 0)
            passed = is_blank.sum(1)
            self.score[rows] += (log_probs * is_blank).sum(1)
            now[rows] += passed
            emitted[rows] *= passed == 0

            # 3. Rows with a label emit it, and their predictor reads it.
            emitting = is_label.any(1).nonzero()[:, 0]
            if len(emitting) == 0:
                continue
            rows = rows[emitting]
            first = passed[emitting]
            self.emit(rows, now[rows], labels[emitting, first], log_probs[emitting, first])

            # 4. A frame that has emitted enough is over.
            emitted[rows] += 1
            full = emitted[rows] == self.max_symbols
            now[rows] += full
            emitted[rows] *= ~full
        self.frame += hidden.shape[1]

    def emit(self, rows, frames, labels, log_probs):
        """Each row writes one label; all arguments (rows,)"""
        columns = [rows, self.frame + frames, labels, log_probs.exp()]
        for row, frame, label, probability in zip(*[column.tolist() for column in columns]):
            self.tokens[row].append(Token(label, frame, probability))
        self.score[rows] += log_probs
        predicted, self.state[rows] = self.student.predictor(labels[:, None], self.state[rows])
        self.predicted[rows] = self.student.joiner.project_predicted(predicted[:, 0])

    def results(self):
        scores = self.score.tolist()
        return [[Hypothesis(tokens, score)] for tokens, score in zip(self.tokens, scores)]


class GreedyCTC:
    """The best label of each frame, repetitions joined, blanks dropped."""

    def __init__(self, student, B=1, first_frame=0):
        self.student = student
        self.frame = first_frame  # of the next hidden state
        self.tokens = [[] for _ in range(B)]
        self.score = [0.0] * B
        self.previous = [BLANK] * B  # label of the frame before

    @torch.no_grad()
    def advance(self, hidden, lengths):
        log_probs, labels = self.student.ctc(hidden).log_softmax(-1).max(-1)  # (B, T)
        for b, length in enumerate(lengths.tolist()):
            probabilities = log_probs[b, :length].exp().tolist()
            for t, label in enumerate(labels[b, :length].tolist()):
                if label != BLANK and label != self.previous[b]:
                    self.tokens[b].append(Token(label, self.frame + t, probabilities[t]))
                self.previous[b] = label
            self.score[b] += log_probs[b, :length].sum().item()
        self.frame += hidden.shape[1]

    def results(self):
        return [[Hypothesis(tokens, score)] for tokens, score in zip(self.tokens, self.score)]


GREEDY = {"transducer": GreedyTransducer, "ctc": GreedyCTC}


# ---------------------------------------- labels to words


def words_of(tokenizer, tokens):
    """list of Token -> list of Word

    A CJK character begins and ends a word, as far as tokens do: such texts have no spaces.
    """
    words = []
    for label, frame, probability in tokens:
        piece = tokenizer.id_to_token(label).replace("<unk>", "")
        start = round(frame * FRAME_SECONDS, 2)
        end = round((frame + 1) * FRAME_SECONDS, 2)
        joined = not piece.startswith(WORD_START)
        piece = piece.removeprefix(WORD_START)
        if words and joined and not is_boundary(words[-1].word, piece):
            last = words[-1]
            confidence = min(last.confidence, probability)
            words[-1] = Word(last.word + piece, last.start, end, confidence, last.joined)
        else:
            words.append(Word(piece, start, end, probability, joined))
    return [word for word in words if word.word]


def is_boundary(before, after):
    """Does one word end between these letters, because one of them is a CJK character?"""
    return bool(re.search(f"[{CJK}]", before[-1:] + after[:1]))


def load_recogniser(path, device):
    """A checkpoint of stage 2 -> (student, tokenizer)"""
    checkpoint = model.load_checkpoint(path)
    if "tokenizer" not in checkpoint:
        raise UserError(
            f"{path} comes from stage 1 and cannot write text yet; "
            f"next: python finetune_rnnt.py --init {path}"
        )
    student = model.load_student(checkpoint).to(device).eval()
    return student, Tokenizer.from_str(checkpoint["tokenizer"])


def transcribe(student, tokenizer, batch, dtype=torch.float32, methods=("transducer",)):
    """Batch -> for each method ("transducer", "ctc") a list of texts, by greedy search"""
    B = len(batch.feature_lengths)
    searches = [GREEDY[method](student, B) for method in methods]
    search_batch(student, batch, searches, dtype)
    texts = []
    for search in searches:
        best = [ranked[0] for ranked in search.results()]
        texts.append([text_of(words_of(tokenizer, hypothesis.tokens)) for hypothesis in best])
    return texts


# ---------------------------------------- python decode.py


def recognise(utterances, student, new_search, chunk, args, dtype, failed):
    """-> ({id: its Hypotheses}, seconds that it took to compute)

    Recordings much longer than the utterances of training are encoded piece by piece, the rest in
    batches. What cannot be read is named and added to `failed`.
    """
    limit = 3 * student.config.seconds
    short = [u for u in utterances if u.seconds <= limit]
    long = [u for u in utterances if u.seconds > limit]
    loader = data.Loader(short, args.batch_seconds, workers=min(args.workers, len(short)))
    found = {}
    compute = 0.0
    bar = tqdm(
        desc="decoding",
        total=math.ceil(sum(u.seconds for u in utterances)),
        bar_format="{desc}: {percentage:.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]",
        leave=False,
    )
    with bar:
        for batch in loader.epoch():
            started = time.time()
            if batch.utterances:
                search = new_search(len(batch.utterances))
                search_batch(student, batch, [search], dtype, chunk)
                ids = [u.id for u in batch.utterances]
                found.update(zip(ids, search.results()))
            compute += time.time() - started
            skip(batch.failed, failed)
            bar.update(batch.seconds)
        for u in long:
            started = time.time()
            try:
                found[u.id] = recognise_long(u, student, new_search, chunk, dtype, bar)
            except UserError as error:
                skip([str(error)], failed)
            compute += time.time() - started
    return found, compute


def recognise_long(u, student, new_search, chunk, dtype, bar):
    """-> [Hypothesis] of an utterance of any length

    After a pause the search begins anew, as after an utterance; over chunks and over other cuts it
    goes on.
    """
    device = next(student.parameters()).device
    audio = data.stream_audio(u.path, u.offset, u.seconds)
    if chunk:
        chunks = encode_chunks(student, audio, chunk, device, dtype)
        pieces = zip(chunks, itertools.repeat(False))
    else:
        pieces = encode_pieces(student, audio, device, dtype)
    searches = [new_search(1)]
    frames = 0
    for hidden, after_pause in pieces:
        if after_pause and frames:
            searches.append(new_search(1, first_frame=frames))
        searches[-1].advance(hidden, torch.tensor([hidden.shape[1]], device=device))
        frames += hidden.shape[1]
        bar.update(hidden.shape[1] * FRAME_SECONDS)
    whole = Hypothesis([], 0.0)
    for search in searches:
        [[best, *_]] = search.results()
        whole.tokens += best.tokens
        whole.score += best.score
    return [whole]


def skip(problems, failed):
    """Name what cannot be used, above the progress bar, and keep it for the count at the end."""
    for problem in problems:
        tqdm.write(f"skipped: {problem}", file=sys.stderr)
    failed += problems


def score(transcripts, output):
    """Write errors and alignment of each utterance to `output` -> Errors of all

    The texts are written first, so that nothing that follows can lose them.
    """
    rows = []
    for u, [(_, words), *_] in transcripts:
        rows.append({"id": u.id, "reference": u.text, "hypothesis": text_of(words)})
    write(output, json_lines(rows))
    total = Errors()
    for row in rows:
        errors = word_errors(row["reference"], row["hypothesis"])
        row.update(asdict(errors))
        total += errors
    write(output, json_lines(rows))
    return total


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path, text):
    """Replace a file whole or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_writable(option, path):
    """Refuse a file that `write` cannot write now, not after an hour of decoding."""
    temporary = Path(f"{path}.tmp")
    reason = "it is a folder" if path.is_dir() else None
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UserError(f"cannot write {option} {path} ({reason}); choose another file")


def one_line(text, width=90):
    """A text, cut to what a line of a terminal shows"""
    return text if len(text) <= width else text[: width - 4] + " ..."


def parse(argv):
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to decode")
    group.add_argument("audio", nargs="*", metavar="AUDIO", help="files or folders to transcribe")
    group.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="transcribed audio to score (default: the demo's test voices)",
    )
    group.add_argument(
        "--stream",
        metavar="FILE",
        help="print words as the audio comes: of FILE, or of - for raw 16 kHz 16-bit mono PCM on "
        "standard input",
    )
    group = parser.add_argument_group("how")
    group.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("exp/finetune"),
        help="run directory or file (default %(default)s)",
    )
    group.add_argument(
        "--chunk",
        type=count,
        metavar="FRAMES",
        help="frames of 40 ms that a streaming student encodes at once, 0: all (default: as "
        "trained; if with --chunk random, 16 for --stream, else 0)",
    )
    group.add_argument(
        "--method",
        choices=list(GREEDY),
        default="transducer",
        help="output of the student (default %(default)s)",
    )
    group.add_argument(
        "--beam",
        type=positive_int,
        metavar="K",
        help="beam search of the transducer with K hypotheses, 4 to 8 are plenty; .jsonl has them "
        "all, of long recordings the best (default: greedy search)",
    )
    group.add_argument(
        "--lm",
        type=text_file,
        metavar="FILE",
        help="with --beam: a text file to count word 3-grams from, a sentence a line",
    )
    group.add_argument(
        "--lm-weight",
        type=not_negative,
        default=0.3,
        help="of the 3-gram's log-probabilities (default %(default)s)",
    )
    group.add_argument(
        "--word-bonus",
        type=not_negative,
        default=4.0,
        help="added to them, or few words would win: about what a word costs (default %(default)s)",
    )
    group = parser.add_argument_group("files and machine")
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="text as .txt, .srt or .vtt; .ctm or .jsonl with times and confidences of words; with "
        "--data a .jsonl of errors and alignments (default: scores-SOURCE.jsonl beside the "
        "checkpoint)",
    )
    group.add_argument(
        "--plot",
        type=picture,
        metavar="FILE.png",
        help="draw log-mel, tokens and the lattice's posterior of the first AUDIO (matplotlib)",
    )
    group.add_argument(
        "--batch-seconds",
        type=positive_float,
        default=120,
        help="seconds of audio decoded at once (default %(default)s)",
    )
    group.add_argument(
        "--workers", type=count, default=1, help="processes that read audio (default %(default)s)"
    )
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default %(default)s)"
    )
    args = parser.parse_args(argv)

    # What fits together.
    if bool(args.audio) + bool(args.data) + bool(args.stream) > 1:
        parser.error("give AUDIO to transcribe or --data to score or --stream, not both")
    if args.beam and (args.method == "ctc" or args.stream):
        parser.error("--beam is for the transducer and without --stream, whose text is final")
    if args.lm and not args.beam:
        parser.error("--lm needs a beam search; add --beam 8")
    if args.stream and args.output:
        parser.error("--stream prints its text; > FILE keeps it, instead of --output")
    if args.plot and not args.audio:
        parser.error("--plot is for AUDIO, the first one")
    kinds = list(FORMATS) if args.audio else [".jsonl"]
    if args.output and args.output.suffix not in kinds:
        parser.error(f"--output {args.output}: its name must end in {' or '.join(kinds)}")
    return args


def choose_chunk(config, args):
    """Frames encoded at once, 0 for all: what --chunk gives, else as the student was trained"""
    chunk = config.chunk if args.chunk is None else args.chunk
    if chunk == RANDOM_CHUNK:
        chunk = 16 if args.stream else 0
    streams_whole = args.stream and chunk == 0
    cuts_what_is_whole = chunk > 0 and config.chunk == 0
    if streams_whole or cuts_what_is_whole:
        raise UserError(
            f"{args.checkpoint} {config.describes_input()}; streaming needs a --chunk above 0 "
            f"and a student trained with pretrain_kd.py --chunk 16 (or --chunk random)"
        )
    return chunk


def choose_search(args, student, tokenizer):
    """-> function (number of rows, first_frame=0) -> a search"""
    if not args.beam:
        return functools.partial(GREEDY[args.method], student)
    fusion = None
    if args.lm:
        device = next(student.parameters()).device
        fusion = Fusion(tokenizer, NGram(args.lm), args.lm_weight, args.word_bonus, device)
    return functools.partial(BeamTransducer, student, beam=args.beam, fusion=fusion)


def find_utterances(args, failed):
    """-> list of Utterance that the arguments name; what cannot be used is added to `failed`"""
    sources = args.data or [DEMO / "corpus/test"]
    if args.audio:
        sources = [name for name in args.audio if os.path.exists(os.path.expanduser(name))]
        missing = [name for name in args.audio if name not in sources]
        skip([f"{name}: no such file or folder, check its name" for name in missing], failed)
    utterances = data.load_sources(sources, skipped=failed)
    # An empty transcript is a reference without words; where there is none, nothing can be scored.
    if not args.audio:
        problems = [f"{u.path}: no transcript" for u in utterances if u.text is None]
        data.report(problems, "without a transcript; to transcribe them, leave out --data")
        failed += problems
        utterances = [u for u in utterances if u.text is not None]
    check_usable(utterances, failed)
    return utterances


def check_usable(utterances, failed):
    if not utterances:
        reason = f" ({failed[0]})" if failed else ""
        raise UserError(f"none of the audio can be used{reason}; give other files or folders")


def scores_file(args):
    """Where scores go without --output: beside the checkpoint, a file for each test set

    It is named after the last two parts of the path, because many test sets are called "test".
    """
    names = []
    for source in args.data or [DEMO / "corpus/test"]:
        path = Path(source).expanduser().resolve()
        names.append("-".join(path.parts[-2:]).removesuffix(".jsonl").strip("/"))
    folder = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    return folder / f"scores-{'+'.join(names)[:70]}.jsonl"


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device, dtype, reason = choose_device(args.device)
    student, tokenizer = load_recogniser(args.checkpoint, device)
    chunk = choose_chunk(student.config, args)
    search_name = f"beam {args.beam}" if args.beam else "greedy"
    print(
        f"{reason}; {args.checkpoint}: {student.parameter_count / 1e6:.1f} M parameters, "
        f"{student.config.describes_input()}, {tokenizer.get_vocab_size()} tokens, "
        f"{search_name} {args.method}",
        file=sys.stderr,
    )
    new_search = choose_search(args, student, tokenizer)
    spell = functools.partial(words_of, tokenizer)
    if args.stream:
        print_stream(args.stream, student, new_search(1), spell, chunk, device, dtype)
        return

    # Whatever is wrong with files is found before an hour of decoding.
    output = args.output
    if not args.audio and not output:
        output = scores_file(args)
    if output:
        check_writable("--output", output)
    if args.plot:
        check_writable("--plot", args.plot)
    failed = []
    utterances = find_utterances(args, failed)
    if output and output.suffix in (".srt", ".vtt") and len(utterances) > 1:
        raise UserError(
            f"--output {output}: subtitles are for one recording, found {len(utterances)}; "
            f"give one or write .jsonl or .ctm"
        )

    started = time.time()
    found, compute = recognise(utterances, student, new_search, chunk, args, dtype, failed)
    utterances = [u for u in utterances if u.id in found]
    check_usable(utterances, failed)
    seconds = sum(u.seconds for u in utterances)
    rtf = (
        f"RTF {compute / seconds:.4f} ({seconds:.0f} s of audio, {compute:.1f} s to compute, "
        f"{time.time() - started:.1f} s with reading)"
    )
    transcripts = []
    for u in utterances:
        ranked = [(hypothesis.score, spell(hypothesis.tokens)) for hypothesis in found[u.id]]
        transcripts.append((u, ranked))

    used = f"{len(utterances)} utterance{'s' * (len(utterances) != 1)}"
    if failed:
        used += f", {len(failed)} could not be used"
    if args.audio:
        print(FORMATS[".txt"](transcripts), end="")
        if output:
            write(output, FORMATS[output.suffix](transcripts))
        if args.plot:
            tokens = found[utterances[0].id][0].tokens
            plot_alignment(args.plot, student, tokenizer, utterances[0], tokens, chunk)
        print(f"{rtf}; {used}", file=sys.stderr)
        return
    total = score(transcripts, output)
    print(f"{total}\n{rtf}")
    print(f"normalised: NFKC, upper case, no punctuation but the apostrophe; {used}")
    _, [(_, words), *_] = transcripts[0]
    print(f"reference:  {one_line(utterances[0].text)}")
    print(f"hypothesis: {one_line(text_of(words))}")
    print(f"alignments: {output}")


if __name__ == "__main__":
    sys.exit(main())
