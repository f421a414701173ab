"""Uploads an export to the Hugging Face hub."""

from pathlib import Path

from smolseek.errors import SmolseekError, reason


def check(repo: str) -> None:
    """Raise SmolseekError if `repo` is not a repository name, or if there is no token. The hub is not contacted."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise SmolseekError(f"--push-to-hub {repo} is not the name of a repository: use OWNER/NAME")
    if get_token() is None:
        raise SmolseekError("--push-to-hub needs a Hugging Face token: run hf auth login, or set HF_TOKEN")


def push(folder: Path, repo: str, *, public: bool, written: Path) -> str:
    """Upload the files in `folder` as one commit to the model repository `repo`, and return its address.

    A repository that does not exist is created, as a private repository unless `public` is set. An existing repository
    keeps its visibility.

    Raises:
        SmolseekError: if the hub refuses or cannot be reached. The export stays in `written`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="smolseek")
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by smolseek export")
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = "use a token that may write there" if status in (401, 403, 404) else "try again"
        why = f"HTTP {status} from the hub: {advice}"
    except Exception as error:  # a network fails in many ways
        why = f"{reason(error).rstrip('.')}: try again"
    else:
        return str(address)
    raise SmolseekError(
        f"{repo} was not uploaded ({why}): the export is complete, so upload it with hf upload {repo} {written}"
    )
