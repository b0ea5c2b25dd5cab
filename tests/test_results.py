"""The script of the results table: who hears what, and what the table says of files it did not write."""
import json

import pytest
import soundfile

import data
import results


def test_the_sets_of_the_protocol_share_nothing(loud_lab, tmp_path):
    results.write_manifests(results.lab_sets(loud_lab), tmp_path)
    sets = {path.stem: data.load_utterances(path) for path in tmp_path.glob("*.jsonl")}
    hours = {name: sum(u.seconds for u in some) / 3600 for name, some in sets.items()}
    assert 0.99 < hours["1h"] <= 1 and hours["rest"] > 6 and 10 <= 60 * hours["10min"] < 10.5
    ids = {name: {u.id for u in some} for name, some in sets.items()}
    speakers = {name: {id.split("-")[0] for id in some} for name, some in ids.items()}
    assert ids["10min"] < ids["1h"] < ids["5h"] and not ids["1h"] & ids["rest"] and ids["5h"] - ids["1h"] < ids["rest"]
    assert len(speakers["1h"]) == len(speakers["5h"]) == 28
    assert not speakers["dev"] & speakers["final"] and not (speakers["dev"] | speakers["final"]) & speakers["5h"]
    assert {name for name, some in sets.items() if any(u.text is None for u in some)} == {"rest", "part", "ocean"}
    assert len(ids["ocean"]) == 2500 and not ids["ocean"] & ids["rest"]
    assert ids["part"] < ids["rest"] and not ids["part"] & ids["5h"]


def test_speech_that_is_not_there_is_one_line(tmp_path, capsys):
    for folder, id in (("train-clean-100/1088/134315", "1088-134315-0000"), ("dev-clean/84/1", "84-1-0000")):
        (tmp_path / "LibriSpeech" / folder).mkdir(parents=True)
        soundfile.write(tmp_path / f"LibriSpeech/{folder}/{id}.wav", [0.0] * 16_000, 16_000)
        (tmp_path / f"LibriSpeech/{folder}/{id[:-5]}.trans.txt").write_text(f"{id} A WORD\n")
    assert results.main(["--lab", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no '1088-134315-0049'; python data.py download" in capsys.readouterr().err


@pytest.fixture
def what_is_there(tmp_path):
    """Options that train nothing, of a folder with two scored runs and one that decode.py has just begun."""
    for seed, wrong in ((0, 3), (1, 1)):
        for method, more in (("transducer", 0), ("ctc", 4)):
            run = tmp_path / f"finetune/no-kd.{seed}"
            run.mkdir(parents=True, exist_ok=True)
            row = {"substitutions": wrong, "deletions": 0, "insertions": more, "words": 5}
            (run / f"{method}.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
        (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "dev WER": 90.0}\n')
    (tmp_path / "finetune/no-kd.2").mkdir()
    (tmp_path / "finetune/no-kd.2/ctc.jsonl").touch()
    return ["--lab", "nowhere", "--rows", "--out", str(tmp_path)]


def test_table(what_is_there, capsys):
    assert results.main(what_is_there) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2:] == ["| no KD | 40.0 % | 60.0, 20.0 | 120.0 % |"]                 # mean of 60 and 20 %, CTC of both


def test_picture(what_is_there, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "results.png"
    assert results.main([*what_is_there, "--figure", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def calls(monkeypatch):
    """What is called instead of being trained: (script, its options as text)."""
    calls = []
    monkeypatch.setattr(results.Results, "call",
                        lambda self, script, *options: calls.append((script, [str(o) for o in options])))
    return calls


def test_students_that_teach_are_trained_first(tmp_path, monkeypatch, calls):
    monkeypatch.setattr(results, "lab_sets", lambda _: {})
    results.main(["--lab", "x", "--out", str(tmp_path), "--rows", "+ essence of three"])
    trained = [options[-1] for script, options in calls if script == "finetune_rnnt.py"]
    first = results.Results(results.parse(["--lab", "x", "--out", str(tmp_path)])).names
    assert trained[:3] == [str(first[f"seed{seed}"]) for seed in (0, 1, 2)] and len(trained) == 4


def test_rows_of_the_demo(tmp_path, calls, capsys):
    assert results.main(["--out", str(tmp_path), "--rows", "+ one-best path, BERT, K2D", "--bert", "B"]) == 0
    for script, options in calls:  # files and folders that exist, or that a call before has made
        for option in filter(lambda option: "/" in option and not option.startswith(str(tmp_path)), options):
            assert results.Path(option).exists(), (script, option)
    assert {u.text is None for u in data.load_utterances(tmp_path / "audio/unlabelled.jsonl")} == {True}
    assert len(data.load_utterances(tmp_path / "audio/final.jsonl")) == 143
    assert [script for script, _ in calls].count("pseudo_label.py") == 1
    assert results.main(["--rows", "no such"]) == 2 and "choose from no KD; two" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", [results.LAB, results.DEMO])
def test_every_row_has_its_student_and_its_audio(protocol):
    students = {student for student, *_ in protocol.rows.values()}
    assert students - {"none"} == set(protocol.students) and protocol.teacher in protocol.rows
    assert protocol is results.DEMO or set(results.MAIN) <= set(protocol.rows)
