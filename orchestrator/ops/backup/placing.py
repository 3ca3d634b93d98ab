"""Where a backup is put, and what must not be replaced by it: a drill beside a deployment that serves is safe.

Into the settings' own home everything goes back where it was: home, model repository and the Redis that the settings
give. Into another home nothing of the settings' deployment is touched: other models than the backup's are replaced in
a folder that somebody has named only, and Redis's data become files of that home, unless it is said that the given
Redis is meant.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from orchestrator.local import state
from orchestrator.ops import serving
from orchestrator.ops.backup.difference import Difference
from orchestrator.ops.backup.errors import BackupError
from orchestrator.ops.backup.tarform import Manifest
from orchestrator.settings import Settings, mask_url


def check_layout(settings: Settings) -> None:
    """Refuse a home or a folder of backups in the model repository, unless it lies in it directly or is hidden in it.

    What contains it would be taken for a model, and be replaced as one. Raises BackupError.
    """
    repository = settings.model_repository.resolve()
    for what, folder in (("home", settings.home), ("folder of the backups", settings.backups)):
        place = folder.resolve()
        if not place.is_relative_to(repository):
            continue
        parts = place.relative_to(repository).parts
        if not parts:
            raise BackupError(f"{repository} is both the model repository and the {what}", "move one of them")
        first = repository / parts[0]
        if first not in (place, settings.home.resolve()) and not parts[0].startswith("."):
            raise BackupError(f"the {what}, {place}, lies in a folder of the model repository", "move it out of there")


class Target:
    """Where a backup is to be put. `settings` are those of the deployment that it makes.

    `home`: another than the settings' one; `repository`: where models go, if somebody has named that; `given_redis`:
    whether another home's data go into the Redis that the settings give. Raises BackupError where they give none.
    """

    def __init__(self, settings: Settings, home: Path | None, repository: Path | None, given_redis: bool) -> None:
        self._own, self._named = settings, repository is not None
        self.models = True  # whether they are put anywhere
        if given_redis and settings.redis_url is None:
            raise BackupError("no Redis is set to put keys into", "set TRUTHGPT_REDIS_URL, or leave --redis out")
        self.elsewhere = home is not None and home.resolve() != settings.home.resolve()
        self.settings = replace(settings, model_repository=repository or settings.model_repository)
        if home is not None and self.elsewhere:
            url = settings.redis_url if given_redis else None
            self.settings = replace(self.settings, home=home, redis_url=url)

    def check(self, manifest: Manifest) -> None:
        """Refuse what cannot be meant. Raises BackupError."""
        folders = [("home", self.settings.home)]
        if "models" in manifest.origins:
            folders.append(("model repository", self.settings.model_repository))
            check_layout(self.settings)
            if self.elsewhere:
                self._spare()
        for what, folder in folders:
            if folder.is_symlink() and not folder.exists():
                raise BackupError(f"the {what}, {folder}, is a link that leads nowhere", "remove it, or make its end")
            if folder.exists() and not folder.is_dir():
                raise BackupError(f"the {what}, {folder}, is no folder", "name another one")

    def settle(self, found: Difference, dry_run: bool) -> None:
        """Leave models alone that nobody has named and that are the backup's already. Raises BackupError for others."""
        tree = found.trees.get("models")
        if tree is None or self._named or not self.elsewhere:
            return
        if tree.same and not (tree.added or tree.changed or tree.removed):
            self.models = False
            found.replaces.pop("models", None)
        elif (tree.same or tree.changed or tree.removed) and not dry_run:
            raise BackupError(
                f"the models of the backup would replace those of another home in {self._own.model_repository}",
                "name a folder for them with --model-repository",
            )

    def check_unserved(self, manifest: Manifest) -> None:
        """Refuse to replace models that a stack of another home serves. Raises BackupError."""
        if "models" not in manifest.origins or not self.models:
            return
        repository = self.settings.model_repository.resolve()
        found = state.read(self._own.home) if self.elsewhere else None
        if found is not None and found.running and repository == self._own.model_repository.resolve():
            raise self._served(f"the stack of {self._own.home} (process {found.pid})")
        for server in serving.servers(repository):
            raise self._served(f"a Triton server (process {server.pid})")

    def replaces(self, manifest: Manifest) -> dict[str, str]:
        """Everything that will be replaced, by its kind: home, models, redis."""
        found = {"home": str(self.settings.home)}
        if "models" in manifest.origins:
            found["models"] = str(self.settings.model_repository)
        if "redis" in manifest.origins and self.settings.redis_url is not None:
            found["redis"] = mask_url(self.settings.redis_url)
        return found

    def _spare(self) -> None:
        """The settings' own deployment may lie in the folder that is named for another one's models."""
        repository = self.settings.model_repository.resolve()
        for folder in (self._own.home, self._own.backups):
            if folder.resolve().is_relative_to(repository):
                raise BackupError(f"{folder} lies in {repository}", "name another folder with --model-repository")

    def _served(self, who: str) -> BackupError:
        hint = "stop that stack, or name another folder with --model-repository"
        return BackupError(f"{who} serves the models of {self.settings.model_repository}", hint)
