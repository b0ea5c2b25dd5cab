"""What a folder, a manifest or an audio file holds: a list of utterances and a list of problems.

data.py describes the sources. Lengths come from headers or manifests; only where a header cannot
know it (MP3, a file from a pipe) the file is read.
"""

import functools
import itertools
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from tools.audio_files import SHORTEST, file_seconds, shown
from tools.command_line import UserError

AUDIO = {".flac", ".wav", ".opus", ".ogg", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf"}


@dataclass(frozen=True, slots=True)
class Utterance:
    path: str  # absolute
    seconds: float
    text: str | None = None  # None: not transcribed
    id: str = ""
    weight: float = 1.0  # of its loss in stage 2
    offset: float | None = None  # seconds; None: the whole file, no segment of it


def scan(source, has_words=None):
    """-> (list of Utterance, list of problems, one line each)

    has_words: function of an Utterance; those for which it is False are problems.
    Raises UserError if the source does not exist or holds nothing.
    """
    path = Path(source).expanduser().absolute()
    if not os.path.exists(path):
        cure = "python -m tools.librispeech download train-clean-100 fetches LibriSpeech"
        raise UserError(f"no such file or folder: {shown(path)} ({cure})")
    if path.is_dir():
        rows, problems = read_folder(path)
    elif path.suffix in (".jsonl", ".json"):
        rows, problems = read_manifest(path)
    else:
        rows = [Utterance(str(path), 0.0, id=path.stem)]
        problems = []
    if not rows and not problems:
        kinds = " ".join(sorted(AUDIO))
        raise UserError(
            f"{shown(path)}: no usable audio; expected a LibriSpeech folder, a .jsonl manifest "
            f"or files ending in {kinds}"
        )

    utterances = []
    places = set()
    ids = set()
    hide_bar = len(rows) < 2000
    for u in tqdm(rows, f"scanning {path.name}", unit="file", leave=False, disable=hide_bar):
        try:
            if not u.seconds:
                u = replace(u, seconds=file_seconds(u.path) - (u.offset or 0.0))
            if has_words and not has_words(u):
                raise UserError(f"{u.path}: no transcript")
            if u.seconds < SHORTEST:
                raise UserError(f"{u.path}: {u.seconds:.2f} s long, shorter than {SHORTEST} s")
            # Which of two texts would be right?
            its_place = place(u)
            if its_place in places:
                raise UserError(f"{u.path}: the same audio stands in {source} twice ({u.id})")
            places.add(its_place)
            utterances.append(with_unique_id(u, ids))
        except UserError as error:
            problems.append(str(error))
    return utterances, problems


def place(utterance):
    """What two utterances of the same audio have in common, however their paths are written."""
    path = real_path(utterance.path)
    if utterance.offset is None:
        return path
    return path, utterance.offset, utterance.seconds


def real_path(path):
    """The path without links to folders; mostly it is the same string, which then is no copy."""
    folder, name = os.path.split(path)
    real = os.path.join(real_folder(folder), name)
    return path if path == real else real


# A folder holds many files, and where its links lead is a question to the disk.
real_folder = functools.cache(os.path.realpath)


def with_unique_id(utterance, ids):
    """The utterance, with a number behind its id if that is one of `ids`; extends `ids`."""
    id = utterance.id
    while id in ids:
        id = f"{id}-{len(ids) + 1}"
    ids.add(id)
    return utterance if id == utterance.id else replace(utterance, id=id)


def read_folder(folder):
    """A LibriSpeech folder (where there is a .trans.txt) or bare audio.

    -> (list of Utterance, their lengths still 0, list of problems)
    """
    audio = []
    texts = {}
    garbled = set()
    problems = []
    for path in sorted(walk(folder)):
        if os.path.splitext(path)[1].lower() in AUDIO:
            audio.append(path)
        if not path.endswith(".trans.txt"):
            continue
        for _, line, problem in read_lines(path):
            id, _, words = line.strip().partition(" ")
            stem = os.path.join(os.path.dirname(path), id)
            texts[stem] = words
            if problem:
                garbled.add(stem)
                problems.append(problem)

    rows = []
    for path in audio:
        stem = os.path.splitext(path)[0]
        if stem not in garbled:
            id = os.path.relpath(stem, folder)
            rows.append(Utterance(path, 0.0, texts.get(stem), id))

    stems = {os.path.splitext(path)[0] for path in audio}
    for stem in sorted(texts.keys() - stems):
        problems.append(f"{shown(stem)}: named in a .trans.txt, but there is no such audio")
    return rows, problems


def walk(folder):
    """The paths of all files below a folder. Links to folders are followed."""
    seen = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        # Each folder once: a link may lead back to where it lies.
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            yield os.path.join(path, name)


def read_manifest(path):
    """JSON lines; relative paths start at the manifest's folder.

    -> (list of Utterance, their lengths 0 where the rows name none, list of problems)
    """
    rows = []
    problems = []
    folder = str(path.parent)
    for number, line, problem in read_lines(path):
        if problem:
            problems.append(problem)
            continue
        try:
            entry = json.loads(line)
            # Pseudo-labels that were judged bad stay in their manifest, with the reason.
            if entry.get("keep") is not False:
                rows.append(read_row(entry, folder))
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            expected = '{"audio_filepath": ..., "text": ...}'
            reason = f"{type(error).__name__}: {error}"
            problems.append(f"{shown(path)}:{number}: expected {expected} ({reason})")
    return rows, problems


def read_row(entry, folder):
    """A manifest's row -> Utterance. What is wrong with it raises ValueError, KeyError ..."""
    path = os.path.join(folder, entry["audio_filepath"])
    text = entry.get("text")
    if text is not None and not isinstance(text, str):
        raise TypeError("text is not a string")
    id = str(entry.get("id") or os.path.splitext(os.path.basename(path))[0])
    # JSON can spell halves of characters that no file can hold.
    f"{id}{path}{text}".encode()

    weight = number_in(entry, "weight", 1.0)
    if not 0 < weight < math.inf:
        raise ValueError(f"weight must be above 0, found {weight}")

    # A segment is named by its offset and duration (NeMo), or by its start and end.
    offset = number_in(entry, "offset", number_in(entry, "start"))
    seconds = number_in(entry, "duration")
    end = number_in(entry, "end")
    if end is not None:
        offset = offset or 0.0
        seconds = end - offset
    if offset is not None and not 0 <= offset < math.inf:
        raise ValueError(f"offset must not be negative, found {offset}")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"duration must be above 0, found {seconds}")
    return Utterance(path, seconds or 0.0, text, id, weight, offset)


def number_in(entry, key, default=None):
    value = entry.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{key} must be a number, found {value!r}")
    return float(value)


def read_lines(path):
    """-> (number, line, problem or None) of the lines of a text file that are not empty"""
    with open(path, "rb") as file:
        # A line may also end in "\r" alone.
        lines = itertools.chain.from_iterable(map(bytes.splitlines, file))
        for number, line in enumerate(lines, 1):
            problem = None
            try:
                line = line.decode()
            except UnicodeDecodeError:
                line = line.decode(errors="replace")
                problem = f"{shown(path)}:{number}: not UTF-8, save it as UTF-8"
            line = line.lstrip("\ufeff")
            if line.strip():
                yield number, line, problem
