"""The GPU script: it runs from end to end without a GPU, judges as GPU.md says, and fails with a reason."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.measure import bars
from benchmarks.gpu.parity import Parity, drift, first_difference

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.sh"


def run(*arguments: object, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = ["bash", str(SCRIPT), *(str(argument) for argument in arguments)]
    return subprocess.run(argv, env=os.environ | environment, capture_output=True, text=True, timeout=timeout)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It failed, said why in its last line, and printed no result."""
    assert done.returncode == 1 and done.stdout == "", done
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), done.stderr


def write_wheel(folder: Path) -> Path:
    """The smallest wheel there is."""
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return path


def in_parts(folder: Path) -> bytes:
    """A folder that holds a wheel in two parts, and its checksum; the wheel's bytes."""
    folder.mkdir()
    path = write_wheel(folder)
    data = path.read_bytes()
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
    path.with_name(f"{path.name}.part-00").write_bytes(data[:100])
    path.with_name(f"{path.name}.part-01").write_bytes(data[100:])
    path.unlink()
    return data


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_no_result(tmp_path: Path) -> None:
    """A machine without nvidia-smi is told so before anything is installed."""
    refused(run("--work", tmp_path / "work"), "no NVIDIA GPU", "--cpu")
    assert not (tmp_path / "work").exists()


def test_wheels_that_are_missing_or_damaged(tmp_path: Path) -> None:
    """A folder that is not there, one without wheels, and a part that was lost on the way are errors."""
    common = ("--cpu", "--python", sys.executable, "--work", tmp_path / "work", "--wheels")
    refused(run(*common, tmp_path / "none"), "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(run(*common, tmp_path / "empty"), "has no wheels")
    in_parts(tmp_path / "parts")
    (tmp_path / "parts" / "tiny-1.0-py3-none-any.whl.part-01").unlink()
    refused(run(*common, tmp_path / "parts"), "damaged or missing")


@pytest.mark.slow
def test_parts_are_joined_and_installed_without_a_registry(tmp_path: Path) -> None:
    """The environment has what the folder has; what it lacks is named."""
    data = in_parts(tmp_path / "parts")
    argv = ("--cpu", "--python", sys.executable, "--work", tmp_path / "work", "--wheels", tmp_path / "parts")
    refused(run(*argv, PIP_INDEX_URL="http://127.0.0.1:9/"), "numpy cannot be imported")
    assert (tmp_path / "work" / "wheels" / "tiny-1.0-py3-none-any.whl").read_bytes() == data
    assert list((tmp_path / "work" / "venv").rglob("tiny.py"))


@pytest.mark.slow
def test_a_run_that_takes_too_long_gives_up(tmp_path: Path) -> None:
    """When its time is up it says so and leaves no server behind."""
    argv = ("--cpu", "--ready", "--python", sys.executable, "--work", tmp_path, "--", "--seconds", "10")
    refused(run(*argv, timeout=110, OMP_NUM_THREADS="1"), "not finished after 10 s")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_dry_run_on_the_processor(tmp_path: Path) -> None:
    """One JSON document on standard output: export, real Triton, parity and both engines at each width."""
    argv = ("--cpu", "--ready", "--python", sys.executable, "--work", tmp_path, "--", "--clients", "1,2")
    done = run(*argv, timeout=390, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ok"] and result["device"] == "cpu" and result["left_out"] == {}
    assert result["parity"]["greedy_agreement"] == 1.0 and result["parity"]["drift"] < 1e-5
    assert {(row["engine"], row["clients"]) for row in result["rows"]} == {
        (name, count) for name in ("transformers", "truthgpt") for count in (1, 2)
    }
    assert "bars" not in result  # a processor's figures are no result


def test_agreement_is_counted_to_the_first_other_token() -> None:
    """Tokens count as long as our text begins with them; what comes after a difference does not."""

    def decode(ids: list[int]) -> str:
        return "".join(f" w{i}" for i in ids)

    assert first_difference(" w1 w2 w3", [1, 2, 3], decode) == 3
    assert first_difference(" w1 w2 w3", [1, 9, 3], decode) == 1
    assert first_difference("", [1, 2], decode) == 0


def test_drift_is_relative_and_nan_is_no_small_number() -> None:
    """An error of a tenth of the spread is 0.1; a row that is not finite is far off, and still JSON."""
    expected = [np.asarray([-1, 1], np.float32)]
    assert drift([np.asarray([-1.1, 1.1], np.float32)], expected) == pytest.approx(0.1)
    assert drift([np.asarray([np.nan, 1], np.float32)], expected) == 1e9
    parity = Parity(agreed=3, tokens=4, ours=expected, expected=expected, transformers=expected)
    assert parity.document() == {
        "greedy_agreement": 0.75,
        "gap": 0.0,
        "drift": 0.0,
        "drift_transformers": 0.0,
        "rows": 1,
    }


def test_bars_take_the_better_of_the_peers() -> None:
    """B6 is met against whichever way of transformers is faster, and against twice the memory's floor."""

    def row(engine: str, clients: int, rate: float) -> dict[str, object]:
        return {"engine": engine, "clients": clients, "tokens_per_s": rate, "ms_per_token": 1000 * clients / rate}

    rows = [row("transformers", 1, 100), row("transformers-static", 1, 400), row("truthgpt", 1, 800)]
    rows += [row("transformers", 16, 1000), row("truthgpt", 16, 2900)]
    found = bars(rows, floor_ms=0.5)
    assert found["B6 C=1"] == {"ratio": 2.0, "at_least": 1.5, "met": True}
    assert found["B6 C=16"] == {"ratio": 2.9, "at_least": 3.0, "met": False}
    assert found["B6 floor"] == {"times": 2.5, "at_most": 2.0, "met": False}
