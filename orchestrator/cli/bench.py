"""`truthgpt bench`: measure an endpoint that generates text or encodes it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.base import INTERRUPTED, Command, CommandError, json_option, print_json

if TYPE_CHECKING:
    from orchestrator.bench.figures import Run
    from orchestrator.bench.plan import Load, Prompt, Target, Task

_EPILOG = """\b
Examples:
  truthgpt bench --url http://127.0.0.1:8080 --model demo --concurrency 1,8,16
  truthgpt bench --url http://127.0.0.1:8080 --model demo --rate 2,4,8 --duration 30 --goodput ttft:0.5,itl:0.05
  truthgpt bench --url http://127.0.0.1:8000 --protocol kserve-http --model demo --requests 200 --json
  truthgpt bench --url 127.0.0.1:8081 --protocol kserve-grpc --model demo --output after.json --html report.html
  truthgpt bench --compare before.json after.json
"""
MAX_KEY_LETTERS = 4096
_HTML_NEEDS = "--html needs matplotlib, which is not installed"


class _Numbers(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer versions of click
    """Numbers with commas between them."""

    name = "N,N,…"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(dict.fromkeys(self._kind(part) for part in str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r} is not numbers with commas between them", param, ctx)
        if len(found) > 100:
            self.fail("more than 100 values", param, ctx)
        return found


@click.command("bench", cls=Command, epilog=_EPILOG, short_help="Measure any OpenAI or KServe v2 endpoint.")
@click.option("--url", metavar="URL", help="The endpoint: http(s)://HOST[:PORT], for kserve-grpc HOST:PORT.")
@click.option("--protocol", type=click.Choice(["openai", "kserve-http", "kserve-grpc"]), default="openai",
              show_default=True, help="What it speaks.")  # fmt: skip
@click.option("--model", metavar="NAME", help="The model to ask.")
@click.option("--concurrency", type=_Numbers(int), metavar="N,N,…",
              help="Clients that ask again once they are answered; a run for each number.  [default: 1]")  # fmt: skip
@click.option("--rate", type=_Numbers(float), metavar="X,X,…",
              help="Instead: requests a second, at random times; a run for each number.")  # fmt: skip
@click.option("--requests", type=int, metavar="N", help="Requests of a run.  [default: 10 a client, at least 50]")
@click.option("--duration", "duration_s", type=float, metavar="SECONDS", help="Begin no more requests after this.")
@click.option(
    "--warmup", type=int, metavar="N", help="Requests before a run that do not count.  [default: a client each]"
)
@click.option("--prompt-tokens", type=int, default=128, show_default=True, metavar="N", help="Tokens of a prompt.")
@click.option("--output-tokens", type=int, default=64, show_default=True, metavar="N", help="Most tokens of an answer.")
@click.option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE",
              help='Prompts to send: JSONL of texts, {"prompt"} or {"messages"}.')  # fmt: skip
@click.option("--endpoint", type=click.Choice(["chat", "completions", "embeddings"]),
              help="Of openai.  [default: chat, or embeddings with --task encode]")  # fmt: skip
@click.option("--task", type=click.Choice(["generate", "encode"]), help="What the model does.  [default: generate]")
@click.option("--stream/--no-stream", default=True, show_default=True, help="Ask for answers piece by piece.")
@click.option("--goodput", metavar="GOALS", help="Count requests that meet all of these: ttft:S,itl:S,latency:S.")
@click.option("--timeout", "timeout_s", type=float, default=120.0, show_default=True, metavar="SECONDS",
              help="Most time of a request.")  # fmt: skip
@click.option("--temperature", type=float, default=0.0, show_default=True, metavar="X", help="Sampling temperature.")
@click.option("--ignore-eos", is_flag=True, help="Ask for answers of full length, where the server can.")
@click.option("--extra-body", metavar="JSON", help="Further fields of each request; null takes one away.")
@click.option("--header", "headers", multiple=True, metavar="NAME: VALUE", help="A header to send; may be repeated.")
@click.option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE",
              help="File with the API key.  [default: TRUTHGPT_API_KEY, else OPENAI_API_KEY]")  # fmt: skip
@click.option("--ca-file", type=click.Path(path_type=Path), metavar="FILE", help="Certificates to trust, PEM.")
@click.option("--allow-cache", is_flag=True, help="Let servers answer from a cache.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of prompts and arrivals.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the JSON document there, too.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a report with plots there.")
@click.option("--compare", nargs=2, type=click.Path(path_type=Path), metavar="A B",
              help="Measure nothing: compare two files that --output has written.")  # fmt: skip
@json_option
def bench(
    url: str | None, model: str | None, compare: tuple[Path, Path] | None, html: Path | None, output: Path | None,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Measure an endpoint: time to first token, between tokens and in all, tokens and requests a second, errors.

    Each prompt is another one, made as long as --prompt-tokens says by the server's own count, and servers are asked
    not to answer from a cache. First tokens are stamped where they come out of the socket. A request that fails in any
    way, inside a stream as well, is an error and in no figure. docs/benchmarks.md says what each figure means.

    Exit code 0 if every request was answered, 1 if not.
    """
    if html is not None:
        _require_matplotlib()
    for path in (output, html):
        if path is not None:
            _require_writable(path)
    if compare:
        if url or model or output:
            raise click.UsageError("--compare measures nothing: leave out --url, --model and --output")
        return _compare(compare, html, as_json)
    if not url or not model:
        raise click.UsageError("--url and --model say what is measured")
    from orchestrator.bench import result
    from orchestrator.cli import benchshow

    target = _target(url, model, given)
    loads = _loads(given)
    runs, stopped = asyncio.run(_measure(target, loads))
    found = result.document(target, [run.to_json() for run in runs])
    if as_json:  # first, so that a disk that is full costs nobody the figures
        print_json(found)
    elif runs:
        benchshow.table(found)
    benchshow.warnings(found)
    if runs and output is not None:
        result.write(output, json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    if runs and html is not None:
        from orchestrator.bench import report

        result.write(html, report.html([(str(target.model), found)]))
    if stopped:
        raise click.exceptions.Exit(INTERRUPTED)
    if any(run.error_count for run in runs):
        raise click.exceptions.Exit(1)


async def _measure(target: Target, loads: Sequence[Load]) -> tuple[list[Run], bool]:
    """One run after another; whether somebody stopped them. A run in which nothing was answered yet is left out."""
    from orchestrator.bench.plan import Progress
    from orchestrator.bench.running import measure
    from orchestrator.cli.benchshow import Bar

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    runs: list[Run] = []
    sizing = None
    for load in loads:
        progress = Progress()
        with Bar(load, progress):
            run = await measure(target, load, progress, stop=stop, sizing=sizing)
        sizing = run.sizing
        if run.completed or run.error_count:
            runs.append(run)
        if stop.is_set():
            break
    return runs, stop.is_set()


def _target(url: str, model: str, given: dict[str, Any]) -> Target:
    from orchestrator.bench.plan import Target

    task: Task = given["task"] or ("encode" if given["endpoint"] == "embeddings" else "generate")
    headers = []
    for header in given["headers"]:
        name, colon, value = header.partition(":")
        if not colon:
            raise click.UsageError(f"--header {header!r}: give NAME: VALUE")
        headers.append((name.strip(), value.strip()))
    return Target(
        url=url, protocol=given["protocol"], model=model, task=task, stream=given["stream"],
        endpoint=given["endpoint"] or ("embeddings" if task == "encode" else "chat"),
        allow_cache=given["allow_cache"], api_key=_api_key(given["api_key_file"]), headers=tuple(headers),
        ca_file=None if given["ca_file"] is None else str(given["ca_file"]),
    )  # fmt: skip


def _api_key(path: Path | None) -> str | None:
    if path is not None:
        with path.open(encoding="utf-8", errors="replace") as file:  # what is no text is no key: Target says so
            return file.read(MAX_KEY_LETTERS).strip()
    return os.environ.get("TRUTHGPT_API_KEY") or os.environ.get("OPENAI_API_KEY") or None


def _loads(given: dict[str, Any]) -> list[Load]:
    from orchestrator.bench.plan import Load
    from orchestrator.bench.prompts import read_file

    if given["rate"] and given["concurrency"]:
        raise click.UsageError("--concurrency and --rate exclude each other")
    prompts: tuple[Prompt, ...] = read_file(given["prompt_file"]) if given["prompt_file"] else ()
    shared = {name: given[name] for name in ("duration_s", "output_tokens", "timeout_s", "temperature", "ignore_eos",
                                             "seed")}  # fmt: skip
    shared |= {"prompts": prompts, "prompt_tokens": None if prompts else given["prompt_tokens"]}
    shared |= {"goals": _goals(given["goodput"]), "extra_body": _object(given["extra_body"])}
    requests, warmup = given["requests"], given["warmup"]
    if given["rate"]:
        if requests is None and given["duration_s"] is None:
            requests = 100
        return [
            Load(concurrency=None, rate=rate, requests=requests, warmup=warmup or 0, **shared)
            for rate in given["rate"]
        ]  # fmt: skip
    loads = []
    for clients in given["concurrency"] or (1,):
        count = requests if requests is not None or given["duration_s"] else max(50, 10 * clients)
        loads.append(Load(concurrency=clients, requests=count, warmup=clients if warmup is None else warmup, **shared))
    return loads


def _goals(text: str | None) -> Any:
    from orchestrator.bench.plan import Goals

    found: dict[str, float] = {}
    for part in (text or "").split(",") if text else ():
        name, _, value = part.strip().partition(":")
        if name not in ("ttft", "itl", "latency") or f"{name}_s" in found:
            raise click.UsageError(
                f"--goodput {part.strip()!r}: give ttft, itl or latency, each once, such as ttft:0.5"
            )
        try:
            found[f"{name}_s"] = float(value)
        except ValueError:
            raise click.UsageError(f"--goodput {part.strip()!r}: {value!r} is no number of seconds") from None
    return Goals(**found)


def _object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    value: Any = None
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
    if not isinstance(value, dict):
        raise click.UsageError('--extra-body is not a JSON object such as {"top_k": 1}')
    return value


def _compare(paths: tuple[Path, Path], html: Path | None, as_json: bool) -> None:
    from orchestrator.bench import result
    from orchestrator.cli import benchshow

    before, after = (result.read(path) for path in paths)
    names = [path.name if paths[0].name != paths[1].name else str(path) for path in paths]
    if html is not None:
        from orchestrator.bench import report

        result.write(html, report.html([(names[0], before), (names[1], after)]))
    if as_json:
        print_json(benchshow.comparison(before, after))
    else:
        benchshow.compared(before, after)


def _require_writable(path: Path) -> None:
    """Before anything is measured, that afterwards it can be written."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise click.UsageError(f"{folder} is not a folder")
    if path.exists() and not path.is_file():
        raise click.UsageError(f"{path} is no file that could be replaced")
    if not os.access(folder, os.W_OK):
        raise click.UsageError(f"nothing can be written to {folder}")


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise CommandError(_HTML_NEEDS, "pip install 'truthgpt[measure]'")
