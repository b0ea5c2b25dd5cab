"""tools/results.py: which audio is used for what, which commands a row runs, and the table."""

import json
from pathlib import Path

import pytest
import soundfile

import data
from tools import results

MODELS = {"tiny": "T", "base": "B", "moonshine": "M", "bert": "BERT"}


def test_the_sets_of_the_protocol_share_nothing(loud_lab, tmp_path):
    results.write_manifests(results.lab_sets(loud_lab), tmp_path)
    sets = {path.stem: data.load_utterances(path) for path in tmp_path.glob("*.jsonl")}
    hours = {name: sum(u.seconds for u in some) / 3600 for name, some in sets.items()}
    assert 0.99 < hours["1h"] <= 1
    assert 10 <= 60 * hours["10min"] < 10.5
    assert hours["rest"] > 6

    ids = {name: {u.id for u in some} for name, some in sets.items()}
    assert ids["10min"] < ids["1h"] < ids["5h"]
    assert not ids["1h"] & ids["rest"]
    assert ids["5h"] - ids["1h"] < ids["rest"]
    listed = (results.TOOLS / "unlabelled-2h.txt").read_text().split()
    assert ids["rest"] - ids["5h"] == set(listed)
    assert len(ids["ocean"]) == 2500 and not ids["ocean"] & ids["rest"]

    speakers = {name: {id.split("-")[0] for id in some} for name, some in ids.items()}
    assert len(speakers["1h"]) == len(speakers["5h"]) == 28
    assert not speakers["dev"] & speakers["final"]
    assert not (speakers["dev"] | speakers["final"]) & speakers["5h"]
    without_text = {name for name, some in sets.items() if any(u.text is None for u in some)}
    assert without_text == {"rest", "ocean"}


def test_mistakes_are_one_line(tmp_path, capsys):
    for folder, id in (("train-clean-100/1088/1", "1088-1-0"), ("dev-clean/84/1", "84-1-0")):
        path = tmp_path / "LibriSpeech" / folder
        path.mkdir(parents=True)
        soundfile.write(path / f"{id}.wav", [0.0] * 16_000, 16_000)
        (path / f"{id[:-2]}.trans.txt").write_text(f"{id} A WORD\n")
    lab = ["--lab", str(tmp_path), "--out", str(tmp_path / "out")]
    mistakes = [
        (lab, "no 1088-134315-0049; python -m"),
        (["--rows", "no such"], "choose from no KD; HuBERT"),
    ]
    for argv, message in mistakes:
        assert results.main(argv) == 2
        assert message in capsys.readouterr().err


def test_mistakes_about_the_figure_are_one_line(capsys):
    pytest.importorskip("matplotlib")
    for name, message in (("x.png", "--figure goes with --lab"), ("x.txt", "must end in .png")):
        assert results.main(["--rows", "--figure", name]) == 2
        assert message in capsys.readouterr().err


# ---------------------------------------- the table


@pytest.fixture
def finished(tmp_path):
    """Options that train nothing, of a folder with two scored runs, and a third at work."""
    for seed, wrong in ((0, 3), (1, 1)):
        run = tmp_path / f"finetune/no-kd.{seed}"
        run.mkdir(parents=True)
        for method, inserted in (("transducer", 0), ("ctc", 4)):
            row = {"substitutions": wrong, "deletions": 0, "insertions": inserted, "words": 5}
            (run / f"{method}.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
        (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "dev WER": 90.0}\n')
    at_work = tmp_path / "finetune/no-kd.2"
    at_work.mkdir()
    (at_work / "ctc.jsonl").touch()
    (at_work / "transducer.jsonl").write_text('{"reference": "A", "hypothesis": "B"}\n')
    return ["--lab", "nowhere", "--rows", "--out", str(tmp_path)]


def test_table_and_picture(finished, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "results.png"
    assert results.main([*finished, "--figure", str(picture)]) == 0
    table = capsys.readouterr().out.splitlines()
    # The mean of 60 and 20 %, and that of CTC.
    assert table[2:] == ["| no KD | 40.0 % | 60.0, 20.0 | 120.0 % |"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_scored_is_not_decoded_again(finished, tmp_path):
    runs = results.Results(results.LAB, tmp_path, MODELS)
    scripts = [command[0] for command in runs.commands("no KD", 0)]
    assert scripts == ["finetune_rnnt.py"]
    scripts = [command[0] for command in runs.commands("no KD", 2)]
    assert scripts == ["finetune_rnnt.py", "decode.py", "decode.py"]


# ---------------------------------------- the commands


def value_of(option, command):
    """What stands behind an option"""
    return command[command.index(option) + 1]


def test_transducers_that_teach_are_trained_first(tmp_path):
    runs = results.Results(results.LAB, tmp_path, MODELS)
    trained = []
    for command in runs.commands("+ essence of three", 0):
        if command[0] == "finetune_rnnt.py":
            trained.append(value_of("--out", command))
    teachers = [runs.folder(results.LAB.teacher, seed) for seed in (0, 1, 2)]
    assert trained == [*teachers, runs.folder("+ essence of three", 0)]


def test_the_commands_of_the_demo(tmp_path):
    """Each file or folder exists, or a command before has made it."""
    sets = results.demo_sets()
    results.write_manifests(sets, tmp_path / "audio")
    runs = results.Results(results.DEMO, tmp_path, MODELS)
    commands = list(runs.commands("+ one-best path, BERT, K2D", 0))
    made = {tmp_path / "cache"}  # stage 1 makes it where it is missing
    for command in commands:
        output = value_of("--output" if command[0] == "decode.py" else "--out", command)
        made.update([output, output / "pieces.jsonl"])
        for word in command:
            path = Path(word) if "/" in str(word) else None
            assert path is None or path in made or path.exists(), word
    assert [command[:2] for command in commands].count(["-m", "methods.pseudo_label"]) == 1
    last = [command for command in commands if command[0] == "finetune_rnnt.py"][-1]
    data_of_last = last[last.index("--data") + 1 : last.index("--dev")]
    assert [path.name for path in data_of_last] == ["train.jsonl", "pieces.jsonl"]

    unlabelled = data.load_utterances(tmp_path / "audio/unlabelled.jsonl")
    assert {u.text for u in unlabelled} == {None}
    assert len(data.load_utterances(tmp_path / "audio/final.jsonl")) == 143


def test_the_half_teachers_are_made_before_they_teach(tmp_path):
    runs = results.Results(results.DEMO, tmp_path, MODELS)
    commands = list(runs.commands("low + high, average", 0))
    made = [["-m", "demo.half_teachers", name] for name in ("low", "high")]
    assert commands[:2] == made
    assert commands[2][0] == "pretrain_kd.py"


@pytest.mark.parametrize("protocol", [results.LAB, results.DEMO], ids=["lab", "demo"])
def test_every_row_has_its_student_and_options_that_exist(protocol, tmp_path):
    import finetune_rnnt
    import pretrain_kd
    from methods import pseudo_label

    parsers = {
        "finetune_rnnt.py": finetune_rnnt.parse,
        "pretrain_kd.py": pretrain_kd.parse,
        "methods.pseudo_label": pseudo_label.parse,
    }
    names = {row.name for row in protocol.rows}
    assert {row.student for row in protocol.rows} - {"none"} == set(protocol.students)
    assert protocol.teacher in names
    if protocol is results.LAB:
        assert names > set(results.CURVES)
    runs = results.Results(protocol, tmp_path, MODELS)
    for name in names:
        for script, *words in runs.commands(name, 0):
            if script == "-m":
                script, *words = words
            if script in parsers:
                parsers[script]([str(word) for word in words])
