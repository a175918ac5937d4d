"""Shards: what is written is read again, by us and by webdataset; what is broken is named."""

import io
import json
import pickle
import tarfile
from dataclasses import replace

import pytest
import webdataset
from PIL import Image

from metaembed_pl.data.collate import decoded, with_positive_of
from metaembed_pl.data.shards import ShardedPairs, ShardWriter, verify
from metaembed_pl.errors import BadSample, UserError
from metaembed_pl.item import Item, Pair


def picture(value, format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, format=format)
    return buffer.getvalue()


def make_pair(i):
    return Pair(
        id=f"a/b.{i}",  # dots and slashes mean something in a tar
        query=Item(f"query {i}", image=picture(i, "JPEG")),
        positive=Item(image=picture(i), id=f"p{i}", answers=(f"p{i}", "twin")),
        negatives=(Item("wrong"), Item(image=picture(i + 1, "WEBP"), id="n")),
        asks="twin",
    )


def write(folder, count=5, **options):
    with ShardWriter(folder, "pets", pairs_per_shard=2, **options) as writer:
        for i in range(count):
            writer.write(make_pair(i))
    return folder


def write_tar(path, members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.parent


def as_json(value):
    return json.dumps(value).encode()


def test_what_is_written_is_read_again(tmp_path):
    pairs = ShardedPairs(write(tmp_path / "pets"))
    assert list(pairs) == [make_pair(i) for i in range(5)]
    assert pairs[-1] == make_pair(4)
    assert pairs.name == "pets"
    assert pairs.shard_sizes == [2, 2, 1]
    assert pairs.locate(3) == ("00001.tar", "00000003")


# webdataset leaves its last file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_plain_webdataset_reads_the_same_bytes(tmp_path):
    folder = write(tmp_path / "pets")
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    for i, sample in enumerate(dataset):
        pair = make_pair(i)
        assert json.loads(sample["json"])["id"] == pair.id
        assert sample["query.jpg"] == pair.query.image
        assert sample["positive.png"] == pair.positive.image
        assert sample["negative.1.webp"] == pair.negatives[1].image
    assert i == 4


def test_a_picture_of_another_kind_becomes_png(tmp_path):
    images = [Image.new("CMYK", (4, 4)), picture(7, "BMP")]
    with ShardWriter(tmp_path / "pets", "pets") as writer:
        for i, image in enumerate(images):
            writer.write(Pair(str(i), Item("q"), Item(image=image)))
    for pair, image in zip(ShardedPairs(tmp_path / "pets"), images, strict=True):
        assert pair.positive.image.startswith(b"\x89PNG")
        assert pair.positive.load_image().tobytes() == Item(image=image).load_image().tobytes()


def test_equal_pairs_make_equal_shards(tmp_path):
    first, second = (write(tmp_path / name) for name in ("a", "b"))
    for file in ("00000.tar", "manifest.json", "index.jsonl"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_the_manifest_carries_the_licence(tmp_path):
    folder = write(tmp_path / "pets", licence="CC0-1.0", attribution="nobody", settings={"n": 1})
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["num_pairs"] == 5
    assert (manifest["licence"], manifest["attribution"]) == ("CC0-1.0", "nobody")
    assert manifest["settings"] == {"n": 1}
    assert [shard["bytes"] for shard in manifest["shards"]] == [
        path.stat().st_size for path in sorted(folder.glob("*.tar"))
    ]


def test_reads_after_pickling(tmp_path):
    pairs = ShardedPairs(write(tmp_path / "pets"))
    assert pairs[0] == pickle.loads(pickle.dumps(pairs))[0]


def test_nothing_is_left_of_a_failed_write(tmp_path):
    def fail():
        with ShardWriter(tmp_path / "pets", "pets") as writer:
            writer.write(make_pair(0))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no pairs were written"):
        write(tmp_path / "pets", count=0)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_shards(tmp_path):
    folder = write(tmp_path / "pets")
    with pytest.raises(UserError, match="no pairs were written"):
        write(folder, count=0, overwrite=True)
    assert len(ShardedPairs(folder)) == 5


def test_overwrites_shards_only_and_only_when_asked(tmp_path):
    folder = write(tmp_path / "pets")
    with pytest.raises(UserError, match="is not empty"):
        write(folder)
    assert len(ShardedPairs(write(folder, count=3, overwrite=True))) == 3
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    with pytest.raises(UserError, match="not a folder of shards"):
        write(tmp_path / "letters", overwrite=True)


def test_the_writer_names_the_pair_whose_picture_is_bad(tmp_path):
    with (
        pytest.raises(UserError, match=r"pair 'x'.*does not decode"),
        ShardWriter(tmp_path / "pets", "pets") as writer,
    ):
        writer.write(Pair("x", Item("q"), Item(image=b"no picture")))


def test_foreign_tars_are_scanned(tmp_path):
    folder = write_tar(
        tmp_path / "theirs" / "b.tar",
        {
            "./dir/1.json": as_json({"query": "a cat", "positive": {"text": "fur"}}),
            "./dir/1.negative.0.PNG": picture(1),
            "./dir/1.cls": b"3",
            "README": b"no suffix",
            "2.json": as_json({"query": {}, "positive": "fur", "negatives": ["x", {"text": "y"}]}),
            "2.query.jpeg": picture(2, "JPEG"),
            "2.negative.1.png": picture(3),
        },
    )
    first, second = pairs = ShardedPairs(folder)
    assert pairs.name == "theirs"
    assert (first.id, first.negatives) == ("./dir/1", (Item(image=picture(1)),))
    assert second.query.image == picture(2, "JPEG")
    assert second.negatives == (Item("x"), Item("y", image=picture(3)))


def test_an_index_can_be_lost(tmp_path):
    folder = write(tmp_path / "pets")
    (folder / "index.jsonl").unlink()
    assert list(ShardedPairs(folder)) == [make_pair(i) for i in range(5)]
    (folder / "manifest.json").unlink()
    assert len(ShardedPairs(folder)) == 5


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"k.json": b"{"}, "its JSON is broken"),
        ({"k.json": b"[" * 100_000}, "its JSON is broken"),
        ({"k.json": b"[]"}, "must be an object, not list"),
        ({"k.query.png": picture(1)}, r"no member \.json"),
        ({"k.json": as_json({"query": "a"})}, 'needs a "positive"'),
        ({"k.json": as_json({"query": "a", "positive": {}})}, "neither"),
        ({"k.json": as_json({"query": "a", "positive": {"image": "positive.png"}})}, "is missing"),
        ({"k.json": as_json({"query": "a", "positive": {"image": "/etc/passwd"}})}, "is missing"),
        ({"k.json": as_json({"query": "a", "positive": "b", "negatives": {}})}, "must be a list"),
        ({"k.json": as_json({"query": "a", "positive": 3})}, "must be a JSON object, not int"),
    ],
)
def test_a_bad_sample_is_named_with_its_reason(tmp_path, members, reason):
    pairs = ShardedPairs(write_tar(tmp_path / "theirs" / "x.tar", members))
    with pytest.raises(BadSample, match=reason) as caught:
        pairs[0]
    assert (caught.value.shard, caught.value.key) == ("x.tar", "k")
    assert "\n" not in str(caught.value)


def test_a_negative_with_an_absurd_number_is_not_believed(tmp_path):
    members = {
        "k.json": as_json({"query": "a", "positive": "b"}),
        "k.negative.999999999.png": picture(1),
        "k.negative.x.png": picture(1),
    }
    assert ShardedPairs(write_tar(tmp_path / "theirs" / "x.tar", members))[0].negatives == ()


def test_a_shard_cut_off_after_opening_is_a_bad_sample(tmp_path):
    folder = write(tmp_path / "pets")
    pairs = ShardedPairs(folder)
    content = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(content[:1000])
    with pytest.raises(BadSample, match="is truncated"):
        pairs[2]
    (folder / "00001.tar").unlink()
    with pytest.raises(BadSample, match="No such file"):
        pairs[2]
    assert pairs[0] == make_pair(0)


@pytest.mark.parametrize("content", [b"", b"garbage" * 500, b"\0" * 5000])
def test_refuses_a_shard_that_is_no_tar(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"not a complete, uncompressed tar|contain no pairs"):
        ShardedPairs(tmp_path)


def test_refuses_a_foreign_shard_that_is_cut_off(tmp_path):
    content = {"k.json": as_json({"query": "a", "positive": "b"}), "k.query.png": picture(1)}
    path = write_tar(tmp_path / "theirs" / "x.tar", content) / "x.tar"
    path.write_bytes(path.read_bytes()[:1600])
    with pytest.raises(UserError, match="not a complete, uncompressed tar"):
        ShardedPairs(path.parent)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("/etc/passwd.json", tarfile.REGTYPE),
        ("../../k.json", tarfile.REGTYPE),
        ("k.json", tarfile.SYMTYPE),
        ("k.json", tarfile.LNKTYPE),
        ("k.json", tarfile.CHRTYPE),
        ("k.json", tarfile.FIFOTYPE),
    ],
)
def test_refuses_members_that_are_not_plain_files(tmp_path, name, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(member)
    with pytest.raises(
        UserError, match=r"x\.tar: member .* is a link, a device or an escaping path"
    ):
        ShardedPairs(tmp_path)


def test_refuses_a_missing_or_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"no folder of shards at .*nowhere: prepare the data"):
        ShardedPairs(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no shards \(\*\.tar\).*: prepare the data"):
        ShardedPairs(tmp_path)
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000.tar").touch()
    with pytest.raises(UserError, match=r"choose one of [^,]*test, [^,]*train$"):
        ShardedPairs(tmp_path)


def set_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "is malformed"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is malformed"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1}'), "malformed .'shards'|name"),
        (lambda f: set_manifest(f, format=9), "its format is 9; this version reads 1 and 2"),
        (lambda f: set_manifest(f, num_pairs=9), "num_pairs is not the sum"),
        (lambda f: set_manifest(f, shards=[], num_pairs=0), r"disagree on '00000\.tar'"),
        (lambda f: (f / "00001.tar").unlink(), r"disagree on '00001\.tar'"),
        (lambda f: (f / "extra.tar").touch(), r"disagree on 'extra\.tar'"),
        (lambda f: (f / "00001.tar").write_bytes(b"x"), "has 1 bytes, its manifest says"),
        (lambda f: (f / "index.jsonl").write_text(""), "disagrees with manifest"),
        (lambda f: (f / "index.jsonl").write_text("{}\n" * 5), r"index\.jsonl:1: not a line"),
    ],
)
def test_refuses_a_folder_whose_files_disagree(tmp_path, spoil, message):
    folder = write(tmp_path / "pets")
    spoil(folder)
    with pytest.raises(UserError, match=message):
        ShardedPairs(folder)


def test_refuses_an_index_that_leads_out_of_the_folder(tmp_path):
    folder = write(tmp_path / "pets", count=3)
    lines = (folder / "index.jsonl").read_text().splitlines()
    line = json.loads(lines[1])
    for wrong in (["../" + line[0], *line[1:]], [*line[:2], {"json": [-1, 4]}], [1, 2]):
        lines[1] = json.dumps(wrong)
        (folder / "index.jsonl").write_text("\n".join(lines) + "\n")
        with pytest.raises(UserError, match=r"index\.jsonl:2: not a line of an index"):
            ShardedPairs(folder)


def test_verify_finds_a_flipped_byte(tmp_path):
    folder = write(tmp_path / "pets")
    verify(folder)
    content = bytearray((folder / "00001.tar").read_bytes())
    content[600] ^= 1
    (folder / "00001.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"00001\.tar does not have the checksum"):
        verify(folder)
    with pytest.raises(UserError, match="cannot be verified"):
        verify(write_tar(tmp_path / "theirs" / "x.tar", {"k.json": b"{}"}))


def questions(count=3, negatives=None):
    """Questions to one candidate without an id, with pictures and hard negatives."""
    positive = Item("page", image=picture(200), answers=("x", "y"))
    return [
        Pair(
            f"q{i}",
            Item(f"question {i}", image=picture(i)),
            positive,
            (Item(image=picture(100 + i)), Item("wrong")) if negatives is None else negatives,
            asks="xy"[i % 2],
        )
        for i in range(count)
    ]


def members_of(folder):
    with tarfile.open(folder / "00000.tar") as tar:
        return [member.name for member in tar]


def test_questions_to_one_candidate_are_one_sample(tmp_path):
    with ShardWriter(tmp_path / "pages", "pages") as writer:
        for pair in (*questions(), make_pair(7)):
            writer.write(pair)
        assert writer.num_pairs == 4
    pairs = ShardedPairs(tmp_path / "pages")
    assert list(pairs) == [*questions(), make_pair(7)]
    assert pairs.shard_sizes == [4]
    assert [pairs.locate(i)[1] for i in range(4)] == ["00000000"] * 3 + ["00000003"]
    names = members_of(tmp_path / "pages")
    assert sum(name.endswith("00000000.positive.png") for name in names) == 1
    assert "00000000.query.2.negative.0.png" in names
    assert pairs.candidate_numbers().tolist() in ([0, 0, 0, 1], [1, 1, 1, 0])


def test_hard_negatives_of_all_questions_belong_to_the_candidate(tmp_path):
    shared = (Item(image=picture(100)), Item("wrong"))
    with ShardWriter(tmp_path / "pages", "pages") as writer:
        for pair in questions(negatives=shared):
            writer.write(pair)
    assert [pair.negatives for pair in ShardedPairs(tmp_path / "pages")] == [shared] * 3
    assert sum("negative" in name for name in members_of(tmp_path / "pages")) == 1


def test_questions_keep_the_score_that_a_model_gave_their_positive(tmp_path):
    given = [
        replace(pair, positive=replace(pair.positive, score=score))
        for pair, score in zip(questions(), (0.5, None, 0.0), strict=True)
    ]
    with ShardWriter(tmp_path / "pages", "pages") as writer:
        for pair in given:
            writer.write(pair)
    pairs = ShardedPairs(tmp_path / "pages")
    assert list(pairs) == given
    assert {pairs.locate(i)[1] for i in range(3)} == {"00000000"}
    first = decoded(pairs[0])
    last = with_positive_of(pairs[2], first)
    assert last.positive.load_image() is first.positive.load_image()
    assert (first.positive.score, last.positive.score) == (0.5, 0.0)


def test_many_questions_begin_another_sample(tmp_path):
    with ShardWriter(tmp_path / "pages", "pages", pairs_per_shard=50) as writer:
        for pair in questions(70):
            writer.write(pair)
    pairs = ShardedPairs(tmp_path / "pages")
    assert list(pairs) == questions(70)
    assert pairs.shard_sizes == [64, 6]
    assert set(pairs.candidate_numbers()) == {0}


def test_pairs_of_one_candidate_find_each_other_however_they_were_written(tmp_path):
    pairs = [
        Pair("1", Item("a"), Item(image=picture(1))),
        Pair("2", Item("b"), Item("text alone")),
        Pair("3", Item("c"), Item("another text", id="named")),
        Pair("4", Item("d"), Item(image=picture(1))),
        Pair("5", Item("e"), Item("text alone")),
        Pair("6", Item("f"), Item("a third text", id="named")),
    ]
    with ShardWriter(tmp_path / "s", "s") as writer:
        for pair in pairs:
            writer.write(pair)
    written = ShardedPairs(tmp_path / "s").candidate_numbers()
    assert [written[i] == written[i + 3] for i in range(3)] == [True] * 3
    assert len(set(written)) == 3
    (tmp_path / "s" / "index.jsonl").unlink()
    assert ShardedPairs(tmp_path / "s").candidate_numbers().tolist() == written.tolist()


def test_shards_of_format_1_are_read_and_their_candidates_found(tmp_path):
    folder = write(tmp_path / "pets")
    lines = [json.loads(line)[:3] for line in (folder / "index.jsonl").read_text().splitlines()]
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    set_manifest(folder, format=1, index={})
    pairs = ShardedPairs(folder)
    assert list(pairs) == [make_pair(i) for i in range(5)]
    assert len(set(pairs.candidate_numbers())) == 5


def test_questions_survive_a_kill(tmp_path):
    def run(stop):
        with ShardWriter(tmp_path / "s", "s", pairs_per_shard=4, resume=True) as writer:
            rows = writer.record.get("rows", 0)
            for number, pair in enumerate(questions(3) + [make_pair(i) for i in range(7)]):
                if number < rows:
                    continue
                if number == stop:
                    raise KeyboardInterrupt
                writer.record["rows"] = number + 1
                writer.write(pair)

    for stop in (2, 5, 9):
        with pytest.raises(KeyboardInterrupt):
            run(stop)
    run(None)
    assert list(ShardedPairs(tmp_path / "s")) == questions(3) + [make_pair(i) for i in range(7)]


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"queries": ["a"], "positive": "p"}, "question 0 must be an object, not str"),
        ({"queries": "a", "positive": "p"}, '"queries" must be a list of more than 0'),
        ({"queries": [], "positive": "p"}, '"queries" must be a list of more than 0'),
        ({"queries": [{"query": "a"}]}, 'needs a "positive"'),
        ({"queries": [{}], "positive": "p"}, 'needs a "query"'),
        ({"queries": [{"query": "a", "x": 1}], "positive": "p"}, "unknown key 'x'"),
        ({"queries": [{"query": "a"}], "positive": "p", "asks": "b"}, "unknown key 'asks'"),
        ({"queries": [{"query": {"image": "query.0.png"}}], "positive": "p"}, "is missing"),
        ({"queries": [{"query": "a"}], "positive": "p", "negatives": 3}, "must be a list"),
    ],
)
def test_a_bad_sample_of_questions_is_named_with_its_reason(tmp_path, sample, reason):
    pairs = ShardedPairs(write_tar(tmp_path / "theirs" / "x.tar", {"k.json": as_json(sample)}))
    with pytest.raises(BadSample, match=reason):
        pairs[0]
