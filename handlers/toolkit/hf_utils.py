"""Models from the Hugging Face hub."""

from __future__ import annotations

from wsgi_ts.handlers.toolkit.library_names import DOWNLOAD

#: What a PyTorch checkpoint is made of; weights in other formats are left out.
_CHECKPOINT_FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "*.bin", "*.pt", "*.pth"]


def download_model(
    model_id: str, revision: str = "main", model_path: str = ".cache", use_auth_token: bool | str = True
) -> str:
    """Downloads a model ("owner/model"), at a branch, tag or commit, into a cache, unless it is there already.

    `use_auth_token` True: the token of the hub that the user is logged in with.

    Returns:
        The folder with the model's files.

    Raises:
        ImportError: huggingface_hub is missing.
    """
    download = DOWNLOAD.load("download_model")
    token = None if use_auth_token is True else use_auth_token
    path: str = download(
        repo_id=model_id, revision=revision, allow_patterns=_CHECKPOINT_FILES, cache_dir=model_path, token=token
    )
    return path
