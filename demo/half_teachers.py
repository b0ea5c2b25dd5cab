"""Two teachers that see different things and know the same: do they pay? (See RESULTS.md.)

    python -m demo.half_teachers low       # 4 minutes each, into exp/low and exp/high
    python -m demo.half_teachers high
    python -m tools.results --rows "high" "low + high" --seeds 0 1 2     # makes them, too

Each is a student of the demo's HuBERT, made by stage 1: `low` sees the lower half of the 80 log-mel
bins, up to 1.7 kHz, `high` the upper half. As teachers they are modules of one's own:
"demo/half_teachers.py:Low" and "demo/half_teachers.py:High".
"""

import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import model
from tools.command_line import Parser, UserError, one_line_errors

BINS = {"low": slice(0, 40), "high": slice(40, 80)}


whole_log_mel = data.log_mel  # main replaces that of the module


def half_of_log_mel(name, waveform):
    """(S,) -> log-mel (F, 80), where the bins of the other half are 0, about their mean"""
    features = whole_log_mel(waveform)
    half = torch.zeros_like(features)
    half[:, BINS[name]] = features[:, BINS[name]]
    return half


class HalfTeacher(torch.nn.Module):
    name = None

    def __init__(self):
        super().__init__()
        run = Path("exp") / self.name
        if not run.exists():
            raise UserError(f"{run} is missing; make it: python -m demo.half_teachers {self.name}")
        self.student = model.load_student(model.load_checkpoint(run))

    def forward(self, waveforms, lengths):
        """waveforms (B, S), lengths (B,) -> hidden states (B, T, d), lengths (B,)"""
        features = []
        for waveform, length in zip(waveforms, lengths.tolist()):
            features.append(half_of_log_mel(self.name, waveform[:length].float()))
        frames = torch.tensor([len(x) for x in features], device=waveforms.device)
        return self.student.encoder(pad_sequence(features, batch_first=True), frames)


class Low(HalfTeacher):
    name = "low"


class High(HalfTeacher):
    name = "high"


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("name", choices=list(BINS))
    args = parser.parse_args(argv)
    import pretrain_kd  # not above: stage 1 loads this file, too, as a teacher

    # Stage 1 as it is, but its student sees half of the bins.
    data.log_mel = lambda waveform: half_of_log_mel(args.name, waveform)
    hubert = str(data.DEMO / "teachers/hubert")
    cache = "exp/results-demo/cache"  # that of tools/results.py
    return pretrain_kd.main(["--teachers", hubert, "--cache", cache, "--out", f"exp/{args.name}"])


if __name__ == "__main__":
    sys.exit(main())
