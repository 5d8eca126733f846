"""Resolves a checkpoint's folder: a local folder, or a downloaded repository of the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id

from minicpmv46_jax.checkpoint.hf_folder import INDEX, WEIGHTS

# Every file of a released folder but the weights. A converted folder keeps them byte for byte.
SIDE_FILES = (
    "config.json generation_config.json preprocessor_config.json video_preprocessor_config.json processor_config.json "
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "chat_template.jinja chat_template.json LICENSE"
).split()


def resolve(
    source: str | Path, revision: str | None = None, *, endpoint: str | None = None, cache_dir: Path | None = None
) -> Path:
    """Returns a checkpoint's folder: `source` itself, or the cached or downloaded hub repository of that id.

    Args:
      source: a folder, or a hub id `owner/name`.
      revision: a hub branch, tag or commit; not for folders.
      endpoint: the hub's address; None takes huggingface_hub's (`HF_ENDPOINT`).
      cache_dir: the cache's folder; None takes huggingface_hub's.

    Raises:
      ValueError: `source` is neither a folder nor a hub id; `revision` is given for a folder; this account
        has no access to the repository or revision; the hub cannot be reached and the cache lacks the
        repository.
    """
    if str(source) and Path(source).is_dir():  # Path("") is the working folder
        if revision is not None:
            raise ValueError(f"revision {revision!r} is set, but {source} is a folder: only hub repositories have revisions")
        return Path(source)
    repo = str(source)
    if not _is_hub_id(repo):
        raise ValueError(f"{repo} is neither a folder nor a hub id of the form owner/name")
    try:
        found = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            endpoint=endpoint,
            cache_dir=cache_dir,
            allow_patterns=[*SIDE_FILES, WEIGHTS, INDEX, "*.safetensors"],
        )
    except Exception as error:
        reason = _hub_error_message(error, repo, revision)
        if reason is None:
            raise
        raise ValueError(reason) from error
    return Path(found)


def _is_hub_id(repo: str) -> bool:
    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        return False
    return repo.count("/") == 1


def _hub_error_message(error: Exception, repo: str, revision: str | None) -> str | None:
    """Returns a one-line message for an expected error of the hub; None for an unexpected error."""
    match error:
        case errors.GatedRepoError():
            return f"hub repository {repo} is gated: ask for access on its page, then run `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"hub repository {repo} has no revision {revision!r}"
        case errors.RepositoryNotFoundError():
            return (
                f"{repo} is not a folder here, and the hub has no such repository (or it is private: "
                "check the spelling, or run `hf auth login`)"
            )
        case errors.LocalEntryNotFoundError():
            return (
                f"{repo} is not a folder here nor in the hub's cache, and the hub cannot be reached (no network, or "
                "HF_HUB_OFFLINE is set): pass a checkpoint folder instead of the id"
            )
        case errors.HfHubHTTPError():
            return f"the hub refused {repo} (status {error.response.status_code}): pass a checkpoint folder instead of the id"
        case OSError() if _is_connection_loss(error):
            return f"the connection to the hub was lost while downloading {repo}: run again to go on, or pass a checkpoint folder"
    return None


def _is_connection_loss(error: BaseException) -> bool:
    """Returns whether the connection failed.

    The types are builtins, because huggingface_hub's HTTP library depends on its version.
    """
    return isinstance(error, ConnectionError | TimeoutError)
