"""What runs have logged, finished or not, as one picture: training losses on the left, evaluations on the right.

    python plot.py exp/pretrain                               # -> curves.png
    python plot.py exp/finetune exp/scratch --out wer.png     # a colour for each run
"""
import argparse
import json
import sys
from pathlib import Path

from run import UserError, polite


def read_log(run):
    """-> list of the entries of log.jsonl; what is being written at this moment is left for the next time."""
    try:
        lines = (Path(run) / "log.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"{run} has no readable log.jsonl ({error}); give the --out of a run")


def two_panels():
    """-> (figure, [left, right]); a UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install matplotlib")
    figure = Figure(figsize=(12, 5), layout="constrained")
    return figure, figure.subplots(1, 2)


@polite
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--out of a run")
    parser.add_argument("--out", default="curves.png", help="picture to write (default %(default)s)")
    args = parser.parse_args(argv)
    figure, panels = two_panels()
    for number, run in enumerate(args.runs):
        rows = read_log(run)
        scores = [name for name in dict.fromkeys(name for row in rows for name in row) if name.startswith("dev ")]
        for panel, name, style in [(panels[0], "loss", "-"), *zip([panels[1]] * 9, scores, 3 * [".-", ".--", ".:"])]:
            steps, values = [[row[key] for row in rows if name in row] for key in ("step", name)]
            panel.plot(steps, values, style, color=f"C{number % 10}", label=f"{run}: {name}")
    for panel in panels:
        panel.set_xlabel("updates")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
