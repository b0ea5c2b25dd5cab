"""The curves of runs in one picture, a panel for each quantity; also while the runs are at work.

python -m tools.plot exp/pretrain                                    # -> curves.png
python -m tools.plot exp/finetune exp/scratch --out wer.pdf          # a colour for each run
"""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

from tools.command_line import Parser, UserError, one_line_errors

SUFFIXES = (".png", ".pdf", ".svg")
LINE_STYLES = ("-", "--", ":", "-.")

# The panels from left to right: title -> label of the y axis, with its unit.
PANELS = {
    "training loss, stage 1": "L1, sum over teachers (standard deviations)",
    "development L1": "L1 to each teacher (standard deviations)",
    "training loss, stage 2": "loss (nats per utterance)",
    "development WER": "WER (%)",
}


def read_log(run):
    """-> the rows of a run's log.jsonl, a list of dicts.

    A row without its newline is just being written and is left out. Raises UserError without a log.
    """
    path = Path(run) / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: no readable log.jsonl ({error}); give the --out of a run")


def panel_of(name, row):
    """The title of the panel that an entry of a row belongs to, None if it is not drawn."""
    if name.startswith("dev WER"):
        return "development WER"
    if name.startswith("dev "):
        return "development L1"
    if name != "loss":
        return None
    # Only stage 2 logs a transducer loss beside the sum.
    stage = 2 if "transducer" in row else 1
    return f"training loss, stage {stage}"


def find_curves(rows):
    """Rows of a log -> {panel: {name: (steps, values)}}"""
    curves = {}
    for row in rows:
        for name, value in row.items():
            title = panel_of(name, row)
            if title is None:
                continue
            steps, values = curves.setdefault(title, {}).setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(value)
    return curves


def picture(text):
    """argparse type: the path of a picture that can be written on this machine"""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text}: its name must end in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("a picture needs matplotlib: pip install matplotlib")
    return path


def new_figure(count):
    """-> (figure, list of `count` panels in one or two rows)"""
    # Whoever draws nothing needs no matplotlib.
    from matplotlib.figure import Figure

    rows = 1 if count <= 2 else 2
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(6.5 * columns, 4.5 * rows), layout="constrained")
    panels = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure, panels


def draw(panel, title, runs):
    """One quantity of all runs: a colour for each run, a line style for each name.

    runs: {folder of a run: its curves, from `find_curves`}
    """
    names = []
    for curves in runs.values():
        for name in curves.get(title, {}):
            if name not in names:
                names.append(name)
    for number, (run, curves) in enumerate(runs.items()):
        for name, (steps, values) in curves.get(title, {}).items():
            label = run
            if len(names) > 1:
                label = f"{run}: {name.removeprefix('dev ')}"
            panel.plot(
                steps,
                values,
                color=f"C{number % 10}",
                linestyle=LINE_STYLES[names.index(name) % len(LINE_STYLES)],
                # A run at work may have one evaluation, which is no line yet.
                marker="." if title.startswith("development") else None,
                label=label,
            )
    panel.set(title=title, xlabel="updates", ylabel=PANELS[title])
    panel.set_xlim(left=0)
    if title == "development WER":
        # Early models insert without end; what counts happens below 100 %.
        panel.set_ylim(0, min(100, panel.get_ylim()[1]))
    panel.legend(fontsize="small")


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--out of a run")
    parser.add_argument(
        "--out",
        type=picture,
        default="curves.png",
        help=f"file to write, {', '.join(SUFFIXES)} (default %(default)s)",
    )
    args = parser.parse_args(argv)

    runs = {run: find_curves(read_log(run)) for run in args.runs}
    logged = {title for curves in runs.values() for title in curves}
    titles = [title for title in PANELS if title in logged]
    if not titles:
        raise UserError(f"{args.runs[0]}: nothing is logged yet; try again after some updates")
    figure, panels = new_figure(len(titles))
    for panel, title in zip(panels, titles):
        draw(panel, title, runs)
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
