"""Audio as it comes: the hidden states of a streaming student, and the text of a live stream."""

import itertools
import math
import sys
import time

import numpy
import torch

import data
from data import FRAME, FRAME_SECONDS, HOP, SAMPLE_RATE, WINDOW
from tools.command_line import UserError
from tools.machine import autocast
from tools.subtitles import text_of

LOOK_AHEAD = HOP + WINDOW // 2  # samples after a chunk that its last frame depends on: 22.5 ms
PAUSE = 1.0  # seconds without a token after which a word is complete


@torch.no_grad()
def encode_chunks(student, audio, chunk, device, dtype=torch.float32):
    """Audio as it comes -> the hidden states of each chunk as soon as its last sample is there.

    audio: iterable of float32 tensors (S_i,) of 16 kHz; chunk: frames of 40 ms
    -> iterator of (1, T_i, d), equal to the masked pass over the whole audio, in bounded memory.
    """
    samples = torch.zeros(0)
    # The first `context` frames of `samples` were encoded before: the convolutions of the
    # subsampling look back on them.
    context = 0
    past = None
    for block in itertools.chain(audio, [None]):
        ended = block is None
        if not ended:
            samples = torch.cat([samples, block])
        while True:
            # A chunk is encoded when it is whole; at the end of the audio half a frame is enough.
            end = (context + chunk) * FRAME + LOOK_AHEAD
            needed = end
            if ended:
                needed = context * FRAME + 2 * HOP
            if len(samples) < needed:
                break
            features = data.log_mel(samples[:end])[None].to(device)
            lengths = torch.tensor([features.shape[1]], device=device)
            with autocast(device, dtype):
                x, _ = student.encoder.subsampling(features, lengths)
                x = x[:, context : context + chunk]
                hidden, past = student.encoder.stream(x, past)
            yield hidden.float()
            # Keep two frames of this chunk for the next one.
            encoded = context + chunk
            context = min(2, encoded)
            samples = samples[(encoded - context) * FRAME :]


def raw_audio(file, chunk):
    """16-bit mono PCM of 16 kHz -> float32 tensors: LOOK_AHEAD samples, then chunk by chunk"""
    for samples in itertools.chain([LOOK_AHEAD], itertools.repeat(chunk * FRAME)):
        block = file.read(2 * samples)
        whole = len(block) // 2 * 2  # bytes: the last sample may have been cut in half
        integers = numpy.frombuffer(block[:whole], "<i2")
        yield torch.from_numpy(integers / numpy.float32(32768))
        if len(block) < 2 * samples:
            return


class Arrivals:
    """An iterable of blocks of audio that notes when the last one came."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.time = time.time()

    def __iter__(self):
        for block in self.blocks:
            self.time = time.time()
            yield block


class LiveWords:
    """The words of tokens that become more and more, each word once, as soon as it is complete.

    The last word may go on with the next token, unless a pause comes after it.
    """

    def __init__(self, words_of):
        self.words_of = words_of  # list of Token -> list of Word
        self.words = []  # all that were complete
        self.first = 0  # the first token after the last pause
        self.complete = 0  # words since then that were complete

    def update(self, tokens, now):
        """All tokens until `now`, in seconds -> the words that are newly complete"""
        recent = self.words_of(tokens[self.first :])
        paused = bool(recent) and now - recent[-1].end >= PAUSE
        complete = len(recent) if paused else max(0, len(recent) - 1)
        new = recent[self.complete : complete]
        self.words += new
        self.complete = complete
        if paused:
            self.first = len(tokens)
            self.complete = 0
        return new


def print_stream(source, student, search, words_of, chunk, device, dtype):
    """Print the words of `source`, a file or "-" for raw PCM on standard input, as they come.

    A line gives when the words were emitted, the latency (what a chunk waits for its audio + what
    it takes to compute) and the words; the last line is the whole text.
    search: a greedy search, whose labels are final; words_of: list of Token -> list of Word
    """
    blocks = data.stream_audio(source) if source != "-" else raw_audio(sys.stdin.buffer, chunk)
    arrivals = Arrivals(blocks)
    live = LiveWords(words_of)
    waiting = 1000 * (chunk * FRAME + LOOK_AHEAD) / SAMPLE_RATE  # ms
    compute = []  # ms of each chunk
    frames = 0
    finished = time.time()

    def print_words(words):
        if words:
            times = f"{words[0].start:9.2f} -{words[-1].end:9.2f} s"
            latency = f"latency {waiting:.1f} + {compute[-1]:.1f} ms"
            print(f"{times}   {latency}  {text_of(words)}", flush=True)

    try:
        for hidden in encode_chunks(student, arrivals, chunk, device, dtype):
            search.advance(hidden, torch.tensor([hidden.shape[1]], device=device))
            frames += hidden.shape[1]
            [[best]] = search.results()
            # Of the chunks of one block, all but the first begin when the one before has ended.
            started = max(finished, arrivals.time)
            finished = time.time()
            compute.append(1000 * (finished - started))
            print_words(live.update(best.tokens, frames * FRAME_SECONDS))
    except KeyboardInterrupt:
        pass  # This is how a live stream ends.
    if frames == 0:
        raise UserError(f"{source}: shorter than 40 ms, nothing to transcribe; give more audio")

    # After the end nothing can go on, so the last word is complete.
    print_words(live.update(best.tokens, now=math.inf))
    print(text_of(live.words))
    seconds = frames * FRAME_SECONDS
    print(
        f"{seconds:.1f} s in {len(compute)} chunks of {40 * chunk} ms; latency: {waiting:.1f} ms "
        f"for the audio of a chunk and of its look-ahead, {sum(compute) / len(compute):.1f} ms to "
        f"compute ({max(compute):.1f} at most); RTF {sum(compute) / (1000 * seconds):.4f}",
        file=sys.stderr,
    )
