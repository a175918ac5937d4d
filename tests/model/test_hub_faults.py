"""Models that cannot be had from the hub: the reason, and what to do, in one line."""

import httpx
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from metaembed_pl.errors import UserError
from metaembed_pl.model import weights
from metaembed_pl.model.hub_faults import why_not


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/org/name"))


def wrapped(cause: BaseException) -> OSError:
    """As transformers passes on what the hub's client raised."""
    found = OSError("We couldn't load it.\nA second line.")
    found.__cause__ = cause
    return found


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (
            GatedRepoError("403", response=answer(403)),
            "accept the licence at https://huggingface.co/org/name, then log in with `hf auth",
        ),
        (RepositoryNotFoundError("404", response=answer(404)), "does not exist or is private"),
        (RevisionNotFoundError("404", response=answer(404)), "not this revision"),
        (LocalEntryNotFoundError("not cached"), "run `hf download org/name`"),
        (OfflineModeIsEnabled("offline"), "run `hf download org/name`"),
        (httpx.ConnectError("no route"), "the hub could not be reached"),
        (ValueError("something else"), "We couldn't load it."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_reason_has_its_remedy(cause, words):
    told = why_not("org/name/backbone", wrapped(cause))
    assert words in told
    assert "\n" not in told


def test_a_gated_model_is_told_where_weights_are_read(monkeypatch):
    def refuse(*_, **__):
        raise wrapped(GatedRepoError("403", response=answer(403)))

    monkeypatch.setattr(weights.AutoModel, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"org/name: no model .* its weights are gated: accept"):
        weights.load_backbone("org/name")


def test_a_missing_model_without_network_names_the_way_out():
    """Tests have no network: this asks the real client."""
    with pytest.raises(UserError, match="run `hf download nobody/nothing` with network access"):
        weights.load_backbone("nobody/nothing")
