"""Writes docs/cli.md, docs/models.md, docs/settings.md, and the tables of families in docs/encoders.md, of errors in
docs/gateway.md and of series in docs/metrics.md.

With `--check` it only says whether they are up to date.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from orchestrator import errors, hardening, metrics_table
from orchestrator.api import errors as table
from orchestrator.api import grpc_errors
from orchestrator.cli import cli
from orchestrator.settings import PROFILES, Settings

ROOT = Path(__file__).resolve().parents[1]
NOTICE = "<!-- Written by scripts/reference.py (`make docs`) from the code; a test fails when it differs. -->"
PROFILED = tuple(PROFILES["development"])

CLI_INTRODUCTION = """\
`truthgpt` speaks noun-verb. Every command exits with 0 only on success, 1 on failure, 2 on wrong usage, 130 when
interrupted and 141 when nobody reads its output; errors are `error: …` and `hint: …` on standard error. With `--json` a
command prints exactly one JSON document on standard output. Every command takes `-h`/`--help`, and `--debug` to show
the traceback of an error. An option that names a setting outranks the environment, which outranks the file: see
[settings](settings.md).
"""
SETTINGS_INTRODUCTION = """\
A value comes from, weakest first: its default, the profile that `ENVIRONMENT` names, the TOML file (`TRUTHGPT_CONFIG`,
else `./truthgpt.toml` if it exists), the environment variable, a command's flag. In the file the names are those of the
first column. Durations end in `_s` and are seconds, sizes end in `_bytes`. An empty variable counts as not set.
A secret may stand in a file, as container platforms hand it out: `TRUTHGPT_REDIS_URL_FILE` names the file of
`TRUTHGPT_REDIS_URL`, and so on.
`truthgpt config show` prints every value with where it came from, secrets masked; `truthgpt config check` validates a
whole deployment.
"""
MODELS_INTRODUCTION = """\
`truthgpt export` carries any decoder of transformers whose attention it can put its own in the place of: one method, no
list of families. For each family below a tiny model with random weights is exported, served through Triton and compared
with transformers' `generate`, token for token, by `tests/e2e/test_families.py`; logits agree to 5e-5. What is not in
the table is tried all the same and published only if it is proven on your checkpoint: `manifest.json` has the
certificate.

Sliding windows, soft-capping, attention sinks, ALiBi, layers of different kinds and cache shapes, heads of any width,
partial and scaled rotary positions, tied and scaled embeddings are carried. The window of each layer is read from the
rule that transformers makes its mask with, so it is right for every length. A mixture of experts gathers the weights
of the experts that each token chose, in every step: right for all, fast for small experts, and hungry for memory with
large ones (a token takes the size of its experts; the prefill chunk is cut accordingly). Experts are exported in fp32,
fp16 and bf16; [int8 and int4](precisions.md) are refused.

A checkpoint that brings code of its own (`auto_map`) for a family that transformers has is exported with transformers'
code; the command and the manifest (`source.own_code`) say so. `--trust-remote-code` runs the checkpoint's.
"""
REFUSED_INTRODUCTION = """\
## What is refused

By name, before anything is traced:
"""


def cli_page() -> str:
    """Every command with its arguments, options and examples."""
    lines = [
        "# Command line",
        "",
        NOTICE,
        "",
        *CLI_INTRODUCTION.splitlines(),
        "",
    ]
    commands = list(walk(cli, ["truthgpt"]))
    lines += [f"- [`{' '.join(path)}`](#{'-'.join(path)}): {summary(command)}" for path, command in commands]
    for path, command in commands:
        lines += ["", *section(path, command)]
    return "\n".join(lines) + "\n"


def models_page() -> str:
    """The families that are exported and those that are not, from the table that the tests run."""
    sys.path.insert(0, str(ROOT))  # the tests are no installed package
    from tests.export.families import FAMILIES, REFUSED, VARIANTS

    lines = ["# Models", "", NOTICE, "", *MODELS_INTRODUCTION.splitlines(), ""]
    lines += ["| `model_type` | what is particular about it |", "|---|---|"]
    lines += [f"| `{family.name}` | {family.note} |" for family in FAMILIES]
    lines += ["", f"Tested as well: {', '.join(VARIANTS)}.", "", *REFUSED_INTRODUCTION.splitlines(), ""]
    lines += ["| what | why |", "|---|---|", *(f"| {what} | {refusal.why} |" for what, refusal in REFUSED.items())]
    return "\n".join(lines) + "\n"


def walk(group: click.Group, path: list[str]) -> Iterator[tuple[list[str], click.Command]]:
    """Every command below a group, in the order of its help."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None:
            raise SystemExit(f"error: {' '.join([*path, name])} cannot be loaded")
        if isinstance(command, click.Group):
            yield from walk(command, [*path, name])
        else:
            yield [*path, name], command


def section(path: list[str], command: click.Command) -> list[str]:
    """One command's chapter."""
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    options = [
        p for p in command.params if isinstance(p, click.Option) and not p.hidden and p.name not in ("help", "debug")
    ]
    usage = " ".join([*path, *(["[OPTIONS]"] if options else []), *(str(a.name).upper() for a in arguments)])
    lines = [f"## {' '.join(path)}", "", f"    {usage}", "", *prose(command.help or "")]
    if options:
        lines += ["", "| option | meaning |", "|---|---|"]
        lines += [f"| {cell(spelling(option))} | {cell(meaning(option))} |" for option in options]
    return [*lines, "", *prose(command.epilog or "")]


def summary(command: click.Command) -> str:
    text = command.short_help or inspect.cleandoc(command.help or "").split("\n\n")[0].split(". ")[0]
    return text.replace("\n", " ").rstrip(".")


def prose(text: str) -> list[str]:
    """Help text as Markdown: a paragraph that click is told not to wrap is code."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        body = paragraph.removeprefix("\b\n")
        lines += [""] if lines else []
        if body is paragraph or body == paragraph:
            lines += body.splitlines()
        elif body.startswith("Examples:"):
            lines += ["Examples:", "", *(f"    {line.strip()}" for line in body.splitlines()[1:])]
        else:
            lines += [f"    {line}" for line in body.splitlines()]
    return lines


def spelling(option: click.Option) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    return f"`{names}`" if option.is_flag else f"`{names} {metavar(option)}`"


def metavar(option: click.Option) -> str:
    if option.metavar:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return "|".join(str(choice) for choice in option.type.choices)
    if hasattr(option.type, "describe"):
        return str(option.type.describe())
    return {"integer": "N", "integer range": "N", "float": "X", "float range": "X", "path": "PATH"}.get(
        option.type.name, "TEXT"
    )


def meaning(option: click.Option) -> str:
    text = " ".join((option.help or "").split())
    default = "" if option.is_flag or not option.show_default else f" [default: {option.default}]"
    text = f"{text}{default}".replace("  [", " [")
    return text + (" [may be given several times]" if option.multiple and "several" not in text else "")


def settings_page() -> str:
    """Every setting with its variable, default, rules and help."""
    lines = [
        "# Settings",
        "",
        NOTICE,
        "",
        *SETTINGS_INTRODUCTION.splitlines(),
        "",
        "| setting | variable | default | allowed | meaning |",
        "|---|---|---|---|---|",
    ]
    for name, spec in Settings.table().items():
        default = "by profile" if name in PROFILED else "" if spec.default is None else f"`{shown(spec.default)}`"
        allowed = ", ".join(f"`{choice}`" for choice in spec.choices) or limits(spec.minimum, spec.maximum)
        allowed = allowed or (f"`{spec.pattern}`" if spec.pattern else "`true`, `false`" if spec.kind is bool else "")
        help = spec.help + (" Its password is never printed." if spec.secret else "")
        lines.append(f"| `{name}` | `{spec.env}` | {default} | {cell(allowed)} | {cell(help)} |")
    lines += ["", "## Profiles", "", f"| setting | {' | '.join(f'`{profile}`' for profile in PROFILES)} |"]
    lines.append("|---" * (len(PROFILES) + 1) + "|")
    for name in PROFILED:
        lines.append(f"| `{name}` | {' | '.join(shown(values[name]) for values in PROFILES.values())} |")
    return "\n".join(lines) + "\n"


def gateway_page() -> str:
    """docs/gateway.md as it stands, with its generated parts anew."""
    return filled("docs/gateway.md", errors=error_rows(), statuses=status_rows(), refusals=refusal_rows())


def encoders_page() -> str:
    """docs/encoders.md as it stands, with the families that the tests run."""
    sys.path.insert(0, str(ROOT))
    from tests.export.encoder_checkpoints import FAMILIES

    rows = [f"| `{name}` | {family.note} |" for name, family in FAMILIES.items()]
    return filled("docs/encoders.md", families=["| `model_type` | what is particular about it |", "|---|---|", *rows])


def metrics_page() -> str:
    """docs/metrics.md as it stands, with its generated parts anew."""
    return filled("docs/metrics.md", series=series_rows())


def filled(page: str, **tables: list[str]) -> str:
    """A page as it stands, with these parts of it anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, lines in tables.items():
        parts = re.split(rf"(?<=<!-- {name}: generated -->\n).*(?=<!-- end of {name} -->)", text, flags=re.DOTALL)
        if len(parts) != 2:
            raise SystemExit(f"error: {page} has no one place for its {name}")
        text = "\n".join([parts[0], *lines, "", parts[1]])
    return text


def series_rows() -> list[str]:
    """Every series, in the table's order."""
    lines = ["| series | kind | labels | workers | meaning | wake somebody when it is |", "|---|---|---|---|---|---|"]
    for series in metrics_table.TABLE.values():
        labels = ", ".join(f"`{label}`" for label in series.labels)
        meaning, alert = cell(series.help), cell(series.alert)
        lines.append(f"| `{series.name}` | {series.kind} | {labels} | {series.merge} | {meaning} | {alert} |")
    return lines


def error_rows() -> list[str]:
    """Every class of the error tree, in its order and with the meanings of its drawing."""
    drawn = re.findall(r"^ {4}[ │├└─]*(\w+) +(\S.*)$", errors.__doc__ or "", re.MULTILINE)
    meanings = {"TruthGPTError": "root of the tree: never raised itself", **dict(drawn)}
    lines = ["| error | HTTP | type | code | again | when |", "|---|---|---|---|---|---|"]
    for name, meaning in meanings.items():
        error: type[errors.TruthGPTError] = getattr(errors, name)
        row = table.TABLE[error]
        later = issubclass(error, (errors.RateLimited, errors.Unavailable))
        again = "wait" if later else "yes" if error.retryable else "no"
        code = f"`{row.code}`" if row.code else ""
        lines.append(f"| {name} | {row.status} | `{row.type}` | {code} | {again} | {cell(meaning.replace('`', ''))} |")
    return lines


def status_rows() -> list[str]:
    """Every status that gRPC's edge has for errors, with the HTTP statuses and the errors that have it."""
    lines = ["| gRPC | HTTP | errors |", "|---|---|---|"]
    for status in dict.fromkeys(grpc_errors.TABLE.values()):
        kinds = [kind for kind, code in grpc_errors.TABLE.items() if code is status]
        http = ", ".join(dict.fromkeys(str(table.TABLE[kind].status) for kind in kinds))
        lines.append(f"| {status.name} | {http} | {', '.join(kind.__name__ for kind in kinds)} |")
    return lines


def refusal_rows() -> list[str]:
    """What is refused before the gateway's rules: by the edge, and while a request arrives."""
    edge = [
        (table.NOT_FOUND, table.NO_SUCH_PATH),
        (table.METHOD_NOT_ALLOWED, table.WRONG_METHOD),
        (table.UNSUPPORTED_CODING, table.CODINGS_TAKEN),
        (table.HEADERS_TOO_LARGE, table.TOO_MANY_HEADERS),
    ]
    rows = [(row.status, row.type, row.code, text.en) for row, text in edge]
    arriving = [value for value in vars(hardening).values() if isinstance(value, hardening.Refusal)]
    rows += [(refusal.status, refusal.kind, refusal.code, refusal.text.en) for refusal in arriving]
    lines = ["| HTTP | type | code | message |", "|---|---|---|---|"]
    return lines + [f"| {status} | `{kind}` | `{code}` | {cell(text)} |" for status, kind, code, text in rows]


def limits(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    ends = (f"{end:g}" if isinstance(end, float) else str(end) for end in (low, high))
    return " to ".join(ends)


def shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {
    "docs/cli.md": cli_page,
    "docs/encoders.md": encoders_page,
    "docs/models.md": models_page,
    "docs/settings.md": settings_page,
    "docs/gateway.md": gateway_page,
    "docs/metrics.md": metrics_page,
}


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for name, page in PAGES.items():
        path, text = ROOT / name, page()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    if check and stale:
        print(f"error: {', '.join(stale)} does not say what the code does", file=sys.stderr)
        print("hint: run `make docs` and commit what it writes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
