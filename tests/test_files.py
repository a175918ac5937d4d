"""Files and folders that appear complete or not at all."""

import pytest

from metaembed_pl.errors import UserError
from metaembed_pl.files import new_folder


def test_a_folder_that_another_process_made_meanwhile_is_kept(tmp_path):
    late = new_folder(tmp_path / "a")
    (late.__enter__() / "file").write_text("late")
    with new_folder(tmp_path / "a") as first:
        (first / "file").write_text("first")
    with pytest.raises(UserError, match="/a exists already: choose another folder"):
        late.__exit__(None, None, None)
    assert (tmp_path / "a" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_to_a_folder_stays_a_link(tmp_path, overwrite):
    disk = tmp_path / "disk"
    (disk / "a").mkdir(parents=True)
    (tmp_path / "a").symlink_to(disk / "a")
    with new_folder(tmp_path / "a", overwrite) as folder:
        (folder / "file").touch()
    assert (tmp_path / "a").is_symlink()
    assert (disk / "a" / "file").exists()
