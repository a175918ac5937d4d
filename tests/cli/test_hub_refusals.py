"""Models the hub does not give out: a server that answers as it does, asked by the commands."""

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

import tiny
from metaembed_pl.cli.main import main

ANSWERS = {
    "org/gated": (403, "GatedRepo", "Access to model org/gated is restricted."),
    "org/login": (401, "GatedRepo", "Access to model org/login is restricted. Please log in."),
    "org/private": (401, "RepoNotFound", "Invalid username or password."),
    "Qwen/Qwen2.5-VL-3B-Instrct": (404, "RepoNotFound", "Repository not found"),
    "org/old": (404, "RevisionNotFound", "Invalid rev id: main"),
}

# Both verbs for each name, in one process: to import everything takes longer than to ask.
ASK = """
import sys
from metaembed_pl.cli.main import main

recipe, *names = sys.argv[1:]
for name in names:
    for verb in ("check", "fit"):
        print(f"== {name} {verb}", file=sys.stderr)
        print(main([verb, "--config", recipe, f"--model.backbone.path={name}"]), file=sys.stderr)
"""


class Refusal(BaseHTTPRequestHandler):
    def do_GET(self):
        name = next((name for name in ANSWERS if f"/{name}" in self.path), None)
        status, code, message = ANSWERS.get(name, (404, "EntryNotFound", ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def recipe(folder: Path, backbone: str) -> str:
    settings = {
        "run": {"name": "hub", "folder": str(folder / "runs")},
        "model": {"backbone": {"path": backbone}, "groups": ["1x1", "2x4"]},
        "data": {
            "train": [{"path": str(tiny.shards(folder / "train", 8))}],
            "global_batch_size": 8,
            "num_workers": 0,
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "logger": False},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def faults(said: str) -> list[str]:
    starts = ("fault: ", "metaembed-pl: model.")
    return [line for line in said.splitlines() if line.startswith(starts)]


def test_a_refusal_of_the_hub_names_the_key_and_the_way_out(hub, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ASK, recipe(tmp_path, "set/below"), *ANSWERS],
        env=os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    said = {part.partition("\n")[0]: part for part in done.stderr.split("== ")[1:]}
    assert len(said) == 2 * len(ANSWERS)
    for name in ANSWERS:
        words = "the repository does not exist or is private"
        if name in ("org/gated", "org/login"):
            words = f"accept the licence at https://huggingface.co/{name}, then log in"
        elif name == "org/old":
            words = "not this revision"
        for verb in ("check", "fit"):
            text = said[f"{name} {verb}"]
            assert text.splitlines()[-1] == "2", text
            [line] = faults(text)
            assert f"model.backbone.path: {name}: " in line
            assert words in line
            assert "HTTP Request" not in text
    assert "did you mean 'Qwen/Qwen2.5-VL-3B-Instruct'?" in said["Qwen/Qwen2.5-VL-3B-Instrct check"]


@pytest.mark.parametrize("verb", ["check", "fit"])
def test_no_network_names_the_command_for_elsewhere(verb, tmp_path, capsys):
    """Tests have no network."""
    assert main([verb, "--config", recipe(tmp_path, "org/away")]) == 2
    [line] = faults(capsys.readouterr().err)
    assert "model.backbone.path: org/away: " in line
    assert "the hub could not be reached: run `hf download org/away`" in line
    assert "a local folder" in line
