"""The Hugging Face Hub: upload a folder, fetch one. Everything that can go wrong there, in plain words."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from fedbiscuit.types import ConfigError, EnvironmentFault, FedbiscuitError, first_line

__all__ = ["check_name", "download", "upload"]

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
READ = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]
"""What is fetched: never a pickle."""


def check_name(name: str) -> None:
    """``ConfigError`` where this cannot be a place on the Hub."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r:.100}: not a name on the Hub; write it as OWNER/NAME, such as ann/kitchen-selector")


def upload(folder: Path, name: str, public: bool = False) -> str:
    """Make the repository where it is not there yet, private unless ``public``, and put the folder in it; its address."""
    from huggingface_hub import HfApi

    check_name(name)
    api = HfApi()
    with _plainly(name, "nothing was uploaded", "upload"):
        api.create_repo(name, repo_type="model", private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=name, repo_type="model", folder_path=folder, commit_message="Upload an export of fedbiscuit"
        )
    return f"{api.endpoint}/{name}"


def download(name: str) -> Path:
    """The folder of a repository in the Hub's cache on this machine, fetched where it is not there yet."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name}: no such folder; name what `fedbiscuit export` wrote, a run, or OWNER/NAME on the Hub"
        )
    from huggingface_hub import snapshot_download

    with _plainly(name, "not a folder here, and not to be had from the Hub", "fetch"):
        return Path(snapshot_download(name, allow_patterns=READ))


@contextlib.contextmanager
def _plainly(name: str, what: str, verb: str) -> Iterator[None]:
    """Errors of the block as ours: what did not happen, why, and the next step."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except FedbiscuitError:
        raise
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if constants.is_offline_mode():
            why = "HF_HUB_OFFLINE is set, which forbids the network"
            raise EnvironmentFault(f"{name}: {what}: {why}; unset it, and {verb} it again") from error
        raise EnvironmentFault(f"{name}: {what}: {_no_network(constants.ENDPOINT)}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403):
            why = f"the Hub does not let you ({code})"
            step = f"log in with `hf auth login` or set HF_TOKEN to a token that may {verb}, and check the owner's name"
        else:
            why, step = f"the Hub answers {code}: {first_line(error)}", "check the name, and try again later"
        raise EnvironmentFault(f"{name}: {what}: {why}; {step}") from error
    except ValueError as error:  # what the Hub or its library does not take, such as a card's first lines
        raise ConfigError(f"{name}: {what}: {first_line(error)}") from error
    except Exception as error:  # the transport's own classes differ between versions of huggingface_hub
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in (
            "httpx",
            "httpx2",
            "httpcore",
            "requests",
        ):
            raise EnvironmentFault(f"{name}: {what}: {_no_network(constants.ENDPOINT)}") from error
        raise


def _no_network(endpoint: str) -> str:
    return (
        f"{endpoint} cannot be reached from this machine; connect it to the network, or set HF_ENDPOINT to a mirror. "
        "The exported folder can also be copied by hand"
    )
