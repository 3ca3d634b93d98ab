"""The command: results on standard output, sentences on standard error, true exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from export.cli import export_command
from export.repository import Repository
from tests.export.checkpoints import edit_config, write_gpt2
from tests.export.test_repository import snapshot


def _run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(export_command, [str(argument) for argument in arguments], env=environment)


def _refused(result: Result) -> str:
    """The error sentence of a command that failed as it should: one line of error, one of what to do, no traceback."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line[:1].isspace()]
    assert [line.split(": ")[0] for line in lines] == ["error", "hint"]
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.mark.slow
def test_json_from_the_real_command(gpt2: Path, tmp_path: Path) -> None:
    """`python -m export --json` prints one document on stdout, progress on stderr, and the version is there."""
    command = [sys.executable, "-m", "export", str(gpt2), "--name", "chat", "--json"]
    environment = os.environ | {"TRUTHGPT_MODEL_REPOSITORY": str(tmp_path / "repository"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {key: document[key] for key in ("name", "version", "task", "precision")} == {
        "name": "chat",
        "version": "1",
        "task": "text_generation",
        "precision": "fp32",
    }
    assert document["path"] == str(tmp_path / "repository" / "chat" / "1")
    assert (Path(document["path"]) / "manifest.json").is_file()
    assert document["parity"]["max_abs_logit_diff"] <= 1e-4
    assert document["parity"]["greedy_agreement"] == 1.0
    for stage in ("load", "trace", "optimise", "verify", "publish"):
        assert stage in done.stderr
    assert "Warning" not in done.stderr and "torchvision" not in done.stderr


def test_help_shows_examples() -> None:
    """--help says what the command does, with examples and every option."""
    result = _run("--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout and "truthgpt export ./demo/model" in result.stdout
    for option in ("--name", "--precision", "--repository", "--chat-template", "--max-len", "--slots", "--json"):
        assert option in result.stdout


def test_importing_the_command_is_cheap() -> None:
    """`truthgpt --help` must not pay for torch: importing the command leaves it and its company alone."""
    code = (
        "import sys, export.cli; print([m for m in ('torch','transformers','onnx','numpy','rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "missing", ["torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("transformers", "onnxscript"))]
)
def test_without_the_extra(tmp_path: Path, missing: str) -> None:
    """Without the export extra the command names it and says how to install it."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from export.cli import export_command; export_command([{str(tmp_path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "error: truthgpt export needs truthgpt[export]" in done.stderr
    assert "hint: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--precision", "fp7"), "fp7"),
        (("--slots", "0"), "slots"),
        (("--max-len", "3"), "max-len"),
        (("--chat-template", "/nonexistent"), "nonexistent"),
        (("--nonsense",), "nonsense"),
    ],
)
def test_usage_errors_exit_2(gpt2: Path, arguments: tuple[str, ...], word: str) -> None:
    """What the command line cannot mean is a usage error, before torch is imported."""
    result = _run(gpt2, *arguments)
    assert result.exit_code == 2
    assert word in result.stderr


@pytest.mark.parametrize("model", ["./no-such-folder", "/no/such/folder", "a/b/c", "~/nothing-here"])
def test_unknown_folder(tmp_path: Path, model: str) -> None:
    """A path that does not exist is said to be missing, and is not looked for on the Hub."""
    assert "There is no folder" in _refused(_run(model, "--repository", tmp_path / "r"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a causal language model (BertForMaskedLM)"),
        ({"architectures": ["GPT2ForTokenClassification"]}, "not a causal language model"),
        ({"model_type": "t5", "is_encoder_decoder": True, "architectures": None}, "sequence-to-sequence"),
        ({"model_type": "mystery", "architectures": ["MysteryForCausalLM"]}, "mystery"),
        ({"model_type": "mystery", "architectures": None, "auto_map": {"AutoConfig": "x.Y"}}, "code of its own"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised already"),
    ],
)
def test_wrong_kinds_are_refused_by_their_configuration(
    tmp_path: Path, gpt2: Path, changes: dict[str, object], word: str
) -> None:
    """Encoders, sequence-to-sequence, unknown and quantised models are refused without weights being there at all."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    edit_config(folder, **changes)
    assert word in _refused(_run(folder, "--repository", tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    """Pickles, missing shards, truncated weights, missing tensors and bad JSON each get a sentence of their own."""
    repository = tmp_path / "r"

    def damaged(name: str) -> Path:
        return write_gpt2(tmp_path / name)

    pickled = damaged("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pytorch_model.bin" in _refused(_run(pickled, "--repository", repository))

    sharded = damaged("sharded")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    assert "model-00001.safetensors" in _refused(_run(sharded, "--repository", repository))

    cut = damaged("cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert "model.safetensors is damaged: it has" in _refused(_run(cut, "--repository", repository))
    weights.write_bytes(b"\x05")
    assert "damaged" in _refused(_run(cut, "--repository", repository))

    deeper = damaged("deeper")
    edit_config(deeper, n_layer=3)
    assert "lacks the weight" in _refused(_run(deeper, "--repository", repository))

    garbled = damaged("garbled")
    (garbled / "config.json").write_text("{")
    assert "config.json cannot be read" in _refused(_run(garbled, "--repository", repository))
    (garbled / "config.json").unlink()
    assert "has no config.json" in _refused(_run(garbled, "--repository", repository))
    assert not repository.exists() or list(repository.iterdir()) == []


def test_bad_options_for_a_model(tmp_path: Path, gpt2: Path) -> None:
    """A length beyond the model's positions, a revision of a folder and a bad name are refused with the limit."""
    assert "128 positions" in _refused(_run(gpt2, "--max-len", 129, "--repository", tmp_path / "r"))
    assert "--revision" in _refused(_run(gpt2, "--revision", "main", "--repository", tmp_path / "r"))
    assert "../evil" in _refused(_run(gpt2, "--name", "../evil", "--repository", tmp_path / "r"))
    assert not (tmp_path / "r").exists()


_UNFIT = [
    (("--precision", "int8", "--device", "cuda"), None, "int8 runs on a CPU"),
    (("--precision", "int4", "--device", "cuda"), None, "int4 runs on a CPU"),
    (("--precision", "fp32", "--device", "cuda", "--task", "text_generation"), None, "fp32 runs on a CPU"),
    (("--precision", "int4", "--task", "embeddings"), None, "Encoders have no int4"),
    (("--slots", "4", "--task", "embeddings"), None, "--slots is for text generation"),
    (("--precision", "fp32", "--device", "cuda"), "gpt2", "fp32 runs on a CPU"),
]


@pytest.mark.parametrize(("arguments", "config", "word"), _UNFIT)
def test_what_cannot_be_is_said_before_the_checkpoint_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], config: str | None, word: str
) -> None:
    """Nothing is asked of the Hub where the options alone are wrong, and its config.json only where they may be."""
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": config}))

    def fetch(model: str, revision: str | None, check: Callable[[Path, str], object], *_: object, **__: object) -> None:
        assert config is not None
        check(tmp_path, "0" * 40)
        pytest.fail("weights would be fetched")

    monkeypatch.setattr("export.hub.fetch", fetch)
    assert word in _refused(_run("org/model", *arguments, "--repository", tmp_path / "r"))


def test_a_repository_that_cannot_be_written(tmp_path: Path, gpt2: Path) -> None:
    """A file in the way and a file system that takes no folders are refused, with a sentence about the repository."""
    (tmp_path / "file").write_text("")
    assert "in the way" in _refused(_run(gpt2, "--repository", tmp_path / "file"))
    assert "in the way" in _refused(_run(gpt2, "--repository", tmp_path / "file" / "below"))
    assert "repository /proc/truthgpt cannot be" in _refused(_run(gpt2, "--repository", "/proc/truthgpt"))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    """--debug adds the traceback to the same sentence and exit code."""
    result = _run("./no-such-folder", "--debug", "--repository", tmp_path / "r")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "error: There is no folder" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(gpt2: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C and SIGTERM in the middle of the work leave no staging folder and say so by the exit code."""
    command = [sys.executable, "-m", "export", str(gpt2), "--repository", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stderr is not None
        seen = ""
        while "trace" not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        time.sleep(0.3)
        process.send_signal(number)
        rest = process.communicate(timeout=60)
    assert process.returncode == code, rest
    assert "Traceback" not in rest[1]
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import os, signal, sys
from pathlib import Path
import onnxscript.function_libs.torch_lib.ops  # imported once, before the children
from export.pipeline import ExportOptions, export_model
checkpoint, root, stages = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
children = {}
for where in stages:
    child = os.fork()
    if child == 0:
        def progress(stage, state):
            if where in (stage, state):
                os.kill(os.getpid(), signal.SIGKILL)
        export_model(ExportOptions(checkpoint, root, name=where, precision="int8"), progress)
        os._exit(0)
    children[child] = where
for child, where in children.items():
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (where, status)
    print(where)
"""


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_killed_at_every_stage(gpt2: Path, tmp_path: Path) -> None:
    """kill -9 at each stage of a real export leaves the repository as it was; the next export removes what it left."""
    (tmp_path / "other" / "1").mkdir(parents=True)
    (tmp_path / "other" / "config.pbtxt").write_text("kept")
    before = snapshot(tmp_path)
    stages = ["load", "trace", "quantise", "verify", "renaming"]
    command = [sys.executable, "-c", _KILLED, str(gpt2), str(tmp_path), *stages]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == stages
    assert snapshot(tmp_path) == before
    left = {path.name for path in (tmp_path / ".staging").iterdir() if path.is_dir()}
    assert {name.split("-")[0] for name in left} == set(stages) - {"load"}  # nothing is staged while loading begins
    assert list((tmp_path / ".staging").glob("renaming-*/renaming/1/manifest.json"))
    with Repository(tmp_path).staging("renaming") as staging:
        assert [path for path in (tmp_path / ".staging").iterdir() if path.is_dir()] == [staging.root]
    assert snapshot(tmp_path) == before
