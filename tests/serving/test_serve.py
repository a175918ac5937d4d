"""The service, its HTTP, and the process: against `Store.search` and explicit loops."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
import zlib

import pytest
import torch
import uvicorn
from starlette.testclient import TestClient

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.identity import identity_of
from metaembed_pl.model.patches import patch_attention
from metaembed_pl.picture import small_jpeg
from metaembed_pl.retrieval.calibration import QUERIES_FILE, calibrate, logged_queries
from metaembed_pl.retrieval.sources import draw_page, open_source
from metaembed_pl.retrieval.store import Store
from metaembed_pl.serving.app import make_app
from metaembed_pl.serving.measuring import Measuring
from metaembed_pl.serving.queries import MOST_QUERIES, EncodedQuery, RecentQueries
from metaembed_pl.serving.service import MAX_TEXT, MAX_TOP, NotNow, NotThere, Service
from tiny_pdf import make_pdf

MAX_UPLOAD = 50_000


@pytest.fixture(scope="module")
def model():
    return tiny.embedder()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """24 texts, and 6 pictures of which one has odd characters in its id."""
    items = [Item(tiny.text(i), id=f"text-{i}") for i in range(24)]
    items += [Item(image=tiny.picture(i, (84, 56)), id=f"a/../b #{i}?x=1&é") for i in range(6)]
    path = tmp_path_factory.mktemp("stores") / "shelf"
    Store.build(path, model, items)
    return path


@pytest.fixture(scope="module")
def service(model, folder):
    return Service(model, folder, max_upload_bytes=MAX_UPLOAD)


@pytest.fixture(scope="module")
def client(service):
    with TestClient(make_app(service), base_url="http://127.0.0.1:8000") as client:
        yield client


def digests(folder):
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "calibration.json"
    }


def encoded(picture):
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def ask(client, text=None, picture=None):
    files = {"picture": ("a.png", picture, "image/png")} if picture else None
    return client.post("/api/queries", data={"text": text} if text else {}, files=files)


@pytest.mark.parametrize("plan", ["1x1", "4x1", "2x4", "4x8", "4x1:20,4x8:10"])
def test_finds_what_the_store_finds(client, model, folder, plan):
    question = ask(client, "red apple", encoded(tiny.picture(3))).json()
    assert (question["text"], question["has_picture"]) == ("red apple", True)
    vectors = model.encode_query([Item("red apple", tiny.picture(3))])
    store = Store.open(folder)
    how = {"cascade": plan} if ":" in plan else {"budget": plan}
    expected = store.search(vectors, **how, top=10)
    values = {"query": question["query"], "plan": plan, "top": 10}
    answer = client.get("/api/search", params=values).json()
    assert [one["id"] for one in answer["results"]] == expected.ids[0]
    scores = [one["score"] for one in answer["results"]]
    assert scores == pytest.approx(expected.scores[0], abs=1e-5)
    assert (answer["plan"], answer["bytes_read"]) == (plan, expected.bytes_read)
    normalised = client.get("/api/search", params=values | {"normalised": True}).json()
    r_q = int(answer["budget"].split("x")[0])
    assert r_q * normalised["results"][0]["score"] == pytest.approx(scores[0], abs=1e-5)


def test_a_query_is_encoded_once(client):
    first, again = ask(client, "a fish").json(), ask(client, "a fish").json()
    assert first["milliseconds"] > 0
    assert again == first | {"milliseconds": 0}


@pytest.mark.parametrize(("r_q", "r_c"), [(1, 1), (2, 4), (4, 1), (4, 8)])
def test_the_explanation_sums_to_the_score(client, model, folder, r_q, r_c):
    query = ask(client, "blue star").json()["query"]
    values = {"query": query, "plan": f"{r_q}x{r_c}", "top": 30}
    found = {
        one["id"]: one["score"]
        for one in client.get("/api/search", params=values).json()["results"]
    }
    store, item = Store.open(folder), "a/../b #2?x=1&é"
    candidate, asked = store.vectors(store.rows_of([item]))[0], model.encode_query(["blue star"])[0]
    values = {"query": query, "item": item, "budget": f"{r_q}x{r_c}"}
    why = client.get("/api/explanation", params=values).json()
    total = 0.0
    for i in range(r_q):
        row = [torch.dot(asked[i], candidate[j]).item() for j in range(r_c)]
        assert why["products"][i] == pytest.approx(row, abs=1e-5)
        assert row[why["winners"][i]] == pytest.approx(max(row), abs=1e-6)
        total += max(row)
    assert why["item"]["score"] == pytest.approx(total, abs=1e-5)
    assert found[item] == pytest.approx(total, abs=1e-4)


def test_a_projected_store_is_searched_and_explained(model, tmp_path):
    items = [Item(image=tiny.picture(i, (84, 56)), id=f"{i}") for i in range(12)]
    store = Store.build(tmp_path / "s", model, items, width=20)
    service = Service(model, tmp_path / "s", max_upload_bytes=MAX_UPLOAD)
    shelf = service.store_info()
    assert (shelf.width, shelf.model_width) == (20, model.width)
    query = service.ask("green fish").query
    found = service.search(query, "4x8", top=12)
    assert [one.id for one in found.results] == store.search(
        model.encode_query(["green fish"]), "4x8", top=12
    ).ids[0]
    for one in found.results:
        why = service.explain(query, one.id, "4x8")
        assert sum(max(row) for row in why.products) == pytest.approx(one.score, abs=1e-5)
        assert why.maps.agreement == pytest.approx(1, abs=0.05)


def test_the_maps_are_those_of_the_model(service, model, folder):
    item = "a/../b #2?x=1&é"
    why = service.explain(service.ask("cat").query, item, "2x4")
    store = Store.open(folder)
    (preview,) = store.previews(store.rows_of([item]))
    expected = patch_attention(model, Item(image=preview), "candidate")[:4]
    assert (why.maps.height, why.maps.width) == (2, 3)
    assert why.maps.drawn_from == "preview"
    weights = torch.tensor(why.maps.weights)
    assert weights.mean(dim=1) == pytest.approx(torch.ones(4), abs=1e-2)
    even = expected.mean(dim=(1, 2), keepdim=True)
    assert torch.allclose(weights.view(4, 2, 3), expected / even, atol=1e-3)
    assert (
        service.explain(service.ask("cat").query, "text-1").why_no_maps == "the item has no picture"
    )


def test_only_pictures_in_allowed_folders_are_read(model, tmp_path):
    (tmp_path / "in").mkdir()
    for path in ("in/in.png", "out.png"):
        tiny.picture(1, (84, 56)).save(tmp_path / path)
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    store = Store.create(tmp_path / "s", model.groups, model.width, identity_of(model))
    paths = {"in": "in/in.png", "out": "out.png", "up": "in/../out.png", "link": "in/link.png"}
    vectors = model.encode_candidate([Item(image=tiny.picture(1, (84, 56)))] * 4)
    store.add(list(paths), vectors, [{"image": f"{tmp_path}/{path}"} for path in paths.values()])
    service = Service(model, tmp_path / "s", [tmp_path / "in"])
    assert service.picture("in").media_type == "image/jpeg"
    query = service.ask("cat").query
    why = service.explain(query, "in")
    assert why.maps.drawn_from == "picture"
    assert why.maps.agreement == pytest.approx(1, abs=1e-2)
    assert why.item.metadata == {"image": "in.png"}
    for item in ("out", "up", "link"):
        with pytest.raises(NotThere, match="no picture of this item"):
            service.picture(item)
        assert service.explain(query, item).maps is None


def test_a_page_of_a_pdf_is_shown_where_its_folder_is_allowed(model, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("in/a.pdf", "b.pdf"):
        (tmp_path / name).write_bytes(make_pdf([["first page"], ["second page"]]))
    sources = open_source(tmp_path / "in" / "a.pdf"), open_source(tmp_path / "b.pdf")
    Store.build(tmp_path / "s", model, [entry for source in sources for entry in source])
    service = Service(model, tmp_path / "s", [tmp_path / "in"])
    page = draw_page(tmp_path / "in" / "a.pdf", 2).load_image()
    assert service.picture("a.pdf#page=2").content == small_jpeg(page, 1280, 88)
    assert service.explain(service.ask("page").query, "a.pdf#page=2").maps.drawn_from == "picture"
    assert service.picture("b.pdf#page=2") == service.preview("b.pdf#page=2")
    (tmp_path / "in" / "a.pdf").unlink()
    assert service.picture("a.pdf#page=2") == service.preview("a.pdf#page=2")


def test_pictures_come_by_the_id_of_their_item(client, folder):
    store, item = Store.open(folder), "a/../b #4?x=1&é"
    answer = client.get("/api/preview", params={"item": item})
    assert answer.content == store.previews(store.rows_of([item]))[0]
    assert answer.headers["content-type"] == "image/jpeg"
    assert client.get("/api/preview", params={"item": "text-1"}).status_code == 404


def bomb():
    """A small PNG that says it has 400 million pixels."""

    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    head = (20_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        (
            ("POST", "/api/queries", {"files": {"picture": ("a.png", b"no picture")}}),
            422,
            "does not decode",
        ),
        (("POST", "/api/queries", {"files": {"picture": ("a.png", bomb())}}), 422, "is refused"),
        (
            ("POST", "/api/queries", {"files": {"picture": ("a.png", b"x" * (MAX_UPLOAD + 1))}}),
            413,
            "larger than 50,000",
        ),
        (
            ("POST", "/api/queries", {"files": {"picture": ("a.png", b"x" * 10**6)}}),
            413,
            "the request is too large",
        ),
        (
            ("POST", "/api/queries", {"data": {"text": "x" * (MAX_TEXT + 1)}}),
            413,
            "20,001 characters",
        ),
        (
            ("POST", "/api/queries", {"data": {"text": "x" * 10**7}}),
            413,
            "the request is too large",
        ),
        (("POST", "/api/queries", {"data": {"text": "  "}}), 422, 'needs a "text"'),
        (("POST", "/api/queries", {"data": {"txt": "a"}}), 422, "got 'txt'"),
        (("POST", "/api/queries", {"data": {"picture": "/etc/passwd"}}), 422, "must be a file"),
        (("GET", "/api/search?query=nothing", {}), 404, "send it again"),
        (("GET", "/api/search?query=QUERY&plan=16x64", {}), 422, "not trained at 16 query vectors"),
        (("GET", "/api/search?query=QUERY&plan=hello", {}), 422, "got 'hello'"),
        (("GET", "/api/search?query=QUERY&plan=" + "9" * 300, {}), 422, "plan: "),
        (("GET", "/api/search?query=QUERY&top=0", {}), 422, "top: "),
        (("GET", "/api/search?query=QUERY&where=nonsense", {}), 422, "got 'nonsense'"),
        (("GET", "/api/search?query=QUERY&where=n<" + "[" * 490, {}), 200, ""),
        (("GET", "/api/explanation?query=QUERY&item=none", {}), 404, "no item 'none'"),
        (
            ("GET", "/api/explanation?query=QUERY&item=text-1&budget=9x9", {}),
            422,
            "not trained at 9",
        ),
        (("GET", "/api/preview?item=../../../../etc/passwd", {}), 404, "no item"),
        (("GET", "/api/picture?item=/etc/passwd", {}), 404, "no item"),
        (("GET", "/../../etc/passwd", {}), 404, "Not Found"),
        (("GET", "/page/..%2f..%2fservice.py", {}), 404, "Not Found"),
        (("GET", "/docs", {}), 404, "Not Found"),
        (("GET", "/api/store", {"headers": {"Host": "evil.example"}}), 421, "'evil.example'"),
        (("GET", "/api/store", {"headers": {"Origin": "http://evil.example"}}), 403, "other sites"),
        (("GET", "/api/store", {"headers": {"Origin": "http://["}}), 403, "other sites"),
        (("GET", "/api/store", {"headers": {"Origin": "null"}}), 403, "other sites"),
        (("GET", "/api/store", {"headers": {"Sec-Fetch-Site": "cross-site"}}), 403, "other sites"),
    ],
)
def test_bad_requests_are_told_and_change_nothing(client, folder, request_, status, said):
    before = digests(folder)
    method, path, values = request_
    query = ask(client, "moon").json()["query"]
    answer = client.request(method, path.replace("QUERY", query), **values)
    assert answer.status_code == status
    if said:
        assert said in answer.json()["error"]
        assert "\n" not in answer.json()["error"]
    assert client.get("/api/search", params={"query": query}).status_code == 200
    assert digests(folder) == before


def test_a_body_of_unknown_length_is_cut_off(client):
    def forever():
        yield b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 10_000

    head = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = client.post("/api/queries", content=forever(), headers=head)
    assert answer.status_code == 413


def test_nan_does_not_enter(model, folder, monkeypatch):
    service = Service(model, folder)
    monkeypatch.setattr(model, "encode_query", lambda items: torch.full((1, 4, 32), torch.nan))
    with pytest.raises(UserError, match="returned NaN"):
        service.ask("never asked before")


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for path in ("page.css", "page.js"):
        assert f'"{path}"' in page.text
        text = client.get(path).text
        assert len(text) > 1000
        assert "https://" not in text
    assert "https://" not in page.text
    assert "/api/search" in client.get("/openapi.json").json()["paths"]


def test_what_is_added_meanwhile_is_found_and_a_broken_manifest_is_told(model, tmp_path):
    path = tmp_path / "s"
    store = Store.build(path, model, [Item(tiny.text(i), id=f"{i}") for i in range(12)])
    service = Service(model, path)
    query = service.ask("sun").query
    Store.build(path, model, [Item("sun", id="new")])
    assert len(service.search(query, top=20).results) == len(store) + 1
    with TestClient(make_app(service), base_url="http://localhost") as client:
        manifest = path / "manifest.json"
        good = manifest.read_text()
        manifest.write_text(good.replace('"num_rows": 13', '"num_rows": 12'))
        answer = client.get("/api/search", params={"query": query})
        assert answer.status_code == 503
        assert "was edited or damaged" in answer.json()["error"]
        assert str(path.parent) not in answer.json()["error"]
        manifest.write_text(good)
        assert client.get("/api/search", params={"query": query}).status_code == 200
        for file in (path / "data-0000").iterdir():  # mapped, and cut off
            content = file.read_bytes()
            os.truncate(file, 7)
            answer = client.get("/api/search", params={"query": query})
            assert answer.status_code == 503
            assert f"{file.name} has 7 bytes" in answer.json()["error"]
            file.write_bytes(content)
        assert client.get("/api/search", params={"query": query}).status_code == 200


def test_measures_in_the_background_and_then_knows_what_to_spend(client, service, monkeypatch):
    query = ask(client, "tree").json()["query"]
    values = {"query": query, "plan": "auto"}
    monkeypatch.setattr("metaembed_pl.retrieval.calibration.SMALL", 0)
    if client.get("/api/store").json()["measurement"]["state"] == "none":
        answer = client.get("/api/search", params=values).json()
        assert (answer["plan"], "have not been measured" in answer["note"]) == ("4x8", True)
    assert client.post("/api/measurement").status_code == 202
    service.measuring.wait()
    shelf = client.get("/api/store").json()
    assert shelf["measurement"]["state"] == "done"
    assert shelf["plans"][-1]["recall"] == 1
    answer = client.get("/api/search", params=values).json()
    chosen = next(one for one in shelf["plans"] if one["plan"] == answer["plan"])
    assert chosen["recall"] >= 0.98
    assert "measured with" in answer["note"] or "no cheaper plan" in answer["note"]
    assert client.get("/api/search", params={"query": query}).json()["plan"] == answer["plan"]
    assert client.get("/api/store").json()["default_plan"] == answer["plan"]


def test_a_small_store_is_searched_exactly_and_says_so(client):
    query = ask(client, "tree").json()["query"]
    answer = client.get("/api/search", params={"query": query}).json()
    assert (answer["plan"], answer["note"]) == ("4x8", "exact: the store is small")


def test_queries_are_logged_only_where_that_was_asked_for(model, tmp_path):
    Store.build(tmp_path / "s", model, [tiny.text(i) for i in range(12)])
    Service(model, tmp_path / "s").ask("not kept")
    logging = Service(model, tmp_path / "s", log_queries=True)
    for text in ("a tree", "ein Bäumchen", "two\u2028lines", "a tree"):
        logging.ask(text)
    found = ["two\u2028lines", "ein Bäumchen", "a tree"]
    assert logged_queries(Store.open(tmp_path / "s")) == found


def test_plans_of_an_empty_store_have_a_cost_that_a_page_can_draw(model, tmp_path):
    store = Store.open_for(model, tmp_path / "s")
    plans = Service(model, store.folder).store_info().plans
    assert plans
    assert {plan.cost for plan in plans} == {1.0}


def test_queries_that_cannot_be_logged_are_refused_at_the_start(model, tmp_path):
    store = Store.build(tmp_path / "s", model, ["a tree"])
    (store.folder / QUERIES_FILE).mkdir()
    with pytest.raises(OSError, match=r"queries\.jsonl"):
        Service(model, store.folder, log_queries=True)


def test_a_measurement_that_fails_is_told_and_tried_again(model, tmp_path):
    store = Store.build(tmp_path / "s", model, [tiny.text(i) for i in range(12)])
    faults, calls = [UserError("no room to measure")], []

    def measure(store, go_on):
        calls.append(store)
        if faults:
            raise faults.pop()
        return calibrate(store, go_on=go_on)

    measuring = Measuring(measure)
    for state, error in (("failed", "no room to measure"), ("done", None), ("done", None)):
        measuring.start(store)
        measuring.wait()
        assert (measuring.state(store).state, measuring.state(store).error) == (state, error)
    assert len(calls) == 2, "what is known is not measured again"


def test_of_many_queries_the_one_unused_for_longest_is_forgotten():
    queries, asked = RecentQueries(), EncodedQuery("a", False, torch.zeros(1, 1, 1))
    for i in range(MOST_QUERIES):
        queries.add(str(i), asked)
    assert queries.get("0") is asked
    queries.add("one more", asked)
    assert queries.get("1") is None
    assert None not in (queries.get("0"), queries.get("2"), queries.get("one more"))


def test_a_measurement_ends_with_the_service(model, tmp_path):
    begun = threading.Event()

    def measure_forever(store, go_on):
        while True:
            begun.set()
            calibrate(store, go_on=go_on)

    Store.build(tmp_path / "s", model, [tiny.text(i) for i in range(12)])
    service = Service(model, tmp_path / "s")
    service.measuring = Measuring(measure_forever)
    with TestClient(make_app(service), base_url="http://localhost") as client:
        assert client.post("/api/measurement").json()["state"] == "running"
        assert begun.wait(20)
    service.measuring.wait()  # it is over, or this would never be


def test_a_store_replaced_by_another_models_is_not_searched(model, tmp_path):
    texts = [tiny.text(i) for i in range(3)]
    Store.build(tmp_path / "s", model, texts)
    service = Service(model, tmp_path / "s")
    query = service.ask("sun").query
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(NotNow, match="/s is not a store"):
        service.search(query)
    Store.build(tmp_path / "s", tiny.embedder(seed=1), texts)
    with pytest.raises(NotNow, match="/s was replaced by another model's store"):
        service.search(query)


@pytest.mark.parametrize("top", [0, MAX_TOP + 1])
def test_the_service_gives_a_number_of_results_that_a_page_can_show(service, top):
    with pytest.raises(UserError, match=rf"between 1 and {MAX_TOP}, got {top}"):
        service.search(service.ask("sun").query, top=top)


def test_refuses_another_models_store(folder):
    with pytest.raises(UserError, match="another model"):
        Service(tiny.embedder(seed=1), folder)


@pytest.fixture(scope="module")
def command(model, folder, tmp_path_factory):
    """All but the number of a port."""
    saved = tmp_path_factory.mktemp("run") / "model"
    model.save_pretrained(saved)
    return ["serve", "--model", str(saved), "--store", str(folder), "--port"]


def test_the_extra_that_is_missing_is_named(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main([*command, "0"]) == 2
    assert "serve needs uvicorn: pip install 'metaembed-pl[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "warned", "hosts"),
    [
        ("", False, {"127.0.0.1", "localhost", "::1"}),
        ("--host 0.0.0.0", True, None),
        ("--host 0.0.0.0 --allow-host Shelf.Here", True, {"0.0.0.0", "shelf.here"}),
    ],
)
def test_who_opens_it_to_others_is_warned(command, capsys, monkeypatch, flags, warned, hosts):
    served = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append(self.config.app))
    assert main([*command, "0", *flags.split()]) == 0
    out, err = capsys.readouterr()
    assert ("there is no password" in err) == warned
    assert f"at http://{'0.0.0.0' if warned else '127.0.0.1'}:" in out
    assert [app.hosts for app in served] == [hosts]


def test_the_process_answers_and_ends_in_order(command, capsys):
    with subprocess.Popen(
        [sys.executable, "-m", "metaembed_pl", *command, "0"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert "(30 items) at http://127.0.0.1:" in line
            url = line.partition(" at ")[2].split()[0]
            with urllib.request.urlopen(f"{url}/api/store", timeout=20) as answer:
                assert json.load(answer)["items"] == 30
            assert main([*command, url.rpartition(":")[2]]) == 2
            assert "choose another --port" in capsys.readouterr().err
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
