import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from transformers import AutoModel, AutoTokenizer

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.export_sentence_transformers import MetaEmbedderModule
from metaembed_pl.model.export_vllm import VllmPrompts
from metaembed_pl.training.module import MetaEmbedModule

DOCS = Path(__file__).parents[2] / "docs"
ITEMS = [{"text": "red apple"}, {"image": tiny.picture(1)}]


def spare(model: MetaEmbedder, rows: int = 40) -> MetaEmbedder:
    """The model with rows of its vocabulary that no word uses, as the hub's models have."""
    size = len(model.processing.tokenizer) + rows
    model.backbone.resize_token_embeddings(size, mean_resizing=False)
    if model.backbone.config.model_type == "mllama":  # its table has eight rows beyond that number
        model.backbone.config.text_config.vocab_size -= 8
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "base"
    model = spare(tiny.embedder())
    model.backbone.save_pretrained(folder)
    model.processing.save(folder)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """A LoRA run as `fit` leaves it, and a checkpoint of another moment of it."""
    folder = tmp_path_factory.mktemp("runs") / "custom"
    recipe = {
        "backbone": {"path": str(base), "max_pixels": 56 * 56},
        "groups": ["1x1", "2x4"],
        "layout": "both",
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "train_vision": False,
    }
    (folder / "checkpoints").mkdir(parents=True)
    config = {"run": {"name": "custom"}, "model": recipe, "trainer": {"max_steps": 3}}
    (folder / "config.fit.yaml").write_text(yaml.safe_dump(config))
    (folder / "report").mkdir()
    metrics = {
        "test/pool/recall@1/1x1": 0.25,
        "test/pool/recall@1/2x4": 0.5,
        "test/pool/mrr/2x4": 1,
    }
    (folder / "report" / "metrics.json").write_text(json.dumps(metrics))
    module = _module(recipe)
    _stir(module, 1)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)  # leaves out the base model's weights
    torch.save(checkpoint, folder / "checkpoints" / "best.ckpt")
    _stir(module, 2)
    module.embedder.save_pretrained(folder / "model")
    return folder


def _module(recipe: dict) -> MetaEmbedModule:
    from metaembed_pl.model.backbone import BackboneConfig
    from metaembed_pl.model.lora import LoraConfig

    parts = {"backbone": BackboneConfig(**recipe["backbone"]), "lora": LoraConfig(**recipe["lora"])}
    module = MetaEmbedModule(**(recipe | parts))
    module.configure_model()
    return module


def _stir(module: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def export(*arguments) -> int:
    return main(["export", *map(str, arguments)])


def vectors(folder: Path) -> torch.Tensor:
    model = MetaEmbedder.from_pretrained(folder)
    return torch.cat([model.encode_query(ITEMS), model.encode_candidate(ITEMS)], dim=1)


def test_an_adapter_is_exported_as_it_is(run, tmp_path, capsys):
    assert export("--run", run, "--out", tmp_path / "deep" / "out") == 0
    out = tmp_path / "deep" / "out"
    assert not (out / "backbone").exists()
    assert torch.equal(vectors(out), vectors(run / "model"))
    assert capsys.readouterr().out == f"written to {out}\n"


def test_merged_weights_stand_alone_and_the_difference_is_told(run, base, tmp_path, capsys):
    out = tmp_path / "out"
    expected = vectors(run / "model")
    assert export("--run", run, "--out", out, "--merge") == 0
    told = re.search(
        r"merged: smallest cosine of a vector (\S+), the ranking is kept", capsys.readouterr().out
    )
    assert float(told[1]) > 0.99999
    assert not (out / "adapter").exists()
    base.rename(tmp_path / "away")
    try:
        torch.testing.assert_close(vectors(out), expected, atol=1e-5, rtol=0)
    finally:
        (tmp_path / "away").rename(base)


def test_a_merge_that_changes_the_vectors_is_refused(run, tmp_path, capsys, monkeypatch):
    from metaembed_pl.model import export as module
    from metaembed_pl.model.lora import adapted_layers

    def spoil(backbone):
        for layer in adapted_layers(backbone).values():
            layer.enable_adapters(False)

    monkeypatch.setattr(module, "merge_adapter", spoil)
    assert export("--run", run, "--out", tmp_path / "out", "--merge") == 2
    told = capsys.readouterr().err
    assert re.search(r"merging would change the model: smallest cosine of a vector -?0\.\d+", told)
    assert "keeps its adapter" in told
    assert (run / "model" / "adapter").is_dir()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_exported_by_the_runs_recipe(run, tmp_path):
    assert export("--run", run, "--out", tmp_path / "best", "--checkpoint", "best") == 0
    assert not torch.equal(vectors(tmp_path / "best"), vectors(run / "model"))
    assert "Quality by budget" not in (tmp_path / "best" / "README.md").read_text()
    module = _module(yaml.safe_load((run / "config.fit.yaml").read_text())["model"])
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert not any(name.endswith("base_layer.weight") for name in state)
    module.load_state_dict(state, strict=False)
    module.embedder.save_pretrained(tmp_path / "expected")
    assert torch.equal(vectors(tmp_path / "best"), vectors(tmp_path / "expected"))


def test_the_card_tells_quality_by_budget_and_the_recipe(run, tmp_path):
    assert export("--run", run, "--out", tmp_path / "out", "--licence", "mit") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    header, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(header)["license"] == "mit"
    assert "## Quality by budget" in body
    assert "## Intended use" in body
    assert "Texts are cut at 512 tokens" in body
    assert "| pool | recall@1 | 0.250 | 0.500 |" in body
    assert "max_steps: 3" in body
    assert f"torch: {torch.__version__}" in body


def test_the_hub_can_read_results_datasets_and_languages_of_the_card(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(run, tmp_path / "copy"))
    for name, source in (("a", "org/pairs"), ("b", "made here")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"source": source}))
    config = yaml.safe_load((run / "config.fit.yaml").read_text())
    config["data"] = {"train": [{"path": "a"}, "b", {"path": "away"}]}
    (run / "config.fit.yaml").write_text(yaml.safe_dump(config))
    assert export("--run", run, "--out", "out", "--language", "en", "--language", "zh") == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["org/pairs"]
    assert card.data.language == ["en", "zh"]
    assert card.data.model_name == "out"
    found = [(r.dataset_name, r.metric_name, r.metric_value) for r in card.data.eval_results]
    assert found == [("pool", "recall@1 at 1x1", 0.25), ("pool", "recall@1 at 2x4", 0.5)]
    assert card.text.count("<details>") == card.text.count("</details>") == 2


def test_plain_transformers_gives_the_same_vectors(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert export("--run", run, "--out", out, "--format", "transformers") == 0
    told = capsys.readouterr().out
    assert float(re.search(r"by plain transformers: .* vector (\S+), the rank", told)[1]) > 0.99999
    assert not (out / "metaembed.json").exists()


def test_the_code_in_the_docs_gives_the_same_vectors(run, tmp_path, monkeypatch):
    """The page's own words, run: an independent way from an item to its vectors."""
    monkeypatch.chdir(tmp_path)
    assert export("--run", run, "--out", "custom", "--format", "transformers") == 0
    tiny.picture(5).save("apple.png")
    code = re.findall(r"```python\n(.*?)```", (DOCS / "export.md").read_text(), re.DOTALL)
    Path("snippet.py").write_text(next(part for part in code if "def embed" in part))
    found = runpy.run_path("snippet.py")
    model = MetaEmbedder.from_pretrained(run / "model")
    query = model.encode_query(["a red apple"])[0]
    torch.testing.assert_close(found["query"], query, atol=1e-5, rtol=0)
    both = {"text": "blue star", "image": tiny.picture(2, (84, 56))}
    for item in ({"image": Image.open("apple.png")}, both, {"text": "moon"}):
        theirs = found["embed"]("candidate", **item)
        torch.testing.assert_close(theirs, model.encode_candidate([item])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_vllm_form_is_plain_transformers_still(family, tmp_path):
    """What vLLM makes of it: `make test-vllm`. Here: what is in it, and that others can load it."""
    model = spare(tiny.embedder(config=tiny.CONFIGS[family]))
    model.save_pretrained(tmp_path / "m")
    out = tmp_path / "o"
    assert export("--run", tmp_path / "m", "--out", out, "--format", "vllm") == 0
    plain, report = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    for name, weight in plain.state_dict().items():
        if "embed_tokens" not in name:
            assert torch.equal(weight, model.backbone.state_dict()[name])
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"][0].startswith("MetaEmbedQwen")
    told = config["metaembed"]
    assert (told["num_query"], told["num_candidate"]) == (4, 8)
    table = plain.get_input_embeddings().weight
    rows = table[told["first_id"] : told["first_id"] + 12]
    assert torch.equal(rows, model.meta_tokens.embedding.weight)


def test_the_chat_template_and_the_prompts_give_our_tokens(run, tmp_path):
    out = tmp_path / "out"
    assert export("--run", run, "--out", out, "--format", "vllm") == 0
    tokenizer, prompts = AutoTokenizer.from_pretrained(out), VllmPrompts(out)
    ours = MetaEmbedder.from_pretrained(run / "model")
    for side, num_slots in (("query", 2), ("candidate", 6)):
        for item in (Item("red apple"), Item(image=tiny.picture(1)), Item("a", tiny.picture(1))):
            ids = ours.processor()([item], side)["input_ids"][0, :-num_slots]
            is_picture = ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
            kept = ids[~is_picture | (is_picture.cumsum(0) == 1)].tolist()  # vLLM repeats it
            parts = [{"type": "image"}] if item.image is not None else []
            parts += [{"type": "text", "text": item.text}] if item.text else []
            messages = [{"role": side, "content": parts}]
            told = tokenizer.apply_chat_template(messages, return_dict=False)
            assert told[:-num_slots] == kept
            assert prompts([item], side)[0]["prompt_token_ids"] == told
            assert tokenizer.decode(told[-1:]).startswith("<|meta_")
    with pytest.raises(Exception, match="the role must be query or candidate, got user"):
        tokenizer.apply_chat_template([{"role": "user", "content": []}])


def test_the_vllm_form_is_refused_where_vllm_has_no_class(tmp_path, capsys):
    spare(tiny.embedder(config=tiny.CONFIGS["gemma3"])).save_pretrained(tmp_path / "m")
    arguments = ["--run", tmp_path / "m", "--out", tmp_path / "o", "--format", "vllm"]
    assert export(*arguments) == 2
    assert "is there for qwen2_vl, qwen2_5_vl, qwen3_vl, not for gemma3" in capsys.readouterr().err


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_every_family_has_a_transformers_form(family, tmp_path, capsys):
    spare(tiny.embedder(config=tiny.CONFIGS[family], projection=8)).save_pretrained(tmp_path / "m")
    assert export("--run", tmp_path / "m", "--out", tmp_path / "o", "--format", "transformers") == 0
    assert (tmp_path / "o" / "projection.safetensors").is_file()


def test_words_kept_in_reserve_are_used_where_there_are_any(tmp_path):
    from metaembed_pl.model.export_transformers import spare_words

    tokenizer = tiny.processing().tokenizer
    kept = [f"<|reserved_special_token_{i}|>" for i in range(5)]
    tokenizer.add_tokens(kept)
    assert spare_words(tokenizer, len(tokenizer), 4) == kept[:4]


def test_a_vocabulary_without_spare_rows_is_told(tmp_path, capsys):
    tiny.embedder().save_pretrained(tmp_path / "m")
    arguments = ["--run", tmp_path / "m", "--out", tmp_path / "o", "--format", "transformers"]
    assert export(*arguments) == 2
    assert "12 meta tokens into unused rows of the vocabulary, and this model has 0" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "o").exists()


def test_the_sentence_transformers_module_gives_the_same_vectors(tmp_path):
    """Of a family whose folder does not carry the code: the module of this package."""
    expected = tiny.embedder(config=tiny.CONFIGS["gemma3"])
    expected.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--run", tmp_path / "model", "--out", out, "--format", "sentence-transformers"]
    assert export(*arguments) == 0
    kind = json.loads((out / "modules.json").read_text())[0]["type"]
    assert kind == f"{MetaEmbedderModule.__module__}.MetaEmbedderModule"
    module = MetaEmbedderModule.load(str(out), subfolder="", token=None)
    inputs = ["red apple", {"image": tiny.picture(1)}, tiny.picture(2)]
    items = [inputs[0], inputs[1], {"image": inputs[2]}]
    for task, encode in (("query", expected.encode_query), (None, expected.encode_candidate)):
        features = module.forward(module.preprocess(inputs, prompt="", task=task), task=task)
        assert torch.equal(features["token_embeddings"], encode(items))
        assert features["attention_mask"].all()
    prompted = module.preprocess(["apple"], prompt="red ", task="query")
    plain = module.preprocess(["red apple"], task="query")
    assert torch.equal(prompted["input_ids"], plain["input_ids"])
    lower = MetaEmbedderModule.load(str(out), model_kwargs={"torch_dtype": torch.bfloat16})
    assert lower.embedder.backbone.dtype == torch.bfloat16
    for given, told in (
        ({"backend": "onnx"}, "backend='torch', not 'onnx'"),
        ({"model_kwargs": {"device_map": "auto"}}, "got device_map"),
    ):
        with pytest.raises(UserError, match=told):
            MetaEmbedderModule.load(str(out), **given)


@pytest.fixture(scope="module")
def lone(run, tmp_path_factory) -> Path:
    """An export for sentence-transformers, and two pictures beside it."""
    folder = tmp_path_factory.mktemp("alone")
    tiny.picture(1).save(folder / "apple.png")
    tiny.picture(2, (84, 56)).save(folder / "wide.png")
    out = folder / "out"
    assert export("--run", run, "--out", out, "--format", "sentence-transformers") == 0
    return folder


def test_sentence_transformers_needs_nothing_of_this_package(run, lone, monkeypatch):
    library = pytest.importorskip("sentence_transformers", minversion="6")
    assert not (lone / "out" / "adapter").exists()
    ours = MetaEmbedder.from_pretrained(run / "model")
    apple, wide = Path(lone / "apple.png"), Image.open(lone / "wide.png")
    inputs = ["red apple <|image_pad|>", {"image": apple}, wide, {"text": "moon", "image": wide}]
    items = [Item("red apple <|image_pad|>"), Item(image=apple), Item(image=wide), inputs[3]]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "metaembed_pl", None)  # importing it fails
        theirs = library.MultiVectorEncoder(str(lone / "out"), trust_remote_code=True, device="cpu")
        queries, candidates = theirs.encode_query(inputs), theirs.encode_document(inputs)
        theirs.save_pretrained(str(lone / "again"))
    torch.testing.assert_close(torch.stack(queries), ours.encode_query(items), atol=1e-5, rtol=0)
    expected = ours.encode_candidate(items)
    torch.testing.assert_close(torch.stack(candidates), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors(lone / "again"), vectors(lone / "out"), atol=1e-6, rtol=0)
    assert (lone / "again" / "sentence_transformers_module.py").is_file()


def test_sentence_transformers_gets_the_precision_it_asks_for(lone):
    library = pytest.importorskip("sentence_transformers", minversion="6")
    ask = {"trust_remote_code": True, "device": "cpu"}
    given = {"model_kwargs": {"torch_dtype": "bfloat16"}, "token": False, "cache_folder": "."}
    model = library.MultiVectorEncoder(str(lone / "out"), **ask, **given)
    assert model[0].backbone.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="backend='torch', not 'onnx'"):
        library.MultiVectorEncoder(str(lone / "out"), backend="onnx", **ask)
    with pytest.raises(ValueError, match="expected a text, a picture or text and image"):
        model.encode_query([{"words": "red"}])


@pytest.mark.parametrize("projection", [None, 8])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_sentence_transformers_scores_as_we_do(family, projection, tmp_path):
    library = pytest.importorskip("sentence_transformers", minversion="6")
    layout = "both" if projection else "own"
    ours = tiny.embedder(config=tiny.CONFIGS[family], projection=projection, layout=layout)
    ours.save_pretrained(tmp_path / "model")
    arguments = ["--run", tmp_path / "model", "--out", tmp_path / "out"]
    assert export(*arguments, "--format", "sentence-transformers") == 0
    theirs = library.MultiVectorEncoder(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    inputs = [{"text": "red apple"}, {"image": tiny.picture(1)}]
    scores = theirs.similarity(theirs.encode_query(inputs), theirs.encode_document(inputs))
    expected = ours.score(ours.encode_query(inputs), ours.encode_candidate(inputs))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


class Hub:
    """In place of the network alone: what a hub would be asked, and what it would say."""

    def __init__(self, monkeypatch, private=True, licence="apache-2.0"):
        self.asked = []
        card = huggingface_hub.ModelCardData(license=licence) if licence else None
        info = type("Info", (), {"private": private, "card_data": card})
        for name, answer in (
            ("create_repo", "https://the.hub/org/name"),
            ("model_info", info),
            ("upload_folder", None),
        ):
            monkeypatch.setattr(huggingface_hub.HfApi, name, self._method(name, answer))

    def _method(self, name, answer):
        def method(_api, *args, **kwargs):
            if name == "upload_folder":
                folder = Path(kwargs["folder_path"])
                kwargs["files"] = {str(f.relative_to(folder)) for f in folder.rglob("*")}
                kwargs["card"] = (folder / "README.md").read_text()
            self.asked.append((name, args, kwargs))
            return answer

        return method


def test_pushes_a_private_model_with_its_card(run, monkeypatch, capsys):
    hub = Hub(monkeypatch)
    assert export("--run", run, "--merge", "--push-to", "org/name", "--licence", "mit") == 0
    assert [name for name, *_ in hub.asked] == ["create_repo", "model_info", "upload_folder"]
    assert hub.asked[0][1:] == (("org/name",), {"private": True, "exist_ok": True})
    sent = hub.asked[2][2]
    assert sent["repo_id"] == "org/name"
    assert {"metaembed.json", "backbone/model.safetensors", "README.md"} <= sent["files"]
    assert "license: mit" in sent["card"]
    assert 'from_pretrained("org/name")' in sent["card"]
    assert "uploaded to https://the.hub/org/name" in capsys.readouterr().out


def test_the_licence_of_a_base_model_on_the_hub_is_looked_up(run, tmp_path, monkeypatch):
    hub = Hub(monkeypatch, licence="gemma")
    folder = tmp_path / "run"
    config = yaml.safe_load((run / "config.fit.yaml").read_text())
    config["model"]["backbone"]["path"] = "google/gemma"
    tiny.embedder().save_pretrained(folder / "model")
    (folder / "config.fit.yaml").write_text(yaml.safe_dump(config))
    assert export("--run", folder, "--push-to", "org/name", "--public") == 0
    assert hub.asked[0][:2] == ("model_info", ("google/gemma",))
    assert hub.asked[1] == ("create_repo", ("org/name",), {"private": False, "exist_ok": True})
    card = hub.asked[-1][2]["card"]
    assert "license: gemma" in card
    assert "base_model: google/gemma" in card


@pytest.mark.parametrize(
    ("hub", "arguments", "message"),
    [
        ({"private": False}, ["--merge", "--licence", "mit"], "exists and is public"),
        ({}, ["--licence", "mit"], "belongs to a base model on this machine"),
        ({}, ["--merge"], "licence of the base model (not on the hub) is not known"),
    ],
)
def test_nothing_is_sent_that_should_not_be(run, monkeypatch, capsys, hub, arguments, message):
    asked = Hub(monkeypatch, **hub).asked
    assert export("--run", run, "--push-to", "org/name", *arguments) == 2
    assert message in capsys.readouterr().err
    assert "upload_folder" not in [name for name, *_ in asked]


def test_without_a_network_a_push_is_one_line_that_does_not_blame_the_login(
    run, monkeypatch, capsys
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def away(*_args, **_kwargs):
        raise ConnectionError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", away)
    assert export("--run", run, "--merge", "--licence", "mit", "--push-to", "org/name") == 2
    err = capsys.readouterr().err
    assert "org/name: the hub could not be reached ([Errno -3]" in err
    assert "login" not in err
    assert err.count("\n") == 1


def test_a_dry_run_says_what_would_be_sent_and_asks_nobody(run, monkeypatch, capsys):
    asked = Hub(monkeypatch).asked
    where = ["--run", run, "--merge", "--licence", "mit", "--push-to", "org/name"]
    assert export(*where, "--dry-run") == 0
    out = capsys.readouterr().out
    assert not asked
    assert "  backbone/model.safetensors\n" in out
    assert re.search(r"would be uploaded to org/name \(private\): \d+ files, [\d,]+ bytes", out)
    assert export("--run", run, "--licence", "mit", "--push-to", "org/name", "--dry-run") == 2
    assert "belongs to a base model on this machine" in capsys.readouterr().err


def test_a_refusal_of_the_hub_is_one_line(run, monkeypatch, capsys):
    Hub(monkeypatch)

    class Refusal(HfHubHTTPError):
        def __init__(self):
            Exception.__init__(self, "403 Forbidden\nyou may not")

    def refuse(*_args, **_kwargs):
        raise Refusal

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    assert export("--run", run, "--merge", "--licence", "mit", "--push-to", "org/name") == 2
    assert "403 Forbidden; log in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nowhere to write"),
        (["--out", "."], ". exists already"),
        (["--out", "new", "--run", "nowhere"], "nowhere is neither a run nor a model folder"),
        (["--push-to", "name"], "--push-to must be ORG/NAME, got 'name'"),
        (["--out", "new", "--public"], "only works with --push-to"),
        (["--out", "new", "--dry-run"], "--dry-run only works with --push-to"),
        (["--out", "new", "--language", "English"], "a code such as en or zh, got 'English'"),
        (["--out", "new", "--checkpoint", "worst.ckpt"], "there is no worst.ckpt; checkpoints of"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = arguments if "--run" in arguments else ["--run", run, *arguments]
    assert export(*given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_merge_without_an_adapter_is_refused(tmp_path, capsys):
    tiny.embedder().save_pretrained(tmp_path / "m")
    assert export("--run", tmp_path / "m", "--out", tmp_path / "o", "--merge") == 2
    assert "no adapter" in capsys.readouterr().err


def test_a_run_that_has_not_ended_is_told_how(run, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.fit.yaml").write_text((run / "config.fit.yaml").read_text())
    assert export("--run", unfinished, "--out", tmp_path / "o") == 2
    assert "--checkpoint last" in capsys.readouterr().err


@pytest.mark.parametrize("projection", [None, 24])
@pytest.mark.parametrize("format", ["metaembed", "transformers"])
def test_a_width_that_was_trained_is_what_the_first_dimensions_are(
    projection, format, tmp_path, capsys
):
    model = tiny.embedder(projection=projection)
    model.widths = (16, 8)
    if format == "transformers":  # which writes into spare rows
        rows = len(model.processing.tokenizer) + 40
        model.backbone.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    where = ["export", "--run", str(tmp_path / "model"), "--format", format]
    assert main([*where, "--out", str(tmp_path / "out"), "--width", "16"]) == 0
    items = ["red apple", {"image": tiny.picture(1)}]
    expected = torch.nn.functional.normalize(model.encode_candidate(items)[..., :16], dim=-1)
    if format == "metaembed":
        narrow = MetaEmbedder.from_pretrained(tmp_path / "out")
        assert (narrow.width, narrow.widths) == (16, (8,))
        torch.testing.assert_close(narrow.encode_candidate(items), expected, atol=1e-6, rtol=0)
    else:
        form = json.loads((tmp_path / "out" / "retrieval.json").read_text())
        assert (form["width"], form["widths"]) == (16, [8])
    assert main([*where, "--out", str(tmp_path / "no"), "--width", "12"]) == 2
    assert "width 12: this model was trained at 16, 8" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
