"""The Hugging Face hub, for `export --push-to`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaembed_pl.errors import UserError, first_line
from metaembed_pl.model.hub_faults import could_not_reach


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Sends a folder to the hub as one commit.

    Args:
        folder: a model folder with its card.
        repository: `ORG/NAME`; created if it does not exist.
        private: visible to its owners only.

    Returns:
        The address of the repository.
    """
    from huggingface_hub import HfApi

    _refuse_local_base(folder)
    api = HfApi()
    address = _ask(repository, api.create_repo, repository, private=private, exist_ok=True)
    if private and not _ask(repository, api.model_info, repository).private:
        raise UserError(
            f"{repository} exists and is public: add --public to upload to it anyway, or choose "
            "another name; nothing was uploaded"
        )
    _ask(
        repository,
        api.upload_folder,
        repo_id=repository,
        folder_path=str(folder),
        commit_message="Model exported by metaembed-pl",
    )
    return str(address)


def would_send(folder: Path, repository: str, private: bool = True) -> str:
    """What `push` would send; the hub is not asked."""
    _refuse_local_base(folder)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    sizes = [(file.stat().st_size, file.relative_to(folder).as_posix()) for file in files]
    lines = [f"{size:>15,}  {name}" for size, name in sizes]
    kind = "private" if private else "public"
    total = f"{len(files)} files, {sum(size for size, _ in sizes):,} bytes"
    return "\n".join([*lines, f"would be uploaded to {repository} ({kind}): {total}"])


def _refuse_local_base(folder: Path) -> None:
    settings = folder / "metaembed.json"
    base = json.loads(settings.read_text()).get("backbone") if settings.is_file() else None
    if base and base["path"].startswith("."):
        raise UserError(
            "--push-to: this adapter belongs to a base model on this machine, which nobody who "
            "loads it would have: give --merge"
        )


def licence_of(base: str | None) -> str:
    """The licence of a base model on the hub; if unknown, a UserError asks for `--licence`."""
    from huggingface_hub import HfApi

    found = None
    if base is not None:
        card = _ask(base, HfApi().model_info, base).card_data
        found = card.get("license_name") or card.get("license") if card else None
    if not found:
        raise UserError(
            f"the licence of the base model ({base or 'not on the hub'}) is not known: give "
            "--licence ID, such as apache-2.0"
        )
    return str(found)


def _ask(repository: str, do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the hub; its errors become one line."""
    from huggingface_hub.errors import HfHubHTTPError

    http_error: Any = HfHubHTTPError.__mro__[1]  # of the HTTP library that this version of it uses
    try:
        return do(*args, **kwargs)
    except (http_error, OSError, ValueError) as error:
        said = first_line(error)
        if could_not_reach(error):
            raise UserError(
                f"{repository}: the hub could not be reached ({said}); run the command again "
                "with network access"
            ) from error
        raise UserError(
            f"the hub refuses {repository}: {said}; log in with `hf auth login`, and check the "
            "name and your rights to it"
        ) from error
