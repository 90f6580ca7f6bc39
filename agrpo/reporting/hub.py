"""A model on the Hugging Face Hub. Nothing goes there unless asked, and then to a private repository."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from agrpo.types import InputError


class PushFailed(RuntimeError):
    """The Hub did not take the model; the folder is as it was."""


def push_model(folder: Path, repository: str, message: str, *, private: bool = True) -> str:
    """Upload a model's folder as one commit, making the repository where there is none.

    Args:
        repository: owner/name.
        private: of a repository that is made. One that is there and public is refused, unless this is False.

    Returns:
        The commit's address.

    Raises:
        InputError: no HF_TOKEN in the environment.
        PushFailed: with the reason; never with the token.
    """
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise InputError("pushing to the Hub needs a token that may write: set HF_TOKEN in the environment")
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi(token=token)
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        if private and not hub.model_info(repository).private:
            raise PushFailed(f"{repository} is public: set hub.private to false (agrpo push --public) to mean that")
        commit = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()).replace(token, "…") or type(error).__name__
        raise PushFailed(f"{repository}: {reason[:500]}") from None
    return str(commit.commit_url)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agrpo push", description="A model to the Hub; the token is HF_TOKEN.")
    parser.add_argument("model", help="a run or a folder of a model")
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("--public", action="store_true", help="the repository is, or shall be, public")
    options = parser.parse_args(arguments)
    from agrpo.evaluation.runs import find_model

    try:
        folder = Path(find_model(options.model))
        if not folder.is_dir():
            raise InputError(f"{options.model}: is no folder")
        print(push_model(folder, options.repository, "agrpo push", private=not options.public))
    except (InputError, PushFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0
