"""Embeddings of teachers on disk: each teacher encodes each utterance once, ever.

    caches, training, development = fill(folder, teachers, training, development, speeds, ...)
    embedding = caches[0](utterance, speed)      # (T, dim) float16, what teacher.embed gave

A teacher is here any object with .spec, .layers, .dim, .fingerprint and embed().
"""

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import data
from tools.command_line import UserError
from tools.machine import all_gather


def audio_key(utterance):
    """What an utterance is known by: the last four parts of its path, so that audio and cache may
    move, and where in the file it begins."""
    parts = Path(os.path.abspath(utterance.path)).parts
    return "/".join(parts[-4:]), utterance.offset


class Cache:
    """The embeddings of one teacher, as they are, in float16.

    NAME.RANK.f16 holds them one behind the other, (T, dim) each, to be memory-mapped.
    NAME.RANK.jsonl tells them apart: a header about the teacher, then a line for each utterance and
    speed. Both files are only appended to, an embedding before its line, so an interruption leaves
    at most an unfinished end, which `open` cuts off. Each process writes files of its own and reads
    those of all.

    Raises UserError that names the files to delete, where the teacher's embeddings are not what
    they were, or an utterance's length changed.
    """

    def __init__(self, folder, teacher, name, rank=0):
        self.folder = Path(folder)
        self.name = re.sub(r"[^\w.,-]+", "-", name)
        self.dim = teacher.dim
        self.index_path = self.folder / f"{self.name}.{rank}.jsonl"
        self.header = {
            "format": 2,
            "teacher": teacher.spec,
            "layers": teacher.layers,
            "dim": teacher.dim,
            "transformers": transformers.__version__,
            "fingerprint": teacher.fingerprint,
        }
        self.files = None
        self.read()

    # ---- reading

    def __call__(self, utterance, speed):
        """-> (T, dim) float16"""
        path, start, frames = self.find(utterance, speed)
        bytes_before = 2 * self.dim * start
        mapped = np.memmap(path, np.float16, "r", bytes_before, (frames, self.dim))
        return torch.from_numpy(np.array(mapped))

    def find(self, utterance, speed):
        """-> (file, its first frame in there, frames), or None if it is not in the cache"""
        row = self.rows.get((audio_key(utterance), speed))
        if row is None:
            return None
        path, start, frames, seconds = row
        if seconds != utterance.seconds:
            raise UserError(
                f"--cache: {path} has {utterance.path} with {seconds:.2f} s, now it has "
                f"{utterance.seconds:.2f} s; delete {path.with_suffix('')}.* or choose another "
                f"--cache"
            )
        return path, start, frames

    def read(self):
        """Read the index of every process."""
        self.rows = {}
        self.ends = (0, 0)  # bytes of this process's index and embeddings that are complete
        # Not those of a teacher whose name only begins like this one's.
        own = re.compile(re.escape(self.name) + r"\.\d+\.jsonl")
        for index_path in sorted(self.folder.glob("*.jsonl")):
            if not own.fullmatch(index_path.name):
                continue
            ends = self._read_index(index_path)
            if index_path == self.index_path:
                self.ends = ends

    def _read_index(self, index_path):
        """Add the rows of one index. -> bytes of it and of its embeddings that are complete"""
        embeddings_path = index_path.with_suffix(".f16")
        frames_there = 0
        if embeddings_path.exists():
            frames_there = embeddings_path.stat().st_size // (2 * self.dim)
        # What stands behind the last end of a line was never finished.
        lines = index_path.read_bytes().split(b"\n")[:-1]
        if not lines:
            return 0, 0
        self._check_header(index_path, lines[0])
        start = 0
        end = len(lines[0]) + 1
        for line in lines[1:]:
            try:
                row = json.loads(line)
                key = (row["audio"], row["offset"])
                frames = row["frames"]
                place = (embeddings_path, start, frames, row["seconds"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"--cache: {index_path} is damaged; delete {index_path.with_suffix('')}.* or "
                    f"choose another --cache"
                )
            if start + frames > frames_there:
                break
            self.rows[key, row["speed"]] = place
            start += frames
            end += len(line) + 1
        return end, 2 * self.dim * start

    def _check_header(self, index_path, line):
        """UserError unless the header is that of this teacher"""
        problems = []
        try:
            old = json.loads(line)
            for key in ("format", "layers", "dim"):
                if old[key] != self.header[key]:
                    problems.append(f"{key} was {old[key]}, is {self.header[key]}")
            then = torch.tensor(old["fingerprint"])
            now = torch.tensor(self.header["fingerprint"])
            # The difference of bfloat16 to float32 is within.
            if not problems and (then - now).norm() > 0.05 * now.norm():
                problems.append(
                    f"the embeddings of {self.header['teacher']} are not what those of "
                    f"{old['teacher']} were (other weights, or transformers {old['transformers']} "
                    f"and now {self.header['transformers']}; a module of your own must seed them)"
                )
        except (ValueError, KeyError, TypeError):
            problems = ["its header is damaged"]
        if problems:
            raise UserError(
                f"--cache: {index_path} is stale: {'; '.join(problems)}; delete "
                f"{index_path.with_suffix('')}.* or choose another --cache"
            )

    # ---- writing

    def open(self):
        """Get ready to append: lock the files, cut off what an interruption left unfinished."""
        import fcntl  # Not on Windows, where all but --cache works.

        index = open(self.index_path, "ab")
        try:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            index.close()
            raise UserError(
                f"--cache: another process is filling {self.index_path.with_suffix('.f16')}; wait "
                f"for it or choose another --cache"
            )
        embeddings = open(self.index_path.with_suffix(".f16"), "ab")
        self.files = (index, embeddings)
        # Another process may have written since this one read.
        self.read()
        index_end, embeddings_end = self.ends
        index.truncate(index_end)
        embeddings.truncate(embeddings_end)
        if index_end == 0:
            index.write(json.dumps(self.header).encode() + b"\n")

    def append(self, utterances, speed, embeddings, lengths):
        """embeddings (B, T, dim) and lengths (B,) of B utterances"""
        index, file = self.files
        largest = torch.finfo(torch.float16).max
        halves = embeddings.clamp(-largest, largest).half().cpu()
        lengths = lengths.tolist()
        for half, length in zip(halves, lengths):
            file.write(half[:length].numpy().tobytes())
        file.flush()
        for utterance, length in zip(utterances, lengths):
            audio, offset = audio_key(utterance)
            row = {
                "audio": audio,
                "offset": offset,
                "speed": speed,
                "seconds": utterance.seconds,
                "frames": length,
            }
            index.write(json.dumps(row).encode() + b"\n")
        index.flush()

    def close(self):
        for file in self.files:
            file.close()
        # Open files could not go to the processes that read batches.
        self.files = None


# ---------------------------------------- filling


def fill(
    folder, teachers, training, development, speeds, batch_seconds, workers=0, rank=0, world=1
):
    """Let the teachers encode what is not on disk yet: training at each speed, development as is.

    -> a Cache for each teacher, and the two lists without the utterances that cannot be read.
    Each of the `world` processes calls this and encodes its share. Prints the size first; UserError
    if the disk has no room for it.
    """
    folder = Path(folder)
    wanted = wanted_embeddings(training, development, speeds)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        caches = []
        for teacher, name in zip(teachers, cache_names(teachers)):
            caches.append(Cache(folder, teacher, name, rank))
        missing = not_in(caches, wanted)
        if missing and rank == 0:
            check_room(folder, caches, missing)
        all_gather(None)  # Nobody writes while others still look for what is missing.
        if missing:
            encode(caches, teachers, missing, batch_seconds, workers, rank, world)
        all_gather(None)
        for cache in caches:
            cache.read()
    except OSError as error:
        raise UserError(
            f"cannot write --cache {folder} ({error.strerror}); what is there is intact: free some "
            f"space or choose another folder, and give the same command again"
        ) from error

    # What is still missing is audio that cannot be read.
    unreadable = {audio_key(utterance) for utterance, _ in not_in(caches, wanted)}
    for other in all_gather(unreadable):
        if other != unreadable:
            raise UserError(
                f"--cache {folder} is not one folder for all processes: put it on a disk that they "
                f"share"
            )
    training = [u for u in training if audio_key(u) not in unreadable]
    development = [u for u in development if audio_key(u) not in unreadable]
    return caches, training, development


def cache_names(teachers):
    """-> a name for each teacher's files: the last part of its spec, the whole if need be"""
    short = [Path(teacher.spec).name for teacher in teachers]
    names = []
    for teacher, name in zip(teachers, short):
        if short.count(name) > 1:
            name = teacher.spec
        names.append(name)
    return names


def wanted_embeddings(training, development, speeds):
    """-> list of (utterance, speed), each once"""
    pairs = []
    for utterance in training:
        for speed in speeds:
            pairs.append((utterance, speed))
    for utterance in development:
        pairs.append((utterance, 1.0))

    wanted = {}
    for utterance, speed in pairs:
        key = audio_key(utterance)
        known, _ = wanted.setdefault((key, speed), (utterance, speed))
        if known.path != utterance.path:
            raise UserError(
                f"--cache knows a file by the last four parts of its path and finds these twice: "
                f"{known.path} and {utterance.path}; rename a folder or train without --cache"
            )
        if known.seconds != utterance.seconds:
            raise UserError(
                f"--cache knows a segment by where it begins, and of {utterance.path} two of "
                f"different length begin at {utterance.offset} s; train without --cache"
            )
    return list(wanted.values())


def not_in(caches, wanted):
    """-> those of the pairs (utterance, speed) that some cache lacks"""
    missing = []
    for utterance, speed in wanted:
        if not all(cache.find(utterance, speed) for cache in caches):
            missing.append((utterance, speed))
    return missing


def check_room(folder, caches, missing):
    """Print how much will be written; UserError if the disk has less."""
    sizes = []
    for cache in caches:
        frames = 0
        for utterance, speed in missing:
            if not cache.find(utterance, speed):
                frames += round(utterance.seconds / speed / data.FRAME_SECONDS)
        sizes.append(2 * cache.dim * frames / 1e9)
    free = shutil.disk_usage(folder).free / 1e9
    parts = [f"{cache.name} {size:.3g}" for cache, size in zip(caches, sizes)]
    print(f"cache {folder}: {sum(sizes):.3g} GB to write ({', '.join(parts)}), {free:.3g} GB free")
    if sum(sizes) > free:
        raise UserError(
            f"--cache {folder} has {free:.3g} GB free, {sum(sizes):.3g} GB are needed; choose "
            f"another disk, fewer --speeds or teachers"
        )


def encode(caches, teachers, missing, batch_seconds, workers, rank, world):
    """Append this process's share of `missing`, pairs (utterance, speed), to the caches."""
    seconds = sum(utterance.seconds for utterance, _ in missing) / world
    bar = tqdm(total=round(seconds), unit="s", desc="caching", disable=rank > 0, dynamic_ncols=True)
    # However this ends: the caches are closed, and with that unlocked.
    with contextlib.ExitStack() as stack, bar:
        for cache in caches:
            cache.open()
            stack.callback(cache.close)
        for speed in sorted({speed for _, speed in missing}):
            utterances = [utterance for utterance, its_speed in missing if its_speed == speed]
            loader = data.Loader(
                utterances, batch_seconds, speeds=(speed,), workers=workers, rank=rank, world=world
            )
            for batch in loader.epoch():
                for problem in batch.failed:
                    tqdm.write(f"skipped: {problem}", file=sys.stderr)
                for cache, teacher in zip(caches, teachers):
                    encode_batch(cache, teacher, batch, speed)
                bar.update(round(sum(utterance.seconds for utterance in batch.utterances)))


def encode_batch(cache, teacher, batch, speed):
    """Append the embeddings of those of a batch that this cache lacks."""
    utterances = []
    waveforms = []
    for utterance, waveform in zip(batch.utterances, batch.waveforms):
        if not cache.find(utterance, speed):
            utterances.append(utterance)
            waveforms.append(waveform)
    if utterances:
        embeddings, lengths = teacher.embed(waveforms)
        cache.append(utterances, speed, embeddings, lengths)
