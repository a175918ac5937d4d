"""A store and its model as a service: encodes queries once, searches for them, explains scores.

    service = Service(MetaEmbedder.from_pretrained("runs/emoji/model"), "shelf")
    question = service.ask("flag of Japan")
    answer = service.search(question.query, "8x1:200,8x16:10")
    service.explain(question.query, answer.results[0].id, answer.budget)

It is independent of HTTP (see `app.py`) and thread-safe: one thread at a time runs the model, any
number search. If the store changes, each call sees the newest generation.
"""

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.late_interaction import narrowed
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.retrieval.calibration import (
    QUERIES_FILE,
    Choice,
    choose,
    measure,
    plan_name,
    stages_of,
)
from metaembed_pl.retrieval.manifest import Manifest
from metaembed_pl.retrieval.planes import vector_bytes
from metaembed_pl.retrieval.store import Store
from metaembed_pl.samples import evenly_spread
from metaembed_pl.serving import schema
from metaembed_pl.serving.explanation import attention_maps
from metaembed_pl.serving.measuring import Measuring, choices
from metaembed_pl.serving.pictures import Encoded, as_jpeg, media_type, original, without_paths
from metaembed_pl.serving.queries import EncodedQuery, RecentQueries

MAX_TEXT = 20_000
MAX_TOP = 200
MAX_UPLOAD_BYTES = 10_000_000
NUM_EXAMPLES = 6
EXAMPLE_LENGTH = 40


class NotThere(UserError):
    """A query or an item is unknown or has expired."""


class NotNow(UserError):
    """The store cannot be read at the moment."""


class TooLarge(UserError):
    """A query is too large."""


class Service:
    """A store that is served.

    Args:
        model: that embedded the store.
        folder: of the store.
        pictures: folders whose pictures and PDFs may be shown, if items were made from them.
        max_upload_bytes: of a picture in a query.
        log_queries: log text queries in the store's folder; search plans are then measured with
            them.

    Raises:
        UserError: the store is damaged or another model's, or a folder does not exist.
    """

    def __init__(
        self,
        model: MetaEmbedder,
        folder: str | Path,
        pictures: Sequence[str | Path] = (),
        max_upload_bytes: int = MAX_UPLOAD_BYTES,
        log_queries: bool = False,
    ):
        self._log_queries = log_queries
        self.model, self.max_upload_bytes = model, max_upload_bytes
        for root in pictures:
            if not Path(root).is_dir():
                raise UserError(
                    f"{root} is not a folder: give a folder whose pictures may be shown"
                )
        self._roots = [Path(root).resolve() for root in pictures]
        self._store = Store.open(folder)
        self._store.check_model(model)
        if log_queries:
            self._log([])  # now, if the folder is read-only
        self._opening, self._encoding = threading.Lock(), threading.Lock()
        self._queries = RecentQueries()
        self.measuring = Measuring(lambda store, go_on: measure(store, self._encoded, go_on))

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self._store.folder

    @property
    def store(self) -> Store:
        """The current state of the store; reopened if it has changed.

        Raises:
            NotNow: it was damaged or replaced by another model's.
        """
        with self._opening:
            try:
                if Manifest.read(self._store.folder) != self._store.snapshot().manifest:
                    newer = Store.open(self._store.folder)
                    if newer.identity != self._store.identity:
                        raise UserError(f"{newer.folder} was replaced by another model's store")
                    self._store = newer
            except UserError as error:
                raise NotNow(str(error)) from error
            return self._store

    def store_info(self) -> schema.StoreInfo:
        """A description of the store."""
        store = self.store
        calibration = self.measuring.calibration(store)
        return schema.StoreInfo(
            name=store.folder.resolve().name,
            items=len(store),
            generation=store.generation,
            groups=[str(group) for group in store.groups],
            width=store.width,
            model_width=store.model_width,
            dtype=store.dtype,
            vector_bytes=vector_bytes(store.description),
            plans=choices(store, calibration),
            default_plan=plan_name(choose(store, calibration).stages),
            measurement=self.measuring.state(store),
            examples=_examples(store),
            max_upload_bytes=self.max_upload_bytes,
            max_text=MAX_TEXT,
        )

    def ask(self, text: str | None = None, picture: bytes | None = None) -> schema.Question:
        """Encode a query, unless it was encoded recently, and remember its vectors.

        Raises:
            TooLarge: the text or picture is too large.
            UserError: neither is given, or the picture cannot be read.
        """
        if len(text or "") > MAX_TEXT:
            raise TooLarge(f"the text has {len(text or ''):,} characters; at most {MAX_TEXT:,}")
        if len(picture or b"") > self.max_upload_bytes:
            raise TooLarge(f"the picture is larger than {self.max_upload_bytes:,} bytes")
        item = Item((text or "").strip() or None, picture)
        id = item.content.removeprefix("sha256:")[:32]
        query, seconds = self._queries.get(id), 0.0
        if query is None:
            started = time.perf_counter()
            query = EncodedQuery(item.text, picture is not None, self._encoded([item]))
            seconds = time.perf_counter() - started
            self._queries.add(id, query)
            if self._log_queries and query.text:
                self._log([query.text])
        return schema.Question(
            query=id, text=query.text, has_picture=query.has_picture, milliseconds=1000 * seconds
        )

    def search(
        self,
        query: str,
        plan: str | None = None,
        top: int = 10,
        where: Sequence[str] = (),
        normalised: bool = False,
        target_recall: float = 0.98,
    ) -> schema.Answer:
        """Search for an encoded query.

        Args:
            query: its id.
            plan: a budget, or the stages of a cascade; None or "auto": the cheapest plan measured
                to reach `target_recall`, or the exact search if there is none.
            top: results.
            where: conditions on metadata.
            normalised: divide scores by r_q.
            target_recall: share of the exact search's ten best.

        Raises:
            NotThere: the query is unknown or has expired.
            UserError: an argument is not valid.
        """
        if not 1 <= top <= MAX_TOP:
            raise UserError(f"top must be between 1 and {MAX_TOP}, got {top}")
        encoded, store = self._known(query), self.store
        stages, note = self._choice(store, plan, top, target_recall)
        hits = store.search(encoded.vectors, cascade=stages, where=where, normalised=normalised)
        rows = hits.rows[0]
        found = hits.ids[0], hits.scores[0], store.metadata(rows), store.previews(rows)
        return schema.Answer(
            plan=plan_name(hits.stages),
            note=note,
            budget=str(stages[-1].budget),
            results=list(map(_result, *found)),
            milliseconds=hits.milliseconds,
            bytes_read=hits.bytes_read,
            items=len(store),
            generation=store.generation,
        )

    def explain(self, query: str, item: str, budget: str | None = None) -> schema.Explanation:
        """Explain an item's score for a query, with attention maps of the item's picture.

        Raises:
            NotThere: the query is unknown or has expired, or there is no such item.
            UserError: the model was not trained for the budget.
        """
        encoded, store = self._known(query), self.store
        r_q, r_c, width = spent = store.check_budget(budget)
        row = _row(store, item)
        (metadata,), (preview,) = store.metadata([row]), store.previews([row])
        vectors = store.vectors([row], r_c)[0]
        own = store.accept(encoded.vectors)[0, :r_q].cpu()
        products = narrowed(own, width) @ narrowed(vectors, width).T
        score = products.amax(dim=1).sum().item()
        maps, why = self._maps(store, metadata, preview, vectors)
        return schema.Explanation(
            item=_result(item, score, metadata, preview),
            budget=str(spent),
            products=products.tolist(),
            winners=products.argmax(dim=1).tolist(),
            maps=maps,
            why_no_maps=why,
        )

    def preview(self, item: str) -> Encoded:
        """The preview of an item.

        Raises:
            NotThere: there is no such item, or it has no preview.
        """
        store = self.store
        (preview,) = store.previews([_row(store, item)])
        kind = media_type(preview) if preview else None
        if preview is None or kind is None:
            raise NotThere("the store keeps no picture of this item")
        return Encoded(preview, kind)

    def picture(self, item: str) -> Encoded:
        """The original picture of an item if it may be shown, else its preview.

        Raises:
            NotThere: there is no such item, or it has no picture.
        """
        store = self.store
        (metadata,) = store.metadata([_row(store, item)])
        # One at a time: large pictures take much memory, and pypdfium2 is not thread-safe.
        with self._encoding:
            picture = original(metadata, self._roots)
        return self.preview(item) if picture is None else as_jpeg(picture)

    def _log(self, texts: Sequence[str]) -> None:
        with (self.folder / QUERIES_FILE).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)

    def _known(self, id: str) -> EncodedQuery:
        query = self._queries.get(id)
        if query is None:
            raise NotThere("unknown or expired query: send it again")
        return query

    def _encoded(self, queries: Sequence[Item | str]) -> Float[Tensor, "Q Rq D"]:
        with self._encoding:
            vectors = self.model.encode_query(queries).to(self.model.device)
        if not vectors.isfinite().all():
            raise UserError("the model returned NaN or infinity for this query")
        return vectors

    def _choice(self, store: Store, plan: str | None, top: int, target_recall: float) -> Choice:
        if plan in (None, "auto"):
            return choose(store, self.measuring.calibration(store), target_recall, top)
        stages = stages_of(plan, store.description, top)
        return Choice(store.stages(cascade=stages), "")

    def _maps(
        self,
        store: Store,
        metadata: dict[str, Any],
        preview: bytes | None,
        vectors: Float[Tensor, "Rc D"],
    ) -> tuple[schema.Maps | None, str | None]:
        with self._encoding:
            picture = original(metadata, self._roots)
            shown, drawn_from = (preview, "preview") if picture is None else (picture, "picture")
            if shown is None and "image" not in metadata and "file" not in metadata:
                return None, "the item has no picture"
            if shown is None:
                return None, (
                    "the store keeps no picture of this item: embed with previews, or allow the "
                    "folder of its original with --pictures"
                )
            item = Item(_said(metadata, "text"), shown, instruction=_said(metadata, "instruction"))
            maps = attention_maps(self.model, item, store, vectors, drawn_from)
        if maps is None:
            return None, (
                f"models of the family {self.model.processing.family.model_type} have no maps: "
                "the tokens of their pictures are not in the row"
            )
        return maps, None


def _row(store: Store, item: str) -> int:
    if item not in store:
        raise NotThere(f"there is no item {item[:80]!r}")
    return store.rows_of([item])[0]


def _result(
    id: str, score: float, metadata: dict[str, Any], preview: bytes | None
) -> schema.Result:
    return schema.Result(
        id=id,
        score=score,
        text=_said(metadata, "text"),
        has_preview=preview is not None,
        metadata=without_paths(metadata),
    )


def _said(metadata: dict[str, Any], key: str) -> str | None:
    """A text in metadata, whose values may have any type."""
    value = metadata.get(key)
    return value if isinstance(value, str) and value.strip() else None


def _examples(store: Store) -> list[str]:
    """Short texts of items, as example queries."""
    rows = evenly_spread(len(store), 8 * NUM_EXAMPLES)
    said = [_said(value, "asked_as") or _said(value, "text") for value in store.metadata(rows)]
    short = [text for text in said if text and len(text) <= EXAMPLE_LENGTH]
    return list(dict.fromkeys(short))[:NUM_EXAMPLES]
