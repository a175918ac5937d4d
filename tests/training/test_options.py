"""Options of the loss in whole runs of a tiny recipe: cached or not, on one rank or two."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
import tiny_run
from metaembed_pl.cli.main import main
from metaembed_pl.model.embedder import MetaEmbedder

OPTIONS = {
    "model__meta_tokens_orthogonal": True,
    "model__loss": {
        "temperature": 0.1,
        "temperature_bounds": [0.01, 1.0],
        "learn_weights": True,
        "both_directions": True,
        "query_spread": {"weight": 1.0, "margin": 0.3},
        "candidate_spread": {"weight": 0.1, "margin": 0.5},
        "self_distillation": {"weight": 0.5, "first_step": 1, "warmup_steps": 2},
        "quantization": {"bits": 8, "share": 0.5},
        "widths": [16],
    },
    "trainer__max_steps": 3,
}
CACHED = {"model__gradient_cache": {"max_tokens": 60}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.data(tmp_path_factory.mktemp("data"))


def learned(folder) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "runs/r/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("loss.")}


def fit(data, folder, **changes):
    assert main(["fit", "--config", str(tiny_run.recipe(data, folder, **changes))]) == 0
    return folder


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    return fit(data, tmp_path_factory.mktemp("plain"), **OPTIONS)


def test_a_run_and_an_evaluation_report_the_largest_budget_at_each_width(data, plain, tmp_path):
    report = plain / "runs/r/report"
    names = json.loads((report / "results.json").read_text())["budgets"]
    assert names == ["1x1", "2x4x16", "2x4"]
    ours = json.loads((report / "metrics.json").read_text())
    assert "| 2x4x16 |" in (report / "report.md").read_text()
    model, out = str(plain / "runs/r/model"), tmp_path / "out"
    flags = ["--model", model, "--benchmark", f"pairs:{data / 'test'}", "--out", str(out)]
    assert main(["evaluate", *flags, "--store-dtype", "fp32"]) == 0
    theirs = json.loads((out / "results.json").read_text())
    assert theirs["budgets"] == names
    (dataset,) = theirs["tasks"]
    for metric in ("recall@1", "ndcg@10"):
        name = f"{dataset}/{metric}/2x4x16"
        assert theirs["metrics"][f"evaluate/{name}"] == pytest.approx(ours[f"test/{name}"])
    assert main(["evaluate", *flags, "--budgets", "2x4x8"]) == 2


def test_a_store_of_the_run_is_searched_and_its_card_told_at_the_width(plain, tmp_path, capsys):
    model, items = str(plain / "runs/r/model"), tmp_path / "items.jsonl"
    texts = [tiny.text(i) for i in range(12)]
    items.write_text(
        "".join(json.dumps({"id": f"{i}", "text": t}) + "\n" for i, t in enumerate(texts))
    )
    flags = ["--model", model, "--items", str(items), "--store", str(tmp_path / "s")]
    assert main(["embed", *flags, "--store-dtype", "fp16"]) == 0
    embedder = MetaEmbedder.from_pretrained(model)
    scores = embedder.score(
        embedder.encode_query(["a red circle"]), embedder.encode_candidate(texts), "2x4x16"
    )[0]
    asked = ["--model", model, "--query", "a red circle", "--top", "3", "--json"]
    for source in (["--store", str(tmp_path / "s")], ["--items", str(items)]):
        capsys.readouterr()
        assert main(["search", *asked, *source, "--budget", "2x4x16"]) == 0
        found = json.loads(capsys.readouterr().out)["results"]
        best = scores.topk(3).values.tolist()
        assert [hit["score"] for hit in found] == pytest.approx(best, abs=2e-3)
        own = [scores[int(hit["id"])].item() for hit in found]
        assert own == pytest.approx(best, abs=2e-3)
        assert main(["search", *asked, *source, "--budget", "2x4x8"]) == 2
        assert "not trained at width 8; choose one of 16" in capsys.readouterr().err
    assert main(["export", "--run", str(plain / "runs/r"), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A third number keeps fewer dimensions: 2x4x16." in card
    assert "| dataset | metric | 1x1 | 2x4x16 | 2x4 |" in card


def test_what_the_loss_learns_is_the_same_with_gradient_caching(data, plain, tmp_path):
    expected = learned(plain)
    assert {name.rpartition(".")[2] for name in expected} == {"place", "log_weights"}
    assert expected["loss.mmr.log_weights"].abs().min() > 1e-4, "nothing was learned"
    torch.testing.assert_close(learned(fit(data, tmp_path, **OPTIONS, **CACHED)), expected)


def test_what_the_loss_learns_is_the_same_on_two_ranks_with_gradient_caching(data, plain, tmp_path):
    file = tiny_run.recipe(
        data, tmp_path, **OPTIONS, **CACHED, trainer__devices=2, trainer__strategy="ddp"
    )
    tiny_run.started(file, count=2).end()
    torch.testing.assert_close(learned(tmp_path), learned(plain))


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn_from_it(data, plain, tmp_path):
    changes = {
        "model__start_from": str(plain / "runs/r/model"),
        "model__backbone": None,
        "model__groups": None,
        "model__layout": None,
        "model__loss": {
            "temperature": 0.1,
            "mean_over_query": True,
            "weights": [0, 1],
            "teacher": {"model": str(plain / "runs/r/model"), "temperature": 0.1},
        },
        "trainer__max_steps": 1,
        "trainer__logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(tmp_path)},
        },
    }
    values = []
    for name, more in (("plain", {}), ("cached", CACHED)):
        fit(data, tmp_path / name, **changes, **more)
        (metrics,) = tmp_path.rglob("metrics.csv")
        with metrics.open() as file:
            (row,) = (row for row in csv.DictReader(file) if row["train/loss"])
        values.append({name: float(value) for name, value in row.items() if value})
        metrics.unlink()
    for found in values:
        # The largest group is the teacher's own; the smaller one is not.
        assert found["train/teacher/2x4"] == pytest.approx(0, abs=1e-5)
        assert found["train/teacher/1x1"] > 1e-4
    assert values[0]["train/loss"] == pytest.approx(values[1]["train/loss"], abs=1e-5)


def test_lightnings_own_average_of_the_weights_is_what_is_kept(data, tmp_path):
    def weights(folder):
        return load_file(folder / "runs/r/model/meta_tokens.safetensors")["meta_tokens"]

    steps = [
        weights(fit(data, tmp_path / str(n), trainer__max_steps=n, data__test=[]))
        for n in (1, 2, 3)
    ]
    average = {
        "class_path": "lightning.pytorch.callbacks.EMAWeightAveraging",
        "init_args": {"decay": 0.75},
    }
    changes = {"trainer__callbacks": [average], "trainer__max_steps": 3}
    found = weights(fit(data, tmp_path / "averaged", **changes))
    expected = 0.75 * (0.75 * steps[0] + 0.25 * steps[1]) + 0.25 * steps[2]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (expected - steps[2]).abs().max() > 1e-5


def test_refuses_a_teacher_of_another_vocabulary(data, plain, tmp_path, capsys):
    other = {"vocab_size": 290, "sources": [str(data / "train")]}
    loss = {"teacher": {"model": str(plain / "runs/r/model")}}
    file = tiny_run.recipe(data, tmp_path, model__backbone__tokenizer=other, model__loss=loss)
    assert main(["fit", "--config", str(file)]) == 2
    assert "has another tokenizer than the model in training" in capsys.readouterr().err


def test_refuses_a_teacher_whose_scores_the_pairs_do_not_have(data, tmp_path, capsys):
    file = tiny_run.recipe(data, tmp_path, model__loss={"teacher": {}})
    assert main(["fit", "--config", str(file)]) == 2
    assert "`score` of each pair's positive and hard negatives" in capsys.readouterr().err
