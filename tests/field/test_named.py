"""What a person names is what is used: no other file of that name, nothing left out unsaid."""

import json
import os
import unicodedata
from pathlib import Path

import pytest

import hub
import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.data_prep import folder as folder_script
from metaembed_pl.data_prep import pairs as pairs_script
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, read_items, read_pairs
from metaembed_pl.retrieval.store import Store

COMPOSED, DECOMPOSED = "Käse", unicodedata.normalize("NFD", "Käse")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.embedder().save_pretrained(folder)
    return folder


def embed(model, items, store, *arguments):
    command = ["embed", "--model", model, "--items", items, "--store", store, "--device", "cpu"]
    return main([str(part) for part in (*command, *arguments)])


def pdf(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.Image.new("RGB", (60, 60), color).save(path, "PDF")
    return path


def test_pdfs_of_one_name_in_two_folders_are_two_items(model, tmp_path):
    store = tmp_path / "shelf"
    for year in ("y2023", "y2024", "y2024", "y2023"):
        file = tmp_path / year / "annual.pdf"
        if not file.exists():
            pdf(file, "red" if year == "y2023" else "blue")
        assert embed(model, file, store) == 0
    assert Store.open(store).ids == ["annual.pdf#page=1", "y2024/annual.pdf#page=1"]


def test_pictures_of_one_name_in_two_folders_are_two_items(model, tmp_path):
    for seed, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        tiny.picture(seed).save(tmp_path / name / "0001.png")
        assert embed(model, tmp_path / name, tmp_path / "shelf") == 0
    store = Store.open(tmp_path / "shelf")
    assert store.ids == ["0001.png", "two/0001.png"]
    assert not store.vectors()[0].allclose(store.vectors()[1])


def test_a_picture_replaced_on_disk_is_replaced_in_the_store(model, tmp_path):
    (tmp_path / "in").mkdir()
    tiny.picture(0).save(tmp_path / "in" / "a.png")
    assert embed(model, tmp_path / "in", tmp_path / "shelf") == 0
    before = Store.open(tmp_path / "shelf").vectors()
    tiny.picture(1).save(tmp_path / "in" / "a.png")
    assert embed(model, tmp_path / "in", tmp_path / "shelf") == 0
    store = Store.open(tmp_path / "shelf")
    assert store.ids == ["a.png"]
    assert not store.vectors().allclose(before)


def test_another_text_under_an_id_of_the_store_is_told(model, tmp_path, capsys):
    file = tmp_path / "items.jsonl"
    for text in ("red apple", "blue star"):
        file.write_text(json.dumps({"id": "a", "text": text}))
        assert embed(model, file, tmp_path / "shelf") == 0
    assert "1 ids stand for other items" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pairs.parquet", "parquet/pairs.parquet", "json/pairs.parquet"])
def test_a_relative_parquet_file_is_that_one(tmp_path, monkeypatch, name):
    for path in ("pairs.parquet", "parquet/pairs.parquet", "json/pairs.parquet"):
        hub.write_parquet(tmp_path / path, [{"query": path, "positive": "x"}])
    monkeypatch.chdir(tmp_path)
    options = ["--pairs", name, "--out", "out", "--held-out", "0", "--num-workers", "0"]
    assert pairs_script.main(options) == 0
    assert [pair.query.text for pair in ShardedPairs(tmp_path / "out" / "train")] == [name]


def test_the_hubs_layout_in_a_folder_called_like_a_format_is_that_folder(tmp_path, monkeypatch):
    from metaembed_pl.data_prep._rows import read_rows

    hub.write_parquet(tmp_path / "parquet" / "a.parquet", [{"x": "right"}])
    hub.write_parquet(tmp_path / "a.parquet", [{"x": "wrong"}])
    monkeypatch.chdir(tmp_path)
    assert [row["x"] for row in read_rows("parquet", "a.parquet")] == ["right"]
    with pytest.raises(UserError, match="json is neither a folder"):
        list(read_rows("json", "a.parquet"))


def write_cellar(tmp_path):
    """A picture, others with other suffixes, a linked folder, and what a Mac leaves beside them."""
    root, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path in (root, elsewhere):
        path.mkdir()
    tiny.picture(0).save(root / "a.png")
    tiny.picture(1).save(root / "photo.jfif", "JPEG")
    tiny.picture(2).save(root / "LOUD.JPG", "JPEG")
    tiny.picture(3).save(root / "no ending", "PNG")
    tiny.picture(4).save(elsewhere / "linked.png")
    (root / "linkdir").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (root / "._a.png").write_bytes(b"\0\5\x16\7")
    (root / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "gone.png").symlink_to(tmp_path / "nothing")
    return root


FOUND = ["LOUD.JPG", "a.png", "linkdir/linked.png", "no ending", "photo.jfif"]
TOLD = ("1 hidden", "1 .heic", "1 broken link, pipe or device")


def test_a_folders_pictures_are_all_found_and_the_rest_is_told(model, tmp_path, caplog):
    root = write_cellar(tmp_path)
    assert [item.id for item in read_items(root)] == FOUND
    assert all(words in caplog.text for words in TOLD)
    caplog.clear()
    assert embed(model, root, tmp_path / "shelf") == 0
    assert Store.open(tmp_path / "shelf").ids == FOUND
    assert all(words in caplog.text for words in TOLD)
    caplog.clear()
    out = tmp_path / "out"
    options = ["--from", root, "--out", out, "--held-out", "0", "--num-workers", "0"]
    assert folder_script.main(list(map(str, options))) == 0
    assert sorted(pair.positive.id for pair in ShardedPairs(out / "train")) == FOUND
    assert all(words in caplog.text for words in TOLD)


def test_avif_is_read_where_the_decoder_is_there(tmp_path):
    features = pytest.importorskip("PIL.features")
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    tiny.picture(0).save(tmp_path / "a.avif")
    assert read_items(tmp_path)[0].load_image().size == (56, 56)


def test_a_name_that_is_not_utf8_is_told_and_the_rest_is_found(tmp_path, caplog):
    tiny.picture(0).save(tmp_path / "a.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(hub.png(1))
    assert [item.id for item in read_items(tmp_path)] == ["a.png"]
    assert "b'caf\\xe9.png'" in caplog.text


def test_a_folder_whose_name_is_not_utf8_is_told_and_the_rest_is_found(tmp_path, caplog):
    tiny.picture(0).save(tmp_path / "a.png")
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "b.png").write_bytes(hub.png(1))
    assert [item.id for item in read_items(tmp_path)] == ["a.png"]
    assert "b'caf\\xe9/b.png'" in caplog.text


@pytest.mark.parametrize(("on_disk", "named"), [(DECOMPOSED, COMPOSED), (COMPOSED, DECOMPOSED)])
def test_names_join_however_their_letters_are_composed(tmp_path, on_disk, named):
    (tmp_path / on_disk).mkdir()
    (tmp_path / on_disk / f"{on_disk}.png").write_bytes(hub.png(0))
    image = f"{named}/{named}.png"
    (tmp_path / "p.jsonl").write_text(json.dumps({"query": "a", "positive": {"image": image}}))
    assert next(read_pairs(tmp_path / "p.jsonl")).positive.image_content() == hub.png(0)
    (tmp_path / "p.csv").write_text(f"query,positive_image\na,{image}\n")
    out = tmp_path / "out"
    options = ["--pairs", tmp_path / "p.csv", "--out", out, "--held-out", "0", "--num-workers", "0"]
    assert pairs_script.main(list(map(str, options))) == 0
    assert ShardedPairs(out / "train")[0].positive.image == hub.png(0)


@pytest.mark.parametrize("how", ["metadata", "sidecar"])
def test_captions_join_their_pictures_however_composed(tmp_path, capsys, how):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    (root / f"{DECOMPOSED}.png").write_bytes(hub.png(0))
    if how == "metadata":
        lines = [{"file_name": f"{COMPOSED}.png", "text": text} for text in ("cheese", "Brie")]
        lines.append({"file_name": "nowhere.png", "text": "x"})
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    else:
        (root / f"{COMPOSED}.txt").write_text("cheese\nBrie")
    options = ["--from", root, "--out", out, "--held-out", "0", "--num-workers", "0"]
    assert folder_script.main([*map(str, options), "--text", how]) == 0
    assert [pair.query.text for pair in ShardedPairs(out / "train")] == ["cheese", "Brie"]
    assert ("1 texts have no picture here" in capsys.readouterr().err) == (how == "metadata")


def test_texts_that_look_the_same_are_the_same():
    assert Item(COMPOSED).content == Item(DECOMPOSED).content


def write_tar(path, members):
    import io
    import tarfile

    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_tar_from_elsewhere_is_read_and_what_is_left_out_of_it_is_told(tmp_path, caplog):
    pair = json.dumps({"query": "red", "positive": {"text": "apple", "id": 7}}).encode()
    odd = os.fsdecode(b"caf\xe9")
    names = ("photo-a..b.json", f"{odd}.json", "._x.json", "README")
    write_tar(tmp_path / "0.tar", [(name, pair) for name in names])
    pairs = ShardedPairs(tmp_path)
    assert [pairs.locate(i)[1] for i in range(len(pairs))] == ["photo-a", "caf\\xe9"]
    assert pairs[1].positive.id == "7"
    assert "2 members belong to no pair, such as '._x.json'" in caplog.text


def test_two_members_of_one_name_are_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.json", b"{}"), ("a.JSON", b"{}")])
    with pytest.raises(UserError, match=r"two members a\.json"):
        ShardedPairs(tmp_path)
