# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A folder to the Hub in one commit. The token comes from `hf auth login` or HF_TOKEN and is written nowhere."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from modeling_coe import CoEConfig
from modeling_coe.folders import WRITTEN, written_files


# What detect-secrets 1.5 does not know.
NEWER_SECRETS = {
    "Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "GitHub token": r"\bgithub_pat_\w{22,}",
    "Google key": r"\bAIza[\w-]{35}",
    "key of Anthropic, OpenAI or OpenRouter": r"\bsk-(?:(?:ant|proj|svcacct|or)-[\w-]{20,}|[A-Za-z0-9]{40,})",
    "token of npm, Replicate, DigitalOcean, Groq or xAI": r"\b(?:npm_|r8_|do[opr]_v1_|gsk_|xai-)[A-Za-z0-9]{32,}",
    "variable of an environment": r"\b[A-Z][A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)\s*[=:]\s*[\"']?[\w/+.-]{16,}",
    "named secret": r"(?i)(?:secret|(?:api|access|private)_?key|(?:auth|access|session|refresh)_?token|password)\w*"
    r"[\"']?\s*[=:]\s*[\"']?[\w/+.=-]{16,}",
}


# The paragraph of model_cards/template.md that an upload makes untrue.
NOT_UPLOADED = re.compile(r"^`[^`\n]+` is not uploaded yet\..*\n\n?", re.MULTILINE)


def check_login():
    """A bad token fails here, before the work, and not after it."""
    HfApi().whoami()


def detectors() -> dict[str, Callable[[str], Iterable[str]]]:
    """Each kind of secret that has a form of its own, and what finds it in a line, asking no server whether it works.

    detect-secrets also goes by entropy, which hashes and commit ids have as well.
    """
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector
    from detect_secrets.plugins.ip_public import IPPublicDetector

    kinds = get_mapping_from_secret_type_to_class()
    found = {
        name: kind().analyze_string
        for name, kind in kinds.items()
        if issubclass(kind, RegexBasedDetector) and kind is not IPPublicDetector
    }
    return found | {name: re.compile(pattern).findall for name, pattern in NEWER_SECRETS.items()}


def refuse_secrets(folder: Path):
    """Raises ValueError if a file other than weights and pictures holds the user's token, or what looks like a secret.

    The message names the file, the line and the kind, and not the secret.
    """
    kinds = detectors()
    if token := get_token():
        kinds["your token of the Hub"] = lambda line: [token] if token in line else []
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".png") or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if found := [name for name, find in kinds.items() if any(find(line))]:
                raise ValueError(f"{path.name}, line {number}, holds what looks like a secret: {found[0]}. Remove it.")


def files_to_upload(folder: Path) -> Iterator[tuple[str, Path]]:
    """What was written into a prepared folder, by its name there; in another folder, every file.

    Raises:
        ValueError: one of them is a link, or is reached through one, or is no file.
    """
    written = written_files(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if written is not None and name not in written:
            if name != WRITTEN:
                print(f"Not uploaded: {path}, which publishing did not write.")
        elif path.resolve() != folder.resolve() / name or not path.is_file():
            raise ValueError(f"{path} is a link or no file; only files are uploaded. Put a copy in its place.")
        else:
            yield name, path


# What decides how a model loads and speaks and what is said of it: such a file of an earlier model does not stay.
OF_A_MODEL = re.compile(
    r"[^/]*\.safetensors(\.index\.json)?|pytorch_model[^/]*\.bin(\.index\.json)?|adapter_(model\.bin|config\.json)|"
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|generation_config|chat_template)\.json|"
    r"tokenizer\.model|vocab\.txt|merges\.txt|chat_template\.jinja|(additional_chat_templates|\.eval_results)/.*"
)


def push(folder: Path, repo: str, is_private: bool) -> str:
    """Upload the folder in one commit, before which nothing is visible; the model of an earlier commit goes.

    The card goes without its paragraph that says it is not uploaded yet.

    Interrupted, it is simply run again: what has arrived is not sent twice. Returns the address of the commit.

    Raises:
        ValueError: a secret, a private upload to a public repository, or one that holds another kind of model.
    """
    files = dict(files_to_upload(folder))
    refuse_secrets(folder)
    api = HfApi()
    api.create_repo(repo, private=is_private, exist_ok=True)
    if is_private and not api.repo_info(repo).private:
        raise ValueError(
            f"`{repo}` is a public repository already; make it private on the Hub, or leave `--private` out."
        )
    present = api.list_repo_files(repo)
    kind = CoEConfig.model_type
    if "config.json" in present:
        kind = json.loads(Path(api.hf_hub_download(repo, "config.json")).read_text(encoding="utf-8")).get("model_type")
    elif "adapter_config.json" in present:
        kind = "adapter"
    if kind != CoEConfig.model_type:
        raise ValueError(f"`{repo}` holds a model of another kind, {kind!r}; publish into a repository of its own.")
    stale = [name for name in present if OF_A_MODEL.fullmatch(name) and name not in files]
    # Not `upload_folder`: it may split the folder into several commits.
    contents = dict(files)
    if card := files.get("README.md"):
        contents["README.md"] = NOT_UPLOADED.sub("", card.read_text(encoding="utf-8")).encode()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    return api.create_commit(repo, operations, commit_message=f"Publish {repo}").commit_url
