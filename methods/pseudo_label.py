"""Pseudo-labels for long recordings: two recognisers and a filter (K2D, arXiv 2407.10603).

    python -m methods.pseudo_label demo/corpus/unlabelled \\
        --teacher demo/teachers/whisper --validator demo/teachers/hubert              # minutes
    python finetune_rnnt.py --data demo/corpus/train exp/pseudo/pieces.jsonl \\
        --dev demo/corpus/dev --out exp/k2d

    python -m methods.pseudo_label lectures/ --teacher openai/whisper-large-v2 \\
        --validator openai/whisper-base --out exp/lectures                            # one GPU

The teacher transcribes a recording in pieces of at most 30 s. The validator, smaller and of another
kind, transcribes the same pieces. A piece is kept where the two agree (section 3 of the paper):

    d(Y, V) = max(h(Y), min(1 - h(V), PER(Y, V)))        keep Y if d(Y, V) <= alpha

Y is the teacher's text, V the validator's, h is 1 for a text that loops, PER is an error rate from
0 to 1. The result is a manifest, --out/pieces.jsonl, whose rows point into the recordings: no audio
is written. A row that is not kept has "keep": false and its reason. The same command continues an
interrupted run.

[ours]: h (see `loops`), PER without a lexicon (see `phone_distance`), the weight of pseudo-labels.
The paper's KL divergence over the teacher's tokens has no counterpart in a transducer; the nearest
is finetune_rnnt.py --teacher-transducer.
"""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import torchaudio
from tqdm import tqdm

import data
from tools.audio_files import SHORTEST
from tools.command_line import (
    Parser,
    UserError,
    first_line,
    not_negative,
    one_line_errors,
    positive_float,
)
from tools.machine import choose_device
from tools.recognisers import cut_out, load_recogniser
from tools.word_errors import split_words

N_GRAM = 6  # characters
OFTEN = 5  # more of the same n-gram or word are suspicious
IN_A_ROW = 3  # phrases of several words

# A word or syllable that follows itself more than OFTEN times: HAHAHA..., NO NO NO...
STUTTER = re.compile(rf"([^\W\d]+?)(?: ?\1){{{OFTEN},}}")


# ---------------------------------------- the filter


def repeats_a_phrase(words):
    """Does a phrase of several words stand IN_A_ROW times or more in a row?

    Two Chinese characters are mostly one word (非常非常非常 is "very very very"), so a phrase has three
    letters or characters at least.
    """
    for size in range(2, len(words) // IN_A_ROW + 1):
        for i in range(len(words) - IN_A_ROW * size + 1):
            phrase = words[i : i + size]
            in_a_row = words[i : i + IN_A_ROW * size] == IN_A_ROW * phrase
            if in_a_row and len("".join(phrase)) >= 3:
                return True
    return False


def repeated_share(text):
    """The share of a text, 0 to 1, that lies in n-grams which occur more than OFTEN times"""
    starts = range(len(text) - N_GRAM + 1)
    count = Counter(text[i : i + N_GRAM] for i in starts)
    covered = set()
    for i in starts:
        if count[text[i : i + N_GRAM]] > OFTEN:
            covered.update(range(i, i + N_GRAM))
    return len(covered) / max(1, len(text))


def loops(text):
    """h of the paper: is this a loop, such as recognisers write on noise and silence?

    The paper asks whether some n-gram occurs more than c times; follow-up code takes six characters
    and five times. That also finds " THAT " six times, or the topic of a lecture. [ours]: a loop is
    a repetition that follows itself or makes up half of the text,

    - a phrase of two words or more (in Chinese three characters), three times in a row or more;
    - one word or syllable, more than five times in a row: "no no no" and "very very very good" are
      human, and a recogniser that loops on one word seldom stops at five;
    - n-grams as above, where half of the text or more lies in them.

    It finds 0.07 % of 12,916 windows of 75 words, about 30 s, of read books (train-clean-100).
    """
    text = data.normalise(text)
    if repeats_a_phrase(split_words(text)):
        return True
    if STUTTER.search(text):
        return True
    return repeated_share(text) >= 0.5


def phone_distance(first, second):
    """Edit distance of the letters of two texts over the longer length, 0 to 1.

    [ours]: normalised letters without spaces stand for the paper's phones.
    """
    first = data.normalise(first).replace(" ", "")
    second = data.normalise(second).replace(" ", "")
    longer = max(len(first), len(second), 1)
    return torchaudio.functional.edit_distance(first, second) / longer


def judge(teacher, validator, alpha=0.4):
    """Two texts of a piece -> {keep, reason, distance, per, teacher_loops, validator_loops}"""
    per = phone_distance(teacher, validator)
    teacher_loops = loops(teacher)
    validator_loops = loops(validator)
    distance = max(float(teacher_loops), min(1.0 - validator_loops, per))
    keep = distance <= alpha
    if not data.normalise(teacher):
        keep = False
        reason = "the teacher's text is empty"
    elif teacher_loops:
        reason = "the teacher loops"
    elif validator_loops:
        reason = "the validator loops, the teacher does not"
    elif keep:
        reason = "they agree"
    else:
        reason = "they disagree"
    return {
        "keep": keep,
        "reason": reason,
        "distance": round(distance, 4),
        "per": round(per, 4),
        "teacher_loops": teacher_loops,
        "validator_loops": validator_loops,
    }


# ---------------------------------------- the manifest


def name_of(recording):
    """What the rows of a recording have in common: its path, and which segment of the file."""
    path = os.path.abspath(recording.path)
    if recording.offset is None:
        return path
    return f"{path}@{recording.offset!r}+{recording.seconds!r}"


def label_recording(recording, teacher, validator, alpha, weight):
    """An Utterance of any length -> its rows. Raises UserError where it cannot be read."""
    begin = recording.offset or 0.0
    seconds = None if recording.offset is None else recording.seconds
    waveform = data.load_audio(recording.path, recording.offset, seconds)

    # The teacher decides where the pieces begin and end.
    pieces = []
    for start, end, text in teacher.segments(waveform):
        if end - start >= SHORTEST:
            pieces.append((start, end, text))
    checks = validator.transcribe(cut_out(waveform, pieces)) if pieces else []

    # A recording without any text has one row, too: it is finished.
    if not pieces:
        pieces = [(0.0, len(waveform) / data.SAMPLE_RATE, "")]
        checks = [""]
    rows = []
    for (start, end, text), check in zip(pieces, checks):
        row = {
            "audio_filepath": os.path.abspath(recording.path),
            "offset": round(begin + start, 3),
            "duration": round(end - start, 3),
            "text": text,
            "weight": weight,
            "validator": check,
            **judge(text, check, alpha),
            "recording": name_of(recording),
            "pieces": len(pieces),
        }
        rows.append(row)
    return rows


def write_rows(rows, path, mode):
    with open(path, mode, encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_finished(path):
    """The rows of finished recordings. What an interruption left of another is removed."""
    if not path.exists():
        return []
    # What stands behind the last newline is half a row.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    found = Counter(row["recording"] for row in rows)
    rows = [row for row in rows if found[row["recording"]] == row["pieces"]]
    temporary = Path(f"{path}.tmp")
    write_rows(rows, temporary, "w")
    temporary.replace(path)
    return rows


def open_manifest(out, settings):
    """Make the folder, or continue what the same settings made there. -> rows that are done"""
    path = out / "settings.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(settings), encoding="utf-8")
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if settings[name] != before.get(name)]
        if not changed:
            return read_finished(out / "pieces.jsonl")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"--out {out} cannot be used ({first_line(error)}); choose another folder")
    differences = [f"--{name} {before.get(name)}, now {settings[name]}" for name in changed]
    raise UserError(f"--out {out} was made with {'; '.join(differences)}; choose another folder")


def label_recordings(recordings, teacher, validator, out, alpha=0.4, weight=0.8, rows=()):
    """Append the rows of recordings to out/pieces.jsonl, one recording after the other.

    teacher has `segments`, validator has `transcribe` (tools/recognisers.py); rows: what is done.
    -> (all rows, problems: a line for each recording that could not be read)
    """
    rows = list(rows)
    problems = []
    done = {row["recording"] for row in rows}
    for recording in tqdm(recordings, unit="recording"):
        if name_of(recording) in done:
            continue
        try:
            new = label_recording(recording, teacher, validator, alpha, weight)
        except UserError as error:  # One bad file never ends a run.
            problems.append(str(error))
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        write_rows(new, out / "pieces.jsonl", "a")
        rows += new
    return rows, problems


# ---------------------------------------- the script


def summary(rows, problems):
    """One line: how much is kept, and why the rest is not."""
    kept = [row for row in rows if row["keep"]]
    hours = sum(row["duration"] for row in rows) / 3600
    kept_hours = sum(row["duration"] for row in kept) / 3600
    line = f"kept {len(kept)} of {len(rows)} pieces, {kept_hours:.2f} of {hours:.2f} h"
    reasons = Counter(row["reason"] for row in rows if not row["keep"])
    dropped = [f"{reason} {count}" for reason, count in reasons.items()]
    line += f"; dropped: {', '.join(dropped) or 'none'}"
    if problems:
        line += f"; {len(problems)} files could not be used"
    return line


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("audio", nargs="+", metavar="SOURCE", help="files, folders or manifests")
    parser.add_argument(
        "--teacher",
        required=True,
        metavar="NAME",
        help="transcribes: a recogniser of transformers (hub name or folder), or a checkpoint of "
        "stage 2",
    )
    parser.add_argument(
        "--validator",
        required=True,
        metavar="NAME",
        help="checks: another recogniser, preferably smaller and of another kind",
    )
    parser.add_argument(
        "--language",
        help="for multilingual models, e.g. en or zh (default: they choose one, piece by piece)",
    )
    parser.add_argument(
        "--alpha",
        type=not_negative,
        default=0.4,
        help="largest distance to keep; a smaller one keeps fewer, better labels "
        "(default %(default)s, the paper's)",
    )
    parser.add_argument(
        "--weight",
        type=positive_float,
        default=0.8,
        help="of a pseudo-label's loss where a transcript has 1, because some are wrong; below 1 "
        "also keeps them out of the development text (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("exp/pseudo"), help="default %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    if args.teacher == args.validator:
        raise UserError("--validator must be another model than --teacher, or it agrees with all")
    device, _, reason = choose_device(args.device)
    print(reason)
    unreadable = []
    recordings = data.load_sources(args.audio, skipped=unreadable)
    teacher = load_recogniser(args.teacher, device, args.language)
    # The validator's text is only compared, so the best path without beams is enough.
    validator = load_recogniser(args.validator, device, args.language, beams=1)

    settings = {}
    for name in ("teacher", "validator", "language", "alpha", "weight"):
        settings[name] = getattr(args, name)
    rows = open_manifest(args.out, settings)
    if rows:
        finished = {row["recording"] for row in rows}
        print(f"continuing {args.out}: {len(finished)} recordings are done")

    rows, problems = label_recordings(
        recordings, teacher, validator, args.out, args.alpha, args.weight, rows
    )
    if not rows:
        raise UserError("none of the audio could be read; give other recordings")
    print(summary(rows, unreadable + problems))
    print(
        f"next: python finetune_rnnt.py --data TRANSCRIBED {args.out / 'pieces.jsonl'} "
        f"--dev TRANSCRIBED_DEV --out exp/k2d"
    )


if __name__ == "__main__":
    sys.exit(main())
