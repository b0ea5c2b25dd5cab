"""Pseudo-labels for long unlabelled recordings: one model transcribes, a smaller one checks, a filter decides (K2D).

    python pseudo_label.py lectures/ --teacher openai/whisper-large-v2 --validator openai/whisper-base --out exp/pseudo
    python finetune_rnnt.py --data LibriSpeech/train-clean-100 --pseudo exp/pseudo/pieces.jsonl --out exp/k2d

Teacher and validator: a speech recogniser of transformers (Whisper, Moonshine, a CTC model: hub name or folder) or a
checkpoint of ours. Written to --out: audio/*.flac, pieces of at most 30 s, and the manifest pieces.jsonl, in which each
has its texts, its scores, whether it is kept and why: training reads the kept ones. The same command goes on after an
interruption, recording by recording.

    h(Y)    = 1 if some n-gram of characters occurs more than c times in Y, else 0       # a loop, made up
    d(Y, V) = max(h(Y), min(1 - h(V), PER(Y, V)))                                        # arXiv 2407.10603
    keep Y if d(Y, V) <= alpha                                                           # V: the validator's text

[ours]: n = 6 and c = 5; PER without a lexicon is the edit distance of the normalised characters by the longer text.
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import soundfile
import torch
import torchaudio
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import decode
import run as running
from run import UserError

LONGEST = 30.0                          # seconds of a piece


# ---------------------------------------------------------------------------- the filter

def loops(text, n=6, c=5):
    """h: does some n-gram of characters occur more than c times?"""
    text = data.normalise(text)
    return max(Counter(text[i:i + n] for i in range(len(text) - n + 1)).values(), default=0) > c


def phone_distance(a, b):
    """PER-like: edit distance of the letters of two normalised texts, spaces left out, by the longer one, 0 to 1."""
    a, b = (data.normalise(text).replace(" ", "") for text in (a, b))
    return torchaudio.functional.edit_distance(a, b) / max(len(a), len(b), 1)


def judge(teacher, validator, alpha=0.4, n=6, c=5):
    """Two texts of one piece -> {keep, reason, distance d(Y, V), per, teacher_loops, validator_loops}"""
    per = phone_distance(teacher, validator)
    teacher_loops, validator_loops = (loops(text, n, c) for text in (teacher, validator))
    distance = max(float(teacher_loops), min(1.0 - validator_loops, per))
    empty = not data.normalise(teacher)
    reason = ("the teacher heard nothing" if empty else "the teacher loops" if teacher_loops else
              "the validator loops, the teacher does not" if validator_loops else
              "they agree" if distance <= alpha else "they disagree")
    return {"keep": not empty and distance <= alpha, "reason": reason, "distance": round(distance, 4),
            "per": round(per, 4), "teacher_loops": teacher_loops, "validator_loops": validator_loops}


# ---------------------------------------------------------------------------- pieces

def join(segments, longest=LONGEST):
    """Segments (start, end, text) in order -> pieces of consecutive ones, each at most `longest` seconds from its start
    to its end; a single segment that is longer stays a piece."""
    pieces = []
    for start, end, text in segments:
        if pieces and end - pieces[-1][0] <= longest:
            pieces[-1] = (pieces[-1][0], end, f"{pieces[-1][2]} {text.strip()}".strip())
        else:
            pieces.append((start, end, text.strip()))
    return pieces


def quiet_cuts(waveform, longest=LONGEST):
    """(S,) -> [(start, end)] in seconds, cut where a recording is quietest for 0.2 s, `longest` / 3 apart or more."""
    window, rate, cuts, end = data.SAMPLE_RATE // 5, data.SAMPLE_RATE, [0.0], len(waveform) / data.SAMPLE_RATE
    while end - cuts[-1] > longest:
        low, high = cuts[-1] + longest / 3, cuts[-1] + longest
        loudness = torch.nn.functional.avg_pool1d(cut(waveform, low, high).square()[None], window, window // 4)[0]
        cuts.append(low + (loudness.argmin().item() * (window // 4) + window // 2) / rate)
    return [*zip(cuts, [*cuts[1:], end])]


# ---------------------------------------------------------------------------- recognisers

class Recogniser:
    """One of ours or of transformers. texts(list of (S,)) -> list of str; pieces((S,)) -> [(start, end, text)]."""

    def __init__(self, name, device, language=None):
        self.name, self.device, self.ours, self.window = name, device, None, LONGEST
        if Path(name).suffix == ".pt" or (Path(name) / "best.pt").exists():
            self.ours = decode.load_recogniser(name, device)
            return
        transformers.logging.set_verbosity_error()
        try:
            self.pipe = transformers.pipeline("automatic-speech-recognition", name, device=device,
                                              dtype=running.inference_dtype(device) if device.type == "cuda"
                                              else torch.float32)
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
            raise UserError(f"{name}: {str(error).strip().splitlines()[0]} - give a speech recogniser of transformers "
                            f"(hf download {name} fetches one), a folder, or a checkpoint of stage 2")
        if self.pipe.tokenizer is None:
            raise UserError(f"{name}: it has no tokenizer, so it cannot write; give a model fine-tuned to transcribe")
        if not hasattr(self.pipe.tokenizer, "_decode_asr") and self.pipe.type == "seq2seq_whisper":
            self.pipe.type = "seq2seq"  # Whisper's architecture with a tokenizer of one's own, like the demo's
            self.window = self.pipe.feature_extractor.chunk_length  # seconds; it would not hear the rest
        generation = getattr(self.pipe.model, "generation_config", None)
        choose = language and getattr(generation, "is_multilingual", False)  # others have but one
        self.options = {"generate_kwargs": {"language": language, "task": "transcribe"}} if choose else {}
        self.timestamps = hasattr(generation, "no_timestamps_token_id")  # Whisper: it cuts long audio itself
        # it hears 30 s whatever it gets; padding changes the answers of others, and a CPU gains nothing by a batch
        self.batch_size = 8 if self.timestamps and device.type != "cpu" else 1

    def texts(self, waveforms):
        if self.ours:
            student, tokenizer = self.ours
            texts = []
            for some in (waveforms[i:i + 8] for i in range(0, len(waveforms), 8)):
                features = [data.log_mel(w) for w in some]
                batch = data.Batch(list(map(str, range(len(features)))), pad_sequence(features, batch_first=True),
                                   torch.tensor([len(f) for f in features]), None, None, None, None, 0.0)
                texts += decode.transcribe(student, tokenizer, batch, self.device)[0]
            return texts
        inputs = [{"raw": w.numpy(), "sampling_rate": data.SAMPLE_RATE} for w in waveforms]
        return [answer["text"].strip() for answer in self.pipe(inputs, batch_size=self.batch_size, **self.options)]

    def pieces(self, waveform):
        if not self.ours and self.timestamps:
            answer = self.pipe({"raw": waveform.numpy(), "sampling_rate": data.SAMPLE_RATE}, return_timestamps=True,
                               **self.options)
            end = len(waveform) / data.SAMPLE_RATE
            return join((start, end if stop is None else min(stop, end), text)
                        for chunk in answer["chunks"] for (start, stop), text in [(chunk["timestamp"], chunk["text"])])
        cuts = quiet_cuts(waveform, self.window)
        waveforms = [cut(waveform, start, end) for start, end in cuts]
        return [(*times, text) for times, text in zip(cuts, self.texts(waveforms))]


def cut(waveform, start, end):
    return waveform[round(start * data.SAMPLE_RATE):round(end * data.SAMPLE_RATE)]


# ---------------------------------------------------------------------------- python pseudo_label.py

def label(u, number, teacher, validator, args):
    """One recording -> its rows of the manifest; each row's audio is written before the row is."""
    waveform, rows = data.load_audio(u.path), []
    pieces = [piece for piece in teacher.pieces(waveform) if piece[1] - piece[0] >= data.SHORTEST]
    waveforms = [cut(waveform, start, end) for start, end, _ in pieces]
    for (start, end, text), audio, check in zip(pieces, waveforms, validator.texts(waveforms) if pieces else []):
        file = f"audio/{number:05d}-{len(rows):04d}.flac"
        soundfile.write(args.out / file, audio.numpy(), data.SAMPLE_RATE)
        rows.append({"audio_filepath": file, "duration": round(end - start, 3), "text": text, "validator": check,
                     **judge(text, check, args.alpha, args.n, args.c), "source": u.path, "start": round(start, 3),
                     "pieces": len(pieces)})
    return rows or [{"keep": False, "reason": "the teacher heard nothing", "source": u.path, "pieces": 1}]


def read_rows(path):
    """The rows of whole recordings; what an interruption left of another is taken out of the file."""
    # what stands behind the last \n is half a line
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    found = Counter(row["source"] for row in rows)
    rows = [row for row in rows if found[row["source"]] == row["pieces"]]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rows


def prepare(args):
    """Make --out, or find what is done there. -> rows"""
    settings = {name: getattr(args, name) for name in ("teacher", "validator", "language", "alpha", "n", "c")}
    try:
        (args.out / "audio").mkdir(parents=True, exist_ok=True)
        known = args.out / "settings.json"
        if known.exists() and json.loads(known.read_text()) != settings:
            raise UserError(f"{args.out} was made with other settings ({known.read_text()}); choose another --out")
        known.write_text(json.dumps(settings))
        return read_rows(args.out / "pieces.jsonl")
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot use --out {args.out} ({error}); choose another folder")


@running.polite
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", nargs="+", metavar="SOURCE", help="recordings: files, folders or manifests")
    parser.add_argument("--teacher", required=True, help="transcribes: hub name, folder, or checkpoint of stage 2")
    parser.add_argument("--validator", required=True, help="checks: the same kinds, preferably smaller and different")
    parser.add_argument("--language", help="for multilingual models, e.g. en or zh; else they guess it piece by piece")
    parser.add_argument("--alpha", type=float, default=0.4, help="largest distance to keep (default %(default)s)")
    parser.add_argument("--n", type=int, default=6, help="characters of an n-gram (default %(default)s)")
    parser.add_argument("--c", type=int, default=5, help="more frequent than this, it is a loop (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("exp/pseudo"), help="default %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)

    device, _, why = running.choose_device(args.device)
    print(why)
    failed = []
    recordings = data.absolute(data.load_sources(args.audio, skipped=failed))
    teacher, validator = (Recogniser(name, device, args.language) for name in (args.teacher, args.validator))
    rows = prepare(args)
    done = {row["source"] for row in rows}
    if done:
        print(f"continuing {args.out}: {len(done)} recordings are done")
    with open(args.out / "pieces.jsonl", "a", encoding="utf-8") as file:
        for u in tqdm(recordings, unit="recording"):
            if u.path in done:
                continue
            try:
                new = label(u, len(done), teacher, validator, args)
            except UserError as error:  # one bad file never ends a run
                failed.append(str(error))
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                continue
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new))
            file.flush()
            rows += new
            done.add(u.path)
    if not rows:
        raise UserError("none of the audio could be read")
    hours = lambda rows: sum(row.get("duration", 0.0) for row in rows) / 3600
    kept = [row for row in rows if row["keep"]]
    reasons = Counter(row["reason"] for row in rows if not row["keep"])
    print(f"kept {len(kept)} of {len(rows)} pieces, {hours(kept):.2f} of {hours(rows):.2f} h; dropped: "
          + (", ".join(f"{reason} {count}" for reason, count in reasons.items()) or "none")
          + (f"; {len(failed)} files could not be used" if failed else ""))
    print(f"next: python finetune_rnnt.py --pseudo {args.out / 'pieces.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
