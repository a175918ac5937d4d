"""Rows and pictures from copies of the hub: what is found, what is refused, what is cut off."""

import errno
import io
import os
import tarfile
import zipfile

import pytest

import hub
from metaembed_pl.data_prep._rows import Named, fetch, read_rows, unpack
from metaembed_pl.errors import Unreachable, UserError


@pytest.mark.parametrize("name", ["CIRR/a.png", "images/CIRR/a.png", "image/CIRR/a.png"])
@pytest.mark.parametrize("inside", ["CIRR/a.png", "images/CIRR/a.png"])
def test_a_picture_is_found_with_and_without_the_folder_of_images(tmp_path, name, inside):
    hub.write_zip(tmp_path / "CIRR.zip", {inside: b"in the zip"})
    assert Named(name, (tmp_path, tmp_path / "CIRR.zip")).read() == b"in the zip"
    (tmp_path / inside).parent.mkdir(parents=True)
    (tmp_path / inside).write_bytes(b"unpacked")
    assert Named(name, (tmp_path, tmp_path / "CIRR.zip")).read() == b"unpacked"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", "a\0"]
)
def test_a_path_that_leaves_its_folder_is_refused(tmp_path, name):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="a picture's path leaves its folder: "):
        Named(name, (tmp_path / "in",)).read()


def test_a_link_that_leaves_its_folder_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"leaves its folder through a link: 'a\.png'"):
        Named("a.png", (tmp_path / "in",)).read()


def test_a_picture_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(UserError, match=r"picture not found: b\.png"):
        Named("b.png", (tmp_path,)).read()


def test_broken_zips_and_bombs_in_zips_are_refused(tmp_path, monkeypatch):
    hub.write_zip(tmp_path / "a.zip", {"a.png": hub.png(0)})
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"picture cannot be read: a\.png in cut\.zip"):
        Named("a.png", (tmp_path / "cut.zip",)).read()
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a.png", bytes(2_000_000))
    monkeypatch.setattr("metaembed_pl.data_prep._rows.MAX_BYTES", 1_000_000)
    with pytest.raises(UserError, match=r"picture is refused: a\.png unpacks to 2,000,000 bytes"):
        Named("a.png", (tmp_path / "bomb.zip",)).read()


def test_unpack_takes_what_is_wanted_and_only_once(tmp_path):
    files = {"keep/a.png": b"a", "keep/b/c.png": b"c", "other/d.png": b"d"}
    (tmp_path / "a.tar.gz").write_bytes(hub.tar_gz(files))
    folder = unpack([tmp_path / "a.tar.gz"], tmp_path / "out", below="keep/")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert found == {"keep/a.png", "keep/b/c.png"}
    (tmp_path / "a.tar.gz").unlink()
    assert unpack([tmp_path / "a.tar.gz"], tmp_path / "out", below="keep/") == folder


def tar_with(member, content=b""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def link(kind):
    member = tarfile.TarInfo("a.png")
    member.type, member.linkname = kind, "/etc/hostname"
    return member


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_with(link(tarfile.SYMTYPE)), "'a.png' is a link or a device"),
        (tar_with(link(tarfile.LNKTYPE)), "'a.png' is a link or a device"),
        (tar_with(link(tarfile.CHRTYPE)), "'a.png' is a link or a device"),
        (tar_with(tarfile.TarInfo("../a.png"), b"x"), "is not a complete gzipped tar: .*outside"),
        (hub.tar_gz({"a.png": os.urandom(9999)})[:5000], "is not a complete gzipped tar"),
        (b"no tar at all", "is not a complete gzipped tar"),
    ],
    ids=["soft link", "hard link", "device", "outside", "cut short", "no tar"],
)
def test_unpack_refuses_what_is_no_plain_file_and_leaves_nothing(tmp_path, content, message):
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=message):
        unpack([tmp_path / "a.tar.gz"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_rows_that_are_not_there_and_columns_that_are_missing_are_named(tmp_path):
    hub.write_parquet(tmp_path / "a" / "train-00000-of-00001.parquet", [{"query": "x"}])
    assert list(read_rows(str(tmp_path), "a/train-*.parquet", ["query"])) == [{"query": "x"}]
    with pytest.raises(UserError, match=r"has no file b/train-\*\.parquet"):
        next(read_rows(str(tmp_path), "b/train-*.parquet"))
    with pytest.raises(UserError, match="has no column 'image'; it has query"):
        next(read_rows(str(tmp_path), "a/train-*.parquet", ["image"]))
    (tmp_path / "a" / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a/broken\.parquet cannot be read"):
        next(read_rows(str(tmp_path), "a/broken.parquet"))


def test_without_the_hub_a_file_is_cut_off_and_not_missing(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        Unreachable, match=r"cannot download images\.zip of some/where: the hub cannot"
    ):
        fetch("some/where", "images.zip")
    with pytest.raises(Unreachable, match=r"cannot read data/\*\.parquet of some/where"):
        next(read_rows("some/where", "data/*.parquet"))


def test_a_full_disk_is_not_called_a_damaged_archive(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"a picture")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "a.png", "a.png")

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.png")

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(OSError, match="No space left"):
        unpack([tmp_path / "a.tar.gz"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
