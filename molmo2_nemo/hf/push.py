"""An exported folder to a Hub, through huggingface_hub: HF_ENDPOINT says which, HF_TOKEN or `hf auth login` who.

Checked against huggingface_hub 2.4.
"""

from collections.abc import Callable
from pathlib import Path

from molmo2_nemo import compat
from molmo2_nemo.config.errors import ConfigError, refuse

# In a repository that was just made.
_MADE_BY_THE_HUB = {".gitattributes"}


def refuse_push(repo: str) -> None:
    """ConfigError in one sentence, if `repo`, ORG/NAME, cannot be pushed to: no name, no token, or it exists."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import get_token, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = repo.rstrip("/") or "''"
        raise ConfigError(
            f"--push {repo} is no name on the Hub: write ORG/NAME, of letters, digits, -, _ and ."
        ) from None
    refuse("/" not in repo, f"--push {repo} names no owner: write ORG/NAME or YOU/NAME.")
    refuse(
        not get_token(), f"--push {repo} needs a token that may write: set HF_TOKEN, or log in with `hf auth login`."
    )
    _refuse_existing(repo)


def push(folder: Path, repo: str, public: bool) -> str:
    """Put a folder into a new model repository, private unless `public`; returns its address.

    huggingface_hub shows the progress. All files are there when this returns. Raises ConfigError in one sentence.
    """
    api, again = _api(), f"`hf upload {repo} {folder} .{'' if public else ' --private'}` tries again"
    is_made = _refuse_existing(repo)
    if not is_made:
        _asked(repo, again, lambda: api.create_repo(repo, private=not public))
    _asked(repo, again, lambda: api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export"))
    info = _asked(repo, again, lambda: api.model_info(repo, files_metadata=True))
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and sizes.get(name) != path.stat().st_size:
            raise ConfigError(f"{repo} does not have {name} as it was sent: {again}.")
    return f"{api.endpoint}/{repo}"


def _refuse_existing(repo: str) -> bool:
    """Whether there is a repository of this name, an empty one. ConfigError: it holds something, or cannot be asked."""
    from huggingface_hub.errors import RepositoryNotFoundError

    api = _api()
    try:
        info = _asked(repo, "try again later", lambda: api.model_info(repo))
    except RepositoryNotFoundError:
        return False
    files = {sibling.rfilename for sibling in info.siblings or []} - _MADE_BY_THE_HUB
    refuse(
        bool(files), f"--push {repo}: it is on the Hub already and holds {min(files, default='')}: name another one."
    )
    return True


def _api():
    """The Hub, asked by a client without the limits of downloads, which fetch/hub.py sets for the whole process.

    They refuse private addresses, where a Hub of one's own may be.
    """
    from huggingface_hub import HfApi, set_client_factory

    set_client_factory(compat.hub_client)
    return HfApi()


def _asked[T](repo: str, advice: str, ask: Callable[[], T]) -> T:
    """What the Hub answers. RepositoryNotFoundError: it has no such repository; ConfigError for all else."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return ask()
    except (RepositoryNotFoundError, ConfigError):
        raise
    except OfflineModeIsEnabled:
        raise ConfigError(f"--push {repo} cannot be done while HF_HUB_OFFLINE is set: unset it.") from None
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        status = None if cause is None or cause.response is None else cause.response.status_code
        if status in (401, 403):
            raise ConfigError(
                f"--push {repo}: the token may not write there (status {status}): use one with the right to write to"
                f" {repo.partition('/')[0]}, then {advice}."
            ) from None
        what = f"the Hub answered with status {status}" if status else f"no connection ({type(error).__name__})"
        raise ConfigError(f"--push {repo} to {constants.ENDPOINT} was cut off, {what}: {advice}.") from None
