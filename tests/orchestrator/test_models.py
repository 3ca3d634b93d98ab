"""Reading a model repository from disk, choosing what to serve, and removing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import models
from orchestrator.models import Choice, ModelsError
from orchestrator.settings import Settings


def make(repository: Path, name: str, *versions: int | str, manifest: str | None = None) -> Path:
    for version in versions:
        folder = repository / name / str(version)
        folder.mkdir(parents=True)
        text = json.dumps({"task": "text_generation", "precision": "fp32"}) if manifest is None else manifest
        (folder / "manifest.json").write_text(text)
    (repository / name / "config.pbtxt").write_text('parameters { key: "slots" value { string_value: "4" } }')
    return repository / name


def settings(model: str | None = None, **environ: str) -> Settings:
    given = {"TRUTHGPT_CONFIG": "", **environ, **({"TRUTHGPT_MODEL": model} if model else {})}
    return Settings.load(environ=given)


def test_entries_and_versions_are_found(tmp_path: Path) -> None:
    """Models come by name, versions as numbers newest first; staging, files and odd folders are no models."""
    make(tmp_path, "b", 1, 2, 10)
    make(tmp_path, "a", 3)
    (tmp_path / "empty").mkdir()
    make(tmp_path, "odd", "01", "0", "1a")
    make(tmp_path, ".staging", 1)
    (tmp_path / "README.md").write_text("")
    found = models.read(tmp_path)
    assert [(entry.name, [version.number for version in entry.versions]) for entry in found] == [
        ("a", [3]),
        ("b", [10, 2, 1]),
    ]
    assert found[0].newest.fact("precision") == "fp32"
    assert models.parameters(found[0].config()) == {"slots": "4"}


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_a_broken_manifest_is_told_and_not_raised(tmp_path: Path, text: str) -> None:
    """An entry whose manifest cannot be read is still listed, with the reason."""
    folder = make(tmp_path, "a", 1) / "1" / "manifest.json"
    folder.write_bytes(text.encode("latin-1"))
    version = models.read(tmp_path)[0].newest
    assert version.manifest is None and version.fault
    assert version.fact("task") is None


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    """A missing repository is empty; an unknown model or version says what there is; a file in the way is an error."""
    assert models.read(tmp_path / "nowhere") == []
    make(tmp_path, "a", 1)
    with pytest.raises(ModelsError, match="no model b") as unknown:
        models.get(tmp_path, "b")
    assert unknown.value.hint == "it has a"
    with pytest.raises(ModelsError, match="no version 7") as version:
        models.get(tmp_path, "a").version(7)
    assert version.value.hint == "it has 1"
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ModelsError, match="Not a directory"):
        models.read(blocked)


def test_the_chosen_model_is_served_or_refused() -> None:
    """What a person names is served if it is there, and otherwise refused with the command that exports it."""
    assert models.choose(settings("a"), ["a", "demo"]) == Choice("a")
    with pytest.raises(ModelsError, match="environment TRUTHGPT_MODEL") as caught:
        models.choose(settings("DialoGPT-small"), ["demo"])
    assert caught.value.hint == "export it first: truthgpt export microsoft/DialoGPT-small"
    with pytest.raises(ModelsError, match="is not in"):
        models.choose(settings("a"), [])
    assert models.choose(settings("demo"), []) == Choice("demo", export_demo=True)


def test_the_profiles_model_gives_way_to_the_demo() -> None:
    """The profile's model is served if exported, else the demo with a note, exported first into an empty repository."""
    assert models.choose(settings(), ["DialoGPT-small", "demo"]) == Choice("DialoGPT-small")
    there = models.choose(settings(), ["a", "demo"])
    assert there.model == "demo" and not there.export_demo and "DialoGPT-small (profile development)" in there.note
    empty = models.choose(settings(ENVIRONMENT="production"), [])
    assert empty.model == "demo" and empty.export_demo and "DialoGPT-medium (profile production)" in empty.note


def test_one_other_model_is_served_and_several_are_asked_about() -> None:
    """Without the demo a single model is served with a note; several make `up` ask for TRUTHGPT_MODEL."""
    only = models.choose(settings(), ["a"])
    assert only.model == "a" and "the only model" in only.note
    with pytest.raises(ModelsError, match="several others: a, b") as caught:
        models.choose(settings(), ["a", "b"])
    assert "TRUTHGPT_MODEL=a" in caught.value.hint


@given(st.sets(st.sampled_from(["demo", "DialoGPT-small", "a", "b"])), st.sampled_from([None, "demo", "a", "x"]))
def test_a_choice_can_be_served(names: set[str], model: str | None) -> None:
    """Whatever is there and asked for: the choice is in the repository, or it is the demo about to be exported."""
    try:
        choice = models.choose(settings(model), sorted(names))
    except ModelsError as error:
        assert error.hint
        return
    assert (choice.model in names) != choice.export_demo
    assert choice.export_demo == (not names) and (model is None or choice.model == model)


def test_remove_takes_one_version_or_all(tmp_path: Path) -> None:
    """A version goes alone, the last version takes the model with it, and no staging stays behind."""
    make(tmp_path, "a", 1, 2)
    assert models.remove(tmp_path, models.get(tmp_path, "a"), 1) == [tmp_path / "a" / "1"]
    assert [version.number for version in models.get(tmp_path, "a").versions] == [2]
    assert models.remove(tmp_path, models.get(tmp_path, "a"), 2) == [tmp_path / "a"]
    make(tmp_path, "b", 1, 2)
    models.remove(tmp_path, models.get(tmp_path, "b"))
    assert list(tmp_path.iterdir()) == []


def test_remove_leaves_the_target_of_a_link_alone(tmp_path: Path) -> None:
    """A model that is a link into another folder loses the link, not the files."""
    make(tmp_path / "elsewhere", "a", 1)
    repository = tmp_path / "repository"
    repository.mkdir()
    os.symlink(tmp_path / "elsewhere" / "a", repository / "a")
    models.remove(repository, models.get(repository, "a"))
    assert models.read(repository) == [] and len(models.read(tmp_path / "elsewhere")) == 1


def test_remove_keeps_the_staging_of_exports_at_work(tmp_path: Path) -> None:
    """Another export's staging folder survives a removal, and what is removed was renamed into staging first."""
    make(tmp_path, "a", 1)
    at_work = tmp_path / ".staging" / "b-1-0a1b2c3d"
    at_work.mkdir(parents=True)
    models.remove(tmp_path, models.get(tmp_path, "a"))
    assert [path.name for path in (tmp_path / ".staging").iterdir()] == [at_work.name]


def test_remove_needs_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder can be made, as on a full disk, models and versions go all the same, by a hidden name."""
    make(tmp_path, "a", 1, 2)
    names: list[str] = []
    real = Path.rename

    def full(self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    def rename(self: Path, target: Path) -> Path:
        names.append(target.name)
        moved = real(self, target)
        assert all(version.number != 1 for entry in models.read(tmp_path) for version in entry.versions)
        return moved

    monkeypatch.setattr(Path, "mkdir", full)
    monkeypatch.setattr(Path, "rename", rename)
    models.remove(tmp_path, models.get(tmp_path, "a"), 1)
    assert sorted(path.name for path in (tmp_path / "a").iterdir() if path.is_dir()) == ["2"]
    models.remove(tmp_path, models.get(tmp_path, "a"))
    assert list(tmp_path.iterdir()) == [] and all(re.fullmatch(r"\.removed-a-\d+-[0-9a-f]{8}", n) for n in names)


def test_remove_that_fails_says_why(tmp_path: Path) -> None:
    """A repository that cannot be changed is one sentence, and the model stays."""
    make(tmp_path, "a", 1)
    (tmp_path / ".staging").write_text("in the way")
    with pytest.raises(ModelsError, match="could not be removed"):
        models.remove(tmp_path, models.get(tmp_path, "a"))
    assert models.get(tmp_path, "a").newest.number == 1


def test_further_models_are_served_beside_the_first() -> None:
    """Each once, in order, without the one that is served anyway; one that is not exported is refused by its name."""
    given = settings("a", TRUTHGPT_MODELS="b,a,c,b")
    assert models.choose(given, ["a", "b", "c"]).further == ("b", "c")
    with pytest.raises(ModelsError, match="the model c .*TRUTHGPT_MODELS.* is not in"):
        models.choose(given, ["a", "b"])
    assert models.choose(settings("a"), ["a"]).further == ()


def test_a_pinned_configuration_names_one_version(tmp_path: Path) -> None:
    """What the file says, with a policy for one version, and the digest is that of the manifest's bytes."""
    make(tmp_path, "a", 1, 2)
    entry = models.get(tmp_path, "a")
    assert entry.pinned(1) == {
        "parameters": {"slots": {"string_value": "4"}},
        "version_policy": {"specific": {"versions": [1]}},
    }
    data = (tmp_path / "a" / "2" / "manifest.json").read_bytes()
    assert entry.newest.digest == hashlib.sha256(data).hexdigest()[:32]


def test_a_graph_is_loaded_before_its_model(tmp_path: Path) -> None:
    """In the version that the model's manifest names, whatever is newer; one that is missing or not named is told."""
    make(tmp_path, "m--engine", 1, 2, manifest='{"graph_only": true}')
    served_by = {"name": "m--engine", "version": 1, "manifest_sha256": "0" * 64}
    make(tmp_path, "m", 1, manifest=json.dumps({"served_by": served_by}))
    make(tmp_path, "m", 2, manifest=json.dumps({"served_by": served_by | {"version": 3}}))
    make(tmp_path, "m", 3, manifest='{"served_by": {"name": "m--engine"}}')
    make(tmp_path, "plain", 1)
    assert list(models.with_engines(tmp_path, {"plain": 1, "m": 1}).items()) == [
        ("plain", 1), ("m--engine", 1), ("m", 1),
    ]  # fmt: skip
    with pytest.raises(ModelsError, match="m version 2 needs m--engine version 3") as missing:
        models.with_engines(tmp_path, {"m": 2})
    assert "--serve-with native" in missing.value.hint
    with pytest.raises(ModelsError, match="does not say which entry has its graph"):
        models.with_engines(tmp_path, {"m": 3})
    assert [version.number for version in models.in_front_of(tmp_path, "m--engine", [1])] == [1]
