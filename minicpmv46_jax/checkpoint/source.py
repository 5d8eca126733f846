"""Where a checkpoint comes from: a folder on this machine, or a repository on the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id

from minicpmv46_jax.checkpoint.hf_folder import INDEX, WEIGHTS

# Everything of a released folder that is not weights, and that a converted folder keeps byte for byte.
SIDE_FILES = (
    "config.json generation_config.json preprocessor_config.json video_preprocessor_config.json processor_config.json "
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "chat_template.jinja chat_template.json LICENSE"
).split()


def resolve(
    source: str | Path, revision: str | None = None, *, endpoint: str | None = None, cache_dir: Path | None = None
) -> Path:
    """The folder of a checkpoint: `source` itself if it is one, else the hub repository of that id, downloaded or from the cache.

    Args:
      source: a folder, or a hub id `owner/name`.
      revision: a hub branch, tag or commit; not for folders.
      endpoint: another hub than huggingface_hub's (`HF_ENDPOINT`).
      cache_dir: another cache than huggingface_hub's.

    Raises:
      ValueError: neither a folder nor an id; a revision of a folder; the repository or revision is unknown or closed to this
        account; the hub cannot be reached and the cache lacks the repository.
    """
    if str(source) and Path(source).is_dir():  # Path("") is the working folder
        if revision is not None:
            raise ValueError(f"revision {revision!r} was asked for, but {source} is a folder: revisions are the hub's")
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
    """One line for what the hub may answer to a user's request; None for what is nobody's mistake."""
    match error:
        case errors.GatedRepoError():
            return f"hub repository {repo} is gated: ask for access on its page, then run `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"hub repository {repo} has no revision {revision!r}"
        case errors.RepositoryNotFoundError():
            return (
                f"{repo} is not a folder here, and the hub knows no such repository (or it is private: "
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
    """huggingface_hub's HTTP library differs between its versions, so its errors go by kind, not by class."""
    return isinstance(error, ConnectionError | TimeoutError)
