"""Whether a hub model can be had: one question to the hub, and an answer within seconds.

transformers repeats failed requests for a minute, for each file. That is right for a connection that was lost, and
wrong for one that was never there.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from pathlib import Path

from bmx.errors import ModelError
from bmx.redact import without_secrets

BUSY_WAITS = (1.0, 2.0)  # seconds before a busy hub (429, 5xx) is asked again
CHECK_NAME = "no folder here has that name either: check it and --revision; private models need HF_TOKEN"
CHECK_KIND = "--model takes a hub id (owner/name), a local folder or a .gguf file"
CHECK_NETWORK = "check the name, the network, the proxy and HF_ENDPOINT; or name a local folder or .gguf file"
CHECK_HOME = "HF_HOME names the folder of the hub's models and token"
CHECK_CACHE = "check the name, unset HF_HUB_OFFLINE, or name a local folder or .gguf file"
PLACE_ERRORS = (PermissionError, NotADirectoryError, IsADirectoryError, FileNotFoundError)

logger = logging.getLogger(__name__)


@cache
def reach_model(name: str, revision: str | None) -> None:
    """Make sure that transformers will find a hub model, in its cache or on the hub.

    If the hub cannot be reached, the cached copy is used for the rest of the process, and a warning says so.

    Args:
        name: the model's hub id.
        revision: branch, tag or commit; None is ``main``.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached and the model is not in the cache.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    problem = "HF_HUB_OFFLINE forbids asking the hub" if offline else _problem(name, revision)
    if not problem:
        return
    if not cached_commit(name, revision):
        raise ModelError(
            f"cannot load model {name}: it is not in the cache {constants.HF_HUB_CACHE}, and {problem}",
            hint=CHECK_CACHE if offline else CHECK_NETWORK,
        )
    if not offline:
        logger.warning("%s; model %s is taken from the cache %s", problem, name, constants.HF_HUB_CACHE)
        constants.HF_HUB_OFFLINE = True


def cached_commit(name: str, revision: str | None) -> str | None:
    """The commit of a hub model in the cache; None if it is not there, or is a folder.

    Args:
        name: the model's hub id, or a folder.
        revision: branch, tag or commit; None is ``main``.
    """
    folder = cached_folder(name, revision)
    return folder.name if folder else None


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder in the cache with the files of a hub model; None if it is not there, or is a folder itself.

    Args:
        name: the model's hub id, or a folder.
        revision: branch, tag or commit; None is ``main``.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).exists():
        return None
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # it cannot be the name of a model
        return None
    return Path(file).parent if isinstance(file, str) else None


def _problem(name: str, revision: str | None) -> str | None:
    """Why the hub cannot be used; None if it can.

    Raises:
        ModelError: the hub says that there is no such model.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = without_secrets(constants.ENDPOINT)
    for wait in (*BUSY_WAITS, None):
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
        except EntryNotFoundError:
            return None  # the model is there; what it lacks is for transformers to say
        except HFValidationError:
            message = f"no such model: {name[:200]} is no file or folder, and cannot be a hub id"
            raise ModelError(
                message, hint="--model takes a hub id (name/model), a local folder or a .gguf file"
            ) from None
        except GatedRepoError:
            raise ModelError(
                f"{hub} does not give out {name}: its terms must be accepted", hint="accept them, and set HF_TOKEN"
            ) from None
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            what = "such model" if isinstance(error, RepositoryNotFoundError) else f"revision {revision} of the model"
            raise ModelError(f"{hub} has no {what}: {name}", hint=CHECK_NAME) from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if wait is None or not (status == 429 or status >= 500):
                return f"{hub} answers {status}"
            time.sleep(wait)
        except UnicodeEncodeError:
            raise ModelError("HF_TOKEN has characters that no token has", hint="copy it again") from None
        except PLACE_ERRORS as error:  # the file of the token
            raise ModelError(f"cannot read {error.filename}: {error.strerror}", hint=CHECK_HOME) from None
        except Exception as error:  # of the HTTP library, whose name changes: no network, no such host, a timeout
            return f"{hub} cannot be reached ({without_secrets(str(error)) or type(error).__name__})"
        else:
            return None
    return None
