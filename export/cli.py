"""``truthgpt export``: the command only. Importing this module is cheap; torch comes in when the command runs."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from export.errors import ExportError

if TYPE_CHECKING:
    from export.pipeline import Exported, ExportOptions

# What the extra brings; anything else that cannot be imported is a fault of ours.
_NEEDED = {"torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tokenizers", "jinja2", "huggingface_hub"}
_NEEDED |= {"numpy", "rich"}

_EPILOG = """\b
Examples:
  truthgpt export ./demo/model --name demo
  truthgpt export microsoft/DialoGPT-small --precision int8
  truthgpt export ./my-llama --precision int4 --calibrate dialogues.txt
  truthgpt export ./my-llama --max-len 4096 --slots 8 --json
  truthgpt export ./my-gpt2 --chat-template chat.jinja
  truthgpt export ./my-llama --target tensorrt
  truthgpt export sentence-transformers/all-MiniLM-L6-v2
"""


@click.command("export", epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option(
    "--task",
    type=click.Choice(["auto", "text_generation", "sentiment_analysis", "embeddings"]),
    default="auto",
    show_default=True,
    help="What the model is served for; auto: what the checkpoint is.",
)
@click.option("--name", help="Name in the repository.  [default: the last part of MODEL]")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]),
    help="Number format of the weights (docs/precisions.md).  [default: fp32; fp16 for tensorrt]",
)
@click.option(
    "--target",
    type=click.Choice(["onnx", "tensorrt"]),
    default="onnx",
    show_default=True,
    help="What runs the graph: ONNX Runtime, or TensorRT on an NVIDIA GPU.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="What the entry is for; auto: an NVIDIA GPU where the server has one that runs the precision.",
)
@click.option(
    "--calibrate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Text like the model will see, in UTF-8: int8 and int4 round to suit it.",
)
@click.option(
    "--allow-drift",
    type=click.FloatRange(0, 1, min_open=True),
    help="Publish int4 although it moves the logits by up to this share of their spread.  [default: 0.1]",
)
@click.option(
    "--batch-invariant",
    is_flag=True,
    help="int8 only: scale each row by itself, so that no answer depends on its company; about a fifth slower.",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "int8"]),
    default="auto",
    show_default=True,
    help="int8, with --precision int8 or int4: slots of a quarter of the memory, faster over long contexts.",
)
@click.option(
    "--repository",
    type=click.Path(path_type=Path, file_okay=True),
    envvar="TRUTHGPT_MODEL_REPOSITORY",
    default=Path("model_repository"),
    show_default=True,
    show_envvar=True,
    help="Triton model repository to publish into.",
)
@click.option(
    "--chat-template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Jinja file to use instead of the checkpoint's own chat template.",
)
@click.option(
    "--max-len",
    type=click.IntRange(min=8),
    help="Tokens a sequence may hold.  [default: the model's positions, at most 2048; an encoder's max_seq_length]",
)
@click.option("--slots", type=click.IntRange(1, 1024), default=16, show_default=True, help="Sequences decoded at once.")
@click.option(
    "--prefill-chunk",
    type=click.IntRange(1, 8192),
    help="Prompt tokens processed in one step.  [default: 512; with --target tensorrt 128]",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1, 100_000),
    default=256,
    show_default=True,
    help="Requests that may wait for a slot or, at an encoder, for a batch.",
)
@click.option(
    "--serve-with",
    type=click.Choice(["backend", "native"]),
    default="backend",
    show_default=True,
    help="Encoders only. native: Triton's own backend runs and batches the graph, ours only tokenises.",
)
@click.option(
    "--max-tokens-per-batch",
    type=click.IntRange(64, 1_000_000),
    default=16_384,
    show_default=True,
    help="Encoders only: tokens of one run, padding included.",
)
@click.option("--revision", help="Commit, branch or tag, for a model from the Hub.")
@click.option("--allow-pickle", is_flag=True, help="Accept pickled weights, opened by torch's restricted unpickler.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the checkpoint brings.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' own messages.")
@click.pass_context
def export_command(
    context: click.Context,
    model: str,
    task: str,
    name: str | None,
    precision: str | None,
    target: str,
    device: str,
    calibrate: Path | None,
    allow_drift: float | None,
    batch_invariant: bool,
    kv_cache_dtype: str,
    repository: Path,
    chat_template: Path | None,
    max_len: int | None,
    slots: int,
    prefill_chunk: int | None,
    max_queue: int,
    serve_with: str,
    max_tokens_per_batch: int,
    revision: str | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Export MODEL into the model repository, verified against transformers.

    MODEL is a local folder in the Hugging Face format or an id on the Hub. The next version is published only
    if its logits and greedy tokens (an encoder's embeddings or logits) are those of transformers; otherwise nothing is
    written.
    """
    signals = _Signals()
    with signals.caught(), _reported(debug):
        if not debug:
            _quiet_libraries()
        try:
            from export.encoder_config import EncoderServing
            from export.manifest import Serving
            from export.pipeline import ExportOptions
            from export.source import Trust
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in _NEEDED:
                raise
            raise ExportError(
                f"truthgpt export needs truthgpt[export] ({error.name} is not installed).",
                "Run: pip install 'truthgpt[export]'",
            ) from error
        options = ExportOptions(
            model=model,
            repository=repository,
            name=name,
            precision=precision or ("fp16" if target == "tensorrt" else "fp32"),
            target=target,
            chat_template=chat_template,
            max_len=max_len,
            revision=revision,
            device=device,
            calibrate=calibrate,
            allow_drift=allow_drift,
            batch_invariant=batch_invariant,
            int8_cache=kv_cache_dtype == "int8",
            trust=Trust(pickle=allow_pickle, code=trust_remote_code),
            serving=Serving(slots, prefill_chunk or (128 if target == "tensorrt" else 512), max_queue),
            given=tuple(key for key in ("slots", "prefill_chunk", "max_tokens_per_batch") if _given(context, key)),
            task=task,
            serve_with=serve_with,
            encoder_serving=EncoderServing(max_queue, max_tokens_per_batch),
        )
        exported = _run(options, signals, debug)
        if as_json:
            click.echo(json.dumps(exported.document()))
        else:
            click.echo(_summary(exported))


def _given(context: click.Context, key: str) -> bool:
    return context.get_parameter_source(key) is not click.core.ParameterSource.DEFAULT


def _run(options: ExportOptions, signals: _Signals, debug: bool) -> Exported:
    import transformers

    from export.pipeline import STAGES, export_model
    from export.progress import ProgressDisplay

    if not debug:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    with ProgressDisplay(STAGES) as display:

        def progress(stage: str, state: float | str) -> None:
            signals.check()
            display(stage, state)

        return export_model(options, progress)


def _summary(exported: Exported) -> str:
    parity = exported.parity
    published = f"{exported.name} version {exported.version} ({exported.precision}) published in {exported.path}"
    measured = f"measured: {parity['of']}\n" if "of" in parity else ""
    if exported.task != "text_generation":
        figures = (
            f"{measured}{exported.task}: max |difference| {parity['max_abs_diff']:.1e}, "
            f"relative {parity['rms_over_std']:.1e}, batch effect {parity['batch_effect']:.1e}"
        )
        return "\n".join([published, figures, *exported.notes])
    lines = [
        published,
        f"{measured}max |logit difference| {parity['max_abs_logit_diff']:.1e}, relative {parity['rms_over_std']:.1e}, "
        f"greedy agreement {parity['greedy_agreement']:.1%}, batch effect {parity['batch_effect']:.1e}",
    ]
    if exported.precision == "int4":
        lines.append(f"int4 moves the logits by {parity['rms_over_std']:.1%} of their spread")
    if exported.fp32_layers:
        lines.append(f"kept in fp32, because {exported.precision} overflows there: {', '.join(exported.fp32_layers)}")
    return "\n".join([*lines, *exported.notes])


@contextmanager
def _reported(debug: bool) -> Iterator[None]:
    """Every failure as ``error:`` and ``hint:`` on standard error, with its exit code; tracebacks only when asked."""
    try:
        yield
    except ExportError as error:
        _fail(str(error), error.hint, debug)
    except MemoryError:
        _fail(
            "There is not enough memory to export this model.",
            "Give --max-len, or use a machine with more memory.",
            debug,
        )
    except click.exceptions.ClickException:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        _fail(f"{type(error).__name__}: {lines[0] if lines else ''}", "Run again with --debug for the details.", debug)


def _fail(message: str, hint: str | None, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    click.echo(f"error: {' '.join(message.split())}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    sys.exit(1)


class _Interrupted(BaseException):
    """A signal asked the export to stop."""


class _Signals:
    """SIGINT and SIGTERM unwind the export, so that its staging folder is removed.

    An exception raised inside a finalizer (tracing runs many) is printed and forgotten by Python; so the signal is
    remembered here, and raised again at the next progress report, of which one comes right before publishing.
    """

    def __init__(self) -> None:
        self._number = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may install handlers
            return
        former: list[Any] = [signal.signal(number, self._handle) for number in numbers]
        report = sys.unraisablehook
        sys.unraisablehook = lambda lost: None if lost.exc_type is _Interrupted else report(lost)
        try:
            yield
        except _Interrupted:
            click.echo("error: interrupted.", err=True)
            sys.exit(128 + self._number)
        finally:
            sys.unraisablehook = report
            for number, handler in zip(numbers, former, strict=True):
                signal.signal(number, handler)

    def check(self) -> None:
        if self._number:
            raise _Interrupted

    def _handle(self, number: int, _: FrameType | None) -> NoReturn:
        self._number = number
        raise _Interrupted


def _quiet_libraries() -> None:
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
