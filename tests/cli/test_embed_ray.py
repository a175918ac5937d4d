"""Embedding on a Ray cluster: where Ray is installed, on a local one; without it, a line."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.retrieval.store import Store

HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.embedder().save_pretrained(folder)
    return folder


@pytest.fixture
def things(tmp_path):
    lines = [{"id": f"{i}", "text": tiny.text(i)} for i in range(400)]
    file = tmp_path / "things.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def embed(model, things, store, *flags):
    command = ["embed", "--model", model, "--items", things, "--store", store, "--device", "cpu"]
    return main([*map(str, (*command, "--batch-size", 1, *flags))])


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_it_says_what_to_install(model, things, tmp_path, capsys):
    assert embed(model, things, tmp_path / "s", "--engine", "ray") == 2
    err = capsys.readouterr().err
    assert "--engine ray needs Ray: pip install 'metaembed-pl[ray]'" in err
    assert err.count("\n") == 1
    assert embed(model, things, tmp_path / "s", "--engine", "ray", "--part", "1/2") == 2
    assert "--part does not work with --engine ray" in capsys.readouterr().err


def workers():
    """Processes that embed a part, by what Ray calls them."""
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in lines.splitlines() if "ray::embed_part" in line]


@pytest.mark.skipif(not HAS_RAY, reason="needs Ray")
@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_the_store_is_what_one_process_makes(
    model, things, tmp_path, capsys
):
    killed = []

    def kill():
        folder = tmp_path / "ray.parts"
        while not killed:
            for part in folder.glob("*/manifest.json"):
                if json.loads(part.read_text()).get("num_rows", 0) > 8 and workers():
                    killed.append(workers()[0])
                    os.kill(killed[0], 9)
                    return
            time.sleep(0.02)

    threading.Thread(target=kill, daemon=True).start()
    assert embed(model, things, tmp_path / "ray", "--engine", "ray", "--parts", 3, "--json") == 0
    assert killed
    told = json.loads(capsys.readouterr().out)
    assert told["items"] == 400
    assert embed(model, things, tmp_path / "one") == 0
    one, ray = Store.open(tmp_path / "one"), Store.open(tmp_path / "ray")
    assert ray.ids == one.ids
    assert torch.equal(ray.vectors(), one.vectors())
    assert not (tmp_path / "ray.parts").exists()
    assert embed(model, things, tmp_path / "ray", "--engine", "ray") == 2
    assert "exists already: --engine ray only creates new stores" in capsys.readouterr().err
    assert sys.modules["ray"].is_initialized()
