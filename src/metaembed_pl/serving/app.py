"""The service over HTTP: a page, and a JSON API that `/openapi.json` describes.

Handlers are plain functions, which run on a few threads and call `service.py`.
"""

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, NamedTuple

import anyio.to_thread
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.routing import Route

from metaembed_pl import __version__
from metaembed_pl.errors import UserError
from metaembed_pl.serving import schema
from metaembed_pl.serving.guard import LOOPBACK, Guard, problem
from metaembed_pl.serving.service import MAX_TOP, NotNow, NotThere, Service, TooLarge

NUM_THREADS = 8
FORM_BYTES = 200_000
"""Size of a query without its picture: 20,000 characters and the form around them."""
STATUS = {NotThere: 404, TooLarge: 413, NotNow: 503}
PAGE = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.Problem} for status in (404, 413, 422, 503)
}
FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "description": "text query"},
                    "picture": {
                        "type": "string",
                        "format": "binary",
                        "description": "image query: PNG, JPEG, WebP, GIF, BMP or TIFF",
                    },
                },
            }
        }
    },
}

Id = Annotated[str, Query(max_length=2000, description="of an item")]
QueryId = Annotated[str, Query(max_length=64, description="id of an encoded query")]
Where = Annotated[str, Query(max_length=500)]


def make_app(service: Service, hosts: Collection[str] | None = LOOPBACK) -> Guard:
    """The service as an ASGI application.

    Args:
        service: that answers.
        hosts: names of this machine that requests may use; None: any.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = NUM_THREADS
        yield
        await anyio.to_thread.run_sync(service.measuring.stop)

    # FastAPI's documentation pages would load scripts from other servers.
    app = FastAPI(
        title="metaembed_pl",
        version=__version__,
        description=schema.__doc__ or "",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=PROBLEMS,
    )
    _answer_errors(app, service)
    _add_page(app)
    _add_api(app, service)
    return Guard(app, hosts, service.max_upload_bytes + FORM_BYTES)


def _add_page(app: FastAPI) -> None:
    # Read once, by name: no path of a request is ever opened.
    folder = files("metaembed_pl.serving") / "page"
    for name, media_type in PAGE.items():
        headers = {"Cache-Control": "no-cache"}
        response = Response((folder / name).read_bytes(), media_type=media_type, headers=headers)
        path = "/" if name == "index.html" else f"/{name}"
        app.router.routes.append(Route(path, response, methods=["GET"], include_in_schema=False))


class _Form(NamedTuple):
    text: str | None
    picture: bytes | None


async def _read_form(request: Request) -> _Form:
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise UserError(f"expected a form (with curl, -F text=...), got {kind or 'untyped'}")
    # Texts of any size reach the check of their length; the guard limits requests.
    limit = int(request.headers.get("content-length", 0)) + FORM_BYTES
    async with request.form(max_files=1, max_fields=2, max_part_size=limit) as form:
        unknown = [name for name in form if name not in ("text", "picture")]
        if unknown:
            raise UserError(f"expected the fields text, picture or both, got {unknown[0][:80]!r}")
        return _Form(_text(form), await _uploaded(form))


def _text(form: FormData) -> str | None:
    text = form.get("text")
    if isinstance(text, UploadFile):
        raise UserError("text must be a form field, not a file")
    return text


async def _uploaded(form: FormData) -> bytes | None:
    picture = form.get("picture")
    if isinstance(picture, str):
        raise UserError("picture must be a file: with curl, -F picture=@FILE")
    return None if picture is None else await picture.read()


def _add_api(app: FastAPI, service: Service) -> None:
    @app.get("/api/store")
    def store() -> schema.StoreInfo:
        """The store, and the plans that a search can choose from."""
        return service.store_info()

    @app.post("/api/queries", openapi_extra={"requestBody": FORM})
    def ask(form: Annotated[_Form, Depends(_read_form)]) -> schema.Question:
        """Encode a text, a picture or both; searches then name the query by its id."""
        return service.ask(form.text, form.picture)

    @app.get("/api/search")
    def search(
        query: QueryId,
        plan: Annotated[
            str | None, Query(max_length=200, description="a budget or a cascade; default: auto")
        ] = None,
        top: Annotated[int, Query(ge=1, le=MAX_TOP, description="results")] = 10,
        where: Annotated[
            list[Where] | None,
            Query(max_length=16, description="a condition on metadata, such as lang=de; several"),
        ] = None,
        normalised: Annotated[bool, Query(description="divide scores by r_q")] = False,
        target_recall: Annotated[float, Query(gt=0, le=1, description="of auto")] = 0.98,
    ) -> schema.Answer:
        """Find the best items for a query; without a plan, with the cheapest that was measured."""
        return service.search(query, plan, top, where or (), normalised, target_recall)

    @app.get("/api/explanation")
    def explanation(
        query: QueryId,
        item: Id,
        budget: Annotated[str | None, Query(max_length=32, description="such as 4x8")] = None,
    ) -> schema.Explanation:
        """The matching vectors of query and item, and attention maps of the item's picture."""
        return service.explain(query, item, budget)

    @app.get("/api/preview", response_class=Response)
    def preview(item: Id) -> Response:
        """The preview of an item."""
        return _picture(*service.preview(item))

    @app.get("/api/picture", response_class=Response)
    def picture(item: Id) -> Response:
        """The original picture of an item, if the operator allows it, else its preview."""
        return _picture(*service.picture(item))

    @app.post("/api/measurement", status_code=202)
    def measure() -> schema.Measurement:
        """Measure recall and cost of each plan; `/api/store` shows when it is done."""
        service.measuring.start(service.store)
        return service.measuring.state(service.store)


def _picture(content: bytes, media_type: str) -> Response:
    headers = {"Cache-Control": "private, max-age=600"}
    return Response(content, media_type=media_type, headers=headers)


def _answer_errors(app: FastAPI, service: Service) -> None:
    """Every error is an object with one sentence; unexpected errors are logged as well."""

    @app.exception_handler(UserError)
    def refuse(_request: Request, error: UserError) -> JSONResponse:
        # The path of the store is not for clients.
        message = str(error).replace(str(service.folder), service.folder.name)
        return problem(STATUS.get(type(error), 422), " ".join(message.split()))

    @app.exception_handler(HTTPException)
    def refuse_request(_request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    def refuse_values(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return problem(422, f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}")

    @app.exception_handler(Exception)
    def fail(request: Request, error: Exception) -> JSONResponse:
        logging.getLogger(__name__).error("%s failed", request.url.path, exc_info=error)
        return problem(500, "internal error; see the service log")
