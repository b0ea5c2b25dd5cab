"""tools/plot.py: which quantity is drawn where, of runs at work too, and what it refuses."""

import json
import sys

import pytest

from tools import plot


@pytest.fixture
def runs(tmp_path):
    """A run of each stage; the second is writing a row."""
    pretrain = [
        {"step": 20, "lr": 1e-3, "loss": 1.7, "hubert": 0.8, "whisper": 0.9},
        {"step": 40, "lr": 1e-3, "loss": 1.5, "hubert": 0.7, "whisper": 0.8},
        {"step": 40, "dev L1 hubert": 0.6, "dev L1 whisper": 0.7},
    ]
    finetune = [
        {"step": 20, "loss": 60.0, "transducer": 40.0, "ctc": 66.0},
        {"step": 30, "dev WER": 130.0, "dev WER of CTC": 140.0},
        {"step": 60, "dev WER": 50.0, "dev WER of CTC": 90.0},
    ]
    for name, rows in (("pretrain", pretrain), ("finetune", finetune)):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "log.jsonl").write_text(lines)
    with open(tmp_path / "finetune/log.jsonl", "a") as file:
        file.write('{"step": 80, "lo')
    return [str(tmp_path / "pretrain"), str(tmp_path / "finetune")]


def test_each_quantity_has_its_panel(runs):
    stage_1, stage_2 = [plot.find_curves(plot.read_log(run)) for run in runs]
    assert stage_1["training loss, stage 1"] == {"loss": ([20, 40], [1.7, 1.5])}
    assert stage_1["development L1"]["dev L1 whisper"] == ([40], [0.7])
    assert stage_2["training loss, stage 2"] == {"loss": ([20], [60.0])}
    assert stage_2["development WER"]["dev WER"] == ([30, 60], [130.0, 50.0])
    assert set(stage_1) | set(stage_2) == set(plot.PANELS)


def test_panels_have_units_and_wer_ends_at_100(runs):
    pytest.importorskip("matplotlib")
    curves = {run: plot.find_curves(plot.read_log(run)) for run in runs}
    _, [panel] = plot.new_figure(1)
    plot.draw(panel, "development WER", curves)
    assert panel.get_ylim() == (0, 100)
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("updates", "WER (%)")
    solid, dashed = panel.get_lines()
    assert solid.get_color() == dashed.get_color()  # one run
    assert solid.get_linestyle() != dashed.get_linestyle()
    assert dashed.get_label() == f"{runs[1]}: WER of CTC"


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_a_picture_of_runs_of_both_stages(runs, suffix, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"curves{suffix}"
    assert plot.main([*runs, "--out", str(out)]) == 0
    assert out.stat().st_size > 5000
    assert capsys.readouterr().out.strip() == str(out)


def test_mistakes_are_one_line_before_anything_else(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "log.jsonl").touch()
    mistakes = [
        (["no-such-run", "--out", "curves.txt"], "must end in .png, .pdf, .svg"),
        ([*runs, str(tmp_path)], "give the --out of a run"),
        ([str(empty)], "nothing is logged yet"),
    ]
    for argv, message in mistakes:
        assert plot.main(argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_missing_matplotlib_is_one_line(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert plot.main(["no-such-run"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
