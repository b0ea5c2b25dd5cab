"""The script of the results table: who hears what, and what the table says of files it did not write."""
import json

import pytest
import soundfile

import data
import results


def test_the_sets_of_the_protocol_share_nothing(loud_lab, tmp_path):
    results.write_manifests(loud_lab, tmp_path)
    sets = {path.stem: data.load_utterances(path) for path in tmp_path.glob("*.jsonl")}
    hours = {name: sum(u.seconds for u in some) / 3600 for name, some in sets.items()}
    assert 0.99 < hours["1h"] <= 1 and hours["rest"] > 6 and 10 <= 60 * hours["10min"] < 10.5
    ids = {name: {u.id for u in some} for name, some in sets.items()}
    speakers = {name: {id.split("-")[0] for id in some} for name, some in ids.items()}
    assert ids["10min"] < ids["1h"] < ids["5h"] and not ids["1h"] & ids["rest"] and ids["5h"] - ids["1h"] < ids["rest"]
    assert len(speakers["1h"]) == len(speakers["5h"]) == 28
    assert not speakers["dev"] & speakers["final"] and not (speakers["dev"] | speakers["final"]) & speakers["5h"]
    assert {name for name, some in sets.items() if any(u.text is None for u in some)} == {"rest", "part"}
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


def test_students_that_teach_are_trained_first(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(results.Results, "call", lambda self, script, *options: calls.append((script, options[-1])))
    monkeypatch.setattr(results, "write_manifests", lambda *_: None)
    results.main(["--lab", "x", "--out", str(tmp_path), "--rows", "+ essence of three"])
    trained = [out for script, out in calls if script == "finetune_rnnt.py"]
    first = results.Results(results.parse(["--lab", "x", "--out", str(tmp_path)])).names
    assert trained[:3] == [first[f"seed{seed}"] for seed in (0, 1, 2)] and len(trained) == 4


def test_every_row_has_its_student_and_its_audio():
    students = {student for student, *_ in results.ROWS.values()}
    assert students - {"none"} == set(results.STUDENTS) and {results.TEACHER, *results.MAIN} <= set(results.ROWS)
