"""Fetching a checkpoint from the Hugging Face Hub into its local cache, and nothing more of it than is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from export.errors import ExportError, SourceError

WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_TIMEOUT_S = 10.0
_HINT = "Give a local folder that holds config.json and *.safetensors, or check the id and the network."


def fetch(
    model: str,
    revision: str | None,
    check: Callable[[Path, str], object],
    say: Callable[[str], None],
    pickle: bool = False,
    code: bool = False,
) -> Path:
    """The snapshot folder of a model, whose name is its commit. Without the Hub, what the cache already holds.

    ``check`` is called with a folder that holds config.json, and the commit, before any weights are downloaded.
    ``pickle`` allows pytorch_model*.bin where there is nothing safer; ``code`` fetches the checkpoint's Python files.

    Raises:
        SourceError: unknown, private or gated; no safetensors; not in the cache and the Hub is out of reach.
    """
    try:
        info = model_info(model, revision=revision, timeout=_TIMEOUT_S)
    except GatedRepoError as error:
        raise SourceError(f"{model} is gated.", "Accept its licence on the Hub and set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{model} has no revision {revision}.", "Check --revision.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceError(f"There is no folder {model} and no such public model on the Hub.", _HINT) from error
    except HfHubHTTPError as error:
        raise SourceError(f"The Hub refused to tell about {model}: {_first_line(error)}.", _HINT) from error
    except Exception as error:  # no route, no name server, offline mode, time-out: each HTTP library has its own
        return _cached(model, revision, error, _wanted(pickle, code))
    names = [file.rfilename for file in info.siblings or ()]
    safe = any(name.endswith(".safetensors") for name in names)
    if not safe and not (pickle and any(name.endswith(".bin") for name in names)):
        raise SourceError(
            f"{model} has no safetensors weights on the Hub.",
            "Look for a revision that has them, or convert it yourself and give the folder.",
        )
    try:
        # By the revision asked for, not by its commit: only so does the cache remember which commit that is.
        config = Path(hf_hub_download(model, "config.json", revision=revision))
        if any(file.rfilename == "modules.json" for file in info.siblings or ()):
            hf_hub_download(model, "modules.json", revision=revision)  # it says that this is an embedding model
        check(config.parent, config.parent.name)
        say(f"downloading {model}")
        return Path(snapshot_download(model, revision=revision, allow_patterns=_wanted(not safe, code)))
    except ExportError:
        raise
    except Exception as error:
        raise SourceError(f"{model} cannot be downloaded: {_first_line(error)}.", _HINT) from error


def _wanted(pickle: bool, code: bool) -> list[str]:
    return [*WANTED, *(["pytorch_model*.bin"] if pickle else []), *(["*.py"] if code else [])]


def _cached(model: str, revision: str | None, cause: Exception, wanted: list[str]) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise SourceError(
            f"{model} is neither a folder nor in the Hub's cache here, and the Hub cannot be reached.", _HINT
        ) from cause


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
