"""Checkpoints and states to the Hugging Face hub, and states back from it. A failed upload never ends a run."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)
REPO_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True)
class UploadOptions:
    """Where saved files go. folder: path in the repository. states: upload state folders too. beside: in a thread."""

    repository: str
    kind: str = "model"
    folder: str = ""
    token: str | None = None
    public: bool = False
    states: bool = False
    beside: bool = False


def hub_client(token: str | None) -> Any:
    """huggingface_hub's client.

    Raises:
        UserError: the package is missing.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError("--huggingface_* needs its package: pip install huggingface_hub") from error
    return HfApi(token=token)


class Uploader:
    """Sends files and folders, one after the other; creates the repository when it is absent.

    Args:
        client: huggingface_hub.HfApi, or what stands for it.
    """

    def __init__(self, options: UploadOptions, client: Any = None) -> None:
        self.options = options
        self._client = client or hub_client(options.token)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._created = False

    def send(self, path: Path, *, last: bool = False) -> None:
        """Upload a file or a folder under its own name.

        Args:
            last: nothing follows, so wait even with `beside`.
        """
        done = self._worker.submit(self._send, path)
        if last or not self.options.beside:
            done.result()

    def _send(self, path: Path) -> None:
        options = self.options
        target = "/".join(part for part in (options.folder.strip("/"), path.name) if part)
        try:
            self._create()
            where: dict[str, object] = {"repo_id": options.repository, "repo_type": options.kind}
            where["commit_message"] = f"Upload {path.name}"
            if path.is_dir():
                self._client.upload_folder(folder_path=str(path), path_in_repo=target, **where)
            else:
                self._client.upload_file(path_or_fileobj=str(path), path_in_repo=target, **where)
        except Exception as error:
            logger.warning("%s was not uploaded to %s: %s", path.name, options.repository, self._safe(error))
            return
        logger.info("uploaded %s to %s", target, options.repository)

    def _create(self) -> None:
        if not self._created:
            options = self.options
            self._client.create_repo(
                options.repository, repo_type=options.kind, private=not options.public, exist_ok=True
            )
            self._created = True

    def _safe(self, error: Exception) -> str:
        """The error's words without the token."""
        text = f"{type(error).__name__}: {error}".strip()
        return text.replace(self.options.token, "***") if self.options.token else text


def download_state(place: str, target: Path, token: str | None = None, client: Any = None) -> Path:
    """A state folder of the hub, for --resume.

    Args:
        place: `user/repository/path[:revision[:repo_type]]`.
        target: folder that the files are put below.

    Raises:
        UserError: not of that form, or it cannot be had.
    """
    name, _, more = place.partition(":")
    revision, _, kind = more.partition(":")
    parts = [part for part in name.split("/") if part]
    if len(parts) < 3 or ".." in parts or (kind or "model") not in REPO_TYPES:
        raise UserError(f"--resume {place}: with --resume_from_huggingface give user/repository/path[:revision[:type]]")
    repository, path = "/".join(parts[:2]), "/".join(parts[2:])
    client = client or hub_client(token)
    try:
        client.snapshot_download(
            repository,
            repo_type=kind or "model",
            revision=revision or None,
            allow_patterns=[f"{path}/*"],
            local_dir=str(target),
        )
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        words = words.replace(token, "***") if token else words
        raise UserError(f"--resume {place}: cannot be downloaded ({words}); check the name and the token") from error
    folder = target / path
    if not folder.is_dir():
        raise UserError(f"--resume {place}: {repository} has no folder {path}; check its name")
    return folder
