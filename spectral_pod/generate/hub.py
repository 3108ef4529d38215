"""Upload of exported models to the Hugging Face Hub; `hub` is a `huggingface_hub.HfApi`."""

import re
from typing import Any

from huggingface_hub.errors import HTTPError

from spectral_pod.errors import ConfigError, DataError


def check_access(hub: Any, repository: str) -> None:
    """Checks, before there is anything to upload, what can be checked by then.

    Raises:
      ConfigError: the name is not USER/REPO, or there is no login.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"--upload={repository} is not USER/REPO")
    try:
        hub.whoami()
    except (HTTPError, OSError) as error:
        raise ConfigError(
            f"--upload={repository} needs a login to the Hugging Face Hub; run `hf auth login`, or "
            f"leave --upload out. Nothing was written: {error}"
        ) from error


def upload(hub: Any, repository: str, folder: str) -> None:
    """Uploads a folder to a repository, which is created as private if it does not exist.

    Raises:
      DataError: the upload failed; the folder is unchanged.
    """
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)
    except (HTTPError, OSError) as error:
        raise DataError(
            f"the upload to {repository} failed, and {folder} is complete; upload it with "
            f"`hf upload {repository} {folder}`: {error}"
        ) from error
