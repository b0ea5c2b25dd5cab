"""From files to batches: sources of utterances, audio, log-mel features, tokenizer, batches.

A source is a LibriSpeech split folder (SPLIT/SPEAKER/CHAPTER/*.flac + .trans.txt), any folder of
audio, an audio file, or a .jsonl manifest with one {"audio_filepath": ..., "text": ...} a line.
A manifest's row may also have
    "duration"                seconds; believed, so that the file need not be opened to list it
    "offset" and "duration"   (or "start" and "end") a segment of the file, in seconds
    "weight"                  of its losses; below 1 for text that a machine wrote
    "id"                      default: the name of the file

`python -m tools.librispeech` fetches LibriSpeech and checks a source.
"""

import copy
import functools
import math
import re
import signal
import sys
import unicodedata
import zlib
from collections import deque
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchaudio
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence

from tools.audio_files import BLOCK, SAMPLE_RATE, open_audio, seek, segment_frames
from tools.command_line import UserError, positive_float
from tools.packed import pack
from tools.sources import Utterance, place, real_path, scan, with_unique_id

HOP = 160  # samples between frames of log-mel, 10 ms
WINDOW = 400  # samples of such a frame, 25 ms
FRAME = 4 * HOP  # samples of a frame of the student, 40 ms
FRAME_SECONDS = FRAME / SAMPLE_RATE  # 0.04
LONGEST = 35.0  # seconds of an utterance to train on
SILENT = 1e-4  # the largest sample of a file without sound
DEMO = Path(__file__).parent / "demo"
WORD_START = "\u2581"  # how the tokenizer marks the start of a word


# ---------------------------------------- sources


def load_utterances(source, transcribed=False, skipped=None):
    """A source (see above) -> list of Utterance, sorted by id, ids unique.

    What cannot be used is named and counted on stderr, and appended to the list `skipped` if
    there is one. transcribed: keep only utterances with text.
    Raises UserError if nothing is left, unless there is a list `skipped`.
    """
    try:
        utterances, problems = scan(source, has_words if transcribed else None)
    except UserError as error:
        if skipped is None:
            raise
        utterances = []
        problems = [str(error)]
    if skipped is not None:
        skipped += problems
    elif not utterances and len(problems) == 1:
        raise UserError(problems[0])
    total = len(utterances) + len(problems)
    cure = f"python -m tools.librispeech check {source}"
    report(problems, f"of {total} utterances in {source}: {cure} names them all")
    if skipped is None and not utterances:
        raise UserError(f"{source}: none of its {total} utterances can be used ({problems[0]})")
    return sorted(utterances, key=lambda u: u.id)


def load_sources(sources, transcribed=False, skipped=None):
    """Several sources -> one list in which each audio stands once and each id is unique."""
    # Of one source they are so already.
    if len(sources) == 1:
        return load_utterances(sources[0], transcribed, skipped)
    utterances = []
    places = set()
    ids = set()
    twice = 0
    for source in sources:
        for u in load_utterances(source, transcribed, skipped):
            its_place = place(u)
            if its_place in places:
                twice += 1
                continue
            places.add(its_place)
            # Two folders may use the same names for different files.
            if u.id in ids:
                u = replace(u, id=u.path)
            utterances.append(with_unique_id(u, ids))
    if twice:
        print(f"{twice} utterances stand in two of the sources and are used once", file=sys.stderr)
    return utterances


def report(problems, where):
    """What was left out, on stderr: the first few by name, and all as a number."""
    for problem in problems[:5]:
        print(f"skipped: {problem}", file=sys.stderr)
    if len(problems) > 1:
        print(f"skipped {len(problems)} {where}", file=sys.stderr)


def has_words(utterance):
    """Whether anything of its text is left once it is normalised"""
    text = utterance.text or ""
    # Most texts show it at once.
    return bool(re.search("[A-Za-z0-9]", text) or normalise(text))


# ---------------------------------------- training data


def add_source_options(parser):
    group = parser.add_argument_group(
        "data",
        "a source is a LibriSpeech split folder, a .jsonl manifest, an audio file or a folder of "
        "audio",
    )
    group.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="transcribed audio (default: the demo; in stage 1 only without --unlabelled)",
    )
    group.add_argument(
        "--unlabelled", nargs="+", metavar="SOURCE", help="more audio, transcripts not needed"
    )
    group.add_argument(
        "--dev",
        nargs="+",
        metavar="SOURCE",
        help="audio to evaluate on while training (default: one in twenty of --data, at most 200)",
    )
    group.add_argument(
        "--speeds",
        nargs="+",
        metavar="X",
        type=positive_float,
        default=[0.9, 1.0, 1.1],
        help="speed perturbation: one of these factors per utterance (default 0.9 1.0 1.1)",
    )


def load_training_data(args, transcribed=False, quiet=False):
    """What the options above and --batch-seconds name -> (training, development utterances)

    Both are packed, see tools/packed.py.
    transcribed: stage 2, where --data needs text and --unlabelled has none, whatever is beside it.
    quiet: do not print the line that sums it up. Raises UserError if either would be empty.
    """
    sources = args.data or []
    unlabelled = args.unlabelled or []
    dev_sources = args.dev or []
    if not sources and (transcribed or not unlabelled):
        sources = [DEMO / "corpus/train"]
        dev_sources = dev_sources or [DEMO / "corpus/dev"]
        if not transcribed and not unlabelled:
            unlabelled = [DEMO / "corpus/unlabelled"]

    training = load_sources(sources, transcribed)
    more = load_sources(unlabelled)
    if transcribed:
        more = [replace(u, text=None) for u in more]
    longest = min(LONGEST, args.batch_seconds) * min(args.speeds)
    limit = f"--batch-seconds {args.batch_seconds:g}"
    if args.batch_seconds > LONGEST:
        limit = f"training, at most {LONGEST:g} s"
    reason = f"too long for {limit} at the slowest of --speeds"
    training, more = leave_out_long(longest, reason, training, more)

    if dev_sources:
        development = by_people(load_sources(dev_sources, transcribed))
    else:
        development = one_in_twenty(by_people(training or more))
    # Nothing that the student is evaluated on is trained on, and nothing is trained on twice.
    training = without(training, development)
    if more:
        training += without(more, [*training, *development])
    [development] = leave_out_long(LONGEST, "cut it up", development)
    if not training or not development:
        raise UserError(
            f"{len(training)} utterances are left to train on and {len(development)} to evaluate "
            f"on; give more --data, --dev, or larger --batch-seconds"
        )

    # Now that all are chosen, they can be put away in less memory.
    training = pack(training)
    development = pack(development)
    if not quiet:
        print(f"training on {summary(training)}; evaluating on {summary(development)}")
        if transcribed and development[0].weight < 1:
            print("the development text is a machine's, for want of a person's; give --dev")
    return training, development


def without(utterances, others):
    """Those that share no audio with `others`; segments of one file that do not overlap may stay"""
    taken = {}  # file: [(begin, end), ...] in seconds
    for u in others:
        begin = u.offset or 0.0
        taken.setdefault(real_path(u.path), []).append((begin, begin + u.seconds))
    kept = []
    for u in utterances:
        begin = u.offset or 0.0
        end = begin + u.seconds
        overlaps = False
        for other_begin, other_end in taken.get(real_path(u.path), ()):
            # Manifests are rounded.
            overlaps |= min(end, other_end) - max(begin, other_begin) > 0.01
        if not overlaps:
            kept.append(u)
    return kept


def by_people(utterances):
    """Those that were transcribed by people: a machine's text is no measure. If none, all."""
    return [u for u in utterances if u.weight >= 1] or utterances


def leave_out_long(longest, reason, *lists):
    """-> the lists of utterances without those of more than `longest` seconds, which are named"""
    problems = []
    kept = []
    for utterances in lists:
        long = [u for u in utterances if u.seconds > longest]
        problems += [f"{u.path}: {u.seconds:.0f} s, {reason}" for u in long]
        kept.append([u for u in utterances if u.seconds <= longest])
    report(problems, "utterances: too long")
    return kept


def one_in_twenty(utterances):
    """Utterances to hold out, at most 200, always the same ones"""
    count = min(200, math.ceil(len(utterances) / 20))
    order = torch.randperm(len(utterances), generator=torch.Generator().manual_seed(0)).tolist()
    return [utterances[i] for i in sorted(order[:count])]


def fingerprints(training, development):
    """-> {name: text}, which a run directory keeps to notice data that changed between starts"""
    texts = {}
    for name, utterances in (("training", training), ("development", development)):
        checksum = 0
        for u in utterances:
            row = f"{u.id}\t{u.seconds:.2f}\t{u.offset}\t{u.text}\t{u.weight}\n"
            checksum = zlib.crc32(row.encode(), checksum)
        texts[f"the {name} audio"] = f"{summary(utterances)}, checksum {checksum:08x}"
    return texts


def summary(utterances):
    """How many they are, and how long"""
    minutes = sum(pack(utterances).seconds.tolist()) / 60
    length = f"{minutes / 60:.2f} h" if minutes >= 60 else f"{minutes:.1f} min"
    return f"{len(utterances)} utterance{'s' * (len(utterances) != 1)}, {length}"


# ---------------------------------------- audio


def stream_audio(path, offset=None, seconds=None):
    """Audio of any length in bounded memory: float32 tensors (S_i,), mono, 16 kHz, consecutive.

    offset, seconds: the segment to read; without an offset the whole file, which must be of that
    length. A UserError names what is damaged, empty, of another length or no numbers.
    """
    # Blocks share two seconds: one at either end is there for the resampler.
    shared = torch.zeros(0)
    rest = torch.zeros(0)
    begin = 0
    with open_audio(path) as (file, frames):
        rate = file.samplerate
        first, last = segment_frames(path, frames / rate, rate, offset, seconds)
        seek(file, first)
        position = first
        while position < last:
            count = min(BLOCK * rate - len(shared), last - position)
            samples = torch.from_numpy(file.read(count, dtype="float32", always_2d=True))
            if not len(samples):
                break
            position += len(samples)
            waveform = torch.cat([shared, mix_channels(samples)])
            # "not <" is also true of NaN. open_audio makes a UserError of it.
            if not waveform.abs().max() < 100:
                raise ValueError("samples that are not numbers or far beyond -1 and 1")
            shared = waveform[-2 * rate :]
            waveform = torchaudio.functional.resample(waveform, rate, SAMPLE_RATE)
            yield waveform[begin:-SAMPLE_RATE]
            rest = waveform[-SAMPLE_RATE:]
            begin = SAMPLE_RATE
        if position == first or last - position > 0.1 * rate:
            raise ValueError(f"cut off after {position / rate:.1f} of {frames / rate:.1f} s")
    yield rest


def mix_channels(samples):
    """(S, channels) -> (S,), their mean; of channels that cancel each other, the first"""
    mean = samples.mean(dim=1)
    cancelled = mean.abs().max() < 0.01 * samples.abs().max()
    return samples[:, 0] if cancelled else mean


def load_audio(path, offset=None, seconds=None):
    """stream_audio as one tensor (S,)"""
    return torch.cat(list(stream_audio(path, offset, seconds)))


# ---------------------------------------- features


@functools.cache
def mel_spectrogram():
    filters = dict(n_mels=80, f_min=20, norm="slaney", mel_scale="slaney")
    frames = dict(n_fft=512, win_length=WINDOW, hop_length=HOP, pad_mode="constant")
    return torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, **frames, **filters)


def log_mel(waveform):
    """(S,) -> (F, 80), F = S // 160 + 1, frame i centred on i x 10 ms.

    Shift and scale are constants that bring speech near mean 0, deviation 1: nothing to measure,
    nothing to store, the same in training and in a stream. [ours]
    """
    return (torch.log(mel_spectrogram()(waveform).T + 1e-8) + 11) / 4


def spec_augment(features, widest):
    """(F, 80) -> (F, 80) with masks of the utterance's mean (SpecAugment, arXiv 1904.08779)

    Ten of fewer than 40 frames and at most 5 % of all, two of fewer than `widest` bins.
    """
    mean = features.mean().item()
    for axis, count, width, share in ((0, 10, 40, 0.05), (1, 2, widest, 1.0)):
        for _ in range(count):
            features = torchaudio.functional.mask_along_axis(features, width, mean, axis, share)
    return features


# Building a resampler takes longer than using it.
speed_changer = functools.cache(functools.partial(torchaudio.transforms.Speed, SAMPLE_RATE))


def perturb_speed(waveform, speed):
    """(S,) -> (about S / speed,), also of another pitch"""
    return speed_changer(speed)(waveform)[0]


# ---------------------------------------- text


class Characters(dict):
    """What a character becomes in normalised text, found out when it first occurs."""

    def __missing__(self, code):
        category = unicodedata.category(chr(code))
        becomes = " "
        if category[0] in "LMN":
            becomes = chr(code)
        # Format characters (soft hyphen, joiners) are invisible; words go on behind them.
        if category == "Cf":
            becomes = ""
        self[code] = becomes
        return becomes


CHARACTERS = Characters({ord(c): "'" for c in "'`\u00b4\u2018\u2019\u02bc"} | {0x200B: " "})
# An apostrophe has a letter on both sides. Between Chinese or Japanese ones it is a quotation mark.
LETTER = "[^ '\u3040-\u9fff]"
NO_APOSTROPHE = re.compile(f"(?<!{LETTER})'|'(?!{LETTER})")


def normalise(text):
    """What we train on and score: Unicode NFKC in upper case; letters, marks, digits, apostrophes
    inside words, single spaces."""
    # NFKC would take an acute accent that stands alone apart.
    text = unicodedata.normalize("NFKC", text.replace("\u00b4", "'"))
    text = text.upper().translate(CHARACTERS)
    return " ".join(NO_APOSTROPHE.sub(" ", text).split())


def train_tokenizer(texts, vocab_size):
    """BPE learned from the training text. Id 0 is the transducer's blank, 1 an unknown character.

    A merge must occur 100 times, because a token that occurs a few times cannot be learned: small
    corpora thereby get small vocabularies by themselves. [ours]
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.normalizer = normalizers.NFKC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=100,
        special_tokens=["<blank>", "<unk>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(normalise, texts), trainer)
    return tokenizer


# ---------------------------------------- batches


@dataclass
class Batch:
    utterances: list
    features: torch.Tensor  # (B, F, 80), padded with 0
    feature_lengths: torch.Tensor  # (B,)
    seconds: float  # of audio, without padding
    failed: list  # "path: why" of what could not be read
    waveforms: list  # of B (S,), as the features were computed from
    embeddings: list  # of (B, T, dim) float16, one per cache

    def to(self, device):
        """The same with its tensors on a device; the waveforms stay where they are."""
        # A blocking copy would wait for all that the GPU still has to compute.
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, value.to(device, non_blocking=True))
        moved.embeddings = [e.to(device, non_blocking=True) for e in self.embeddings]
        return moved


@dataclass
class TranscribedBatch(Batch):
    targets: torch.Tensor  # (B, U), padded with 0
    target_lengths: torch.Tensor  # (B,); 0 where there is no text
    weights: torch.Tensor  # (B,) of the utterances' losses


@dataclass
class Example:
    """One utterance as one epoch has it"""

    utterance: Utterance
    waveform: torch.Tensor  # (S,)
    features: torch.Tensor  # (F, 80)
    labels: torch.Tensor  # (U,)
    embeddings: list  # of (T, dim), one per cache


@dataclass
class Loader:
    """Batches of about equal length, read by worker processes.

    Order and augmentation of an utterance depend only on (seed, epoch, utterance):
    `epoch(3, skip=17)` goes on exactly where an interrupted run stopped, with any `workers`.
    """

    utterances: list  # which it keeps packed, see tools/packed.py
    batch_seconds: float  # of audio in a batch, at most, padding counted
    _: KW_ONLY
    tokenizer: Tokenizer | None = None  # if there is one, the batches are transcribed
    caches: tuple = ()  # functions (utterance, speed) -> (T, dim) float16
    augment: bool = False  # for training: shuffle and mask; put others for what cannot be read
    spec_augment: int = 0  # masks are narrower than so many bins; 0: no masks at all
    speeds: tuple = (1.0,)  # one is drawn for each utterance
    workers: int = 0  # processes that read ahead
    seed: int = 0
    rank: int = 0  # of this process, among `world`
    world: int = 1

    def __post_init__(self):
        # The workers then share them.
        self.utterances = pack(self.utterances)

    def epoch(self, number=0, skip=0):
        """-> iterator of this process's batches, without the first `skip`"""
        return iter(
            torch.utils.data.DataLoader(
                Epoch(self, number),
                batch_size=None,
                sampler=self.batches(number)[skip:],
                num_workers=self.workers,
                prefetch_factor=4 if self.workers else None,
                worker_init_fn=prepare_worker,
            )
        )

    def batches(self, number):
        """Which utterances make up the batches of this process -> lists of indices"""
        generator = torch.Generator().manual_seed(mix(self.seed, number))
        # Sorted by length there is little padding; training jitters it, to change the neighbours.
        lengths = self.utterances.seconds
        if self.augment:
            jitter = 1 + 0.2 * torch.rand(len(lengths), generator=generator)
            lengths = lengths * jitter.double().numpy()
        order = np.argsort(lengths, kind="stable")
        # A batch must fit at the slowest speed too.
        seconds = self.utterances.seconds[order] / min(self.speeds)
        batches = [[]]
        longest = 0.0
        for i, length in zip(order.tolist(), seconds.tolist()):
            longest = max(longest, length)
            if batches[-1] and longest * (len(batches[-1]) + 1) > self.batch_seconds:
                batches.append([])
                longest = length
            batches[-1].append(i)
        if self.augment:
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[i] for i in shuffled]
            # Every process makes as many steps: else one would wait for ever.
            missing = -len(batches) % self.world
            batches += [batches[i % len(batches)] for i in range(missing)]
        return batches[self.rank :: self.world]

    def worst(self):
        """-> the batches of epoch 0, of all processes, that need the most memory: the one with most
        frames, and the one with most pairs of frames; those of other epochs are hardly larger"""
        slow = replace(self, rank=0, world=1, speeds=(min(self.speeds),))
        plan = slow.batches(0)
        lengths = self.utterances.seconds.tolist()
        longest = []
        for batch in plan:
            longest.append(max(lengths[i] for i in batch))
        worst = set()
        for power in (1, 2):
            sizes = []
            for batch, seconds in zip(plan, longest):
                sizes.append(len(batch) * seconds**power)
            worst.add(tuple(plan[sizes.index(max(sizes))]))
        return [slow.load(0, batch) for batch in worst]

    def load(self, number, indices):
        """Read the utterances of one batch. A bad file is named in the batch, it ends no run."""
        examples = []
        failed = []
        queue = deque(indices)
        while queue:
            i = queue.popleft()
            try:
                examples.append(self.read(number, i))
            except UserError as error:
                failed.append(str(error))
                # Training needs something in every batch: if all of it failed, try the next ones.
                nothing = not examples and not queue
                if self.augment and nothing and len(failed) < 100:
                    queue.append((i + 1) % len(self.utterances))
        return collate(examples, failed, self.tokenizer is not None)

    def read(self, number, i):
        """Utterance i in the epoch `number` -> Example

        Raises UserError if it cannot be read, is silent, or has too long a text.
        """
        u = self.utterances[i]
        waveform = load_audio(u.path, u.offset, u.seconds)
        if self.augment and waveform.abs().max() < SILENT:
            raise UserError(f"{u.path}: silence, nothing to learn from")

        # What is random here depends on nothing that was drawn before.
        speed = 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.seed, number, i))
            if tuple(self.speeds) != (1.0,):
                speed = self.speeds[torch.randint(len(self.speeds), ()).item()]
                waveform = perturb_speed(waveform, speed)
            # Noise that is added to `waveform` reaches the teachers too, unless they are cached;
            # added to the argument of log_mel alone, it is for the student.
            features = log_mel(waveform)
            if self.augment and self.spec_augment:
                features = spec_augment(features, self.spec_augment)

        labels = []
        if self.tokenizer:
            labels = self.tokenizer.encode(normalise(u.text or "")).ids
        if len(features) < 3:
            raise UserError(f"{u.path}: too short, nothing is left of it")
        # CTC needs a frame of the student (4 of log-mel) for every label, and one between equals.
        repeated = sum(a == b for a, b in zip(labels, labels[1:]))
        if len(labels) + repeated > len(features) // 4:
            text = f"its transcript of {len(labels)} tokens"
            raise UserError(f"{u.path}: {text} is too long for its {u.seconds:.1f} s")
        labels = torch.tensor(labels, dtype=torch.long)
        embeddings = [cache(u, speed) for cache in self.caches]
        return Example(u, waveform, features, labels, embeddings)


class Epoch(torch.utils.data.Dataset):
    """What DataLoader's workers ask for the batches of one epoch"""

    def __init__(self, loader, number):
        self.loader = loader
        self.number = number

    def __getitem__(self, indices):
        return self.loader.load(self.number, indices)


def collate(examples, failed, transcribed):
    """Examples -> a Batch, which is of length 0 if there are none, or a TranscribedBatch"""
    features = [x.features for x in examples]
    waveforms = [x.waveform for x in examples]
    caches = zip(*[x.embeddings for x in examples])
    entries = dict(
        utterances=[x.utterance for x in examples],
        features=pad(features, torch.zeros(0, 0, 80)),
        feature_lengths=lengths_of(features),
        seconds=sum(map(len, waveforms)) / SAMPLE_RATE,
        failed=failed,
        waveforms=waveforms,
        embeddings=[pad(rows, None) for rows in caches],
    )
    if not transcribed:
        return Batch(**entries)
    labels = [x.labels for x in examples]
    return TranscribedBatch(
        **entries,
        targets=pad(labels, torch.zeros(0, 0, dtype=torch.long)),
        target_lengths=lengths_of(labels),
        weights=torch.tensor([x.utterance.weight for x in examples]),
    )


def pad(rows, empty):
    """Tensors of different lengths -> one, padded with 0; of none, `empty`"""
    return pad_sequence(rows, batch_first=True) if rows else empty


def lengths_of(rows):
    return torch.tensor([len(row) for row in rows], dtype=torch.long)


def mix(*numbers):
    """Several integers -> one seed"""
    return hash(numbers) % 2**63


def prepare_worker(_):
    """What a process that reads audio does first."""
    # A signal to stop is for the main process, which still needs batches until it has saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
