from functools import partial

import pytest
import torch

import tiny
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.identity import identity_of
from metaembed_pl.retrieval.embedding import Entry, embed
from metaembed_pl.retrieval.snapshot import Snapshot
from metaembed_pl.retrieval.storage_recall import storage_recall
from metaembed_pl.retrieval.store import Store


@pytest.fixture(scope="module")
def model():
    return tiny.embedder()


def items(count):
    """Texts and pictures."""
    return [
        Item(image=tiny.picture(i), id=f"item {i}") if i % 3 == 0 else Item(tiny.text(i))
        for i in range(count)
    ]


def test_holds_what_the_model_makes_of_the_items(model, tmp_path):
    given = items(7)
    store = Store.build(tmp_path / "s", model, given, batch_size=3)
    assert store.ids == [item.uid for item in given]
    assert (store.groups, store.width, store.dtype) == (model.groups, model.width, "bf16")
    assert torch.allclose(store.vectors(), model.encode_candidate(given), atol=2**-9)
    assert store.metadata([1]) == [{"text": given[1].text}]
    pictures = [preview is not None for preview in store.previews(range(7))]
    assert pictures == [item.image is not None for item in given]


def test_goes_on_at_the_next_item_after_it_was_killed(model, tmp_path):
    given = items(10)
    first = embed(Store.open_for(model, tmp_path / "s"), model, given, 2)
    assert next(first).embedded == 3
    first.close()
    loaded = []

    def entry(item):
        return Entry(item.uid, lambda: loaded.append(item.uid) or item)

    store = Store.open(tmp_path / "s")
    progress = list(embed(store, model, map(entry, given), 2))[-1]
    assert loaded == [item.uid for item in given[3:]]
    assert (progress.seen, progress.embedded) == (10, 7)
    assert Store.open(tmp_path / "s").ids == [item.uid for item in given]


def test_more_items_are_appended_and_the_same_are_not_embedded_twice(model, tmp_path):
    Store.build(tmp_path / "s", model, items(3))
    store = Store.build(tmp_path / "s", model, [*items(5), *items(5)], batch_size=2)
    assert store.ids == [item.uid for item in items(5)]
    assert store.generation == 2


def test_again_replaces_what_is_there(model, tmp_path):
    store = Store.build(tmp_path / "s", model, [Item("red apple", id="a"), Item("b", id="b")])
    for _ in embed(store, model, [Item("green tree", id="a")], again=True):
        pass
    assert store.ids == ["b", "a"]
    assert store.metadata([1]) == [{"text": "green tree"}]
    expected = model.encode_candidate(["green tree"])
    assert torch.allclose(store.vectors([1]), expected, atol=2**-9)


def test_an_item_that_cannot_be_read_stops_or_is_left_out(model, tmp_path):
    given = [Item("a"), Item(image=tmp_path / "gone.png", id="lost"), Item("b")]
    with pytest.raises(UserError, match=r"item 'lost': .*gone.png does not exist"):
        Store.build(tmp_path / "s", model, given)
    progress = list(embed(Store.open(tmp_path / "s"), model, given, skip_bad=True))[-1]
    assert progress.embedded == 2
    assert len(progress.skipped) == 1
    assert "lost: the image" in progress.skipped[0]
    assert len(Store.open(tmp_path / "s")) == 2


def test_refuses_a_store_from_another_model(model, tmp_path):
    Store.build(tmp_path / "s", model, items(2))
    with pytest.raises(UserError, match=rf"another model .*{identity_of(model)[:12]}.*another"):
        Store.build(tmp_path / "s", tiny.embedder(seed=1), items(2))
    assert len(Store.open(tmp_path / "s")) == 2


def test_refuses_another_dtype_than_the_store_has(model, tmp_path):
    Store.build(tmp_path / "s", model, items(1), dtype="int8")
    assert Store.build(tmp_path / "s", model, items(2)).dtype == "int8"
    with pytest.raises(UserError, match="stores int8, not bf16"):
        Store.build(tmp_path / "s", model, items(2), dtype="bf16")


def test_an_identity_is_of_weights_prompt_and_groups_and_survives_saving(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    same = identity_of(model)
    assert identity_of(MetaEmbedder.from_pretrained(tmp_path / "m")) == same
    assert identity_of(tiny.embedder()) == same
    others = [
        tiny.embedder(seed=1),
        tiny.embedder(groups=("1x1", "4x8")),
        tiny.embedder(projection=8),
        tiny.embedder(max_text_tokens=5),
    ]
    assert len({same, *map(identity_of, others)}) == 5
    changed = tiny.embedder()
    with torch.no_grad():
        changed.meta_tokens.embedding.weight[3] += 0.1
    assert identity_of(changed) != same


def test_an_identity_needs_weights_that_can_be_told(model):
    with pytest.raises(UserError, match="load it with dtype float32 or bfloat16"):
        identity_of(tiny.embedder().half())


@pytest.mark.parametrize(("dtype", "least"), [("fp16", 0.97), ("bf16", 0.9), ("int8", 0.8)])
def test_tells_what_storing_costs(model, tmp_path, dtype, least):
    store = Store.open_for(model, tmp_path / "s", dtype)
    progress = list(embed(store, model, [Item(tiny.text(i)) for i in range(30)]))[-1]
    recall, count = storage_recall(store, progress)
    assert count == len(store)
    assert least <= recall <= 1
    store.add(store.ids, store.vectors().flip(0))
    assert storage_recall(store, progress)[0] < 0.8, (
        "others' vectors are stored, and it does not tell"
    )


def test_another_item_under_an_id_of_the_store_is_told(model, tmp_path):
    picture = tiny.picture(0)
    store = Store.open_for(model, tmp_path / "s")
    before = [
        Item("red apple", id="a", instruction="Find:"),
        Item("red apple", id="b"),
        Item(image=picture, id="c"),
        Item("same", id="d", answers=("x",)),
    ]
    after = [
        Item("red apple", id="a", instruction="Name:"),
        Item("red apple", id="b", instruction="Find:"),
        Item("now with a text", image=picture, id="c"),
        Item("same", id="d", answers=("y",)),
    ]
    for given, changed in ((before, []), (before, []), (after, ["a", "b"])):
        *_, status = embed(store, model, given)
        assert status.changed == changed


def test_a_run_that_replaces_items_does_not_read_the_store_anew_for_each_batch(
    model, tmp_path, monkeypatch
):
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for number, file in enumerate(files):
        tiny.picture(number).save(file)

    def entries():
        for file in files:
            yield Entry(file.name, partial(Item, image=file), {"file": str(file)}, file)

    store = Store.open_for(model, tmp_path / "s")
    for _ in embed(store, model, entries(), 1):
        pass
    opened, original = [], Snapshot.open
    monkeypatch.setattr(Snapshot, "open", lambda folder: opened.append(0) or original(folder))
    *_, status = embed(store, model, entries(), 1, again=True)
    assert status.embedded == 6
    assert len(opened) <= 2
