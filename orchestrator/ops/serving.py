"""What is served: what is loaded at this moment, as Triton says, and what other replicas serve, as they told Redis."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from pathlib import Path

import psutil
import redis

from orchestrator.errors import TruthGPTError
from orchestrator.jobs import identity
from orchestrator.jobs.ledger import Ledger
from orchestrator.local import state
from orchestrator.resolving import Resolver, entries
from orchestrator.settings import Settings
from orchestrator.triton import Deadlines, Repository, Triton
from orchestrator.triton.repository import READY

_REPOSITORY, _HTTP_PORT = "--model-repository=", "--http-port="


Elsewhere = Callable[[], Collection[tuple[str, int]]]  # versions that other replicas serve; raises CannotTell


class CannotTell(Exception):
    """Whoever may have models of the repository in use does not say which; `hint` says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.hint = "try again once it answers; `truthgpt status` shows it"


def ask(url: str) -> dict[tuple[str, str], str]:
    """State of each (model, version) that takes memory: LOADING and UNLOADING ones, too. Raises TruthGPTError."""

    async def asked() -> dict[tuple[str, str], str]:
        triton = Triton(url, Deadlines())
        try:
            rows = await Repository(triton).rows()
        finally:
            await triton.close()
        return {(row.name, row.version): row.state for row in rows if row.occupied}

    return asyncio.run(asked())


def of_home(settings: Settings) -> dict[tuple[str, str], str]:
    """The same of this home's stack, empty where none runs; of its servers, those that answer.

    Where they differ a version is READY that any of them has ready: it gets requests.
    """
    found, states = state.read(settings.home), dict[tuple[str, str], str]()
    for place in found.tritons if found is not None and found.running else ():
        with contextlib.suppress(TruthGPTError):
            for version, now in ask(place.http).items():
                if states.get(version) != READY:
                    states[version] = now
    return states


def of_repository(settings: Settings) -> set[tuple[str, int]]:
    """Each (model, version) that is loaded by this home's stack, by a server that the settings name, or by any server
    of this machine that serves this repository. Raises CannotTell.
    """
    found = state.read(settings.home)
    urls = {place.http for place in found.tritons} if found is not None and found.running else set()
    urls |= _named(settings.triton_urls)
    for server in servers(settings.model_repository):
        port = next((a.removeprefix(_HTTP_PORT) for a in _arguments(server) if a.startswith(_HTTP_PORT)), "8000")
        urls.add(f"http://127.0.0.1:{port}")
    loaded: set[tuple[str, int]] = set()
    for url in sorted(urls):
        try:
            loaded |= {(name, int(version)) for name, version in ask(url)}
        except (TruthGPTError, ValueError) as error:
            raise CannotTell(f"Triton at {url} does not say what it has loaded: {error}") from error
    return loaded


def _named(triton_urls: str | None) -> set[str]:
    """The URL of every address that these have. Raises CannotTell where nobody knows."""
    if triton_urls is None:
        return set()

    async def looked_up(resolver: Resolver) -> set[str]:
        try:
            return {server.url for server in await resolver.resolve()}
        finally:
            resolver.close()

    resolver = Resolver(entries(triton_urls))
    found = asyncio.run(looked_up(resolver))
    if resolver.failures:
        raise CannotTell(f"not every name in triton_urls, {triton_urls}, has an address at this moment")
    return found


def elsewhere(settings: Settings, client: redis.Redis | None) -> Elsewhere:
    """Asks for the versions of models that other homes which share this repository have to serve, each time anew.

    What its own home serves is in its files, which are newer than what its gateway has told. `client` is None where
    Redis could not be reached: where there is one other replicas may be told of in it, and nobody can tell.
    """

    def ask_redis() -> Collection[tuple[str, int]]:
        if client is None:
            found = state.read(settings.home)
            if settings.redis_url is not None or (found is not None and found.running and found.redis):
                raise CannotTell("Redis does not say what other replicas serve of this repository")
            return frozenset()
        home, repository = identity.find(settings.home), identity.find(settings.model_repository)
        try:
            # of a repository that has no name that all know, what is served of any
            return Ledger(client).served(repository or "*", time.time(), without=home or "")
        except redis.RedisError as error:
            raise CannotTell(f"Redis does not say what other replicas serve: {error}") from error

    return ask_redis


def servers(repository: Path) -> list[psutil.Process]:
    """Triton servers, of any home, that serve this repository."""
    real = repository.resolve()
    found = {
        process.pid: process
        for process in psutil.process_iter()
        # resolved: a repository whose path Triton cannot take is named by a link
        if any(Path(a.removeprefix(_REPOSITORY)).resolve() == real
               for a in _arguments(process) if a.startswith(_REPOSITORY))
    }  # fmt: skip
    return list(found.values())


def server_of(repository: Path, model: str) -> int | None:
    """Process of a server, of any home, that was told to load this model of this repository."""
    loads = f"--load-model={model}"
    return next((server.pid for server in servers(repository) if loads in _arguments(server)), None)


def _arguments(process: psutil.Process) -> list[str]:
    """Its command line, empty when it has just ended or is somebody else's."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
