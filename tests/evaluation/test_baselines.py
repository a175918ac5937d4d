"""Other libraries' models in an evaluation: the numbers are those of the model itself."""

import pytest
import torch

import tiny
from metaembed_pl.budget import Budget
from metaembed_pl.cli.main import main
from metaembed_pl.data.beir import RetrievalSetWriter
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.baselines import (
    Baseline,
    MtebBaseline,
    SentenceTransformersBaseline,
    load_baseline,
)
from metaembed_pl.evaluation.outcome import Outcome
from metaembed_pl.evaluation.registry import open_benchmark
from metaembed_pl.evaluation.run import EvaluationOptions, evaluate
from metaembed_pl.item import Item
from metaembed_pl.model.encoding import Pace

library = pytest.importorskip("sentence_transformers", minversion="6")
pytestmark = pytest.mark.filterwarnings("default")  # the libraries of others warn

NUM = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Texts and pictures as queries and candidates, a model of ours, and its export."""
    root = tmp_path_factory.mktemp("baselines")
    with RetrievalSetWriter(root / "sets" / "mixed", "mixed") as writer:
        for i in range(NUM):
            image = tiny.picture(i) if i % 2 else None
            text = None if i % 4 == 1 else tiny.text(i)
            writer.add_candidate(Item(text or (None if image else "moon"), image, f"c{i}"))
            writer.add_query(Item(tiny.text(100 + i), id=f"q{i}"))
            writer.judge(f"q{i}", f"c{i}")
    with RetrievalSetWriter(root / "texts" / "texts", "texts") as writer:
        for i in range(NUM):
            writer.add_candidate(Item(tiny.text(i, 6), id=f"c{i}"))
            writer.add_query(Item(tiny.text(i, 3), id=f"q{i}"))
            writer.judge(f"q{i}", f"c{i}")
    tiny.embedder().save_pretrained(root / "model")
    where = ["--run", str(root / "model"), "--out", str(root / "export")]
    assert main(["export", *where, "--format", "sentence-transformers"]) == 0
    return root


def metrics(model, root, out, budget):
    benchmark = open_benchmark(f"beir:{root}/sets", root)
    found = evaluate(model, benchmark, [budget], EvaluationOptions(root, out, Pace(4)))
    return {key: value for key, value in found.metrics().items() if key.endswith(str(budget))}


def test_a_model_of_many_vectors_scores_as_it_does_by_itself(root, tmp_path, monkeypatch):
    """Ours, by way of sentence-transformers, and with more room for vectors than it fills."""
    load = library.MultiVectorEncoder
    monkeypatch.setattr(
        library, "MultiVectorEncoder", lambda folder, **k: load(folder, trust_remote_code=True, **k)
    )
    room = Budget(6, 11)
    theirs = SentenceTransformersBaseline(str(root / "export"), "cpu", room)
    found = metrics(theirs, root, tmp_path / "theirs", room)
    ours = metrics(tiny.embedder(), root, tmp_path / "ours", Budget(4, 8))
    assert len(found) == len(ours) > 3
    for (key, value), expected in zip(found.items(), ours.values(), strict=True):
        assert value == pytest.approx(expected, abs=1e-9), key
    with pytest.raises(UserError, match="produced 8 vectors for a candidate, more than 7"):
        SentenceTransformersBaseline(str(root / "export"), "cpu", Budget(6, 7)).encode_candidate(
            [Item("moon")]
        )


def test_a_model_of_mtebs_scores_as_it_does_by_itself(root, tmp_path):
    pytest.importorskip("mteb")
    from metaembed_pl.evaluation.mteb import MtebEncoder

    theirs = MtebBaseline(MtebEncoder(tiny.embedder(), budget="2x4"), "cpu", Budget(3, 4))
    found = metrics(theirs, root, tmp_path / "theirs", Budget(3, 4))
    ours = metrics(tiny.embedder(), root, tmp_path / "ours", Budget(2, 4))
    assert list(found.values()) == pytest.approx(list(ours.values()), abs=1e-9)


def test_a_candidate_without_vectors_scores_nothing():
    class Given(Baseline):
        def vectors_of(self, items, side):
            return [torch.ones(2, 3), torch.ones(0, 3)]

    model = Given("given", "maxsim", Budget(2, 4), 3, torch.device("cpu"))
    full, empty = model.encode_candidate([Item("moon"), Item("sun")])
    assert full.eq(1).all()
    assert empty.eq(0).all()


def dense(folder):
    """A tiny model of texts with one vector each, made from its config."""
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *tiny.WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), num_hidden_layers=1, initializer_range=1.0, **size)
    BertModel(config).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    model = library.SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu")
    model.save_pretrained(str(folder / "dense"))
    return folder / "dense"


def test_a_model_of_one_vector_is_ranked_by_its_cosines(root, tmp_path, capsys):
    folder = dense(tmp_path)
    where = ["--benchmark", f"beir:{root}/texts", "--out", str(tmp_path / "out")]
    assert main(["evaluate", "--model", f"sentence-transformers:{folder}", *where]) == 0
    assert "1x1" in capsys.readouterr().out
    (task,) = Outcome.load(tmp_path / "out").tasks
    model = library.SentenceTransformer(str(folder), device="cpu")
    texts = [[tiny.text(i, length) for i in range(NUM)] for length in (3, 6)]
    cosines = model.similarity(*(model.encode(some) for some in texts))
    for query, hits in enumerate(task.hits["1x1"]):
        assert [place for place, _ in hits[:3]] == cosines[query].topk(3).indices.tolist()
    pictures = ["--benchmark", f"beir:{root}/sets", "--out", str(tmp_path / "no")]
    assert main(["evaluate", "--model", f"sentence-transformers:{folder}", *pictures]) == 2
    told = capsys.readouterr().err
    assert "could not encode a candidate" in told


def colqwen(folder):
    """A tiny ColQwen2 as transformers saves one, made from its config: many vectors of a page."""
    from transformers import ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor

    ours = tiny.processing(tiny.CONFIGS["qwen2_vl"])
    names = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}
    ids = {key: ours.tokenizer.convert_tokens_to_ids(word) for key, word in names.items()}
    config = dict(tiny.CONFIGS["qwen2_vl"])
    text = config["text_config"] | {"vocab_size": len(ours.tokenizer)}
    torch.manual_seed(0)
    model = ColQwen2ForRetrieval(
        ColQwen2Config(vlm_config=config | ids | {"text_config": text}, embedding_dim=12)
    ).eval()
    model.save_pretrained(folder)
    processor = ColQwen2Processor(ours.image_processor, ours.tokenizer)
    processor.save_pretrained(folder)
    return model, processor


def test_colpalis_kin_are_ranked_by_their_own_maxsim(tmp_path):
    model, processor = colqwen(tmp_path / "col")
    with RetrievalSetWriter(tmp_path / "sets" / "pages", "pages") as writer:
        for i in range(NUM):
            writer.add_candidate(Item(image=tiny.picture(i, (56 + 28 * (i % 2), 56)), id=f"c{i}"))
            writer.add_query(Item(tiny.text(i), id=f"q{i}"))
            writer.judge(f"q{i}", f"c{i}")
    where = ["--benchmark", f"beir:{tmp_path}/sets", "--out", str(tmp_path / "out")]
    named = ["--model", f"sentence-transformers:{tmp_path}/col", "--vectors", "40x48"]
    assert main(["evaluate", *named, *where, "--store-dtype", "fp32"]) == 0
    (task,) = Outcome.load(tmp_path / "out").tasks
    with torch.no_grad():
        pages = [tiny.picture(i, (56 + 28 * (i % 2), 56)) for i in range(NUM)]
        candidates = [model(**processor(images=[page])).embeddings[0] for page in pages]
        for i, hits in enumerate(task.hits["40x48"]):
            query = model(**processor(text=[tiny.text(i)])).embeddings[0]
            scores = [float((query @ page.T).max(1).values.sum()) for page in candidates]
            assert [score for _, score in hits] == pytest.approx(sorted(scores)[::-1][: len(hits)])
            assert all(scores[place] == pytest.approx(score) for place, score in hits)


def test_a_model_that_mteb_registers_is_loaded_by_its_name(root, tmp_path):
    pytest.importorskip("mteb")
    model = load_baseline("mteb:mteb/baseline-random-encoder", "cpu")
    assert (model.width, [str(group) for group in model.groups]) == (32, ["1x1"])
    found = metrics(model, root, tmp_path, Budget(1, 1))
    assert len(found) > 3
    items = [Item("moon"), Item(image=tiny.picture(1)), Item("moon", tiny.picture(1))]
    text, picture, both = model.encode_candidate(items)[:, 0]
    assert torch.equal(text, model.encode_query(items[:1])[0, 0])
    raw = [torch.as_tensor(model.vectors_of([item], "query")[0]) for item in items]
    torch.testing.assert_close(raw[2], (raw[0] + raw[1]) / 2)  # as mteb puts them together
    torch.testing.assert_close(both, raw[2] / raw[2].norm())
    assert not torch.allclose(picture, text)
    with pytest.raises(UserError, match="--vectors is for models of many vectors, and mteb:mteb"):
        load_baseline("mteb:mteb/baseline-random-encoder", "cpu", Budget(1, 8))
    with pytest.raises(UserError, match="baseline-random-colbert has no `encode`: it searches"):
        load_baseline("mteb:mteb/baseline-random-colbert", "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sentence-transformers:no/such", "sentence-transformers could not load no/such"),
        ("mteb:no/such-model", "mteb could not load no/such-model"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(name, message):
    with pytest.raises(UserError, match=message):
        load_baseline(name, "cpu")


def test_a_model_of_ours_has_budgets_and_no_vectors(root, capsys):
    where = ["--model", str(root / "model"), "--benchmark", f"beir:{root}/texts"]
    assert main(["evaluate", *where, "--vectors", "4x8"]) == 2
    assert "--vectors is for sentence-transformers:NAME and mteb:NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--revision", "x"], ["--workers", "2"], ["--compile"], ["--attention", "eager"]]
)
def test_flags_of_our_models_are_refused_for_others(root, capsys, flags):
    where = ["--model", "mteb:no/such-model", "--benchmark", f"beir:{root}/texts"]
    assert main(["evaluate", *where, *flags]) == 2
    assert f"{flags[0]} is not for mteb:no/such-model" in capsys.readouterr().err
