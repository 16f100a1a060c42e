"""Bundles in repositories of the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from common.errors import UserError
from inference.bundle import FILES, read_bundle
from inference.command_line import HOW_TO_GET_A_MODEL
from inference.model import Model

_REFUSALS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError)


def push(folder: str | Path, name: str, private: bool = False) -> str:
    """Uploads a bundle, making the repository if there is none.

    Args:
        folder: of the bundle.
        name: of the repository, ``owner/model``.
        private: let nobody else see a repository that is new.

    Returns:
        the repository's address.

    Raises:
        UserError: the folder is no whole bundle, or the hub refuses it.
    """
    read_bundle(folder)
    api = HfApi()
    try:
        # None leaves it to the settings of the owner.
        url = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(FILES),
            # Those of an earlier bundle that this one has no more.
            delete_patterns=list(FILES),
            commit_message="Upload of a bundle",
        )
    except _REFUSALS as error:
        raise UserError(
            f"{name!r} could not be uploaded ({_first_line(error)}). Log in with hf auth login, "
            "and give a name of the form owner/model."
        ) from None
    return str(url)


def pull(name: str, revision: str | None = None) -> Model:
    """The model in a repository, downloaded unless it has been before.

    Args:
        name: of the repository, ``owner/model``.
        revision: branch, tag or commit.

    Raises:
        UserError: it is not to be had, or holds no whole bundle.
    """
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except _REFUSALS as error:
        raise UserError(
            f"No model: {name!r} is no folder here and could not be downloaded from the hub "
            f"({_first_line(error)}). {HOW_TO_GET_A_MODEL}"
        ) from None
    # The hub's cache keeps contents there and makes a revision of links to them.
    return read_bundle(folder, link_targets=folder.parents[1] / "blobs")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
