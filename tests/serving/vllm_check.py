"""vLLM itself, offline and over HTTP, gives what `MetaEmbedder` gives: run by `make test-vllm`."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.export_vllm import VllmPrompts
from metaembed_pl.model.identity import identity_of
from metaembed_pl.retrieval.embedding import Entry, Prepare
from metaembed_pl.retrieval.store import Store
from metaembed_pl.serving.vllm_engine import VllmModel

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

ITEMS = [
    Item("red apple"),
    Item("a small round flag with a <|image_pad|> in it"),
    Item(image=tiny.picture(1)),
    Item(image=tiny.picture(2, (84, 56))),
    Item("moon", image=tiny.picture(3, (56, 84))),
]
# vLLM's attention on a CPU takes heads of 32 and more.
TEXT = {"hidden_size": 64, "num_key_value_heads": 2, "head_dim": 32}
SETTINGS = json.dumps({"dtype": "float32", "enforce_eager": True})
SECTIONS = {"qwen2_vl": [4, 6, 6], "qwen2_5_vl": [4, 6, 6], "qwen3_vl": [8, 4, 4]}
LAYOUTS = {"qwen2_vl": "both", "qwen2_5_vl": "own", "qwen3_vl": "both"}


def model_of(family: str) -> MetaEmbedder:
    config = tiny.CONFIGS[family]
    rope = config["text_config"]["rope_parameters"] | {"mrope_section": SECTIONS[family]}
    text = config["text_config"] | TEXT | {"rope_parameters": rope}
    size = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
    vision = config["vision_config"] | {size: 64}
    model = tiny.embedder(
        config=config | {"text_config": text, "vision_config": vision},
        layout=LAYOUTS[family],
        projection=8 if family == "qwen3_vl" else None,
        max_text_tokens=64,
    )
    rows = len(model.processing.tokenizer) + 40
    model.backbone.resize_token_embeddings(rows, mean_resizing=False)
    return model


def exported(family: str, folder: Path) -> tuple[MetaEmbedder, Path]:
    model = model_of(family)
    model.save_pretrained(folder / "model")
    where = ["--run", str(folder / "model"), "--out", str(folder / "served")]
    assert main(["export", *where, "--format", "vllm"]) == 0
    return model, folder / "served"


def expected(model: MetaEmbedder, side: str) -> torch.Tensor:
    return model.encode_query(ITEMS) if side == "query" else model.encode_candidate(ITEMS)


@pytest.mark.parametrize("family", sorted(SECTIONS))
def test_the_offline_engine_gives_the_same_vectors(family, tmp_path):
    from vllm import LLM

    model, folder = exported(family, tmp_path)
    engine = LLM(str(folder), runner="pooling", dtype="float32", enforce_eager=True)
    prompts = VllmPrompts(folder)
    for side in ("query", "candidate"):
        found = engine.encode(prompts(ITEMS, side), pooling_task="token_embed", use_tqdm=False)
        vectors = torch.stack([one.outputs.data for one in found])
        torch.testing.assert_close(vectors, expected(model, side), atol=1e-5, rtol=0)


def test_embed_with_vllm_makes_the_store_that_embed_makes(tmp_path, capsys):
    model, folder = exported("qwen2_5_vl", tmp_path)
    lines = [{"id": f"{i}", "text": item.text} for i, item in enumerate(ITEMS) if item.text]
    for i, item in enumerate(ITEMS):
        if item.image is not None:
            item.load_image().save(tmp_path / f"{i}.png")
            text = {"text": item.text} if item.text else {}
            lines.append({"id": f"picture {i}", "image": f"{i}.png"} | text)
    lines.append({"id": "long", "text": "word " * 600})
    (tmp_path / "things.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stores = []
    for where, *engine in (
        (folder, "--engine", "vllm", "--vllm-args", SETTINGS),
        [tmp_path / "model"],
    ):
        store = tmp_path / f"store {len(stores)}"
        flags = ["--items", str(tmp_path / "things.jsonl"), "--store", str(store)]
        # fp16 is the nearest to fp32 that a store keeps
        command = ["embed", "--model", str(where), *flags, "--store-dtype", "fp16", *engine]
        assert main(command) == 0, capsys.readouterr().err
        told = capsys.readouterr()
        assert f"{len(lines)} items in {store}, {len(lines)} of them new" in told.out
        assert "1 of 7 texts are longer than 64 tokens and were cut there: 94.2 %" in told.err
        stores.append(Store.open(store))
    theirs, ours = stores
    assert theirs.ids == ours.ids == [line["id"] for line in lines]
    assert theirs.identity == ours.identity == identity_of(model)
    rows = range(len(lines))
    torch.testing.assert_close(theirs.vectors(rows), ours.vectors(rows), atol=1e-3, rtol=0)
    engine = VllmModel(folder, json.loads(SETTINGS))
    prepare = Prepare(engine.processor(), "candidate", 0, skip_bad=False, previews=False)
    entries = [Entry.of(replace(item, id=str(i))) for i, item in enumerate(ITEMS)]
    ((_, vectors),) = engine.encoded([entries], prepare, "candidate")
    torch.testing.assert_close(vectors, expected(model, "candidate"), atol=1e-5, rtol=0)
    query = ["--query", "red apple", "--model", str(tmp_path / "model"), "--json"]
    assert main(["search", "--store", str(theirs.folder), *query]) == 0


def message(item: Item, side: str) -> dict:
    parts: list[dict] = []
    if item.image is not None:
        buffer = io.BytesIO()
        item.load_image().save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    if item.text is not None:
        parts.append({"type": "text", "text": item.text})
    return {"role": side, "content": parts}


@pytest.fixture
def server(tmp_path):
    """A running `vllm serve`, and the model whose folder it serves."""
    model, folder = exported("qwen2_5_vl", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; the command itself asks for a package of the name `vllm`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--runner", "pooling"]
    options = ["--dtype", "float32", "--enforce-eager", "--port", str(port), "--host", "127.0.0.1"]
    with (tmp_path / "server.log").open("w") as told:
        process = subprocess.Popen([*command, *options], stdout=told, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, process, tmp_path / "server.log")
        yield model, address, str(folder)
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise AssertionError(log.read_text()[-5000:])


def test_the_server_gives_the_same_vectors(server):
    model, address, name = server
    told = [item for item in ITEMS if "<|" not in (item.text or "")]  # see docs/export.md
    for side in ("query", "candidate"):
        found = []
        for item in told:
            request = {"model": name, "task": "token_embed", "messages": [message(item, side)]}
            answer = httpx.post(f"{address}/pooling", json=request, timeout=300)
            assert answer.status_code == 200, answer.text
            found.append(torch.tensor(answer.json()["data"][0]["data"]))
        kept = [i for i, item in enumerate(ITEMS) if item in told]
        wanted = expected(model, side)[kept]
        torch.testing.assert_close(torch.stack(found), wanted, atol=1e-5, rtol=0)
    request = {"model": name, "task": "token_embed", "messages": [message(ITEMS[0], "user")]}
    refused = httpx.post(f"{address}/pooling", json=request, timeout=300)
    assert refused.status_code == 400
    assert "the role must be query or candidate, got user" in refused.text
