"""From files to batches: sources of utterances, audio, log-mel features, augmentation, tokenizer, batches by seconds.

    python data.py download train-clean-100 [--to DIR]     # a part of LibriSpeech; run again to go on after a break
    python data.py check PATH...                                  # read every file of a source and report what is wrong

A source is a LibriSpeech split folder (SPLIT/SPEAKER/CHAPTER/*.flac + .trans.txt), a .jsonl manifest with one
{"audio_filepath": ..., "text": ...} a line, an audio file, or any folder of audio.
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import signal
import sys
import tarfile
import unicodedata
import urllib.request
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import soundfile
import torch
import torchaudio
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from run import DEMO, UserError, mix, polite

SAMPLE_RATE = 16_000                       # Hz
HOP = 160                                  # samples, 10 ms
WINDOW = 400                               # samples, 25 ms
SHORTEST, LONGEST = 0.1, 35.0              # seconds of an utterance to train on
SILENT = 1e-4                              # largest sample of a file that nobody can hear
AUDIO = {".flac", ".wav", ".opus", ".ogg", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf"}


# ---------------------------------------------------------------------------- sources

@dataclass(frozen=True)
class Utterance:
    path: str
    seconds: float
    text: str | None = None                # None: nobody wrote it down
    id: str = ""
    weight: float = 1.0                    # of its loss in stage 2


def load_utterances(source, transcribed=False, skipped=None):
    """A source (see above) -> list of Utterance, sorted by id. What cannot be used is named and counted on stderr.

    transcribed: keep only utterances with text. Raises UserError if nothing is left, unless there is a list `skipped`.
    """
    try:
        utterances, problems = scan(source, transcribed)
        if not utterances and len(problems) <= 1:
            raise UserError(problems[0] if problems else f"{source}: no usable audio; expected a LibriSpeech folder, a "
                            f".jsonl manifest or files ending in {' '.join(sorted(AUDIO))}")
    except UserError as error:
        if skipped is None:
            raise
        utterances, problems = [], [str(error)]
    report(problems, f"of {len(utterances) + len(problems)} utterances in {source}: python data.py check {source} "
                     f"names them all")
    if skipped is not None:
        skipped += problems
    elif not utterances:
        raise UserError(f"{source}: none of its {len(problems)} utterances can be used (e.g. {problems[0]})")
    return sorted(utterances, key=lambda u: u.id)


def scan(source, transcribed=False):
    """-> (list of Utterance, list of problems, one line each)"""
    path = Path(source).expanduser()
    if not os.path.exists(path):
        raise UserError(f"no such file or folder: {path} (python data.py download train-clean-100 fetches LibriSpeech)")
    utterances, rows, problems = [], [(path.stem, path, None)], []
    if path.is_dir() or path.suffix in (".jsonl", ".json"):
        rows, problems = read_folder(path) if path.is_dir() else read_manifest(path)
    for id, audio, text in tqdm(rows, desc=f"scanning {path.name}", unit="file", leave=False, disable=len(rows) < 2000):
        try:
            with open_audio(audio) as file:
                seconds = file.frames / file.samplerate
            if transcribed and not normalise(text or ""):
                raise UserError(f"{audio}: no transcript")
            if seconds < SHORTEST:
                raise UserError(f"{audio}: {seconds:.2f} s long, shorter than {SHORTEST} s")
            utterances.append(Utterance(str(audio), seconds, text, id))
        except UserError as error:
            problems.append(str(error))
    return utterances, problems


def read_folder(folder):
    """LibriSpeech layout where *.trans.txt files exist, else bare audio. -> rows (id, path, text), problems."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO)
    text, problems = {}, []
    for transcript in sorted(folder.rglob("*.trans.txt")):
        for line in transcript.read_text(encoding="utf-8-sig", errors="replace").splitlines():
            id, _, words = line.strip().partition(" ")
            if id:
                text[transcript.parent / id] = words
    problems += [f"{path}: named in a .trans.txt, but there is no such audio"
                 for path in sorted(text.keys() - {f.with_suffix("") for f in files})]
    return [(str(f.relative_to(folder).with_suffix("")), f, text.get(f.with_suffix(""))) for f in files], problems


def read_manifest(path):
    """JSON lines; relative paths start at the manifest's folder. -> rows (id, path, text), problems"""
    rows, problems, seen = [], [], Counter()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if entry.get("offset"):
                raise TypeError("segments of a file (offset) are not supported, cut the file")
            if entry.get("keep") is False:  # pseudo_label.py says why in the row
                continue
            audio, text = path.parent / entry["audio_filepath"], entry.get("text")
            if text is not None and not isinstance(text, str):
                raise TypeError("text is not a string")
            id = str(entry.get("id", audio.stem))
            f"{id}{audio}{text}".encode()  # JSON can spell halves of characters that no file can hold
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"{path}:{number}: expected {{\"audio_filepath\": ..., \"text\": ...}} "
                            f"({type(error).__name__}: {error})")
            continue
        seen[id] += 1
        rows.append((id if seen[id] == 1 else f"{id}-{number}", audio, text))
    return rows, problems


@contextlib.contextmanager
def open_audio(path):
    """A SoundFile whose header can be believed. What goes wrong with it becomes a UserError that names the file."""
    shown = str(path).encode(errors="backslashreplace").decode()
    if not os.path.isfile(path) or not os.path.getsize(path):  # a pipe would be waited for
        raise UserError(f"{shown}: {'the file is empty' if os.path.isfile(path) else 'there is no such file'}")
    try:
        if shown != str(path):
            raise ValueError("its name is not UTF-8, rename it")
        with soundfile.SoundFile(str(path)) as file:
            if math.lcm(file.samplerate, SAMPLE_RATE) > 1e8 or file.samplerate < 1000:
                raise ValueError(f"a sample rate of {file.samplerate} Hz, convert it to {SAMPLE_RATE}")
            if not 0 < file.frames < 48 * 3600 * file.samplerate:
                raise ValueError(f"a length of {file.frames / file.samplerate:.0f} s")
            yield file
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        raise UserError(f"{shown}: not readable as audio ({str(error).split(': ')[-1].strip('. ')})")


def report(problems, where):
    """What was left out, on stderr: the first few by name, and all as a number."""
    for problem in problems[:5]:
        print(f"skipped: {problem}", file=sys.stderr)
    if len(problems) > 1:
        print(f"skipped {len(problems)} {where}", file=sys.stderr)


def load_sources(sources, transcribed=False, skipped=None):
    """Several sources -> one list in which each file stands once and each id is unique; skipped: as above."""
    by_id, paths = {}, set()
    for source in sources:
        for u in load_utterances(source, transcribed, skipped):
            if (path := os.path.abspath(u.path)) not in paths:
                paths.add(path)
                by_id[u.id if u.id not in by_id else u.path] = u
    return [replace(u, id=id) for id, u in by_id.items()]


def absolute(utterances):
    """The same with absolute paths: a file is one file, however it was named."""
    return [replace(u, path=os.path.abspath(u.path)) for u in utterances]


def add_source_options(parser):
    group = parser.add_argument_group("data", "a source is a LibriSpeech split folder, a .jsonl manifest, an audio "
                                      "file or a folder of audio")
    group.add_argument("--data", nargs="+", metavar="SOURCE", help="transcribed audio (nothing given: the demo)")
    group.add_argument("--unlabelled", nargs="+", metavar="SOURCE", help="more audio, transcripts not needed")
    group.add_argument("--dev", nargs="+", metavar="SOURCE",
                       help="audio to evaluate on while training (default: one in twenty of the rest, at most 200)")
    group.add_argument("--speeds", nargs="+", type=float, default=[0.9, 1.0, 1.1], metavar="X",
                       help="speed perturbation: one of these factors per utterance (default 0.9 1.0 1.1)")


def load_training_data(args, say, transcribed=False):
    """What the options above name (nothing: the demo). -> (training utterances, development utterances)"""
    sources, unlabelled, dev_sources = args.data or [], args.unlabelled or [], args.dev
    load = lambda *what: absolute(load_sources(*what))
    pseudo = [replace(u, weight=args.pseudo_weight) for u in load(args.pseudo, True)] if transcribed else []
    if not sources and not pseudo and (transcribed or not unlabelled):
        sources = [DEMO / "corpus/train"]
        unlabelled = unlabelled or [DEMO / "corpus/unlabelled"] * (not transcribed)
        dev_sources = args.dev or [DEMO / "corpus/dev"]
    train = load(sources if transcribed else [*sources, *unlabelled], transcribed)
    untold = [replace(u, text=None) for u in load(unlabelled)] if transcribed else []  # whatever is beside them
    slow, most = 1 / min(args.speeds), min(LONGEST, args.batch_seconds)
    fits = lambda u: u.seconds * slow <= most
    report([f"{u.path}: {u.seconds * slow:.0f} s at the slowest of --speeds, too long for --batch-seconds {most:g}"
            for u in train + pseudo + untold if not fits(u)], "training utterances: too long")
    train, pseudo, untold = ([u for u in some if fits(u)] for some in (train, pseudo, untold))
    some = train or pseudo  # what a model wrote is no measure where there is better
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(0)).tolist()
    held = [some[i] for i in sorted(order[:min(200, math.ceil(len(some) / 20))])]
    dev = {u.path: u for u in (load(dev_sources, transcribed) if dev_sources else held)}
    train = [u for u in train + pseudo if u.path not in dev]
    known = dev.keys() | {u.path for u in train}
    train += [u for u in untold if u.path not in known]
    report([f"{u.path}: {u.seconds:.0f} s, cut it up" for u in dev.values() if u.seconds > LONGEST],
           "development utterances: too long")
    dev = [u for u in dev.values() if u.seconds <= LONGEST]
    if not train or not dev:
        raise UserError(f"{len(train)} utterances are left to train on and {len(dev)} to evaluate on; give more "
                        f"--data, --dev, or larger --batch-seconds")
    say(f"training on {summary(train)}; evaluating on {summary(dev)}")
    return train, dev


def summary(utterances):
    hours = sum(u.seconds for u in utterances) / 3600
    return f"{len(utterances)} utterances, " + (f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.1f} min")


# ---------------------------------------------------------------------------- audio and features

def stream_audio(path, seconds=30):
    """A file of any length in bounded memory: float32 tensors (S_i,), mono, 16 kHz, that follow one another; a
    UserError names what is damaged, empty or no sound."""
    rest, second = torch.zeros(0), 0               # blocks share two seconds: one at either end is for the resampler
    with open_audio(path) as file:
        rate, shared = file.samplerate, torch.zeros(0)
        while file.tell() < file.frames:           # (SoundFile.blocks would fill up a short file from memory as it is)
            samples = file.read(seconds * rate - len(shared), dtype="float32", always_2d=True)
            if not len(samples):
                raise ValueError(f"cut off after {file.tell() / rate:.1f} of {file.frames / rate:.1f} s")
            waveform = torch.cat([shared, torch.from_numpy(samples).mean(dim=1)])
            if not waveform.abs().max() < 100:
                raise ValueError("samples that are not numbers or not between -1 and 1")
            shared = waveform[-2 * rate:]
            waveform = torchaudio.functional.resample(waveform, rate, SAMPLE_RATE)
            yield waveform[second:-SAMPLE_RATE]
            rest, second = waveform[-SAMPLE_RATE:], SAMPLE_RATE
    yield rest


def load_audio(path):
    """The whole file as one tensor (S,)."""
    return torch.cat(list(stream_audio(path)))


_mel = functools.cache(lambda: torchaudio.transforms.MelSpectrogram(
    SAMPLE_RATE, n_fft=512, win_length=WINDOW, hop_length=HOP, f_min=20, n_mels=80, pad_mode="constant", norm="slaney",
    mel_scale="slaney"))


def log_mel(waveform):
    """(S,) -> (F, 80), F = S // 160 + 1, frame i centred on i x 10 ms. Shift and scale are constants that bring speech
    near mean 0, deviation 1: nothing to measure, nothing to store, the same in training and in a stream."""
    return (torch.log(_mel()(waveform).T + 1e-8) + 11) / 4


_speed = functools.cache(functools.partial(torchaudio.transforms.Speed, SAMPLE_RATE))


def spec_augment(features, widest):
    """(F, 80) -> (F, 80): ten masks of up to 40 frames and 5 %, two of fewer than `widest` bins (arXiv 1904.08779)."""
    for axis, count, width, share in ((0, 10, 40, 0.05), (1, 2, widest, 1.0)):
        for _ in range(count):
            features = torchaudio.functional.mask_along_axis(features, width, 0.0, axis, share)
    return features


# ---------------------------------------------------------------------------- text

def normalise(text):
    """What we train on and score: Unicode NFKC, upper case, letters, marks, digits, apostrophes, single spaces."""
    text = unicodedata.normalize("NFKC", text).upper().replace("\u2019", "'")
    return " ".join("".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text).split())


def train_tokenizer(texts, vocab_size, min_frequency):
    """BPE learned from the training text. Id 0 is the transducer's blank, 1 what was never seen.

    min_frequency: a merge must be seen that often, because a token that occurs a few times cannot be learned: small
    corpora thereby get small vocabularies by themselves.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.normalizer = normalizers.NFKC()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=min_frequency,
                                  special_tokens=["<blank>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator((normalise(text) for text in texts), trainer)
    return tokenizer


# ---------------------------------------------------------------------------- batches

@dataclass
class Batch:
    ids: list
    features: torch.Tensor                 # (B, F, 80)
    feature_lengths: torch.Tensor          # (B,)
    waveforms: list | None                 # B of (S,), where a teacher wants to listen
    targets: torch.Tensor | None           # (B, U), padded with 0
    target_lengths: torch.Tensor | None    # (B,)
    weights: torch.Tensor | None           # (B,) of the utterances' losses
    seconds: float                         # of audio, without padding
    texts: list | None = None
    failed: tuple = ()                     # "path: why" of files that could not be read
    embeddings: list | None = None         # of (B, T, dim) float16, one per cache

    def to(self, device):
        return Batch(**{name: x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x
                        for name, x in vars(self).items()})


class Loader:
    """Batches of about equal length, at most `batch_seconds` each (padding counted), read by worker processes.

    Order and augmentation of an utterance depend only on (seed, epoch, utterance): `epoch(3, skip=17)` goes on exactly
    where an interrupted run stopped, whatever the number of workers.
    """

    def __init__(self, utterances, batch_seconds, tokenizer=None, waveforms=False, augment=False, speeds=(1.0,),
                 workers=0, seed=0, rank=0, world=1, caches=(), masks=0):
        self.utterances, self.batch_seconds, self.tokenizer = utterances, batch_seconds, tokenizer
        self.waveforms, self.augment, self.speeds, self.masks = waveforms, augment, speeds, masks
        self.workers, self.seed, self.rank, self.world = workers, seed, rank, world
        self.caches = caches  # each a function of (utterance, speed) -> (T, dim): what a teacher once said

    def batches(self, number):
        """Lists of utterances of this process; in training shuffled anew each epoch, jittered to change neighbours."""
        generator = torch.Generator().manual_seed(mix(self.seed, number))
        jitter = 1 + 0.2 * self.augment * torch.rand(len(self.utterances), generator=generator)
        slowest, batches, longest = min(self.speeds), [[]], 0.0
        for i in sorted(range(len(jitter)), key=lambda i: self.utterances[i].seconds * jitter[i].item()):
            longest = max(longest, self.utterances[i].seconds / slowest)
            if batches[-1] and longest * (len(batches[-1]) + 1) > self.batch_seconds:
                batches.append([])
                longest = self.utterances[i].seconds / slowest
            batches[-1].append(i)
        if self.augment:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
            # every process makes as many steps: nobody waits for ever
            batches += [batches[i % len(batches)] for i in range(-len(batches) % self.world)]
        return batches[self.rank::self.world]

    def worst(self):
        """The batches of an epoch, of all processes, that need the most memory: the largest, that of the longest."""
        slow = copy.copy(self)
        slow.rank, slow.world, slow.speeds = 0, 1, (min(self.speeds),)
        size = lambda batch, power: len(batch) * max(self.utterances[i].seconds for i in batch) ** power
        worst = {tuple(max(slow.batches(0), key=lambda batch: size(batch, power))) for power in (1, 2)}
        return [_Dataset(slow, 0)[batch] for batch in worst]

    def epoch(self, number=0, skip=0):
        return iter(torch.utils.data.DataLoader(
            _Dataset(self, number), batch_size=None, sampler=self.batches(number)[skip:], num_workers=self.workers,
            prefetch_factor=4 if self.workers else None, worker_init_fn=_quiet_worker))


def _quiet_worker(_):
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # to stop is the main process's business: it saves first
        signal.signal(number, signal.SIG_IGN)


class _Dataset(torch.utils.data.Dataset):
    def __init__(self, loader, number):
        self.loader, self.number = loader, number

    def __getitem__(self, indices):
        loader, kept, failed, queue = self.loader, [], [], list(indices)
        while queue:
            i = queue.pop(0)
            try:
                kept.append((loader.utterances[i], *self.read(i)))
            except UserError as error:  # one bad file never ends a run
                failed.append(str(error))
                # training needs something in every batch: take a neighbour
                if loader.augment and not queue and not kept and len(failed) < 100:
                    queue.append((i + 1) % len(loader.utterances))
        if not kept:
            return Batch([], torch.zeros(0, 0, 80), torch.zeros(0), None, None, None, None, 0.0, [], tuple(failed))
        utterances, waves, features, labels, embeddings = zip(*kept)
        targets = target_lengths = None
        if loader.tokenizer:
            targets, target_lengths = pad_sequence(labels, batch_first=True), torch.tensor([len(x) for x in labels])
        return Batch([u.id for u in utterances], pad_sequence(features, batch_first=True),
                     torch.tensor([len(f) for f in features]), [*waves] if loader.waveforms else None, targets,
                     target_lengths, torch.tensor([u.weight for u in utterances]), sum(map(len, waves)) / SAMPLE_RATE,
                     [u.text for u in utterances], tuple(failed),
                     [pad_sequence(rows, batch_first=True) for rows in zip(*embeddings)] or None)

    def read(self, i):
        """Utterance i as this epoch hears it -> waveform (S,), features (F, 80), labels (U,), [embedding, ...]"""
        loader, u, speed = self.loader, self.loader.utterances[i], 1.0
        waveform = load_audio(u.path)
        if loader.augment and waveform.abs().max() < SILENT:
            raise UserError(f"{u.path}: silence, nothing to learn from")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(loader.seed, self.number, i))
            if tuple(loader.speeds) != (1.0,):
                speed = loader.speeds[torch.randint(len(loader.speeds), ()).item()]
                waveform = _speed(speed)(waveform)[0]
            mel = log_mel(waveform)
            features = spec_augment(mel, loader.masks) if loader.augment and loader.masks else mel
        labels = loader.tokenizer.encode(normalise(u.text or "")).ids if loader.tokenizer else []
        if len(labels) > len(mel) // 4:  # of CTC no path would be left
            raise UserError(f"{u.path}: its transcript of {len(labels)} tokens is too long for its {u.seconds:.1f} s")
        return waveform, features, torch.tensor(labels, dtype=torch.long), [cache(u, speed) for cache in loader.caches]


# ---------------------------------------------------------------------------- python data.py download | check

def download(part, folder):
    """Fetch, verify and unpack a part of LibriSpeech (CC BY 4.0); a broken download goes on where it stopped."""
    from torchaudio.datasets.librispeech import _CHECKSUMS
    sources = {Path(url).name.removesuffix(".tar.gz"): (url, sha) for url, sha in _CHECKSUMS.items()}
    if part not in sources:
        raise UserError(f"LibriSpeech has no part {part!r}; choose one of {', '.join(sources)}")
    url, sha = sources[part]
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "LibriSpeech" / part / ".complete").exists():
        return print(f"{folder / 'LibriSpeech' / part} is already there")
    archive = folder / f"{part}.tar.gz.part"
    archive.touch()
    have = archive.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
    try:
        with (urllib.request.urlopen(request, timeout=60) as response,
              open(archive, "ab" if response.status == 206 else "wb") as file):
            total = int(response.headers.get("Content-Length", 0)) + (have if response.status == 206 else 0)
            with tqdm(desc=part, total=total, initial=total and file.tell(), unit="B", unit_scale=True) as bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
                if total and file.tell() < total:
                    raise OSError("the connection ended early")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is missing
            raise UserError(f"{url}: the server says {error.code} {error.reason}; try again later")
    except OSError as error:
        raise UserError(f"{url}: {error}; run the same command again to go on from {archive.stat().st_size} bytes")
    with open(archive, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha:
            archive.unlink()
            raise UserError(f"{archive}: the checksum is wrong and the file was deleted; run the same command again")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (folder / "LibriSpeech" / part / ".complete").touch()
    archive.unlink()
    print(f"{folder / 'LibriSpeech' / part} is ready")


def check(sources):
    """Read every file whole; print what is wrong and what there is. -> number of problems"""
    count = 0
    for source in sources:
        utterances, problems = scan(source)
        for u in tqdm(utterances, desc=str(source), unit="file"):
            try:
                waveform = load_audio(u.path)
                if waveform.abs().max() < SILENT:
                    raise UserError(f"{u.path}: silence")
                if u.text is not None and not normalise(u.text):
                    raise UserError(f"{u.path}: its transcript is empty")
                if u.seconds > LONGEST:
                    raise UserError(f"{u.path}: {u.seconds:.0f} s; training uses at most {LONGEST:.0f} s, cut it up")
            except UserError as error:
                problems.append(str(error))
        print("\n".join(problems) or f"{source}: nothing wrong")
        count += len(problems)
        if utterances:
            seconds = sorted(u.seconds for u in utterances)
            letters = "".join(sorted({c for u in utterances for c in normalise(u.text or "")})) or "none"
            print(f"{source}: {summary(utterances)}, {seconds[0]:.1f} to {seconds[-1]:.1f} s (median "
                  f"{seconds[len(seconds) // 2]:.1f}), {sum(u.text is not None for u in utterances)} transcribed, "
                  f"characters: {letters}")
    print(f"{count} problem{'s' * (count != 1)}")
    return count


@polite
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("download", help="fetch a part of LibriSpeech")
    command.add_argument("part", nargs="+", help="dev-clean, test-clean, train-clean-100, ...")
    command.add_argument("--to", default=".", help="where the folder LibriSpeech/ shall lie (default: here)")
    command = commands.add_parser("check", help="read every file of a source and report")
    command.add_argument("source", nargs="+")
    args = parser.parse_args(argv)
    if args.command == "check":
        return 1 if check(args.source) else 0
    for part in args.part:
        download(part, args.to)


if __name__ == "__main__":
    sys.exit(main())
