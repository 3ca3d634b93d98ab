"""docs/gateway.md leaves nothing out: errors, headers, settings, paths and bounds are those of the code."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import hardening, limits, openfiles, sanitize
from orchestrator.api import (
    admin,
    bodies,
    fields,
    grpc_door,
    grpc_errors,
    grpc_health,
    grpc_infer,
    grpc_messages,
    grpc_schema,
    grpc_server,
    grpc_tensors,
    http,
    middleware,
    openai_request,
)
from orchestrator.api import errors as table
from orchestrator.api.ratelimit import limit_headers
from orchestrator.app import Application
from orchestrator.cache import DEFAULT_TTL_S
from orchestrator.domain import ENDPOINTS, Window
from orchestrator.errors import RateLimited, TruthGPTError, Unavailable
from orchestrator.local import tritonserver
from orchestrator.parent import ADMIN_CONNECTIONS
from orchestrator.settings import Settings
from tests.counting import write_entry
from tests.e2e.stack import Stack
from tests.examples import Example, examples
from tests.test_docs import check_command

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gateway.md"
TEXT = PAGE.read_text(encoding="utf-8")
EDGE = ("refusals", *(f"api.{path.stem}" for path in sorted((ROOT / "orchestrator" / "api").glob("[a-z]*.py"))))
PROCESSES = ("app", "server", "parent", "worker")
HEADER = re.compile(rb"[a-z][a-z0-9]*(-[a-z0-9]+)*")
EXAMPLES = examples(PAGE)


def part(heading: str) -> str:
    """What stands below a heading, up to the next one."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found is not None, heading
    return found[1]


def named(text: str) -> set[str]:
    """Every header's name in the first cells of a table, lower-case."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name.lower() for cell in cells for name in re.findall(r"`([\w-]+)", cell)}


def trees() -> Iterator[tuple[object, ast.AST]]:
    for name in EDGE:
        path = ROOT / "orchestrator" / f"{name.replace('.', '/')}.py"
        yield importlib.import_module(f"orchestrator.{name}"), ast.parse(path.read_text(encoding="utf-8"))


def constant(module: object, node: ast.expr) -> bytes | None:
    """The bytes that an expression is: a literal, or a constant of this or another module."""
    value: object = None
    if isinstance(node, ast.Constant):
        value = node.value
    elif isinstance(node, ast.Name):
        value = getattr(module, node.id, None)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        value = getattr(getattr(module, node.value.id, None), node.attr, None)
    return value if isinstance(value, bytes) and HEADER.fullmatch(value) else None


def headers_read() -> set[str]:
    """What `….get(b"name")` of the edge's code asks for."""
    found = {
        constant(module, node.args[0])
        for module, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args
    }
    return {name.decode() for name in found if name is not None}


def headers_sent() -> set[str]:
    """The first item of every pair of the edge's code, and what the limits' headers are called."""
    found = {
        constant(module, node.elts[0])
        for module, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Tuple) and len(node.elts) == 2
    }
    windows = [Window(name, 1, 0, 0.0) for name in ("minute", "hour", "day", "tokens_minute", "tokens_day")]
    return {name.decode() for name in (*found, *dict(limit_headers(windows))) if name is not None}


def classes(root: type[TruthGPTError]) -> Iterator[type[TruthGPTError]]:
    yield root
    for kind in root.__subclasses__():
        yield from classes(kind)


def test_every_error_is_listed_with_its_codes() -> None:
    """The tables have every class of the error tree: its statuses, type, code and whether it is worth another try."""
    rows = {cells[0]: cells[1:5] for cells in (line.strip("| ").split(" | ") for line in part("Errors").splitlines())}
    for error in classes(TruthGPTError):
        row = table.TABLE[error]
        again = "wait" if issubclass(error, (RateLimited, Unavailable)) else "yes" if error.retryable else "no"
        code = f"`{row.code}`" if row.code else ""
        assert rows[error.__name__] == [str(row.status), f"`{row.type}`", code, again]
        assert error.__name__ in rows[grpc_errors.TABLE[error].name][1].split(", ")


def test_what_the_edge_itself_refuses_is_listed() -> None:
    """Every refusal before the gateway's rules, of the edge and of a connection, is in the second table."""
    rows = [(row.status, row.code) for row in vars(table).values() if isinstance(row, table.Row)]
    rows += [(row.status, row.code) for row in vars(hardening).values() if isinstance(row, hardening.Refusal)]
    assert len(rows) >= 10
    for status, code in rows:
        assert re.search(rf"^\| {status} \| .*\| `{code}` \|", part("Errors"), re.MULTILINE), code


def test_every_header_that_is_read_is_listed() -> None:
    """Each header that the edge's code asks for is in the table of request headers, and no other but the proxy's is."""
    read = headers_read()
    assert {"authorization", "x-truthgpt-task", "inference-header-content-length"} <= read
    assert named(part("Request headers")) == read | {"x-forwarded-for"}


def test_every_header_that_is_sent_is_listed() -> None:
    """Each header that the edge's code writes is in the table of response headers, and no other is."""
    sent = headers_sent()
    assert {"x-cache", "x-truthgpt-fallback", "ratelimit", "x-ratelimit-reset-tokens", "retry-after"} <= sent
    assert named(part("Response headers")) == sent


def test_every_setting_of_the_gateway_is_named() -> None:
    """What the gateway's processes read of the settings is named; so are those of Redis, the commands and gRPC."""
    used = {"redis_max_bytes", "api_key", "grpc_port"}
    for name in PROCESSES:
        for node in ast.walk(ast.parse((ROOT / "orchestrator" / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1].strip("_") == "settings":
                used.add(node.attr)
    table_ = Settings.table()
    used &= set(table_)
    assert len(used) > 40
    assert {table_[name].env for name in used} - set(re.findall(r"\bTRUTHGPT_[A-Z_]+[A-Z]\b", TEXT)) == set()


def test_every_method_and_bound_of_grpc_is_named() -> None:
    """Each method of the gRPC service is in its table, in full or by its beginning, and its bounds are the code's."""
    grpc = part("Edges").split("### gRPC")[1]
    service = grpc_schema.POOL.FindServiceByName(grpc_messages.SERVICE)
    named_there = [name.rstrip("…") for name in re.findall(r"`([A-Z]\w+…?)`", grpc)]
    assert len(service.methods) == 20
    for method in service.methods:
        assert any(method.name.startswith(name) for name in named_there), method.name
    for stated in (
        f"Up to {grpc_infer.AT_ONCE} requests", f"{middleware.MAX_HEADER_BYTES >> 10} KiB of metadata",
        f"{openfiles.CONNECTIONS:,} calls", f"`{grpc_infer.AS_STATUS.decode()}: true`", f"`{grpc_infer.FINAL}`",
        f"`{grpc_tensors.ENABLE_FINAL}`", grpc_health.HEALTH,
    ):  # fmt: skip
        assert stated in grpc, stated
    hostile = part("Bounds for hostile clients")
    assert f"{grpc_door.OPEN_STREAMS} of a worker" in hostile and f"{grpc_door.MESSAGE_S:g} s for the next" in hostile
    assert f"{grpc_server.STREAMS} calls" in hostile and f"{grpc_server.IDLE_S} s without" in hostile


async def test_every_path_is_named() -> None:
    """Each path that the public edge serves is in the text, in full or as the end of one, and the admin paths are."""
    application = Application(Settings.load({"audit": False, "grpc": False}, environ={}))
    await application.start()
    try:
        assert application._door is not None
        routes = set(application._door.routes)
    finally:
        await application.stop()
    edges = part("Edges")
    assert len(routes) > 30
    for path in routes:
        short = path.replace("/versions/{version}", "").replace("/v2/models/{model}/", "…/")
        control = path in admin.CONTROL and re.search("trace|logging|repository|sharedmemory", path)
        assert f"`{path}`" in edges or f"`{short}`" in edges or control or short in (
            "/v2/models/{model}", "…/ready", "…/infer", "…/generate",
        ), path  # fmt: skip
    for name in ("repository", "trace/setting", "logging", "systemsharedmemory", "cudasharedmemory"):
        assert f"/v2/{name}" in edges
    for path in middleware.OPEN:
        assert f"`{path}`" in edges


def test_the_numbers_are_those_of_the_code() -> None:
    """Bounds, times to live, windows and leases are stated as the code has them."""
    bounds, hostile = hardening.Bounds(), part("Bounds for hostile clients")
    for stated in (
        f"{bounds.fields} fields, {bounds.head_bytes >> 10} KiB; {bounds.head_s:.0f} s", f"{bounds.idle_s:.0f} s",
        f"{bounds.target_bytes >> 10} KiB", f"{bodies.MAX_DEPTH} levels", f"{bounds.connections:,}",
        f"admin port {ADMIN_CONNECTIONS}", f"and {http.SLOW_READER_S:.0f} s", f"| {openai_request.MAX_PROMPTS} |",
        f"{fields.MAX_STOPS}, of {fields.MAX_STOP_CHARS}",
    ):  # fmt: skip
        assert stated in hostile, stated
    assert (middleware.MAX_HEADERS, middleware.MAX_HEADER_BYTES) == (bounds.fields, bounds.head_bytes)
    for task, seconds in DEFAULT_TTL_S.items():
        assert f"{task} {seconds} s" in part("Cache")
    assert f"leases of {limits.LEASE_S:.0f} s" in part("Limits")
    for name in ENDPOINTS:
        assert name in part("Limits")
    listed = re.search(r"lists what was changed: ([\w,\s]+)\.", part("Sanitising"))
    assert listed is not None and tuple(re.split(r",\s+", listed[1])) == sanitize.CHANGES


def test_every_command_in_a_block_exists() -> None:
    """Each line of a console block that runs truthgpt names a command with these options; the Python compiles."""
    lines = [line for each in EXAMPLES if each.kind == "console" for line in each.code.splitlines()]
    commands = [line.split("truthgpt ", 1)[1] for line in lines if re.match(r"([A-Z_]+=\S+ )*truthgpt ", line)]
    assert len(commands) >= 15
    for command in commands:
        check_command(command.split())
    for example in EXAMPLES:
        if example.kind == "python":
            compile(example.code, "docs/gateway.md", "exec")


def test_lines_fit() -> None:
    """No line is longer than 140 characters; a row of a table cannot be broken."""
    assert [line for line in TEXT.splitlines() if len(line) > 140 and not line.startswith("|")] == []


@pytest.mark.slow
def test_the_quick_start_runs() -> None:
    """The curl call and both Python clients, as they stand there, answer with a key through a real stack."""
    try:
        tritonserver.find()
    except tritonserver.ServerMissing as error:
        pytest.skip(str(error))
    quick = [each for each in EXAMPLES if each.heading == "Quick start"]
    runnable = [each for each in quick if each.kind == "python" or each.code.startswith("curl")]
    assert [each.kind for each in runnable] == ["console", "python", "python"]
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-docs-"))
    write_entry(folder / "repository", slots=2)
    stack = Stack(folder / "home", folder / "repository", extra={"ENVIRONMENT": "staging"})
    try:
        stack.start()
        made = stack.cli("keys", "create", "--tenant", "acme", "--json")
        key = re.search(r'"key": "(tg_[^"]+)"', made.stdout)
        assert key is not None, made.stderr
        for example in runnable:
            code = example.code.replace(":8080", f":{stack.ports['HTTP']}").replace('"demo"', f'"{stack.model}"')
            code = re.sub(r'("content": )"[^"]*"', r'\1"one two"', code)
            done = Example("", example.kind, code).run({"TRUTHGPT_API_KEY": key[1]})
            assert done.returncode == 0, done.stderr
            assert "three" in done.stdout, done.stdout
    finally:
        stack.stop()
        shutil.rmtree(folder)
