"""Small datasets in the layouts that the hub serves: Parquet with pictures, zips, gzipped tars."""

import io
import tarfile
import zipfile
from pathlib import Path

import datasets

import tiny

datasets.disable_progress_bars()


def png(number: int) -> bytes:
    """A small picture of its own for each number, encoded."""
    buffer = io.BytesIO()
    tiny.picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict], images: tuple[str, ...] = ()) -> None:
    """A Parquet file as `push_to_hub` makes it; bytes in the columns of `images` are pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {name: {"bytes": v, "path": None} if name in images else v for name, v in row.items()}
        for row in rows
    ]
    dataset = datasets.Dataset.from_list(rows)
    for name in images:
        dataset = dataset.cast_column(name, datasets.Image())
    dataset.to_parquet(str(path))


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    """A zip of files by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def tar_gz(files: dict[str, bytes]) -> bytes:
    """The content of a gzipped tar of files by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
