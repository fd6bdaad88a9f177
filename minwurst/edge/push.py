"""Pushing a result to the Hub: one commit with the result, its card and one image.

    repository = make_repository("owner/name", private=True)    # before training
    push(output_dir, repository)                                # after it, or at any later time
"""

import re
import shlex
import time
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library, of which there are two: httpx and httpx2
    OfflineModeIsEnabled,
)

from minwurst.base.console import say
from minwurst.base.errors import UserError
from minwurst.edge import export, lora_file, models, run_file
from minwurst.edge.card import card
from minwurst.edge.grids import BEFORE_AFTER

WAITS = (2, 10, 30, 60)  # seconds between tries


def check_token(token):
    """The token without surrounding whitespace; UserError if there is none, or it can't be one."""
    token = (token or huggingface_hub.get_token() or "").strip()
    if not token:
        raise UserError("No login to the Hub found. Run `hf auth login`, or set HF_TOKEN.")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError("The Hub token contains characters that no token has. Copy it again.")
    return token


def make_repository(name, private=False, token=None):
    """Create a model repository, or find an existing one of your own. Returns its full name.

    token: None uses HF_TOKEN or the login of `hf auth login`. A UserError says why a push would
    fail: no login, a wrong or read-only token, somebody else's repository.
    """
    api = huggingface_hub.HfApi(token=check_token(token))
    try:
        # An existing repository of somebody else passes this; the next line finds out.
        made = retry(lambda: api.create_repo(name, private=private or None, exist_ok=True))
        retry(lambda: api.auth_check(made.repo_id, write=True))
        public = private and not retry(lambda: api.model_info(made.repo_id)).private
    except HFValidationError as error:
        raise UserError(f"{name} is not a valid repository name: {error}") from None
    except (HTTPError, OSError) as error:
        raise UserError(f"Can't push to {name}: {reason(error)}") from None
    if public:
        raise UserError(
            f"The repository {made.repo_id} already exists and is public. Make it private on its "
            "page, choose another name, or drop the request for a private one."
        )
    return made.repo_id


def retry(call):
    """call(), repeated after a while if the Hub is busy (429), fails (5xx) or is unreachable."""
    for wait in (*WAITS, None):
        try:
            return call()
        except (HTTPError, OSError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 599
            local = OfflineModeIsEnabled | PermissionError | FileNotFoundError
            hopeless = status < 500 and status != 429 or isinstance(error, local)
            if hopeless or wait is None:
                raise
            say(f"The Hub: {reason(error)} Trying again in {wait} s.")
            time.sleep(wait)


def reason(error):
    """One line about a failure between this machine and the Hub."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "The Hub rejects this token. Run `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "The repository is somebody else's, or the token has no write access."
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError | ValueError):  # it can quote the request, token included
        return f"{type(error).__name__} while talking to the Hub."
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def push_result(settings):
    """Push the result of a run that has just ended, if --push_to_hub is set."""
    if settings.push_to_hub:
        push(settings.output_dir, settings.hub_model_id, settings.hub_token)


def push(folder, repository, token=None):
    """Upload a run's result, card and image in one commit.

    folder: the run's output folder. If it fails, a UserError gives the command that tries again.
    """
    folder = Path(folder)
    run = run_file.read(folder)
    files = results(folder, run)
    try:
        text = card(run, repository, files).encode()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / run_file.FILE} is not as a run wrote it ({error!r}).") from None
    summary = f"{len(files)} files of a prior fine-tuned with minwurst"
    try:
        api = huggingface_hub.HfApi(token=check_token(token))
        add = huggingface_hub.CommitOperationAdd
        operations = [add(path, file) for path, file in files.items()] + [add("README.md", text)]
        done = retry(lambda: api.create_commit(repository, operations, commit_message=summary))
    except (HTTPError, OSError, ValueError, UserError) as error:
        command = shlex.join(["python", "-m", "minwurst.hub", str(folder), repository])
        raise UserError(
            f"Not pushed to {repository}: {reason(error)} The result is safe in {folder}. To push "
            f"it again: {command}"
        ) from None
    say(f"pushed: {done.repo_url}")


def results(folder, run):
    """{path in the repository: local file}: everything that is ever uploaded, besides the card."""
    pipeline = folder / export.FOLDER
    wanted = [pipeline / "model_index.json"]
    for part in export.PARTS:
        wanted += [file for p in models.PATTERNS for file in sorted((pipeline / part).glob(p))]
    files = {str(file.relative_to(pipeline)): file for file in wanted if file.is_file()}
    if (folder / lora_file.FILE).is_file():
        files[lora_file.FILE] = folder / lora_file.FILE
    if not files:
        raise UserError(
            f"{folder} contains no result: neither {export.FOLDER}/ nor {lora_file.FILE}. Give the "
            "--output_dir of a finished run."
        )
    image = folder / "validation" / BEFORE_AFTER
    if run["settings"]["validation_prompts"] and image.is_file():
        files[BEFORE_AFTER] = image
    return files
