"""Teachers that know different things, made to order: when do several teachers pay? (RESULTS.md)

    for NAME in low high whole again; do python -m demo.half_teachers $NAME; done   # 4 minutes each
    python -m tools.results --rows "low" "high" "low + high" "whole" "whole + again" --seeds 0 1 2

Each is a student of the demo's HuBERT, learned without transcripts: `low` sees the lower half of
the 80 log-mel bins (up to 1.7 kHz), `high` the upper half, `whole` and `again` see all of them and
differ in their seeds alone. As teachers they are modules of one's own, in the runs exp/NAME:
"demo/half_teachers.py:Low" and so on.
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import model
from tools.command_line import Parser, one_line_errors

BINS = {"low": (0, 40), "high": (40, 80), "whole": (0, 80), "again": (0, 80)}
SEEDS = {"low": 0, "high": 0, "whole": 0, "again": 1}


def log_mel_of(name, waveform, log_mel=data.log_mel):
    """(S,) -> (F, 80), where the bins that a teacher does not see are 0, about their mean"""
    first, last = BINS[name]
    features = log_mel(waveform)
    seen = torch.zeros_like(features)
    seen[:, first:last] = features[:, first:last]
    return seen


class HalfTeacher(torch.nn.Module):
    name = None

    def __init__(self):
        super().__init__()
        self.student = model.load_student(model.load_checkpoint(f"exp/{self.name}"))

    def forward(self, waveforms, lengths):
        """waveforms (B, S), lengths (B,) -> hidden states (B, T, d), lengths (B,)"""
        features = []
        for waveform, length in zip(waveforms, lengths.tolist()):
            features.append(log_mel_of(self.name, waveform[:length].float()))
        frames = torch.tensor([len(x) for x in features], device=waveforms.device)
        return self.student.encoder(pad_sequence(features, batch_first=True), frames)


class Low(HalfTeacher):
    name = "low"


class High(HalfTeacher):
    name = "high"


class Whole(HalfTeacher):
    name = "whole"


class Again(HalfTeacher):
    name = "again"


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("name", choices=list(BINS))
    args = parser.parse_args(argv)
    import pretrain_kd  # not above: that would load this file, as a teacher, into itself

    # Stage 1 as it is, but its student sees these bins.
    data.log_mel = lambda waveform: log_mel_of(args.name, waveform)
    hubert = str(data.DEMO / "teachers/hubert")
    options = ["--teachers", hubert, "--cache", "exp/results-demo/cache"]
    options += ["--seed", str(SEEDS[args.name]), "--out", f"exp/{args.name}"]
    return pretrain_kd.main(options)


if __name__ == "__main__":
    sys.exit(main())
