"""Words with times, and the files they are written to: .txt, .srt, .vtt, .ctm, .jsonl"""

import json
from pathlib import Path
from typing import NamedTuple

PAUSE = 1.0  # seconds of silence that end a cue
LONGEST = 6.0  # seconds of a cue
SHORTEST = 1.0  # seconds that a cue stays, unless the next one comes
WIDEST = 80  # letters of a cue


class Word(NamedTuple):
    """A word of a transcript. Its confidence is that of its least probable token."""

    word: str
    start: float  # seconds at which its first token was emitted
    end: float  # seconds at which the frame of its last token ended
    confidence: float
    joined: bool = False  # no space before it: inside a Chinese or Japanese text


def text_of(words):
    """list of Word -> str"""
    text = ""
    for word in words:
        space = "" if word.joined else " "
        text += space + word.word
    return text.strip()


# ---------------------------------------- subtitles


def split_cues(words):
    """list of Word -> list of lists: cut at pauses, and before a cue grows too long or too wide

    Words that were emitted in one frame stay together: each cue starts later than the one before.
    """
    cues = []
    for word in words:
        if not cues or cue_ends_before(word, cues[-1]):
            cues.append([])
        cues[-1].append(word)
    return cues


def cue_ends_before(word, cue):
    """Does `word` begin another cue?"""
    if word.start <= cue[0].start:
        return False
    after_pause = word.start - cue[-1].end > PAUSE
    too_long = word.end - cue[0].start > LONGEST
    too_wide = len(text_of(cue)) + len(word.word) >= WIDEST
    return after_pause or too_long or too_wide


def clock(seconds, point):
    """Seconds -> hours:minutes:seconds, milliseconds behind the point"""
    seconds, milliseconds = divmod(round(1000 * seconds), 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{milliseconds:03}"


def subtitles(words, point):
    """The cues of a .srt file (point ",") or a .vtt file (point ".")"""
    cues = split_cues(words)
    blocks = []
    for number, cue in enumerate(cues, 1):
        start = cue[0].start
        end = max(cue[-1].end, start + SHORTEST)
        if number < len(cues):
            end = min(end, cues[number][0].start)
        times = f"{clock(start, point)} --> {clock(end, point)}"
        blocks.append(f"{number}\n{times}\n{text_of(cue)}\n")
    return "\n".join(blocks)


# ---------------------------------------- other files


def ctm(transcripts):
    """NIST's CTM: file, channel, start, duration, word, confidence; sorted by file, then time."""
    rows = []
    for utterance, ranked in transcripts:
        name = "_".join(utterance.id.split())
        _, words = ranked[0]
        for word in words:
            rows.append((name, word))

    def file_and_time(row):
        name, word = row
        return name, word.start

    text = ""
    for name, word in sorted(rows, key=file_and_time):
        times = f"{word.start:.2f} {word.end - word.start:.2f}"
        text += f"{name} 1 {times} {word.word} {word.confidence:.3f}\n"
    return text


def jsonl(transcripts):
    """A row for each utterance, with words and n-best list. It is also a manifest for data.py."""
    text = ""
    for utterance, ranked in transcripts:
        row = {"audio_filepath": str(Path(utterance.path).absolute()), "id": utterance.id}
        if utterance.offset is not None:
            row["offset"] = utterance.offset
            row["duration"] = utterance.seconds
        _, words = ranked[0]
        row["text"] = text_of(words)
        row["words"] = []
        for word, start, end, confidence, _ in words:
            times = {"start": start, "end": end}
            row["words"].append({"word": word, **times, "confidence": confidence})
        row["nbest"] = []
        for score, hypothesis in ranked:
            row["nbest"].append({"score": score, "text": text_of(hypothesis)})
        text += json.dumps(row, ensure_ascii=False) + "\n"
    return text


def txt(transcripts):
    """A line for each utterance: path, tab, text"""
    text = ""
    for utterance, ranked in transcripts:
        _, words = ranked[0]
        text += f"{utterance.path}\t{text_of(words)}\n"
    return text


def srt(transcripts):
    """SubRip, of one recording"""
    [(_, [(_, words), *_])] = transcripts
    return subtitles(words, ",")


def vtt(transcripts):
    """WebVTT, of one recording"""
    [(_, [(_, words), *_])] = transcripts
    return "WEBVTT\n\n" + subtitles(words, ".")


# Functions of a list of (Utterance, [(score, list of Word), ...] best first) -> text of the file
FORMATS = {".txt": txt, ".srt": srt, ".vtt": vtt, ".ctm": ctm, ".jsonl": jsonl}
