"""Tables that a recipe names in place of shards: made into shards once, and found again later.

    train: [{path: mine.parquet, columns: {query: question, positive_image: page}, held_out: 0.1}]
    val: [{path: mine.parquet, columns: {query: question, positive_image: page}, held_out: 0.1}]

The shards are in the cache of remote.py, under a key of everything that determines them: the
content of a local file, the mapping, the share held out. Remote tables are read once.
"""

import hashlib
import json
import logging
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from metaembed_pl.data.mapping import FILES, PRESETS, Columns, digest, open_rows
from metaembed_pl.data.product import Making, Product, listed, make
from metaembed_pl.data.remote import HUB_ID, ShardCache, is_remote
from metaembed_pl.errors import UserError

log = logging.getLogger(__name__)

PRESET = "preset:"
TABLES = tuple(suffix for suffix in FILES if suffix != ".tar")  # a tar may be a shard of ours


@dataclass(frozen=True)
class RecipeTable:
    """A table that a recipe names.

    Args:
        where: a file, a folder, an address, or ORG/NAME.
        columns: its mapping; None: its columns are called like the keys of mapping.py.
        files: pattern of the files to read.
        held_out: share of its candidates to evaluate on and not to train on.
    """

    where: str
    columns: Columns | None = None
    files: str = "*"
    held_out: float = 0.0

    @classmethod
    def of(
        cls, path: str, columns: Columns | None, files: str, held_out: float
    ) -> "RecipeTable | None":
        """The table that a source names; None where it names shards.

        Raises:
            UserError: there is no such preset, or a key that only tables have is given for shards.
        """
        if not 0 <= held_out < 1:
            raise UserError(f"{path}: held_out is a share, 0 to below 1, not {held_out}")
        if path.startswith(PRESET):
            preset = PRESETS.get(path.removeprefix(PRESET))
            if preset is None or not preset.where:
                known = ", ".join(name for name, known in PRESETS.items() if known.where)
                raise UserError(f"{path}: presets with a place on the hub are {known}")
            files = preset.files if files == "*" else files
            return cls(preset.where, columns or preset.columns, files, held_out)
        if columns is not None or Path(path).suffix.lower() in TABLES:
            return cls(path, columns, files, held_out)
        if files != "*" or held_out:
            raise UserError(f"{path}: `files` and `held_out` are for tables: give `columns`, too")
        return None

    @property
    def name(self) -> str:
        """Its name in metrics, unless the recipe has one."""
        return re.sub(r"[^\w.-]+", "-", Path(self.where).stem) or "table"

    @property
    def folder(self) -> Path:
        """The folder of its shards."""
        decides = [self.where, self.columns, self.files, self.held_out, self._content()]
        key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
        return ShardCache.of_environment().folder / "tables" / f"{self.name}-{key}"

    @property
    def is_made(self) -> bool:
        """Whether its shards are complete; the card is written last."""
        return (self.folder / "README.md").exists()

    @property
    def is_elsewhere(self) -> bool:
        """Whether the table is remote."""
        is_id = HUB_ID.fullmatch(self.where) and Path(self.where).suffix not in TABLES
        return is_remote(self.where) or bool(is_id and not Path(self.where).exists())

    def shards(self, split: str) -> Path:
        """The shards of `train` or `test`; if nothing is held out, those of `train` for both."""
        return self.folder / (split if self.held_out else "train")

    def make(self) -> None:
        """Make its shards, unless they are there; other processes wait meanwhile.

        Raises:
            UserError: the table cannot be read, or too many of its pairs cannot be used.
        """
        folder = self.folder
        with ShardCache.of_environment().lock(folder.name):
            if self.is_made:
                return
            log.info("%s: made into shards once, in %s", self.where, folder)
            start = time.monotonic()
            try:
                made = make(self._product(folder), Making(f"a recipe that names {self.where}"))
            except UserError as error:
                if " --" not in str(error):
                    raise
                raise UserError(
                    f"{error}; `metaembed-pl prepare pairs --from {self.where}` has flags for this"
                ) from error
            count, seconds = sum(map(len, made.splits.values())), time.monotonic() - start
            dropped = f"{made.dropped.total():,}{listed(made.dropped)}"
            message = "%s: %s pairs in %.0f s, dropped: %s"
            log.info(message, self.where, f"{count:,}", seconds, dropped)

    def _product(self, folder: Path) -> Product:
        rows = open_rows(self.where, self.columns, self.files)
        settings = {"from": self.where, "files": self.files, "held_out": self.held_out}
        return Product(
            name=self.name,
            folder=folder,
            drafts=rows.drafts,
            source=self.where,
            held_out=self.held_out,
            settings=settings | rows.about,
        )

    def _content(self) -> dict[str, str]:
        if is_remote(self.where) or not Path(self.where).exists():
            return {}
        stat = Path(self.where).stat()
        return _digest(self.where, self.files, stat.st_mtime_ns, stat.st_size)


@lru_cache
def _digest(where: str, files: str, changed_ns: int, num_bytes: int) -> dict[str, str]:
    return digest(where, files)
