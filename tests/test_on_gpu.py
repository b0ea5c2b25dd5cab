"""The script for a machine with a GPU runs here too: everything, in tiny sizes, on a CPU."""

import json
import os
import subprocess
import sys

import pytest

import data
import on_gpu
from conftest import DEMO, ROOT


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    assert on_gpu.main(["--pack", str(DEMO / "corpus/dev/145"), str(folder)]) == 0
    return folder


def run(out, *options):
    """-> exit code, rows of results.jsonl, table.md"""
    script = [sys.executable, ROOT / "tests/on_gpu.py", "--device", "cpu", "--quick"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*script, "--out", out, *options], env=environment)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return done.returncode, rows, (out / "table.md").read_text()


def test_packed_audio_is_small_and_complete(packed):
    utterances = data.load_utterances(DEMO / "corpus/dev/145")
    again = data.load_utterances(packed / "manifest.jsonl", transcribed=True)
    assert [u.text for u in again] == [u.text for u in utterances]
    for u, original in zip(again, utterances):
        assert len(data.load_audio(u.path)) == len(data.load_audio(original.path))
    size = sum(path.stat().st_size for path in packed.iterdir())
    assert size < 4_000 * sum(u.seconds for u in utterances)


def test_everything_runs_on_a_cpu(packed, tmp_path):
    code, rows, table = run(tmp_path, "--audio", packed)
    parts = dict.fromkeys(row["part"] for row in rows)
    expected = [*on_gpu.TESTS, *on_gpu.YARDSTICKS, on_gpu.demo, on_gpu.real_audio]
    assert list(parts) == [part.__name__ for part in expected]
    assert code == 0, table
    assert "failed" not in table and "left out" not in table
    assert len(table.splitlines()) == len(rows) + 2


def test_a_part_that_takes_too_long_is_ended_and_named(tmp_path):
    code, rows, table = run(tmp_path, "--minutes", "0.02")
    reasons = [row["note"] for row in rows if row["value"] == "failed"]
    assert code == 1 and "**failed**" in table
    assert any("ended at its limit" in reason for reason in reasons)
    assert "no time was left for it" in reasons
