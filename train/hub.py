# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A folder to the Hub in one commit. The token comes from `hf auth login` or HF_TOKEN and is written nowhere."""

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token


LOOKS_LIKE_A_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")


def check_login():
    """A bad token fails here, before the work, and not after it."""
    HfApi().whoami()


def refuse_secrets(folder: Path):
    """Raises ValueError if a file other than the weights holds the user's token, or what looks like one."""
    token = (get_token() or "").encode()
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() and path.suffix != ".safetensors" else b""
        if LOOKS_LIKE_A_TOKEN.search(content) or (token and token in content):
            raise ValueError(f"{path.name} holds what looks like a token of the Hub; remove it from the run.")


def push(folder: Path, repo: str, is_private: bool) -> str:
    """Upload the folder in one commit, before which nothing is visible; weights of an earlier commit go.

    Interrupted, it is simply run again: what has arrived is not sent twice. Returns the address of the commit.
    """
    api = HfApi()
    api.create_repo(repo, private=is_private, exist_ok=True)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = [name for name in api.list_repo_files(repo) if ".safetensors" in name and name not in files]
    # Not `upload_folder`: it may split the folder into several commits.
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    return api.create_commit(repo, operations, commit_message=f"Publish {repo}").commit_url
