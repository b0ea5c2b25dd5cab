"""The rows of RESULTS.md. One command repeats a row, or all: real speech and teachers, or the demo.

    python -m tools.results --bert google/bert_uncased_L-2_H-128_A-2   # the demo: an hour a seed
    python -m tools.results --lab LAB                                  # nineteen hours on a core
    python -m tools.results --lab LAB --rows "no KD" "Whisper base" --seeds 0 1 2
    python -m tools.results --lab LAB --rows --figure results.png      # trains nothing

LAB holds LibriSpeech/train-clean-100 and dev-clean, whole or the parts that are named here.
Labelled: one hour of 28 speakers, labelled-1h.txt beside this file. Unlabelled: the rest of
labelled-5h.txt (Mini LibriSpeech's train-clean-5), and unlabelled-2h.txt; one row also takes the
audio of LAB/speechocean762-train (openslr.org/101), where it is. The model is chosen on five
speakers of dev-clean and scored on five others. What is finished is not done again, what was
interrupted is continued.
"""

import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import data
from tools.command_line import Parser, UserError, count, one_line_errors
from tools.plot import new_figure, picture, read_log
from tools.word_errors import Errors

TOOLS = Path(__file__).resolve().parent
DEVELOPMENT_SPEAKERS = ["84", "251", "1272", "1673", "1988"]
FINAL_SPEAKERS = ["2035", "2086", "2412", "2803", "652"]


# ---------------------------------------- the rows

# In teachers, audio and options, words in braces are filled in by `Results`: {tiny}, {base},
# {moonshine} and {bert} are models, {cache} is a folder, {seed} is the row's own seed, {seed0} is
# the transducer of the protocol's row `teacher` with seed 0.


@dataclass(frozen=True)
class Student:
    """A run of stage 1."""

    teachers: str
    audio: str
    options: str = ""


@dataclass(frozen=True)
class Row:
    """A run of stage 2 for each seed, and its score. A student "none" starts from scratch."""

    name: str
    student: str
    audio: str
    options: str = ""


@dataclass(frozen=True)
class Protocol:
    students: dict  # name -> Student
    rows: tuple  # of Row
    teacher: str  # the row whose transducers teach others
    pretrain: str  # options of every run of stage 1; with {seed} in them, one for each seed
    finetune: str  # options of every run of stage 2
    pseudo: tuple  # audio, teacher and validator of the pseudo-labels


STREAMING = "--chunk 16"
BERT = "--bert {bert}"
ONE_BEST = "--teacher-transducer {seed0}"
ENSEMBLE = "--teacher-transducer {seed0} {seed1} {seed2}"
A_THIRD = "--steps 350 --eval-every 70"  # of the demo's stage 1
LONGER_STAGE_2 = "--steps 3600 --eval-every 900"
LONGEST_STAGE_2 = "--steps 10800 --eval-every 2700"
TWO_TEACHERS = "{base} {moonshine}"
ALL_THREE = "{tiny} {base} {moonshine}"

LAB_STUDENTS = {
    "tiny": Student("{tiny}", "1h"),
    "base": Student("{base}", "1h"),
    "moonshine": Student("{moonshine}", "1h"),
    "two": Student(TWO_TEACHERS, "1h"),
    "tiny-more": Student("{tiny}", "1h rest"),
    "base-more": Student("{base}", "1h rest"),
    "moonshine-more": Student("{moonshine}", "1h rest"),
    "moonshine-layer-3": Student("{moonshine}:3", "1h rest"),
    "moonshine-ocean": Student("{moonshine}", "1h rest ocean"),
    "two-more": Student(TWO_TEACHERS, "1h rest"),
    "three-more": Student(ALL_THREE, "1h rest"),
    "two-more-streaming": Student(TWO_TEACHERS, "1h rest", STREAMING),
}

ONE = "Whisper base, + 6.2 h unlabelled"
TWO = "Whisper base + Moonshine, + 6.2 h unlabelled"
THREE = "all three, + 6.2 h unlabelled"
BEST = f"{TWO}, 10,800 updates, one-best path, K2D"
STREAMING_TWO = f"streaming, {TWO}"
OCEAN = "Moonshine, + 6.2 h unlabelled + 2.9 h of speechocean762"
LAB_ROWS = (
    Row("no KD", "none", "1h"),
    Row("no KD, 3,600 updates", "none", "1h", LONGER_STAGE_2),
    Row("no KD, 10,800 updates", "none", "1h", LONGEST_STAGE_2),
    Row("Whisper tiny.en", "tiny", "1h"),
    Row("Whisper base", "base", "1h"),
    Row("Moonshine", "moonshine", "1h"),
    Row("Whisper base + Moonshine", "two", "1h"),
    Row("Whisper tiny.en, + 6.2 h unlabelled", "tiny-more", "1h"),
    Row(ONE, "base-more", "1h"),
    Row("Moonshine, + 6.2 h unlabelled", "moonshine-more", "1h"),
    Row("Moonshine, + 6.2 h unlabelled: layer 3 of 6", "moonshine-layer-3", "1h"),
    Row(OCEAN, "moonshine-ocean", "1h"),
    Row(TWO, "two-more", "1h"),
    Row(THREE, "three-more", "1h"),
    Row(f"{ONE}, 3,600 updates", "base-more", "1h", LONGER_STAGE_2),
    Row(f"{TWO}, 3,600 updates", "two-more", "1h", LONGER_STAGE_2),
    Row(
        f"{TWO}, 3,600 updates, one-best path, K2D",
        "two-more",
        "1h pseudo",
        f"{LONGER_STAGE_2} {ONE_BEST}",
    ),
    Row(BEST, "two-more", "1h pseudo", f"{LONGEST_STAGE_2} {ONE_BEST}"),
    Row("+ one-best path", "two-more", "1h", ONE_BEST),
    Row("+ essence of three", "two-more", "1h", f"{ENSEMBLE} --essence-top-k 4"),
    Row("+ BERT", "two-more", "1h", BERT),
    Row("+ K2D pseudo-labels", "two-more", "1h pseudo"),
    Row("+ one-best path, K2D", "two-more", "1h pseudo", ONE_BEST),
    Row("+ one-best path, BERT, K2D", "two-more", "1h pseudo", f"{ONE_BEST} {BERT}"),
    Row("streaming, no KD", "none", "1h", STREAMING),
    Row(STREAMING_TWO, "two-more-streaming", "1h"),
    Row("10 min labelled, no KD", "none", "10min"),
    Row("10 min labelled, two teachers, + 7 h unlabelled", "two-more", "10min"),
    Row("5.3 h labelled, no KD", "none", "5h"),
    Row("5.3 h labelled, two teachers, + 1.9 h unlabelled", "two-more", "5h"),
)
LAB = Protocol(
    LAB_STUDENTS,
    LAB_ROWS,
    teacher=TWO,
    pretrain="--steps 14400 --eval-every 2400 --cache {cache} --speeds 1",
    finetune="--steps 1200 --eval-every 300",
    pseudo=("rest", "{moonshine}", "{tiny}"),
)

DEMO_WHISPER = f"{data.DEMO}/teachers/whisper"
DEMO_HUBERT = f"{data.DEMO}/teachers/hubert"
HUBERT_AND_WHISPER = f"{DEMO_HUBERT} {DEMO_WHISPER}"
DEMO_LOW = f"{data.DEMO}/half_teachers.py:Low"
DEMO_HIGH = f"{data.DEMO}/half_teachers.py:High"
LOW_AND_HIGH = f"{DEMO_LOW} {DEMO_HIGH}"
DEMO_STUDENTS = {
    "hubert": Student(DEMO_HUBERT, "train unlabelled"),
    "whisper": Student(DEMO_WHISPER, "train unlabelled"),
    "two": Student(HUBERT_AND_WHISPER, "train unlabelled"),
    "hubert-short": Student(DEMO_HUBERT, "train unlabelled", A_THIRD),
    "two-short": Student(HUBERT_AND_WHISPER, "train unlabelled", A_THIRD),
    "two-streaming": Student(HUBERT_AND_WHISPER, "train unlabelled", STREAMING),
    "low": Student(DEMO_LOW, "train unlabelled"),
    "high": Student(DEMO_HIGH, "train unlabelled"),
    "low-high": Student(LOW_AND_HIGH, "train unlabelled"),
    "low-high-average": Student(LOW_AND_HIGH, "train unlabelled", "--combine average"),
    "low-high-random": Student(LOW_AND_HIGH, "train unlabelled", "--combine random"),
}
DEMO_ROWS = (
    Row("no KD", "none", "train"),
    Row("HuBERT alone", "hubert", "train"),
    Row("Whisper alone", "whisper", "train"),
    Row("two teachers", "two", "train"),
    Row("HuBERT alone, a third of stage 1", "hubert-short", "train"),
    Row("two teachers, a third of stage 1", "two-short", "train"),
    Row("+ one-best path", "two", "train", ONE_BEST),
    Row("+ mean of three transducers", "two", "train", ENSEMBLE),
    Row("+ essence of three, k = 16", "two", "train", f"{ENSEMBLE} --essence-top-k 16"),
    Row("+ essence of three, k = 4", "two", "train", f"{ENSEMBLE} --essence-top-k 4"),
    Row("+ essence of three, k = 1", "two", "train", f"{ENSEMBLE} --essence-top-k 1"),
    Row("+ BERT", "two", "train", BERT),
    Row("+ K2D pseudo-labels", "two", "train pseudo"),
    Row("+ one-best path, K2D", "two", "train pseudo", ONE_BEST),
    Row("+ one-best path, BERT, K2D", "two", "train pseudo", f"{ONE_BEST} {BERT}"),
    Row("streaming, no KD", "none", "train", STREAMING),
    Row("streaming, two teachers", "two-streaming", "train"),
    Row("low", "low", "train"),
    Row("high", "high", "train"),
    Row("low + high", "low-high", "train"),
    Row("low + high, average", "low-high-average", "train"),
    Row("low + high, random", "low-high-random", "train"),
)
DEMO = Protocol(
    DEMO_STUDENTS,
    DEMO_ROWS,
    teacher="two teachers",
    pretrain="--cache {cache} --seed {seed}",
    finetune="",
    pseudo=("unlabelled", DEMO_WHISPER, DEMO_HUBERT),
)

# What the picture shows.
CURVES = (
    "no KD, 10,800 updates",
    ONE,
    TWO,
    "+ one-best path",
    f"{ONE}, 3,600 updates",
    f"{TWO}, 3,600 updates",
    BEST,
    STREAMING_TWO,
)


# ---------------------------------------- the audio


def find_recordings(folder, pattern):
    """-> {id: Utterance} of all speakers' folders that match"""
    utterances = data.load_sources(sorted(folder.glob(pattern)), transcribed=True)
    return {Path(u.path).stem: u for u in utterances}


def of_speakers(utterances, speakers):
    """Those of some speakers, one speaker after the other."""
    chosen = []
    for speaker in speakers:
        chosen += [u for id, u in utterances.items() if id.split("-")[0] == speaker]
    return chosen


def lab_sets(lab):
    """-> {name: utterances}: labelled, unlabelled, for development ("dev"), to score ("final")"""
    speech = lab / "LibriSpeech"
    known = find_recordings(speech, "train-clean-*/[0-9]*")
    held_out = find_recordings(speech, "dev-clean*/[0-9]*")
    sets = {}
    for name, file in (("1h", "labelled-1h"), ("5h", "labelled-5h"), ("more", "unlabelled-2h")):
        ids = (TOOLS / f"{file}.txt").read_text().split()
        missing = [id for id in ids if id not in known]
        if missing:
            raise UserError(
                f"{speech} has no {missing[0]}; python -m tools.librispeech download "
                f"train-clean-100 dev-clean fetches all that is needed"
            )
        sets[name] = [known[id] for id in ids]
    sets["10min"] = sets["1h"][:44]
    labelled = set(sets["1h"])
    sets["rest"] = [u for u in sets["5h"] if u not in labelled] + sets.pop("more")
    sets["dev"] = of_speakers(held_out, DEVELOPMENT_SPEAKERS)[::4]
    sets["final"] = of_speakers(held_out, FINAL_SPEAKERS)
    if has_ocean(lab):
        sets["ocean"] = data.load_sources([lab / "speechocean762-train"])
    return sets


def has_ocean(lab):
    return (lab / "speechocean762-train").is_dir()


def demo_sets():
    """The same of the demo."""
    folders = {"train": "train", "unlabelled": "unlabelled", "dev": "dev", "final": "test"}
    corpus = data.DEMO / "corpus"
    return {name: data.load_sources([corpus / folder]) for name, folder in folders.items()}


def write_manifests(sets, folder):
    """A manifest of each set; those that serve as unlabelled have no text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, utterances in sets.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for u in utterances:
                path = Path(u.path).absolute()
                row = {"audio_filepath": str(path), "id": path.stem}
                if name not in ("rest", "ocean"):
                    row["text"] = u.text
                file.write(json.dumps(row) + "\n")


# ---------------------------------------- the runs


def read_scores(path):
    """The Errors of a scores file of decode.py; None where it is missing or not finished."""
    if not path.exists():
        return None
    kinds = ("substitutions", "deletions", "insertions", "words")
    total = Errors()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        # decode.py writes all texts before it counts their errors.
        if "words" not in row:
            return None
        total += Errors(*[row[kind] for kind in kinds])
    return total if total.words else None


class Results:
    """The runs of a protocol in one folder.

    models: {"tiny", "base", "moonshine" and "bert": hub name or folder}
    """

    def __init__(self, protocol, out, models):
        self.protocol = protocol
        self.out = out
        self.rows = {row.name: row for row in protocol.rows}
        self.names = {**models, "cache": out / "cache"}
        for seed in (0, 1, 2):
            self.names[f"seed{seed}"] = self.folder(protocol.teacher, seed)

    def folder(self, name, seed):
        """Where the run of a row is."""
        name = re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")
        return self.out / "finetune" / f"{name}.{seed}"

    def fill(self, text, seed=0):
        """Options or teachers -> list of words, names filled in"""
        names = {**self.names, "seed": seed}
        return [word.format_map(names) for word in text.split()]

    def sources(self, audio):
        """Names of sets, and of the pseudo-labels -> their manifests"""
        manifests = []
        for name in audio.split():
            manifest = self.out / "audio" / f"{name}.jsonl"
            if name == "pseudo":
                manifest = self.out / "pseudo" / "pieces.jsonl"
            manifests.append(manifest)
        return manifests

    def commands(self, name, seed):
        """All commands of a row, in order: [script or module, option, option, ...]

        They do nothing where they have been finished before.
        """
        row = self.rows[name]
        for teaching_seed in re.findall(r"{seed(\d)}", row.options):
            yield from self.commands(self.protocol.teacher, int(teaching_seed))
        if "pseudo" in row.audio:
            yield self.pseudo_label()
        init = "none"
        if row.student != "none":
            # A student that does not depend on the seed is the same for all.
            folder = row.student
            if "{seed}" in self.protocol.pretrain:
                folder += f".{seed}"
            init = self.out / "pretrain" / folder
            # The half-band teachers of the demo are students themselves.
            teachers = self.protocol.students[row.student].teachers
            for half in re.findall(r"half_teachers\.py:(\w+)", teachers):
                yield ["-m", "demo.half_teachers", half.lower()]
            yield self.pretrain(row.student, seed, init)
        out = self.folder(name, seed)
        yield [
            "finetune_rnnt.py",
            "--data",
            *self.sources(row.audio),
            "--dev",
            *self.sources("dev"),
            "--init",
            init,
            *self.fill(self.protocol.finetune),
            *self.fill(row.options),
            "--seed",
            seed,
            "--out",
            out,
        ]
        for method in ("transducer", "ctc"):
            scores = out / f"{method}.jsonl"
            # decode.py would decode again.
            if not read_scores(scores):
                yield [
                    "decode.py",
                    "--data",
                    *self.sources("final"),
                    "--checkpoint",
                    out,
                    "--method",
                    method,
                    "--output",
                    scores,
                ]

    def pretrain(self, name, seed, out):
        student = self.protocol.students[name]
        return [
            "pretrain_kd.py",
            "--data",
            *self.sources(student.audio),
            "--dev",
            *self.sources("dev"),
            "--teachers",
            *self.fill(student.teachers),
            *self.fill(self.protocol.pretrain, seed),
            *self.fill(student.options),
            "--out",
            out,
        ]

    def pseudo_label(self):
        audio, teacher, validator = self.protocol.pseudo
        return [
            "-m",
            "methods.pseudo_label",
            *self.sources(audio),
            "--teacher",
            *self.fill(teacher),
            "--validator",
            *self.fill(validator),
            "--out",
            self.out / "pseudo",
        ]

    def rates(self, name, method="transducer"):
        """WER in percent of the seeds that are there, in their order."""
        rates = []
        pattern = f"{self.folder(name, '*').name}/{method}.jsonl"
        for path in sorted(self.out.glob(f"finetune/{pattern}")):
            errors = read_scores(path)
            if errors:
                rates.append(errors.rate)
        return rates

    def table(self):
        """Markdown: the mean of the seeds, and all of them behind it."""
        lines = ["| row | WER, transducer | of each seed | WER, CTC |", "|---|---|---|---|"]
        for name in self.rows:
            rates = self.rates(name)
            ctc = self.rates(name, "ctc")
            if rates and ctc:
                seeds = ", ".join(f"{rate:.1f}" for rate in rates)
                mean = statistics.mean(rates)
                lines.append(f"| {name} | {mean:.1f} % | {seeds} | {statistics.mean(ctc):.1f} % |")
        return "\n".join(lines)

    def figure(self, path):
        """Left: development WER during stage 2, one seed. Right: final WER, all seeds."""
        figure, (left, right) = new_figure(2)
        shown = [name for name in CURVES if self.rates(name)]
        for y, name in enumerate(shown):
            run = min(self.out.glob(f"finetune/{self.folder(name, '*').name}"))
            evaluations = [row for row in read_log(run) if "dev WER" in row]
            steps = [row["step"] for row in evaluations]
            left.plot(steps, [row["dev WER"] for row in evaluations], ".-", color=f"C{y}")
            rates = self.rates(name)
            right.plot(rates, [y] * len(rates), "o", color=f"C{y}")
        left.set(xlabel="updates of stage 2", ylabel="development WER (%)")
        # The names stand beside their dots and serve the curves, too.
        right.set(xlabel="WER (%)")
        right.set_yticks(range(len(shown)), shown)
        right.yaxis.tick_right()
        right.invert_yaxis()
        figure.savefig(path)


def call(command):
    """Run a script. Raises UserError where it ends with an error."""
    words = [str(word) for word in command]
    print("$ python", *words, flush=True)
    if subprocess.run([sys.executable, *words]).returncode:
        raise UserError(f"{' '.join(words[:2])} ended with an error; its message stands above")


# ---------------------------------------- the script


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("--lab", type=Path, help="folder of the real speech (default: the demo)")
    parser.add_argument(
        "--whisper",
        nargs=2,
        default=["openai/whisper-tiny.en", "openai/whisper-base"],
        metavar=("TINY", "BASE"),
        help="hub names or folders (default %(default)s)",
    )
    parser.add_argument(
        "--moonshine", default="UsefulSensors/moonshine-tiny", help="default %(default)s"
    )
    parser.add_argument(
        "--bert", default="google-bert/bert-base-uncased", help="default %(default)s"
    )
    lab_names = "; ".join(row.name for row in LAB.rows)
    demo_names = "; ".join(row.name for row in DEMO.rows)
    parser.add_argument(
        "--rows",
        nargs="*",
        metavar="ROW",
        help=f"to train (default: all; nothing behind it: none). With --lab: {lab_names}. "
        f"Of the demo: {demo_names}",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=count,
        default=[0],
        help="of stage 2, of the demo of both stages (default 0)",
    )
    parser.add_argument(
        "--out", type=Path, help="default exp/results, of the demo exp/results-demo"
    )
    parser.add_argument("--figure", type=picture, metavar="PNG", help="with --lab: draw it there")
    args = parser.parse_args(argv)

    args.protocol = LAB if args.lab else DEMO
    names = [row.name for row in args.protocol.rows]
    if args.rows is None:
        args.rows = [name for name in names if name != OCEAN or has_ocean(args.lab)]
    unknown = [name for name in args.rows if name not in names]
    if unknown:
        raise UserError(f"--rows: no row {unknown[0]!r}; choose from {'; '.join(names)}")
    if args.figure and not args.lab:
        raise UserError("--figure goes with --lab; python -m tools.plot draws runs of the demo")
    if args.out is None:
        args.out = Path("exp/results" if args.lab else "exp/results-demo")
    return args


@one_line_errors
def main(argv=None):
    args = parse(argv)
    tiny, base = args.whisper
    models = {"tiny": tiny, "base": base, "moonshine": args.moonshine, "bert": args.bert}
    results = Results(args.protocol, args.out, models)
    if args.rows:
        sets = lab_sets(args.lab) if args.lab else demo_sets()
        write_manifests(sets, args.out / "audio")
    for name in args.rows:
        for seed in args.seeds:
            for command in results.commands(name, seed):
                call(command)
    print(results.table())
    if args.figure:
        results.figure(args.figure)


if __name__ == "__main__":
    sys.exit(main())
