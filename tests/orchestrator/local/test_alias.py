import stat
from pathlib import Path

import pytest

from orchestrator.local import alias


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Links of these tests go to a folder of their own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_a_path_that_bash_takes_for_one_word_is_used_as_it_is(tmp_path: Path, temporary_folder: Path):
    """No link is made where none is needed."""
    assert alias.plain(tmp_path, "models", tmp_path / "models") == tmp_path / "models"
    assert not list(temporary_folder.iterdir())


@pytest.mark.parametrize("name", ["my models", "a;b", "$(x)", "modèles", "it's"])
def test_any_other_path_gets_a_plain_link_that_goes_away(tmp_path: Path, temporary_folder: Path, name: str):
    """The link leads to the path, made twice it is the same, only its owner may enter, and clear removes it."""
    target = tmp_path / name
    target.mkdir()
    links = {alias.plain(tmp_path, "models", target) for _ in range(2)}
    (link,) = links
    assert link.resolve() == target and " " not in str(link)
    assert stat.S_IMODE(link.parent.stat().st_mode) == 0o700
    assert [path.name for path in link.parent.iterdir()] == ["models"]
    alias.clear(tmp_path)
    alias.clear(tmp_path)
    assert target.is_dir() and not list(temporary_folder.iterdir())


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, temporary_folder: Path):
    """Whoever made the folder before us could put another backend behind the link."""
    folder = alias.folder(tmp_path)
    folder.chmod(0o777)
    with pytest.raises(alias.AliasError) as caught:
        alias.plain(tmp_path, "models", tmp_path / "my models")
    assert caught.value.hint
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(alias.AliasError):
        alias.folder(tmp_path)
