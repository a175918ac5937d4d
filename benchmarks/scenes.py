"""Learned vectors in bulk: scenes of nine training pictures, encoded by a trained model.

    python benchmarks/scenes.py --model runs/emoji/model --count 200000 --out scenes

OUT is a folder with `vectors.npy` (float16), `tiles.npy` (which picture is where), `names.json` (of
the pictures) and `queries.npz`: queries for one, two and three things. Existing scenes are not
encoded again, so the same command with a larger --count continues. Scenes are encoded in bf16 where
the processor is faster at it (the mean cosine to float32 is .9999), queries in float32.

N: scenes    Q: queries    R: vectors of a scene    D: width
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from metaembed_pl import MetaEmbedder
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.item import Item
from metaembed_pl.retrieval.scoring import fast_dtype

GRID, NUM_QUERIES, BATCH = 3, 256, 64
WORDS = {1: "{}", 2: "{} and {}", 3: "{}, {} and {}"}
"""Of a query for one, two, three things."""


def pictures(shards: Path) -> tuple[list[str], list[np.ndarray]]:
    """Names, and pictures as scenes show them: one picture a name."""
    found: dict[str, np.ndarray] = {}
    pairs = ShardedPairs(shards)
    for i in range(len(pairs)):
        pair = pairs[i]
        if pair.id.endswith("/en/small") and pair.query.text not in found:
            found[pair.query.text or ""] = np.asarray(pair.positive.load_image())
    return list(found), list(found.values())


def tiles_of(count: int, num_pictures: int) -> np.ndarray:
    """For each scene the nine pictures it shows; the first ones do not depend on `count`."""
    rng = random.Random(0)
    drawn = [rng.sample(range(num_pictures), GRID * GRID) for _ in range(count)]
    return np.array(drawn, dtype=np.uint16)


def scene(tiles: list[np.ndarray]) -> Image.Image:
    """Nine pictures in a grid."""
    rows = [np.hstack(tiles[start : start + GRID]) for start in range(0, GRID * GRID, GRID)]
    return Image.fromarray(np.vstack(rows))


def encode_queries(model: MetaEmbedder, tiles: np.ndarray, names: list[str], file: Path) -> None:
    """Ask for one, two and three pictures of some scenes."""
    rng, content = random.Random(1), {}
    for count, words in WORDS.items():
        asked = [
            rng.sample(tiles[i].tolist(), count) for i in rng.sample(range(10_000), NUM_QUERIES)
        ]
        texts = [words.format(*(names[tile] for tile in some)) for some in asked]
        content[f"vectors_{count}"] = model.encode_query(texts, BATCH).numpy()
        content[f"asked_{count}"] = np.array(asked)
    np.savez(file, **content)


def main() -> None:
    """Encode what is not there yet."""
    parser = argparse.ArgumentParser(description="Encode scenes in bulk.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shards", type=Path, default=Path("data/emoji/train/emoji_t2i"))
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = MetaEmbedder.from_pretrained(options.model)
    names, small = pictures(options.shards)
    options.out.mkdir(parents=True, exist_ok=True)
    tiles = tiles_of(options.count, len(names))
    (options.out / "names.json").write_text(json.dumps(names))
    np.save(options.out / "tiles.npy", tiles)
    encode_queries(model, tiles, names, options.out / "queries.npz")
    model.to(fast_dtype(torch.device("cpu")))
    width, slots = model.width, model.groups[-1].r_c
    file = options.out / f"vectors-{slots}x{width}.f16"
    done = file.stat().st_size // (2 * slots * width) if file.exists() else 0
    started, before = time.perf_counter(), done
    with file.open("r+b" if done else "wb") as opened:
        opened.seek(done * 2 * slots * width)
        while done < options.count:
            some = tiles[done : done + BATCH]
            items = [Item(image=scene([small[tile] for tile in row])) for row in some]
            vectors = model.encode_candidate(items, BATCH)
            opened.write(vectors.half().numpy().tobytes())
            done += len(some)
            if done // BATCH % 100 == 0:
                rate = (done - before) / (time.perf_counter() - started)
                print(f"{done:,} of {options.count:,}, {rate:.0f}/s", file=sys.stderr, flush=True)


def load(folder: Path, count: int | None = None) -> tuple[torch.Tensor, np.ndarray]:
    """Vectors and tiles of the first scenes, or of all."""
    (file,) = folder.glob("vectors-*.f16")
    slots, width = map(int, file.stem.removeprefix("vectors-").split("x"))
    there = np.memmap(file, np.float16, "c").reshape(-1, slots, width)
    if count is not None and len(there) < count:
        raise SystemExit(
            f"{file} has {len(there):,} scenes: run benchmarks/scenes.py --count {count}"
        )
    return torch.from_numpy(there[:count]), np.load(folder / "tiles.npy")[:count]


if __name__ == "__main__":
    main()
