"""Each training set in its published layout: written here, read by its script, the same pairs."""

import importlib
import json

import pytest
import yaml

import hub
from metaembed_pl.data.shards import ShardedPairs

PAPER = "recipes/sources/paper.yaml"


def run(script, out, *options):
    module = importlib.import_module(f"metaembed_pl.data_prep.{script}")
    return module.main(["--out", str(out), "--num-workers", "0", *options])


def shown(item):
    """An item as (text, picture)."""
    return (item.text, item.image)


def pairs_of(folder):
    return [
        (shown(pair.query), shown(pair.positive), [shown(item) for item in pair.negatives])
        for pair in ShardedPairs(folder)
    ]


def mmeb_row(query, positive, negative=("", "")):
    names = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
    return dict(zip(names, (*query, *positive, *negative), strict=True))


def test_mmeb_train_reads_parquet_and_pictures_in_zips(tmp_path):
    copy = tmp_path / "MMEB-train"
    # One set with paths as they are in the zip, one with the folder that the zip is unpacked in.
    for subset, head in (("CIRR", ""), ("ImageNet_1K", "images/")):
        rows = [
            mmeb_row(
                ("<|image_1|>\nWith a hat", f"{head}{subset}/a.png"),
                ("<|image_1|>\nRepresent the image", f"{head}{subset}/b.png"),
                ("<|image_1|>\nRepresent the image", f"{head}{subset}/c.png"),
            ),
            mmeb_row(("a text alone", ""), ("<|image_1|>\n", f"{head}{subset}/c.png")),
        ]
        hub.write_parquet(copy / subset / "original-00000-of-00001.parquet", rows)
        other = [mmeb_row(("said otherwise", ""), ("yes", ""))]
        hub.write_parquet(copy / subset / "diverse_instruction-00000-of-00001.parquet", other)
        pictures = {f"{subset}/{name}.png": hub.png(i) for i, name in enumerate("abc")}
        hub.write_zip(copy / "images_zip" / f"{subset}.zip", pictures)
    subsets = ("--subset", "CIRR", "--subset", "ImageNet_1K")
    assert run("mmeb_train", tmp_path / "out", "--from", str(copy), *subsets) == 0
    for subset in ("CIRR", "ImageNet_1K"):
        assert pairs_of(tmp_path / "out" / subset) == [
            (
                ("With a hat", hub.png(0)),
                ("Represent the image", hub.png(1)),
                [("Represent the image", hub.png(2))],
            ),
            (("a text alone", None), (None, hub.png(2)), []),
        ]
    diverse = ("--split", "diverse_instruction", "--subset", "CIRR")
    assert run("mmeb_train", tmp_path / "diverse", "--from", str(copy), *diverse) == 0
    assert pairs_of(tmp_path / "diverse" / "CIRR") == [
        (("said otherwise", None), ("yes", None), [])
    ]


@pytest.mark.parametrize("as_strings", [True, False], ids=["strings", "lists"])
def test_moca_pairs_read_hard_negatives_as_lists_and_as_strings_that_hold_one(tmp_path, as_strings):
    copy = tmp_path / "MoCa-CL-Pairs"
    texts, paths = ["a dog", "", "it's a [fox]", ""], ["", "images/CIRR/b.png", "", ""]
    row = mmeb_row(("a cat", ""), ("", "images/CIRR/a.png"))
    row |= {
        "neg_text": str(texts) if as_strings else texts,
        "neg_image_path": str(paths) if as_strings else paths,
    }
    hub.write_parquet(copy / "CIRR" / "train-00000-of-00001.parquet", [row])
    pictures = {f"CIRR/{name}.png": hub.png(i) for i, name in enumerate("ab")}
    hub.write_zip(copy / "images_zip" / "CIRR.zip", pictures)
    assert run("moca_pairs", tmp_path / "out", "--from", str(copy), "--subset", "CIRR") == 0
    assert pairs_of(tmp_path / "out" / "mmeb_train" / "CIRR") == [
        (
            ("a cat", None),
            (None, hub.png(0)),
            [("a dog", None), (None, hub.png(1)), ("it's a [fox]", None)],
        )
    ]


def test_moca_pairs_run_no_code_that_stands_in_a_row(tmp_path, capsys):
    copy = tmp_path / "MoCa-CL-Pairs"
    trap = f"[__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()]"
    row = mmeb_row(("a cat", ""), ("yes", ""), (trap, ""))
    hub.write_parquet(copy / "CIRR" / "train-00000-of-00001.parquet", [row])
    assert run("moca_pairs", tmp_path / "out", "--from", str(copy), "--subset", "CIRR") == 0
    assert not (tmp_path / "ran").exists()
    assert pairs_of(tmp_path / "out" / "mmeb_train" / "CIRR")[0][2] == [(trap, None)]


def test_moca_pairs_unpack_an_archive_in_parts_once(tmp_path):
    copy, images = tmp_path / "MoCa-CL-Pairs", tmp_path / "images"
    row = mmeb_row(("a slide", ""), ("", "images/visrag_syn/a.png"))
    hub.write_parquet(copy / "visrag_syn" / "train-00000-of-00001.parquet", [row] * 2)
    content = hub.tar_gz({"visrag_syn/a.png": hub.png(0)})
    cuts = [0, 10, 11, 60, 100, len(content)]
    (images / "supplement_images_zip").mkdir(parents=True)
    for letter, start, end in zip("abcde", cuts, cuts[1:], strict=False):
        part = images / "supplement_images_zip" / f"visrag_syn.tar.gz.part_a{letter}"
        part.write_bytes(content[start:end])
    options = ("--from", str(copy), "--images", str(images), "--subset", "visrag_syn")
    assert run("moca_pairs", tmp_path / "out", *options) == 0
    assert (
        pairs_of(tmp_path / "out" / "visrag_syn")
        == [(("a slide", None), (None, hub.png(0)), [])] * 2
    )
    part.unlink()
    (tmp_path / "out" / ".images").rename(tmp_path / "kept")
    assert run("moca_pairs", tmp_path / "again", *options) == 2  # a part is missing


def test_moca_pairs_validate_on_queries_that_are_not_trained_on(tmp_path, monkeypatch):
    from metaembed_pl.data_prep import moca_pairs as moca

    folders = {name: moca.FOLDERS[name] for name in ("CIRR", "OK-VQA")}
    monkeypatch.setattr(moca, "FOLDERS", folders)
    monkeypatch.setattr(moca, "NUM_VALIDATION", 5)
    copy = tmp_path / "MoCa-CL-Pairs"
    for subset in folders:
        path = f"images/{subset}/a.png"
        rows = [
            mmeb_row((f"{subset}, {i} asks {k}", ""), (f"answer {i} {k}", ""), ("no", ""))
            | {"qry_image_path": path if subset == "OK-VQA" and i % 2 else ""}
            for i in range(40)
            for k in range(3)
        ]
        hub.write_parquet(copy / subset / "train-00000-of-00001.parquet", rows)
        hub.write_zip(copy / "images_zip" / f"{subset}.zip", {f"{subset}/a.png": hub.png(0)})
    flags = ("--from", str(copy), "--hold-out", "4")
    assert run("moca_pairs", tmp_path / "out", *flags) == 0
    held = [query for query, *_ in pairs_of(tmp_path / "out" / "paper_val")]
    trained = {
        subset: [query for query, *_ in pairs_of(tmp_path / "out" / folder)]
        for subset, folder in folders.items()
    }
    assert [text.split(",")[0] for text, _ in held] == ["CIRR"] * 5 + ["OK-VQA"] * 5
    assert not {text for text, _ in held} & {text for each in trained.values() for text, _ in each}
    assert 60 <= len(trained["CIRR"]) <= 110  # of 120, about 90
    # All questions to a picture go the same way.
    num_shown = sum(picture is not None for _, picture in trained["OK-VQA"])
    assert num_shown in (0, 60)
    assert (
        run("moca_pairs", tmp_path / "all", "--subset", "CIRR", *flags[:2], "--hold-out", "0") == 0
    )
    assert len(pairs_of(tmp_path / "all" / "mmeb_train" / "CIRR")) == 120


def test_the_scripts_write_all_folders_that_the_papers_recipes_read(request):
    from metaembed_pl.data_prep import moca_pairs as moca

    expected = yaml.safe_load((request.config.rootpath / PAPER).read_text())
    assert {source["path"] for source in expected} == {f"data/{f}" for f in moca.FOLDERS.values()}
    from metaembed_pl.data_prep import _mmeb as mmeb

    assert len(mmeb.TRAIN_SUBSETS) == 20
    assert set(moca.ARCHIVES) == set(moca.FOLDERS) - set(mmeb.TRAIN_SUBSETS)


def test_colpali_train_and_visrag_read_pictures_in_parquet(tmp_path):
    rows = [
        {
            "image": hub.png(i),
            "image_filename": f"{i}.png",
            "query": f"what is {i}?",
            "answer": str(i),
            "source": "docvqa",
            "options": None,
            "page": "1",
            "model": None,
            "prompt": None,
            "answer_type": None,
        }
        for i in range(3)
    ]
    expected = [((f"what is {i}?", None), (None, hub.png(i)), []) for i in range(3)]
    copy = tmp_path / "copy" / "data"
    hub.write_parquet(copy / "train-00000-of-00002.parquet", rows[:2], images=("image",))
    hub.write_parquet(copy / "train-00001-of-00002.parquet", rows[2:], images=("image",))
    options = ("--from", str(copy.parent))
    assert run("colpali_train", tmp_path / "colpali", *options) == 0
    assert pairs_of(tmp_path / "colpali") == expected
    assert run("visrag", tmp_path / "visrag", "--subset", "visrag_ind", *options) == 0
    assert pairs_of(tmp_path / "visrag" / "visrag_ind") == expected
    assert run("visrag", tmp_path / "visrag", *options) == 2  # two datasets from one folder


@pytest.mark.parametrize("as_objects", [False, True], ids=["ids", "objects"])
def test_infoseek_reads_m_beirs_queries_and_pool(tmp_path, as_objects):
    copy = tmp_path / "M-BEIR"
    oven = copy / "mbeir_images" / "oven_images"
    oven.mkdir(parents=True)
    for i in range(2):
        (oven / f"{i}.jpg").write_bytes(hub.png(i))
    pool = [
        {"did": "6:1", "txt": "Cats. They purr.", "img_path": None, "modality": "text"},
        {"did": "6:2", "txt": "Dogs. They bark.", "img_path": None, "modality": "text"},
        {
            "did": "6:3",
            "txt": "Cats. They purr.",
            "img_path": "mbeir_images/oven_images/1.jpg",
            "modality": "image,text",
        },
    ]
    ids = [["6:1", "6:3"], ["6:2", "6:9"]]
    right, wrong = [[{"did": id} for id in some] for some in ids] if as_objects else ids
    query = {
        "qid": "6:1",
        "query_txt": "What sound does it make?",
        "query_img_path": "mbeir_images/oven_images/0.jpg",
        "query_modality": "image,text",
        "query_src_content": "{}",
        "pos_cand_list": right,
        "neg_cand_list": wrong,
    }
    for file, lines in (
        ("query/train/mbeir_infoseek_train.jsonl", [query]),
        ("cand_pool/global/mbeir_union_train_cand_pool.jsonl", pool),
    ):
        (copy / file).parent.mkdir(parents=True)
        (copy / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("infoseek", tmp_path / "out", "--from", str(copy)) == 0
    asked = ("What sound does it make?", hub.png(0))
    assert pairs_of(tmp_path / "out" / "infoseek_it2t") == [
        (asked, ("Cats. They purr.", None), [("Dogs. They bark.", None)])
    ]
    assert pairs_of(tmp_path / "out" / "infoseek_it2it") == [
        (asked, ("Cats. They purr.", hub.png(1)), [])
    ]
    (positive,) = (pair.positive for pair in ShardedPairs(tmp_path / "out" / "infoseek_it2t"))
    assert positive.id == "6:1"
