"""Speech recognisers behind one interface: our checkpoints of stage 2, and models of transformers.

recogniser = load_recogniser("openai/whisper-base", device)
recogniser.transcribe([waveform, ...])  -> [text, ...]
recogniser.segments(waveform)           -> [(start, end, text), ...] of a recording of any length
"""

from pathlib import Path

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

import data
import decode
from tools.command_line import UserError, first_line
from tools.long_audio import loudness, quiet_cut
from tools.machine import fast_dtype

LONGEST = 30.0  # seconds of a piece
BATCH = 8  # pieces transcribed at once


# ---------------------------------------- pieces


def join_segments(segments, longest=LONGEST):
    """Segments (start, end, text) in order, in seconds -> pieces of at most `longest` seconds.

    Consecutive segments are joined while the piece stays short enough, from its start to its end.
    A single segment that is longer stays a piece.
    """
    pieces = []
    for start, end, text in segments:
        text = text.strip()
        if pieces and end - pieces[-1][0] <= longest:
            first, _, before = pieces[-1]
            pieces[-1] = (first, end, f"{before} {text}".strip())
        else:
            pieces.append((start, end, text))
    return pieces


def cut_at_quiet_places(waveform, longest=LONGEST):
    """(S,) -> [(start, end)] in seconds, cut where it is quietest `longest` / 3 to `longest` on."""
    levels = loudness(data.log_mel(waveform))
    widest = int(longest / data.FRAME_SECONDS)  # frames of 40 ms
    cuts = [0]
    while len(levels) - cuts[-1] > widest:
        frame, _ = quiet_cut(levels[cuts[-1] :], widest // 3, widest)
        cuts.append(cuts[-1] + frame)
    times = [cut * data.FRAME_SECONDS for cut in cuts]
    times.append(len(waveform) / data.SAMPLE_RATE)
    return list(zip(times, times[1:]))


def cut_out(waveform, pieces):
    """A waveform (S,) and pieces that begin with (start, end) in seconds -> their waveforms"""
    waveforms = []
    for start, end, *_ in pieces:
        first = round(start * data.SAMPLE_RATE)
        last = round(end * data.SAMPLE_RATE)
        waveforms.append(waveform[first:last])
    return waveforms


# ---------------------------------------- recognisers


class Recogniser:
    """What has `transcribe`: a list of waveforms (S,), mono, 16 kHz -> the list of their texts."""

    longest = LONGEST  # seconds that it can transcribe at once

    def segments(self, waveform):
        """(S,) of any length -> pieces [(start, end, text)] of at most 30 s, times in seconds"""
        times = cut_at_quiet_places(waveform, self.longest)
        texts = self.transcribe(cut_out(waveform, times))
        return [(start, end, text) for (start, end), text in zip(times, texts)]


class OurRecogniser(Recogniser):
    """A checkpoint of stage 2, with greedy search of its transducer."""

    def __init__(self, path, device):
        self.device = device
        self.student, self.tokenizer = decode.load_recogniser(path, device)

    def transcribe(self, waveforms):
        texts = []
        for i in range(0, len(waveforms), BATCH):
            features = [data.log_mel(waveform) for waveform in waveforms[i : i + BATCH]]
            batch = data.Batch(
                utterances=[None] * len(features),
                features=pad_sequence(features, batch_first=True),
                feature_lengths=torch.tensor([len(frames) for frames in features]),
                seconds=0.0,
                failed=[],
                waveforms=[],
                embeddings=[],
            )
            [found] = decode.transcribe(self.student, self.tokenizer, batch)
            texts.extend(found)
        return texts


class HuggingFaceRecogniser(Recogniser):
    """A recogniser of transformers: Whisper, Moonshine, a CTC model. Raises UserError for
    others.

    beams: hypotheses that a decoder's search keeps, None for the five of transformers' pipeline
    """

    def __init__(self, name, device, language=None, beams=None):
        transformers.logging.set_verbosity_error()
        dtype = torch.float32
        if device.type == "cuda":
            dtype = fast_dtype(device)
        task = "automatic-speech-recognition"
        try:
            self.pipe = transformers.pipeline(task, name, device=device, dtype=dtype)
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
            raise UserError(
                f"{name}: {first_line(error)} - give a speech recogniser of transformers "
                f"(hf download {name} fetches one), a folder, or a checkpoint of stage 2"
            )
        if self.pipe.tokenizer is None:
            raise UserError(f"{name}: it has no tokenizer; give a model fine-tuned to transcribe")

        # Whisper's architecture with another tokenizer, like the demo's, has no timestamps.
        # It ignores what lies beyond its window, so recordings are cut to that.
        if self.pipe.type == "seq2seq_whisper" and not hasattr(self.pipe.tokenizer, "_decode_asr"):
            self.pipe.type = "seq2seq"
            self.longest = self.pipe.feature_extractor.chunk_length
        generation = getattr(self.pipe.model, "generation_config", None)
        self.timestamps = hasattr(generation, "no_timestamps_token_id")

        # Only a multilingual model has a language to choose, only a decoder has beams.
        search = {}
        if language and getattr(generation, "is_multilingual", False):
            search = {"language": language, "task": "transcribe"}
        if beams and self.pipe.model.can_generate():
            search["num_beams"] = beams
        self.options = {"generate_kwargs": search} if search else {}

        # Whisper pads every piece to 30 s anyway. Padding would change the texts of the others,
        # and a CPU gains nothing by a batch.
        self.batch_size = 1
        if self.timestamps and device.type != "cpu":
            self.batch_size = BATCH

    def transcribe(self, waveforms):
        inputs = [self.as_input(waveform) for waveform in waveforms]
        outputs = self.pipe(inputs, batch_size=self.batch_size, **self.options)
        return [output["text"].strip() for output in outputs]

    def segments(self, waveform):
        if not self.timestamps:
            return super().segments(waveform)
        output = self.pipe(self.as_input(waveform), return_timestamps=True, **self.options)
        seconds = len(waveform) / data.SAMPLE_RATE
        segments = []
        for chunk in output["chunks"]:
            start, end = chunk["timestamp"]
            # The end of the last segment may be missing, or lie beyond that of the recording.
            if end is None or end > seconds:
                end = seconds
            segments.append((start, end, chunk["text"]))
        return join_segments(segments)

    def as_input(self, waveform):
        return {"raw": waveform.numpy(), "sampling_rate": data.SAMPLE_RATE}


def load_recogniser(name, device, language=None, beams=None):
    """A run directory or checkpoint of stage 2, or the hub name or folder of another recogniser

    language and beams are for models of transformers, see HuggingFaceRecogniser
    """
    if Path(name).suffix == ".pt" or (Path(name) / "best.pt").exists():
        return OurRecogniser(name, device)
    return HuggingFaceRecogniser(name, device, language, beams)
