import json
import re
import subprocess
import sys

import pytest

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.retrieval.qdrant.sizing import sizing
from metaembed_pl.retrieval.store import Store
from qdrant_server import Api, serving

pytestmark = [
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.embedder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    """Twelve texts, of which one says something about itself."""
    folder = tmp_path_factory.mktemp("stores") / "s"
    store = Store.build(folder, MetaEmbedder.from_pretrained(model), map(tiny.text, range(11)))
    embedding = MetaEmbedder.from_pretrained(model).encode_candidate(["roter Apfel"])
    store.add(["obst"], embedding, [{"text": "roter Apfel", "lang": "de"}])
    return folder


def push(store, *arguments):
    return main([str(part) for part in ("push", "--store", store, *arguments)])


def search(model, store, *arguments):
    command = ["search", "--model", model, "--store", store, "--device", "cpu", "--query", "apple"]
    return main([str(part) for part in (*command, *arguments)])


def test_a_store_is_pushed_and_found_like_the_store(model, store, capsys):
    with serving(Api()) as server:
        address = f"{server}/things"
        assert push(store, "--to", address, "--filter", "lang", "--counts", "1,8") == 0
        assert capsys.readouterr().out == f"12 items in {address}, 12 of them new or changed\n"
        assert push(store, "--to", address, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["items"], told["sent"], told["deleted"]) == (12, 0, 0)

        cascade = ["--cascade", "4x1:9,4x8:3", "--json"]
        found = []
        for where in (store, address):
            assert search(model, where, *cascade) == 0
            found.append(json.loads(capsys.readouterr().out))
        assert found[1]["plan"] == "4x1:9,4x8:3"
        assert found[1]["items"] == 12
        ids, metadata = (
            [[result[key] for result in answer["results"]] for answer in found]
            for key in ("id", "metadata")
        )
        assert ids[0] == ids[1]
        assert metadata[0] == metadata[1]
        assert search(model, address, "--where", "lang=de", "--exact", "--top", 2) == 0
        out, err = capsys.readouterr()
        assert [line.split()[2] for line in out.splitlines()] == ["id", "obst"]
        assert err.startswith("4x8:2: ")


def test_a_plan_tells_the_cost_and_connects_to_nothing(store, capsys):
    assert push(store, "--plan", "--counts", "1,8", "--dtype", "turbo8", "--replicas", 2) == 0
    head, *rows, told = capsys.readouterr().out.splitlines()
    assert re.split("  +", head.strip())[:4] == ["items", "disk fp32", "disk fp16", "disk turbo8"]
    assert [row.split()[0] for row in rows] == (
        ["12", "100,000", "1,000,000", "10,000,000", "100,000,000", "1,000,000,000"]
    )
    # 12 items, twice, each with 9 vectors of 32 + 4 bytes in turbo8, 29 bytes of ids, 12 of an
    # offset, 16 and two blocks of 128 of payload, and 32 links of 4 bits.
    size = 12 * 2 * (9 * (32 + 4) + 29 + 12 + 16 + 2 * 128 + 16)
    assert re.split("  +", rows[0].strip())[3] == f"{size / 1000:.1f} kB"
    assert "1 + 8 vectors of width 32" in told
    assert "2 of each shard" in told
    assert f"this store: {size / 1000:.1f} kB on disk" in told
    assert push(store, "--plan", "--json", "--quantization", "int8") == 0
    told = json.loads(capsys.readouterr().out)
    width = Store.open(store).width
    # Payloads of two blocks, as above.
    size = sizing(12, width, [1, 4, 8], quantization="int8", payload_bytes=200)
    assert told["memory_bytes"] == pytest.approx(size.memory)
    assert told["disk_bytes"] == pytest.approx(size.disk)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--to": None}, "give the destination with --to ADDRESS, or --plan"),
        ({"--plan": ""}, "give the destination with --to ADDRESS, or --plan"),
        ({"--to": "http://localhost:6333"}, "is http://HOST:6333/NAME"),
        ({"--shards": "0"}, "--shards must be at least 1, got 0"),
        ({"--batch-size": "-1"}, "--batch-size must be at least 1, got -1"),
        ({"--counts": "1,many"}, "--counts are integers, such as 1,8,64; got '1,many'"),
        ({"--to": None, "--plan": "", "--counts": "1,3"}, "not trained at 3 candidate vectors"),
        ({"--counts": "1,3"}, "not trained at 3 candidate vectors; choose one of 1, 4, 8"),
        ({"--filter": "size"}, "no item's metadata have a text, number or truth under 'size'"),
        ({"--to": "things.edge"}, "folders of Qdrant Edge are no longer supported"),
        ({"--store": "nowhere"}, "nowhere is not a store"),
        ({"--to": None, "--plan": "", "--shards": "2"}, "--shards does not change the cost"),
        ({"--to": None, "--plan": "", "--filter": "lang"}, "--filter does not change the cost"),
        ({"--to": None, "--plan": "", "--batch-size": "2"}, "--batch-size does not change the"),
    ],
)
def test_a_push_that_cannot_be_is_one_line_and_exit_2(store, capsys, flags, message):
    api = Api()
    with serving(api) as server:
        given = {"--store": str(store), "--to": f"{server}/things", **flags}
        arguments = [p for flag in given.items() if flag[1] is not None for p in flag if p]
        assert main(["push", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not api.local.collection_exists("things")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "auto"], "--budget auto only works on a store in a folder"),
        (
            ["--target-recall", ".9"],
            "--target-recall only works with automatic plans, of a store in",
        ),
        (["--budget", "1x4"], "pushed with 1, 8 candidate vectors, not 4"),
        (["--where", "lang<de"], "lang<de: Qdrant orders numbers and dates"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(model, store, capsys, arguments, message):
    with serving(Api()) as server:
        assert push(store, "--to", f"{server}/things", "--counts", "1,8") == 0
        capsys.readouterr()
        assert search(model, f"{server}/things", *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_another_model_is_refused(store, tmp_path, capsys):
    tiny.embedder(seed=1).save_pretrained(tmp_path / "other")
    with serving(Api()) as server:
        assert push(store, "--to", f"{server}/things") == 0
        capsys.readouterr()
        assert search(tmp_path / "other", f"{server}/things") == 2
    assert "/things holds the vectors of another model" in capsys.readouterr().err


def test_exact_excludes_a_budget(model, store, capsys):
    assert search(model, store, "--exact", "--budget", "4x8") == 2
    assert "--exact uses all vectors of all items" in capsys.readouterr().err


def test_help_is_light():
    program = "import sys; from metaembed_pl.cli.main import main\n"
    program += "try: main(['push', '--help'])\nexcept SystemExit: pass\n"
    program += "print({'torch', 'qdrant_client', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "--replicas" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"
