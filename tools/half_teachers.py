"""Two teachers that know different things, for an experiment: when do several teachers pay?

    python -m tools.half_teachers low       # 3 minutes each, into exp/half-low and exp/half-high
    python -m tools.half_teachers high
    python -m tools.results --rows "low teacher" "high teacher" "low and high teacher" --seeds 0 1 2

Each is a student of the demo's HuBERT that sees one half of the 80 log-mel bins, below or above
about 1.7 kHz, and learns without transcripts. As teachers they are modules of one's own,
"tools/half_teachers.py:Low" and "tools/half_teachers.py:High".
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import model
import pretrain_kd
from tools.command_line import Parser, one_line_errors

HALVES = {"low": slice(0, 40), "high": slice(40, 80)}


def keep_half(features, half):
    """log-mel (..., 80) -> the same with the other half of the bins at 0, their mean"""
    kept = torch.zeros_like(features)
    kept[..., HALVES[half]] = features[..., HALVES[half]]
    return kept


class HalfTeacher(torch.nn.Module):
    def __init__(self, half):
        super().__init__()
        self.half = half
        self.student = model.load_student(model.load_checkpoint(f"exp/half-{half}"))

    def forward(self, waveforms, lengths):
        """waveforms (B, S), lengths (B,) -> hidden states (B, T, d), lengths (B,)"""
        features = []
        for waveform, length in zip(waveforms, lengths.tolist()):
            features.append(keep_half(data.log_mel(waveform[:length].float()), self.half))
        frames = torch.tensor([len(x) for x in features], device=waveforms.device)
        return self.student.encoder(pad_sequence(features, batch_first=True), frames)


class Low(HalfTeacher):
    def __init__(self):
        super().__init__("low")


class High(HalfTeacher):
    def __init__(self):
        super().__init__("high")


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("half", choices=list(HALVES))
    args = parser.parse_args(argv)
    whole = data.log_mel
    data.log_mel = lambda waveform: keep_half(whole(waveform), args.half)
    teacher = str(data.DEMO / "teachers/hubert")
    return pretrain_kd.main(["--teachers", teacher, "--out", f"exp/half-{args.half}"])


if __name__ == "__main__":
    sys.exit(main())
