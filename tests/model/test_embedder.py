import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.meta_tokens import MetaTokens
from unchecked import shapes_unchecked

ITEMS = [
    {"text": "red apple"},
    {"image": tiny.picture(1)},
    {"text": "blue flag moon star", "image": tiny.picture(2, (84, 56))},
    {"text": "a text that is a good deal longer than all of the others are"},
]


@pytest.fixture(scope="module")
def model() -> MetaEmbedder:
    return tiny.embedder()


@pytest.mark.parametrize("layout", ["own", "both"])
@pytest.mark.parametrize("side", ["query", "candidate"])
def test_neighbours_batch_size_and_padding_side_change_nothing(layout, side):
    model = tiny.embedder(layout=layout)
    encode = model.encode_query if side == "query" else model.encode_candidate
    together = encode(ITEMS)
    alone = torch.cat([encode([item]) for item in ITEMS])
    in_pairs = encode(ITEMS, batch_size=2)
    model.processing.padding_side = "left"
    left = encode(ITEMS)
    for other in (alone, in_pairs, left):
        torch.testing.assert_close(other, together, atol=1e-5, rtol=0)


def test_meta_embeddings_are_unit_vectors_of_the_sides_count(model):
    queries, candidates = model.encode_query(ITEMS), model.encode_candidate(ITEMS)
    assert queries.shape == (4, 4, 32)
    assert candidates.shape == (4, 8, 32)
    torch.testing.assert_close(queries.norm(dim=-1), torch.ones(4, 4))
    torch.testing.assert_close(candidates.norm(dim=-1), torch.ones(4, 8))


def test_a_width_behind_the_budget_takes_the_first_components_and_is_kept_by_the_folder(tmp_path):
    model = tiny.embedder()
    model.widths = (16, 8)
    model.save_pretrained(tmp_path / "model")
    loaded = MetaEmbedder.from_pretrained(tmp_path / "model")
    assert loaded.widths == (16, 8)
    queries, candidates = loaded.encode_query(ITEMS), loaded.encode_candidate(ITEMS)
    found = loaded.score(queries, candidates, "2x4x8")
    for i, query in enumerate(queries[:, :2, :8]):
        for j, candidate in enumerate(candidates[:, :4, :8]):
            cosines = [
                [float(torch.cosine_similarity(a, b, dim=0)) for b in candidate] for a in query
            ]
            assert found[i, j] == pytest.approx(sum(map(max, cosines)), abs=1e-5)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((16, 8), "not trained at width 4; choose one of 16, 8"),
        ((), "at width 4; leave the width out"),
    ],
)
def test_refuses_a_width_that_was_not_trained(model, widths, message):
    other = tiny.embedder()
    other.widths = widths
    with pytest.raises(UserError, match=message):
        other.score(torch.zeros(1, 4, 32), torch.zeros(1, 8, 32), "4x8x4")


def test_orthogonal_meta_tokens_start_at_right_angles_and_of_the_length_that_was_asked_for():
    tokens = MetaTokens(4, 8, hidden_size=32, std=0.5, orthogonal=True).embedding.weight
    torch.testing.assert_close(tokens @ tokens.T, 0.25 * 32 * torch.eye(12), atol=1e-5, rtol=0)


def test_refuses_more_orthogonal_meta_tokens_than_there_are_dimensions():
    with pytest.raises(UserError, match=r"16 \+ 64 meta tokens of width 32 cannot be orthogonal"):
        MetaTokens(16, 64, hidden_size=32, orthogonal=True)


@pytest.mark.parametrize("layout", ["own", "both"])
def test_fewer_meta_tokens_give_a_prefix_of_more(layout):
    large = tiny.embedder(groups=("1x1", "4x8"), layout=layout)
    small = tiny.embedder(groups=("1x1", "4x2"), layout=layout)
    small.backbone.load_state_dict(large.backbone.state_dict())
    rows = [*range(4), *range(4, 6)]
    with torch.no_grad():
        small.meta_tokens.embedding.weight.copy_(large.meta_tokens.embedding.weight[rows])
    torch.testing.assert_close(
        small.encode_candidate(ITEMS), large.encode_candidate(ITEMS)[:, :2], atol=1e-5, rtol=0
    )


def test_a_query_is_the_same_in_both_layouts():
    own, both = tiny.embedder(layout="own"), tiny.embedder(layout="both")
    both.load_state_dict(own.state_dict())
    assert torch.equal(own.encode_query(ITEMS), both.encode_query(ITEMS))
    assert not torch.allclose(own.encode_candidate(ITEMS), both.encode_candidate(ITEMS))


def test_meta_tokens_equal_new_rows_of_the_vocabulary():
    """The reference: real new tokens in a resized vocabulary, positions left to the library."""
    model = tiny.embedder(layout="both")
    batch = dict(model.processor()([tiny.Item.parse(item) for item in ITEMS], "candidate"))
    with torch.inference_mode():
        ours = model(batch, "candidate")
    slots = batch.pop("slot_index")
    first_new = len(model.processing.tokenizer)
    model.backbone.resize_token_embeddings(first_new + 12, mean_resizing=False)
    with torch.no_grad():
        table = model.backbone.get_input_embeddings().weight
        table[first_new:] = model.meta_tokens.embedding.weight
    batch["input_ids"].scatter_(1, slots, torch.arange(12).expand(len(slots), -1) + first_new)
    with torch.inference_mode():
        hidden = model.backbone(**batch, use_cache=False).last_hidden_state
    states = hidden.gather(1, slots[:, 4:, None].expand(-1, -1, hidden.shape[-1]))
    theirs = torch.nn.functional.normalize(states, dim=-1)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_no_hook_is_left_on_the_backbone(model):
    model.encode_query(["red"])
    assert not model.backbone.get_input_embeddings()._forward_hooks


def test_autocast_does_not_round_the_projection():
    model, seen = tiny.embedder(projection=16), []
    model.projection.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(model.processor()([Item("red")], "query"), "query")
    assert seen == [torch.float32]


@pytest.mark.parametrize("projection", [None, 16])
def test_a_saved_model_loads_in_a_fresh_process_to_the_same_vectors(tmp_path, projection):
    model = tiny.embedder(projection=projection)
    model.save_pretrained(tmp_path / "model")
    code = (
        "import sys, torch; from metaembed_pl.model.embedder import MetaEmbedder;"
        "model = MetaEmbedder.from_pretrained(sys.argv[1]);"
        "torch.save(model.encode_candidate(['red apple', 'moon']), sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model", tmp_path / "found.pt"],
        check=True,
        timeout=120,
    )
    here = model.encode_candidate(["red apple", "moon"])
    assert torch.equal(torch.load(tmp_path / "found.pt"), here)
    assert not [*tmp_path.glob("model/**/*.bin"), *tmp_path.glob("model/**/*.pt")]


def test_scores_at_a_budget_are_those_of_the_prefix(model):
    queries, candidates = model.encode_query(ITEMS), model.encode_candidate(ITEMS)
    expected = (queries[:, None, :2] @ candidates[None, :, :4].mT).amax(-1).sum(-1)
    torch.testing.assert_close(model.score(queries, candidates, budget="2x4"), expected)


def test_refuses_a_budget_it_was_not_trained_for(model):
    vectors = model.encode_query(["red"])
    with pytest.raises(UserError, match="3x8"):
        model.score(vectors, vectors, budget="3x8")
    with (
        shapes_unchecked(),
        pytest.raises(UserError, match=r"candidates must be a tensor.* got str"),
    ):
        model.score(vectors, "red")


def _saved(tmp_path):
    tiny.embedder().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.filterwarnings("ignore")
def test_refuses_a_model_folder_with_a_missing_tensor(tmp_path):
    folder = _saved(tmp_path)
    file = folder / "backbone" / "model.safetensors"
    weights = load_file(file)
    gone = next(name for name in weights if "q_proj" in name)
    del weights[gone]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing .*q_proj"):
        MetaEmbedder.from_pretrained(folder)


def test_refuses_meta_tokens_of_another_shape(tmp_path):
    folder = _saved(tmp_path)
    save_file({"meta_tokens": torch.zeros(3, 32)}, folder / "meta_tokens.safetensors")
    with pytest.raises(UserError, match=r"mis-shaped .*meta_tokens"):
        MetaEmbedder.from_pretrained(folder)


def test_refuses_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"metaembed\.json"):
        MetaEmbedder.from_pretrained(tmp_path)


def test_refuses_a_format_of_the_future(tmp_path):
    folder = _saved(tmp_path)
    settings = json.loads((folder / "metaembed.json").read_text())
    (folder / "metaembed.json").write_text(json.dumps(settings | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        MetaEmbedder.from_pretrained(folder)


def test_does_not_overwrite_a_model_folder_unasked(tmp_path):
    folder = _saved(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        tiny.embedder().save_pretrained(folder)
    tiny.embedder(seed=1).save_pretrained(folder, overwrite=True)
    assert MetaEmbedder.from_pretrained(folder).groups[-1] == (4, 8, None)
