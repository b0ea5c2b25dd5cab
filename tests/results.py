"""The rows of README.md's tables. One command repeats one row or all: real speech and real teachers, or the demo's.

    python tests/results.py --lab LAB                                # everything: about twelve hours on one CPU core
    python tests/results.py --lab LAB --rows "no KD" "Whisper base" --seeds 0 1 2
    python tests/results.py --lab LAB --rows --figure results.png    # train nothing; table and picture of what is there
    python tests/results.py --bert google/bert_uncased_L-2_H-128_A-2 # the demo's methods: an hour a seed

LAB holds LibriSpeech/train-clean-100 and dev-clean, whole or the parts that are named here. Labelled: one hour of 28
speakers, tests/labelled-1h.txt; unlabelled: the rest of tests/labelled-5h.txt (Mini LibriSpeech's train-clean-5), and
tests/unlabelled-2h.txt; for one row besides what LAB/speechocean762-train holds (audio of openslr.org/101), if it is
there. The model is chosen on five speakers of dev-clean and scored on five others. What is finished is not done again;
what was interrupted goes on.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
from decode import Errors
from plot import read_log, two_panels
from run import DEMO as DEMO_FOLDER, UserError, polite

DEVELOPMENT, FINAL = "84 251 1272 1673 1988".split(), "2035 2086 2412 2803 652".split()


@dataclass
class Protocol:
    students: dict   # of stage 1: its teachers, its audio, what else
    rows: dict       # student of stage 1, labelled audio, what else in stage 2
    teacher: str     # the row whose seeds 0, 1, 2 teach by their outputs; "+ method" adds to it
    pretrain: str    # budget of stage 1
    finetune: str    # budget of stage 2
    pseudo: tuple    # audio, teacher and validator of the pseudo-labels


ONE_BEST, ENSEMBLE = "--teacher-transducer {seed0}", "--teacher-transducer {seed0} {seed1} {seed2}"
BERT, K2D, STREAMING = "--bert {bert}", "--pseudo {pseudo}/pieces.jsonl", "--chunk 16 --left 64"


def added(student, labelled, ensembles, k2d="+ K2D pseudo-labels"):
    """The rows of the methods that join stage 2; ensembles: {row: options}."""
    methods = {"+ one-best path": ONE_BEST, **ensembles, "+ BERT": BERT, k2d: K2D,
               "+ one-best path, K2D": f"{ONE_BEST} {K2D}", "+ one-best path, BERT, K2D": f"{ONE_BEST} {BERT} {K2D}"}
    return {row: (student, labelled, more) for row, more in methods.items()}


THRICE = "--steps 3600 --eval-every 900"  # the updates of stage 2
MOONSHINE = "Moonshine, + 6.2 h unlabelled"
OCEAN, OCEAN_FOLDER = f"{MOONSHINE} + 2.9 h of speechocean762", "speechocean762-train"
ALL_THREE = "all three, + 6.2 h unlabelled"
LONGER = f"{ALL_THREE}, 14,400 + 3,600 updates"
LAB = Protocol(
    students={
        "tiny": ("{tiny}", "1h", ""),
        "base": ("{base}", "1h", ""),
        "moonshine": ("{moonshine}", "1h", ""),
        "three": ("{tiny} {base} {moonshine}", "1h", ""),
        "tiny-more": ("{tiny}", "1h rest", ""),
        "base-more": ("{base}", "1h rest", ""),
        "moonshine-more": ("{moonshine}", "1h rest", ""),
        "moonshine-layer-3": ("{moonshine}:3", "1h rest", ""),
        "moonshine-cosine": ("{moonshine}", "1h rest", "--loss cosine"),
        "moonshine-l1-cosine": ("{moonshine}", "1h rest", "--loss l1+cosine"),
        "moonshine-l2": ("{moonshine}", "1h rest", "--loss l2"),
        "moonshine-ocean": ("{moonshine}", "1h rest ocean", ""),
        "two-more": ("{base} {moonshine}", "1h rest", ""),
        "three-more": ("{tiny} {base} {moonshine}", "1h rest", ""),
        "three-longer": ("{tiny} {base} {moonshine}", "1h rest", "--steps 14400 --eval-every 2400"),
        "base-more-streaming": ("{base}", "1h rest", STREAMING),
        "three-more-streaming": ("{tiny} {base} {moonshine}", "1h rest", STREAMING),
    },
    rows={
        "no KD": ("none", "1h", ""),
        "no KD, 3,600 updates": ("none", "1h", THRICE),  # the time of both stages of the others
        "Whisper tiny.en": ("tiny", "1h", ""),
        "Whisper base": ("base", "1h", ""),
        "Moonshine": ("moonshine", "1h", ""),
        "all three": ("three", "1h", ""),
        "Whisper tiny.en, + 6.2 h unlabelled": ("tiny-more", "1h", ""),
        "Whisper base, + 6.2 h unlabelled": ("base-more", "1h", ""),
        MOONSHINE: ("moonshine-more", "1h", ""),
        f"{MOONSHINE}: layer 3 of 6": ("moonshine-layer-3", "1h", ""),
        f"{MOONSHINE}: cosine": ("moonshine-cosine", "1h", ""),
        f"{MOONSHINE}: L1 + cosine": ("moonshine-l1-cosine", "1h", ""),
        f"{MOONSHINE}: L2": ("moonshine-l2", "1h", ""),
        OCEAN: ("moonshine-ocean", "1h", ""),
        "Whisper base + Moonshine, + 6.2 h unlabelled": ("two-more", "1h", ""),
        ALL_THREE: ("three-more", "1h", ""),
        f"{ALL_THREE}, 2,400 updates": ("three-more", "1h", "--steps 2400 --eval-every 600"),
        LONGER: ("three-longer", "1h", THRICE),
        f"{LONGER}, one-best path, K2D": ("three-longer", "1h", f"{THRICE} {ONE_BEST} {K2D}"),
        **added("three-more", "1h", {"+ essence of three": f"{ENSEMBLE} --essence-top-k 4"},
                k2d="+ K2D pseudo-labels of 1.9 h"),
        "streaming, no KD": ("none", "1h", STREAMING),
        "streaming, Whisper base, + 6.2 h unlabelled": ("base-more-streaming", "1h", ""),
        "streaming, all three, + 6.2 h unlabelled": ("three-more-streaming", "1h", ""),
        "10 min labelled, no KD": ("none", "10min", ""),
        "10 min labelled, all three, + 7 h unlabelled": ("three-more", "10min", ""),
        "5.3 h labelled, no KD": ("none", "5h", ""),
        "5.3 h labelled, all three, + 1.9 h unlabelled": ("three-more", "5h", ""),
    },
    teacher=ALL_THREE,
    pretrain="--steps 4800 --eval-every 800 --cache {cache} --speeds 1",
    finetune="--steps 1200 --eval-every 300",
    pseudo=("part", "{moonshine}", "{tiny}"))

BOTH = f"{DEMO_FOLDER}/teachers/hubert {DEMO_FOLDER}/teachers/whisper"
DEMO = Protocol(
    students={"two": (BOTH, "train unlabelled", ""),
              "two-streaming": (BOTH, "train unlabelled", STREAMING)},
    rows={
        "no KD": ("none", "train", ""),
        "two teachers": ("two", "train", ""),
        "two teachers, pruned loss": ("two", "train", "--loss pruned"),
        **added("two", "train", {
            "+ mean of three transducers": ENSEMBLE,
            **{f"+ essence of three, k = {k}": f"{ENSEMBLE} --essence-top-k {k}" for k in (16, 4, 1)}}),
        "streaming, no KD": ("none", "train", STREAMING),
        "streaming, two teachers": ("two-streaming", "train", ""),
    },
    teacher="two teachers", pretrain="", finetune="",
    pseudo=("unlabelled", f"{DEMO_FOLDER}/teachers/whisper", f"{DEMO_FOLDER}/teachers/hubert"))

MAIN = ["no KD, 3,600 updates", "Whisper base", "Whisper base, + 6.2 h unlabelled", ALL_THREE, "+ one-best path",
        LONGER, f"{LONGER}, one-best path, K2D", "streaming, Whisper base, + 6.2 h unlabelled"]
BY_HOURS = {"no KD": [(1 / 6, "10 min labelled, no KD"), (1, "no KD"), (5.3, "5.3 h labelled, no KD")],
            "three teachers, 7.2 h of audio": [(1 / 6, "10 min labelled, all three, + 7 h unlabelled"), (1, ALL_THREE),
                                               (5.3, "5.3 h labelled, all three, + 1.9 h unlabelled")]}


def lab_sets(lab):
    """Which audio is labelled, unlabelled, for development, for the final number: {name: utterances}."""
    speech = lab / "LibriSpeech"
    known, held = ({Path(u.path).stem: u for u in data.load_sources(sorted(speech.glob(name)), True)}
                   for name in ("train-clean-*/[0-9]*", "dev-clean*/[0-9]*"))  # (of all speakers)
    try:
        sets = {name: [known[id] for id in (ROOT / f"tests/{ids}.txt").read_text().split()]
                for name, ids in (("1h", "labelled-1h"), ("5h", "labelled-5h"), ("part", "unlabelled-2h"))}
    except KeyError as id:
        raise UserError(f"{speech} has no {id}; python data.py download train-clean-100 dev-clean gets all it takes")
    sets["10min"] = sets["1h"][:44]
    sets["rest"] = [u for u in sets["5h"] if u not in sets["1h"]] + sets["part"]
    dev, sets["final"] = ([u for speaker in some for id, u in held.items() if id.split("-")[0] == speaker]
                          for some in (DEVELOPMENT, FINAL))
    sets["dev"] = dev[::4]
    if (ocean := lab / OCEAN_FOLDER).is_dir():
        sets["ocean"] = data.load_sources([ocean])
    return sets


def demo_sets():
    folders = {"train": "train", "unlabelled": "unlabelled", "dev": "dev", "final": "test"}
    return {name: data.load_sources([DEMO_FOLDER / "corpus" / folder]) for name, folder in folders.items()}


def write_manifests(sets, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, utterances in sets.items():
        rows = [{"audio_filepath": str(Path(u.path).absolute()), "id": Path(u.path).stem}
                | ({} if name in ("rest", "part", "ocean") else {"text": u.text}) for u in utterances]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Results:
    def __init__(self, args):
        self.protocol, self.out, self.audio = args.protocol, args.out, args.out / "audio"
        self.names = {"tiny": args.whisper[0], "base": args.whisper[1], "moonshine": args.moonshine, "bert": args.bert,
                      "pseudo": args.out / "pseudo", "cache": args.out / "cache",
                      **{f"seed{seed}": self.folder(self.protocol.teacher, seed) for seed in (0, 1, 2)}}

    def options(self, text):
        return [word.format_map(self.names) for word in text.split()]

    def folder(self, row, seed):
        return self.out / "finetune" / f"{re.sub('[^a-z0-9.]+', '-', row.lower()).strip('-')}.{seed}"

    def call(self, script, *options):
        command = [sys.executable, str(ROOT / script), *(str(option) for option in options)]
        print("$", *command[1:], flush=True)
        if subprocess.run(command).returncode:
            raise UserError(f"{script} ended with an error; its message stands above")

    def sources(self, text):
        return [self.audio / f"{name}.jsonl" for name in text.split()]

    def pretrain(self, student):
        """-> what stage 2 takes as --init"""
        if student == "none":
            return student
        out, (teachers, audio, more) = self.out / "pretrain" / student, self.protocol.students[student]
        self.call("pretrain_kd.py", "--data", *self.sources(audio), "--dev", *self.sources("dev"), "--teachers",
                  *self.options(teachers), *self.options(f"{self.protocol.pretrain} {more}"), "--out", out)
        return out

    def row(self, name, seed):
        """Train and score; both do nothing where they have been before."""
        student, labelled, more = self.protocol.rows[name]
        out = self.folder(name, seed)
        for taught_by in re.findall(r"{seed(\d)}", more):
            self.row(self.protocol.teacher, int(taught_by))
        if "{pseudo}" in more:
            audio, teacher, validator = self.protocol.pseudo
            self.call("pseudo_label.py", *self.sources(audio), "--teacher", *self.options(teacher), "--validator",
                      *self.options(validator), "--out", self.names["pseudo"])
        self.call("finetune_rnnt.py", "--data", *self.sources(labelled), "--dev", *self.sources("dev"), "--init",
                  self.pretrain(student), *self.options(f"{self.protocol.finetune} {more}"), "--seed", seed,
                  "--out", out)
        for method in ("transducer", "ctc"):
            scores = out / f"{method}.jsonl"
            if not scores.exists() or not scores.stat().st_size:  # decode.py makes an empty one before it listens
                self.call("decode.py", "--data", *self.sources("final"), "--checkpoint", out, "--method", method,
                          "--output", scores)

    def rates(self, name, method="transducer"):
        """WER in percent of the seeds that are there, in their order."""
        rates = []
        for path in sorted(self.out.glob(f"finetune/{self.folder(name, '*').name}/{method}.jsonl")):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            if not rows:  # still at work, or interrupted
                continue
            kinds = [sum(row[kind] for row in rows) for kind in ("substitutions", "deletions", "insertions", "words")]
            rates.append(Errors(*kinds).rate)
        return rates

    def table(self):
        """Markdown: mean of the seeds, all of them behind it."""
        print("| row | WER, transducer | of each seed | WER, CTC |\n|---|---|---|---|")
        for name in self.protocol.rows:
            rates, ctc = self.rates(name), self.rates(name, "ctc")
            if rates and ctc:
                print(f"| {name} | {statistics.mean(rates):.1f} % | {', '.join(f'{r:.1f}' for r in rates)} | "
                      f"{statistics.mean(ctc):.1f} % |")

    def figure(self, path):
        """Left: development WER while stage 2 runs. Right: WER of the other speakers against hours of labels."""
        figure, (left, right) = two_panels()
        for name in filter(self.rates, MAIN):
            folder, *_ = sorted(self.out.glob(f"finetune/{self.folder(name, '*').name}"))
            if points := [(row["step"], row["dev WER"]) for row in read_log(folder) if "dev WER" in row]:
                left.plot(*zip(*points), ".--" if name.startswith("streaming") else ".-", label=name)
        for name, rows in BY_HOURS.items():
            if points := [(hours, statistics.mean(self.rates(row))) for hours, row in rows if self.rates(row)]:
                right.plot(*zip(*points), "o-", label=name)
        left.set(xlabel="updates of stage 2", ylabel="development WER, %")
        right.set(xlabel="labelled audio", ylabel="WER, %", xscale="log")
        right.set_xticks([1 / 6, 1, 5.3], ["10 min", "1 h", "5.3 h"])
        right.minorticks_off()
        for panel in (left, right):
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
        figure.savefig(path)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, help="folder of the real speech (default: the demo)")
    parser.add_argument("--whisper", nargs=2, default=["openai/whisper-tiny.en", "openai/whisper-base"],
                        metavar=("TINY", "BASE"), help="hub names or folders (default %(default)s)")
    parser.add_argument("--moonshine", default="UsefulSensors/moonshine-tiny", help="default %(default)s")
    parser.add_argument("--bert", default="google-bert/bert-base-uncased", help="default %(default)s")
    parser.add_argument("--rows", nargs="*", metavar="ROW",
                        help=f"which to train (default: all): {'; '.join(LAB.rows)}. Of the demo: "
                             f"{'; '.join(DEMO.rows)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of stage 2 (default 0)")
    parser.add_argument("--out", type=Path, help="default exp/results, of the demo exp/results-demo")
    parser.add_argument("--figure", metavar="PNG", help="of the real speech: draw it there")
    args = parser.parse_args(argv)
    args.protocol = LAB if args.lab else DEMO
    rows = list(args.protocol.rows)
    if args.rows is None:
        args.rows = [row for row in rows if row != OCEAN or (args.lab / OCEAN_FOLDER).is_dir()]
    if unknown := set(args.rows) - set(rows):
        raise UserError(f"no such row: {'; '.join(unknown)}; choose from {'; '.join(rows)}")
    if args.figure and not args.lab:
        raise UserError("--figure is that of --lab; python plot.py draws the runs of the demo")
    args.out = args.out or Path("exp/results" if args.lab else "exp/results-demo")
    return args


@polite
def main(argv=None):
    args = parse(argv)
    results = Results(args)
    if args.rows:
        write_manifests(lab_sets(args.lab) if args.lab else demo_sets(), results.audio)
    for name in args.rows:
        for seed in args.seeds:
            results.row(name, seed)
    results.table()
    if args.figure:
        results.figure(args.figure)


if __name__ == "__main__":
    sys.exit(main())
