"""Audio files as they are found: lengths that a header only guesses, formats that cannot seek,
files cut off.

data.py reads audio through `open_audio`; libsndfile (the soundfile package) does the decoding.
"""

import contextlib
import io
import math
import os
import re
from pathlib import Path

import soundfile

from tools.command_line import UserError

SAMPLE_RATE = 16_000  # Hz, of all audio once it is read
BLOCK = 30  # seconds of audio that are read at once
SHORTEST = 0.1  # seconds of an utterance


def shown(path):
    """A path as it can be printed: names of files need not be UTF-8."""
    return str(path).encode(errors="backslashreplace").decode()


class SoundFile(soundfile.SoundFile):
    """soundfile seeks after each read, unless it takes the file for one that cannot: some can't."""

    def seekable(self):
        return False


class Endless(io.BytesIO):
    """A file in memory whose size cannot be found by seeking to its end."""

    def seek(self, offset, whence=os.SEEK_SET):
        return self.tell() if whence == os.SEEK_END else super().seek(offset, whence)


@contextlib.contextmanager
def open_audio(path):
    """-> (a SoundFile, its true number of frames)

    What goes wrong, also while it is being read, becomes a UserError that names the file.
    """
    # A named pipe would be waited for.
    if not os.path.isfile(path):
        raise UserError(f"{shown(path)}: there is no such file")
    if not os.path.getsize(path):
        raise UserError(f"{shown(path)}: the file is empty")
    try:
        if shown(path) != str(path):
            raise ValueError("its name is not UTF-8, rename it")
        file = SoundFile(str(path))
        if file.format == "MP3":
            file = open_mp3(path, file)
        with file:
            rate = file.samplerate
            if math.lcm(rate, SAMPLE_RATE) > 1e8 or rate < 1000:
                raise ValueError(f"a sample rate of {rate} Hz, convert it to {SAMPLE_RATE}")
            if is_cut_off(path, file):
                raise ValueError("cut off, it is shorter than its header says")
            frames = true_length(path, file)
            if not 0 < frames < 48 * 3600 * rate:
                raise ValueError(f"a length of {frames / rate:.0f} s")
            yield file, frames
    except UserError:
        raise
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        reason = str(error).split(": ")[-1].strip(". ")
        raise UserError(f"{shown(path)}: not readable as audio ({reason})")


def open_mp3(path, file):
    """The SoundFile `file`, or another that reads all of this MP3.

    An MP3 is a sequence of frames. Its length stands in a first frame that is no audio (named Info
    or Xing), or is estimated from the first bit rate and the size. Where MP3s were joined it is
    that of the first. A decoder that finds neither length nor size counts the frames.
    """
    data = bytearray(Path(path).read_bytes())
    # Before the first frame there may be titles and pictures (ID3v2); 7 bits a byte are their size.
    if data.startswith(b"ID3"):
        size = 0
        for byte in data[6:10]:
            size = 128 * size + byte
        del data[: 10 + size]
    tag = re.search(b"Xing|Info", data[:200])
    if tag:
        data[tag.start() : tag.end()] = bytes(4)
    counted = SoundFile(Endless(data))

    # The header's length is without the encoder's silence at both ends, so it is the better one
    # where it is true.
    difference = counted.frames - file.frames
    if tag and difference < -5000:
        seconds = file.frames / file.samplerate
        raise ValueError(f"cut off after {counted.frames / file.samplerate:.1f} of {seconds:.1f} s")
    return file if tag and difference < 5000 else counted


def is_cut_off(path, file):
    """Whether there is less in a file than its header promises; libsndfile only logs it."""
    if file.format == "OGG":
        # The last page must be whole: a header of 27 bytes, the table of its parts, the parts.
        with open(path, "rb") as bytes_of_file:
            bytes_of_file.seek(max(0, os.path.getsize(path) - 66_000))
            end = bytes_of_file.read()
        page = end[max(0, end.rfind(b"OggS")) :]
        parts = page[27 : 27 + page[26]] if len(page) > 26 else b""
        return len(page) < 28 or len(page) < 27 + len(parts) + sum(parts)
    pattern = r"(?:data|riff|SSND|Data Size) *: (\d+) \(should be (\d+)\)"
    for promised, present in re.findall(pattern, file.extra_info):
        # Programs that write into a pipe promise as much as there can be.
        if int(present) + 100 < int(promised) < 0x7FFF0000:
            return True
    return False


def true_length(path, file):
    """The number of frames, which a FLAC or WAV that was written into a pipe does not name"""
    if file.frames == 0 and os.path.getsize(path) > 1000:
        raise ValueError("its header holds no length; re-encode it")
    if file.frames < 2**63 - 1:
        return file.frames
    frames = 0
    with SoundFile(str(path)) as again:
        while block := len(again.read(BLOCK * again.samplerate)):
            frames += block
    return frames


def file_seconds(path):
    """The length of an audio file"""
    with open_audio(path) as (file, frames):
        return frames / file.samplerate


def seek(file, frame):
    """Go to a frame; in what cannot seek, by reading up to there."""
    if frame and super(SoundFile, file).seekable():
        file.seek(frame)
        return
    while frame > 0:
        skipped = len(file.read(min(frame, BLOCK * file.samplerate)))
        if not skipped:
            break
        frame -= skipped


def segment_frames(path, length, rate, offset, seconds):
    """-> (first frame, last frame + 1) of a segment of a file of `length` seconds

    Manifests are rounded: a tenth of a second and 1 % are no contradiction.
    """
    tolerance = 0.1 + 0.01 * (seconds or 0.0)
    if offset is None:
        if seconds is not None and abs(length - seconds) > tolerance:
            raise UserError(
                f"{path}: {length:.2f} s long, but {seconds:.2f} s in its manifest (a segment "
                f"needs an offset) or when it was listed"
            )
        if seconds is not None and length < SHORTEST:
            raise UserError(f"{path}: {length:.2f} s long, shorter than {SHORTEST} s")
        return 0, round(length * rate)
    end = length if seconds is None else offset + seconds
    if offset > length - SHORTEST or end > length + tolerance:
        raise UserError(
            f"{path}: {length:.2f} s long, which is no room for a segment from {offset:.2f} to "
            f"{end:.2f} s"
        )
    return round(offset * rate), round(min(end, length) * rate)
