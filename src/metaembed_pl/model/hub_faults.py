"""One-line messages for failed hub downloads, with the next step."""

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from metaembed_pl.errors import causes, first_line

HUB = "https://huggingface.co"


def why_not(path: str, error: BaseException) -> str:
    """Why a model could not be read from a folder or the hub, with the next step."""
    kinds = [type(each) for each in causes(error)]
    repository = "/".join(path.split("/")[:2])

    def has(*wanted: type) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    if has(GatedRepoError) or "gated repo" in str(error):
        return must_be_accepted(repository)
    if has(RevisionNotFoundError):
        return f"the hub has {repository}, but not this revision of it"
    if has(RepositoryNotFoundError):
        return (
            "the repository does not exist or is private: check the name, or log in "
            "with `hf auth login`"
        )
    # A missing file of a repository that could be asked is no matter of the network.
    if has(LocalEntryNotFoundError) or (could_not_reach(error) and not has(EntryNotFoundError)):
        return (
            "it is not on this machine, and the hub could not be reached: run `hf download "
            f"{repository}` with network access, or give a local folder"
        )
    return first_line(error)


def could_not_reach(error: BaseException) -> bool:
    """Whether the hub did not answer."""
    kinds = [type(each) for each in causes(error)]
    names = ("Connect", "Timeout", "ProxyError")
    return any(
        issubclass(kind, (OfflineModeIsEnabled, ConnectionError, TimeoutError))
        or any(name in kind.__name__ for name in names)
        for kind in kinds
    )


def must_be_accepted(repository: str) -> str:
    """How to get access to a gated model."""
    return (
        f"its weights are gated: accept the licence at {HUB}/{repository}, then log in with `hf "
        "auth login` (or set HF_TOKEN)"
    )
