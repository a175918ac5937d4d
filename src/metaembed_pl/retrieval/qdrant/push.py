"""Pushes a store into a collection: sends missing and changed items, and deletes removed ones.

The same call resumes after an interruption, and updates a collection after the store has changed:
each item has a digest of its vectors and metadata in the collection, and is sent if the digest
differs. So a push reads the complete store, but sends only changes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.qdrant.collection import Collection
from metaembed_pl.retrieval.qdrant.layout import Layout, point_id, revision
from metaembed_pl.retrieval.qdrant.packages import models
from metaembed_pl.retrieval.qdrant.requests import DATE, payload_key
from metaembed_pl.retrieval.store import Store

REQUEST_BYTES = 2**24
"""Approximate limit of a request; a server accepts 32 MiB."""
NUMBER_BYTES = 20
"""Bytes of a component in a request."""
MOST_ITEMS = 256


@dataclass
class Pushed:
    """The status of a push.

    Args:
        seen: items looked at.
        sent: new or changed items.
        deleted: points whose items are no longer in the store.
    """

    seen: int = 0
    sent: int = 0
    deleted: int = 0


def push(
    store: Store,
    collection: Collection,
    *,
    counts: Sequence[int] | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    on_disk: bool | None = None,
    filters: Sequence[str] = (),
    shards: int | None = None,
    replicas: int | None = None,
    batch_size: int | None = None,
) -> Iterator[Pushed]:
    """Copy a store into a collection, which is created if it does not exist.

    Args:
        store: to push.
        collection: the destination.
        counts: numbers of candidate vectors to search with; this and the next three may be left out
            for an existing collection.
        dtype: see `Layout`.
        quantization: see `Layout`.
        on_disk: see `Layout`.
        filters: metadata keys to index for filters.
        shards: of a new collection on a cluster; an existing one must have as many.
        replicas: of each shard; likewise.
        batch_size: items per request; None: as many as fit.

    Yields:
        The status after each batch; the same object each time.

    Raises:
        UserError: the collection is another store's, has other settings or cannot be reached, or
            the numbers of items differ at the end.
    """
    kinds = {payload_key(key): kind_of(store, key) for key in filters}
    settings = {"counts": counts, "dtype": dtype, "quantization": quantization, "on_disk": on_disk}
    layout = Layout.of(store, **settings)
    there = collection.layout()
    if there is None:
        collection.create(layout, shards, replicas)
    else:
        given = {name for name, value in settings.items() if value is not None}
        check_layout(collection.address, there, layout, given)
        _check_copies(collection, shards, replicas)
        layout = there
    for key, kind in kinds.items():
        collection.index(key, kind)
    done = Pushed()
    step = batch_size or items_at_a_time(layout)
    for rows in _parts(len(store), step):
        done.sent += _send(store, collection, layout, rows)
        done.seen = rows.stop
        yield done
    if collection.count() != len(store):
        done.deleted = _delete_gone(store, collection)
    if (count := collection.count()) != len(store):
        raise UserError(
            f"{collection.address} has {count:,} items where the store has {len(store):,}: did "
            "another process change it meanwhile? Push again"
        )
    yield done


def items_at_a_time(layout: Layout) -> int:
    """The number of items that fit a request."""
    of_item = NUMBER_BYTES * layout.width * sum(layout.counts)
    return max(1, min(MOST_ITEMS, REQUEST_BYTES // of_item))


def check_layout(address: str, there: Layout, wanted: Layout, given: Iterable[str]) -> None:
    """Refuse a collection with another model, projection or setting.

    Args:
        address: of the collection.
        there: its layout.
        wanted: the layout of the store.
        given: the settings to compare.

    Raises:
        UserError: the first difference.
    """
    if there.identity != wanted.identity:
        raise UserError(
            f"{address} holds the vectors of another model (identity {there.identity:.12}, this "
            f"store's is {wanted.identity:.12}): choose another name"
        )
    if there.projection != wanted.projection:
        raise UserError(
            f"{address} holds vectors with another projection (of width {there.width}, this "
            f"store's are {wanted.width} wide): choose another name"
        )
    for name in sorted(given):
        before, now = getattr(there, name), getattr(wanted, name)
        if before != now:
            raise UserError(
                f"{address} was made with {name} {before}, not {now}: leave that out, or choose "
                "another name"
            )


def _check_copies(collection: Collection, shards: int | None, replicas: int | None) -> None:
    """Refuse other numbers of shards and replicas than a collection was made with."""
    if shards is None and replicas is None:
        return
    for name, before, now in zip(
        ("shards", "replicas"), collection.copies(), (shards, replicas), strict=True
    ):
        if now is not None and before != now:
            raise UserError(
                f"{collection.address} was made with {before} {name}, not {now}: leave --{name} "
                "out, change it in Qdrant, or choose another name"
            )


def kind_of(store: Store, key: str) -> models.PayloadSchemaType:
    """The kind of index for a metadata key, by the first value of an item.

    Raises:
        UserError: no item has the key, or the value is not a text, number or boolean.
    """
    metadata = (value for rows in _parts(len(store), MOST_ITEMS) for value in store.metadata(rows))
    value = next((value[key] for value in metadata if value.get(key) is not None), None)
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, bool):
        return models.PayloadSchemaType.BOOL
    if isinstance(value, int | float):
        return models.PayloadSchemaType.FLOAT
    if isinstance(value, str):
        dated = DATE.fullmatch(value)
        return models.PayloadSchemaType.DATETIME if dated else models.PayloadSchemaType.KEYWORD
    raise UserError(
        f"{store.folder}: no item's metadata have a text, number or truth under {key!r}, by which "
        "to filter"
    )


def _parts(count: int, step: int) -> Iterator[range]:
    return (range(start, min(start + step, count)) for start in range(0, count, step))


def _send(store: Store, collection: Collection, layout: Layout, rows: range) -> int:
    """Send new and changed items; return their number."""
    ids, metadata = store.ids[rows.start : rows.stop], store.metadata(rows)
    vectors = store.vectors(rows, layout.counts[-1])
    revisions = list(map(revision, vectors, metadata))
    points = list(map(point_id, ids))
    known = collection.revisions(points)
    changed = [i for i, point in enumerate(points) if known.get(point) != revisions[i]]
    if changed:
        new = layout.points(
            [ids[i] for i in changed],
            vectors[changed],
            [metadata[i] for i in changed],
            [revisions[i] for i in changed],
        )
        collection.upsert(new)
    return len(changed)


def _delete_gone(store: Store, collection: Collection) -> int:
    """Delete points of items that are not in the store; return their number."""
    points = {point_id(id) for id in store.ids}
    deleted = 0
    for ids in collection.ids():
        gone = [id for id in ids if id not in points]
        if gone:
            collection.delete(gone)
        deleted += len(gone)
    return deleted
