"""Models of one vector that is read without meta tokens: the last token's, or the mean of all."""

import pytest
import torch
from torch.nn.functional import normalize

import tiny
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.backbone import BackboneConfig, ScratchTokenizer, build_backbone
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.identity import identity_of

ITEMS = [{"text": "red"}, {"text": "blue star moon fish"}, {"image": tiny.picture(1)}]
BIDIRECTIONAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "idefics3", "smolvlm")


def model_of(family="qwen2_5_vl", pooling="mean", bidirectional=False, **processing):
    torch.manual_seed(0)
    config = tiny.CONFIGS[family]
    prepared = tiny.processing(config, **processing)
    scratch = BackboneConfig(scratch=config, tokenizer=ScratchTokenizer(300, ["unused"]))
    backbone = build_backbone(scratch, prepared)
    settings = {"pooling": pooling, "bidirectional": bidirectional}
    return MetaEmbedder(backbone, prepared, ["1x1"], **settings).eval()


def states_of(model, text, bidirectional):
    """Last hidden states of a text by the language model alone, with a mask made here."""
    ids = model.processor()([Item(text)], "query")["input_ids"]
    count = ids.shape[1]
    mask = torch.zeros(1, 1, count, count)
    if not bidirectional:
        mask += torch.full((count, count), -torch.inf).triu(1)
    language = model.backbone.language_model
    with torch.inference_mode():
        embedded = language.get_input_embeddings()(ids)
        places = torch.arange(count).expand(3, 1, -1)
        found = language(inputs_embeds=embedded, attention_mask=mask, position_ids=places)
    return found.last_hidden_state[0]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_vector_is_what_its_name_says(pooling, bidirectional):
    model = model_of(pooling=pooling, bidirectional=bidirectional)
    states = states_of(model, "a round red flag", bidirectional)
    expected = normalize(states[-1] if pooling == "last" else states.mean(0), dim=-1)
    found = model.encode_query(["a round red flag"])
    assert found.shape == (1, 1, 32)
    torch.testing.assert_close(found[0, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_neighbours_and_padding_change_nothing(family, pooling, side):
    both = family in BIDIRECTIONAL and pooling == "mean"
    model = model_of(family, pooling, both, padding_side=side)
    together = model.encode_candidate(ITEMS)
    alone = torch.cat([model.encode_candidate([item]) for item in ITEMS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_a_token_sees_those_behind_it_where_the_model_is_bidirectional(family):
    for bidirectional in (False, True):
        model = model_of(family, "last", bidirectional)
        batch = model.processor()([Item("red flag"), Item("red fish")], "query")
        batch.pop("slot_index")
        with torch.inference_mode():
            hidden = model.backbone(**batch, use_cache=False).last_hidden_state
        assert torch.equal(hidden[0, 0], hidden[1, 0]) is not bidirectional


def test_it_is_saved_and_told_apart(tmp_path):
    model = model_of(bidirectional=True)
    model.save_pretrained(tmp_path / "model")
    again = MetaEmbedder.from_pretrained(tmp_path / "model")
    assert (again.pooling, again.bidirectional) == ("mean", True)
    assert torch.equal(again.encode_query(ITEMS), model.encode_query(ITEMS))
    kinds = [model, model_of(), model_of(pooling="last"), tiny.embedder(("1x1",))]
    assert len({identity_of(kind) for kind in kinds}) == 4


def test_every_weight_but_the_unused_ones_learns():
    model = model_of(bidirectional=True).train()
    batch = model.processor()([Item("red", tiny.picture(1))], "candidate")
    model(batch, "candidate")[0, 0, 0].backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize(
    ("groups", "settings", "message"),
    [
        (["1x1", "2x4"], {"pooling": "mean"}, r"groups must be \[1x1\], got 1x1, 2x4"),
        (["1x1"], {"bidirectional": True}, "bidirectional is for pooling last or mean"),
    ],
)
def test_what_does_not_go_together_is_refused(groups, settings, message):
    model = tiny.embedder()
    with pytest.raises(UserError, match=message):
        MetaEmbedder(model.backbone, model.processing, groups, **settings)
