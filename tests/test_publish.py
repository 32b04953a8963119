# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Publishing a run, against the Hub stand-in: what arrives, what a stranger can do with it, and what goes wrong."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL, build, tokens, whitespace_tokenizer
from hub_stand_in import TOKEN, HubStandIn, Repository
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from test_checkpoint import run_without_the_package
from transformers import AutoModelForCausalLM

from modeling_coe.train import hub as hub_module
from modeling_coe.train import publish
from modeling_coe.train.report import environment
from modeling_coe.train.studies import release


ROOT = Path(__file__).parents[1]
REPO = "tester/coe-chain"


def write_run(folder: Path, iteration_scale: bool = False, **facts) -> Path:
    """What train/pretrain.py leaves behind, of a model with random weights."""
    tokenizer = whitespace_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    build(iteration_scale=iteration_scale).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    samples = [
        {"prompt": f"w{i} w8 w{i + 41}", "expected": " w40\n#### 5", "generated": "w3 #### 4", "solved": False}
        for i in range(4, 9)
    ]
    run = {
        "model": "configuration/models/coe_tiny.json",
        "base": None,
        "dataset": "word_problems",
        "steps": 17,
        "tokens": 2345,
        "validation_loss_before": None,
        "validation_loss": 4.25,
        "share_solved": 0.2,
        "scored_problems": 5,
        "train_seconds": 7200.0,
        "peak_memory_gib": 0.5,
        "seed": 3,
        **environment(torch.device("cpu")),
        **facts,
    }
    (folder / "facts.json").write_text(json.dumps(run))
    training = {"learning_rate": 0.003, "seed": 3, "world_size": 1}
    (folder / "run.json").write_text(json.dumps({"data": "digest", "training": training}))
    (folder / "samples.json").write_text(json.dumps(samples))
    (folder / "loss_curve.jsonl").write_text('{"loss": 4.5}\n')
    shutil.copy(ROOT / "model_cards" / "chain.png", folder / "loss_curve.png")
    return folder


def run_script(code: str, hub: HubStandIn, home: Path, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    environment = {**os.environ, **hub.environment(home, token), "PYTHONPATH": str(ROOT / "train")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as server:
        yield server


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """A run published by the command itself, in shards of 50 KB; the folder, and what the process printed."""
    folder = tmp_path_factory.mktemp("published")
    run = write_run(folder / "run")
    command = f"import publish; publish.main([{str(run)!r}, '--repo', '{REPO}', '--push', '--max-shard-size', '50KB'])"
    result = run_script(command, hub, folder / "home")
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result


def card_as_sent(card: bytes) -> bytes:
    """Without the paragraph that an upload makes untrue."""
    sent, count = re.subn(rb"`tester/[\w-]+` is not uploaded yet\.[^\n]*\n\n", b"", card)
    assert count == 1
    return sent


def test_everything_arrives_in_one_commit(hub, published):
    folder, result = published
    local = {
        path.relative_to(folder / "run" / "hub").as_posix(): path.read_bytes()
        for path in (folder / "run" / "hub").rglob("*")
        if path.is_file() and path.name != "written.json"
    }
    repository = hub.repositories[REPO]
    sent = {name: content for name, content in repository.main.items() if name != ".gitattributes"}
    local["README.md"] = card_as_sent(local["README.md"])
    assert sent.keys() == local.keys() and [name for name in sent if sent[name] != local[name]] == []
    assert len(repository.commits) == 2  # the empty repository's, and ours
    shards = [name for name in local if name.endswith(".safetensors")]
    assert len(shards) > 2 and all(len(local[name]) < 100_000 for name in shards)
    assert {
        "README.md", "config.json", "configuration_coe.py", "facts.json", "generation_config.json", "loss_curve.png",
        "loss_curve.jsonl", "model.safetensors.index.json", "modeling_coe.py", "routing.png", "tokenizer.json",
    } <= set(local)  # fmt: skip
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(json.loads(local["config.json"])["auto_map"])
    assert repository.branches["main"] in result.stdout


def test_stranger_runs_the_cards_snippet_and_sees_the_cards_sample(hub, published, tmp_path):
    card = ModelCard(hub.repositories[REPO].main["README.md"].decode())
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    (sample,) = re.findall(r"```text\n(.*?)\n```", card.text, flags=re.DOTALL)
    assert "not uploaded yet" not in card.text
    code = snippet + textwrap.dedent("""
        from transformers import pipeline
        assert "transformers_modules" in type(model).__module__
        speak = pipeline("text-generation", model=model, tokenizer=tokenizer)
        text = speak("w4 w8 w45", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
        assert text and output_text.startswith(f"w4 w8 w45 {text.strip()}"), (text, output_text)
    """).replace("output_text", "tokenizer.decode(output[0], skip_special_tokens=True)")
    result = run_without_the_package(code, tmp_path, hub.environment(tmp_path, token=None))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == f"w4 w8 w45 {sample}".strip()


def test_a_release_is_rehearsed_without_sending_anything_and_then_sent(hub, published, monkeypatch, tmp_path, capsys):
    """The build is a matter of test_wheel.py; here are the steps, the card before the upload, and the upload."""
    monkeypatch.setattr(release, "BUILD", ["true"])
    run, requests = published[0] / "run", len(hub.requests)
    release.main([f"{run}=coe-demo", "--owner", "tester"])
    printed = capsys.readouterr().out
    assert "would run: twine upload" in printed and f"would run: git tag {release.TAG}" in printed
    assert len(hub.requests) == requests

    card = ModelCard((run / "hub" / "README.md").read_text())
    assert "`tester/coe-demo` is not uploaded yet" in card.text
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    exec(snippet.replace("tester/coe-demo", str(run / "hub")), {})
    (sample,) = re.findall(r"```text\n(.*?)\n```", card.text, flags=re.DOTALL)
    assert capsys.readouterr().out.strip().endswith(sample.strip())

    sent = f"""
        from modeling_coe.train.studies import release
        release.BUILD, release.SENDING = ["true"], [["true"]]
        release.main(["{run}=coe-demo", "--owner", "tester", "--push"])
    """
    result = run_script(sent, hub, tmp_path)
    assert f"{release.TAG} is out." in result.stdout, result.stderr[-3000:]
    assert b"not uploaded yet" not in hub.repositories["tester/coe-demo"].main["README.md"]


def test_snapshots_revisions_and_refusals(hub, published, tmp_path):
    first = next(iter(hub.repositories[REPO].commits))
    code = f"""
        import pathlib
        from huggingface_hub import errors, hf_hub_download, snapshot_download
        folder = pathlib.Path(snapshot_download("{REPO}"))
        print(len(list(folder.glob("*.safetensors"))), (folder / "README.md").is_file())
        print([path.name for path in pathlib.Path(snapshot_download("{REPO}", revision="{first}")).iterdir()])
        for repo, revision in [("{REPO}", "no-such-branch"), ("tester/no-such-model", "main")]:
            try:
                hf_hub_download(repo, "config.json", revision=revision)
            except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
                print(type(error).__name__)
    """
    result = run_script(code, hub, tmp_path, token=None)
    shards = sum(name.endswith(".safetensors") for name in hub.repositories[REPO].main)
    expected = [f"{shards} True", "['.gitattributes']", "RevisionNotFoundError", "RepositoryNotFoundError"]
    assert result.stdout.splitlines() == expected, result.stderr[-3000:]


def test_push_to_hub_makes_private_repositories_that_only_their_owner_loads(hub, tmp_path):
    build().save_pretrained(tmp_path / "model")
    code = f"""
        import torch, modeling_coe
        from transformers import AutoConfig, AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
        model.push_to_hub("tester/secret", private=True, max_shard_size="50KB")
        model.model.norm.weight.data.fill_(7)
        model.push_to_hub("tester/secret", revision="experiment", commit_message="Another norm")
        for token in (False, "hf_wrong"):
            try:
                AutoConfig.from_pretrained("tester/secret", token=token)
            except OSError as error:
                print("make sure to pass a token" in str(error), "Invalid credentials" in str(error))
        main = AutoModelForCausalLM.from_pretrained("tester/secret")
        branch = AutoModelForCausalLM.from_pretrained("tester/secret", revision="experiment")
        print(bool((main.model.norm.weight == 7).any()), bool((branch.model.norm.weight == 7).all()))
    """
    result = run_script(code, hub, tmp_path)
    assert result.stdout.splitlines() == ["True False", "False True", "False True"], result.stderr[-3000:]
    secret = hub.repositories["tester/secret"]
    assert secret.is_private and {"main", "experiment"} == set(secret.branches)
    assert secret.main["modeling_coe.py"] == (ROOT / "modeling_coe" / "modeling_coe.py").read_bytes()


def test_bad_token_fails_before_any_work(hub, tmp_path, monkeypatch):
    result = run_script("import hub; hub.check_login()", hub, tmp_path, token="hf_wrong")
    assert result.returncode != 0 and "401" in result.stderr
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(OfflineModeIsEnabled):  # these tests run offline: the login is checked before the run is read
        publish.main([str(tmp_path / "no-such-run"), "--repo", "tester/other", "--push"])


def test_upload_killed_in_the_middle_publishes_nothing_and_the_next_try_completes(published, tmp_path):
    folder = published[0] / "run" / "hub"
    command = f"""
        from modeling_coe.train import hub
        from pathlib import Path
        print(hub.push(Path({str(folder)!r}), "{REPO}", is_private=False))
    """
    with HubStandIn() as hub:
        hub.stall_after = 4096
        environment = {**os.environ, **hub.environment(tmp_path), "PYTHONPATH": str(ROOT / "train")}
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(command)], env=environment)
        try:
            assert hub.stalled.wait(timeout=600)
        finally:
            process.kill()
            process.wait()
            hub.stall_after = None
        repository = hub.repositories[REPO]
        assert list(repository.main) == [".gitattributes"]

        result = run_script(command, hub, tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        del repository.main[".gitattributes"]
        local = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "written.json"
        }
        local["README.md"] = card_as_sent(local["README.md"])
        sent = repository.main
        assert sent.keys() == local.keys() and [name for name in sent if sent[name] != local[name]] == []


def test_published_again_with_fewer_shards_no_old_weights_remain(hub, published, tmp_path):
    folder = tmp_path / "smaller"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    code = f"""
        from modeling_coe.train import hub
        from pathlib import Path
        hub.push(Path({str(folder)!r}), "tester/again", is_private=False)
        Path({str(folder)!r}, "model.safetensors").rename(Path({str(folder)!r}, "model-00001-of-00001.safetensors"))
        hub.push(Path({str(folder)!r}), "tester/again", is_private=False)
    """
    result = run_script(code, hub, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(hub.repositories["tester/again"].main) == {".gitattributes", "model-00001-of-00001.safetensors"}


def test_of_an_earlier_model_nothing_stays_that_would_change_this_one_and_what_is_a_user_s_does(hub, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    earlier = ["adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "chat_template.jinja",
               "additional_chat_templates/tool.jinja", ".eval_results/gsm.yaml", "tokenizer_config.json"]  # fmt: skip
    own = ["onnx/decoder.safetensors", "notes.md", "data/tokenizer.txt", "tokenizer_report.md", "training_args.bin"]
    repository = Repository(False)
    repository.main.update(dict.fromkeys(earlier + own, b"{}"))
    repository.main["config.json"] = b'{"model_type": "coe"}'
    hub.repositories["tester/earlier"] = repository
    result = run_script(
        f"""
        from modeling_coe.train import hub
        from pathlib import Path
        hub.push(Path({str(folder)!r}), "tester/earlier", is_private=False)
    """,
        hub,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(repository.main) - {".gitattributes"} == {"model.safetensors", "config.json", *own}


@pytest.mark.parametrize(
    "is_private, held, named",
    [
        (True, "config.json", "`tester/other` is a public repository already"),
        (False, "config.json", "another kind, 'llama'"),
        (False, "adapter_config.json", "another kind, 'adapter'"),
    ],
)
def test_a_repository_that_is_public_or_of_another_kind_of_model_gets_nothing(is_private, held, named, hub, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    repository = Repository(False)
    repository.main[held] = b'{"model_type": "llama"}'
    hub.repositories["tester/other"] = repository
    before = dict(repository.main)
    result = run_script(
        f"""
        from modeling_coe.train import hub
        from pathlib import Path
        hub.push(Path({str(folder)!r}), "tester/other", is_private={is_private})
    """,
        hub,
        tmp_path,
    )
    assert named in result.stderr and dict(repository.main) == before


def test_a_prepared_folder_that_lost_its_weights_is_not_uploaded(tmp_path):
    run = write_run(tmp_path / "run")
    publish.main([str(run), "--repo", REPO])
    (run / "hub" / "model.safetensors").unlink()
    options = publish.parse_arguments([str(run), "--repo", REPO, "--push"])
    with pytest.raises(ValueError, match=r"model\.safetensors is gone, so nothing is uploaded"):
        publish.prepare(options, run / "hub")


def test_a_card_that_the_hub_refuses_publishes_nothing(hub, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: no-such-license\n---\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    code = f"""
        from modeling_coe.train import hub
        from pathlib import Path
        hub.push(Path({str(folder)!r}), "tester/refused", is_private=False)
    """
    result = run_script(code, hub, tmp_path)
    assert "must be one of" in result.stderr, result.stderr[-3000:]
    assert list(hub.repositories["tester/refused"].main) == [".gitattributes"]


def test_token_is_written_nowhere(hub, published):
    folder, result = published
    assert ("POST", f"api/models/{REPO}/commit/main") in hub.requests  # the token was really used
    assert TOKEN not in result.stdout + result.stderr
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    for content in hub.repositories[REPO].main.values():
        assert TOKEN.encode() not in content


SECRETS = {
    "token of the Hub": TOKEN,
    "cloud key": "AKIA" + "IOSFODNN7EXAMPLE",
    "cloud secret": "AWS_SECRET_ACCESS_KEY=" + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "Google key": "AIza" + "SyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY",
    "code host": "ghp_" + "a1B2" * 9,
    "code host, fine-grained": "github_pat_" + "11ABCDEFG0abcdefghijkl_mnopq",
    "another code host": "glpat-" + "abcdefghij0123456789",
    "model host": "sk-ant-" + "api03-abcdefghijklmnopqrst",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "address with a password": "postgres://me:hunter2@database/runs",
    "tracker": "WANDB_API_KEY=" + "0123456789abcdef" * 2,
    "npm": "npm_" + "a1B2" * 9,
    "Replicate": "r8_" + "a1B2c3D4e5" * 3 + "abcdefg",
    "cloud, lower case": "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLE",
    "session": "aws_session_token=IQoJb3JpZ2luX2VjE" + "a1B2" * 10,
    "old OpenAI": "sk-" + "a1B2" * 12,
    "DigitalOcean": "dop_v1_" + "a1" * 32,
    "Groq": "gsk_" + "a1B2" * 13,
    "xAI": "xai-" + "a1B2" * 20,
}


@pytest.mark.parametrize("secret", SECRETS)
def test_every_kind_of_secret_is_found_in_any_file_and_not_repeated(secret, tmp_path):
    for name in ("facts.json", "loss_curve.jsonl", "README.md", "chat_template.jinja"):
        (tmp_path / name).write_text(f"one line\n{json.dumps({'note': SECRETS[secret]})}\n")
        with pytest.raises(ValueError, match=rf"{name}, line 2, holds what looks like a secret") as refusal:
            hub_module.refuse_secrets(tmp_path)
        assert SECRETS[secret] not in str(refusal.value)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("where", ["facts.json", "loss_curve.jsonl", "samples.json"])
def test_run_that_recorded_a_secret_is_refused(where, tmp_path):
    run = write_run(tmp_path, **({"commit": TOKEN} if where == "facts.json" else {}))
    if where == "loss_curve.jsonl":
        (run / where).write_text(json.dumps({"loss": 4.5, "note": SECRETS["cloud key"]}) + "\n")
    if where == "samples.json":
        samples = json.loads((run / where).read_text())
        samples[0]["expected"] = SECRETS["code host"]
        (run / where).write_text(json.dumps(samples))
    with pytest.raises(ValueError, match="looks like a secret"):
        publish.main([str(run), "--repo", REPO])
    assert not (run / "hub").exists() and not (run / ".hub.incomplete").exists()


@pytest.mark.parametrize("folder", sorted(path.parent for path in (ROOT / "model_cards").glob("*/facts.json")))
def test_hashes_commits_and_code_are_no_secrets(folder, tmp_path):
    for path in [*folder.iterdir(), *(ROOT / "modeling_coe").glob("*.py"), ROOT / "constraints.txt"]:
        shutil.copy(path, tmp_path)
    vocabulary = {f"w{hashlib.sha256(str(i).encode()).hexdigest()}": i for i in range(2000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary, indent=1))
    hub_module.refuse_secrets(tmp_path)


def test_token_in_use_is_refused_whatever_it_looks_like(tmp_path, monkeypatch):
    run = write_run(tmp_path, commit="issued-by-an-enterprise-hub")
    monkeypatch.setenv("HF_TOKEN", "issued-by-an-enterprise-hub")
    with pytest.raises(ValueError, match="looks like a secret"):
        publish.main([str(run), "--repo", REPO])


@pytest.mark.parametrize("name", ["loss_curve.jsonl", "loss_curve.png", "chat_template.jinja", "facts.json", "hub"])
def test_a_link_in_the_run_is_refused_and_what_it_points_to_not_read(name, tmp_path):
    run = write_run(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("/etc/passwd" if name != "hub" else tmp_path)
    with pytest.raises(ValueError, match=f"{name} is a link"):
        publish.main([str(run), "--repo", REPO])


def test_a_pipe_in_the_run_is_refused_and_not_waited_for(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "samples.json").unlink()
    os.mkfifo(run / "samples.json")
    with pytest.raises(ValueError, match=r"samples\.json is a link or no file"):
        publish.main([str(run), "--repo", REPO])


def a_link(hub):
    (hub / "loss_curve.jsonl").unlink()
    (hub / "loss_curve.jsonl").symlink_to("/etc/passwd")


def a_secret(hub):
    (hub / "README.md").write_text((hub / "README.md").read_text() + SECRETS["cloud key"])


@pytest.mark.parametrize("change, named", [(a_link, "is a link"), (a_secret, "a secret")])
def test_a_link_or_a_secret_in_the_prepared_folder_is_not_uploaded(change, named, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    publish.main([str(run), "--repo", REPO])
    change(run / "hub")
    monkeypatch.setattr(publish, "check_login", lambda: None)
    with pytest.raises(ValueError, match=named):
        publish.main([str(run), "--repo", REPO, "--push"])


def test_a_linked_folder_and_what_publishing_did_not_write_are_not_uploaded(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    publish.main([str(run), "--repo", REPO, "--dataset-id", "openai/gsm8k"])
    hub = run / "hub"
    (hub / "notes.txt").write_text("mine")
    files = dict(hub_module.files_to_upload(hub))
    assert {"README.md", "model.safetensors", ".eval_results/gsm8k.yaml"} <= set(files)
    assert not {"notes.txt", "written.json"} & set(files) and "notes.txt, which" in capsys.readouterr().out
    (hub / ".eval_results").rename(run / "elsewhere")
    (hub / ".eval_results").symlink_to(run / "elsewhere")
    assert ".eval_results/gsm8k.yaml" not in dict(hub_module.files_to_upload(hub))


def test_push_uploads_the_card_that_was_edited_and_says_so(tmp_path):
    run = write_run(tmp_path / "run")
    publish.main([str(run), "--repo", REPO])
    card = run / "hub" / "README.md"
    edited = card.read_text() + "\nTrained in one afternoon.\n"
    card.write_text(edited)
    with pytest.raises(ValueError, match=r"README\.md was changed; --push uploads it"):
        publish.main([str(run), "--repo", REPO])
    for options in (["--repo", "tester/other"], ["--repo", REPO, "--watts", "7"]):
        with pytest.raises(ValueError, match=r"README\.md was changed; the run or the options"):
            publish.prepare(publish.parse_arguments([str(run), *options, "--push"]), run / "hub")
    assert card.read_text() == edited
    with HubStandIn() as hub:
        command = f"import publish; publish.main([{str(run)!r}, '--repo', '{REPO}', '--push'])"
        result = run_script(command, hub, tmp_path / "home")
        assert result.returncode == 0, result.stderr[-3000:]
        notice = (
            f"`{REPO}` is not uploaded yet. Until it is, put the folder that `coe-publish` writes in its place.\n\n"
        )
        assert hub.repositories[REPO].main["README.md"].decode() == edited.replace(notice, "") != edited
    assert "as it was prepared; README.md was changed" in result.stdout


def test_prepared_again_after_the_run_went_on_the_folder_is_the_new_runs(tmp_path):
    run = write_run(tmp_path / "run")
    publish.main([str(run), "--repo", REPO])
    write_run(tmp_path / "run", tokens=54321)
    publish.prepare(publish.parse_arguments([str(run), "--repo", REPO, "--push"]), run / "hub")
    assert "54,321 tokens" in (run / "hub" / "README.md").read_text()


def test_a_folder_called_hub_that_publishing_did_not_write_is_kept(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "hub").mkdir()
    (run / "hub" / "thesis.tex").write_text("Introduction")
    with pytest.raises(ValueError, match=r"written\.json"):
        publish.main([str(run), "--repo", REPO])
    assert (run / "hub" / "thesis.tex").exists()


def test_what_a_killed_publishing_left_is_removed(tmp_path, caplog):
    run = write_run(tmp_path / "run")
    (run / ".hub.incomplete" / "new").mkdir(parents=True)
    (run / ".hub.incomplete" / "new" / "model.safetensors").write_bytes(bytes(2**20))
    publish.main([str(run), "--repo", REPO])
    assert not (run / ".hub.incomplete").exists() and "(1.0 MiB)" in caplog.text


BAD_OPTIONS = {
    "no owner": ["--repo", "chain"],
    "a b/c": ["--repo", "a b/c"],
    "--watts nan": ["--watts", "nan"],
    "--watts -5": ["--watts=-5"],
    "--watts 0": ["--watts", "0"],
    "--watts inf": ["--watts", "inf"],
    "--max-new-tokens 0": ["--max-new-tokens", "0"],
    "--max-new-tokens 99999` exceeds": ["--max-new-tokens", "99999"],
    "--evaluated-split` is empty": ["--evaluated-split", ""],
    "no model": ["--base-model", "no model"],
    "no data": ["--dataset-id", "no data"],
    "Apache 2": ["--license", "Apache 2"],
    "English": ["--language", "English"],
}


@pytest.mark.parametrize("named", BAD_OPTIONS)
def test_bad_options_are_refused_without_a_push_too(named, tmp_path):
    run = write_run(tmp_path)
    with pytest.raises(ValueError, match=named):
        publish.main([str(run), "--repo", REPO, *BAD_OPTIONS[named]])
    assert not (run / "hub").exists()


@pytest.mark.parametrize("name", ["facts.json", "run.json", "samples.json", "loss_curve.png"])
def test_a_missing_or_damaged_file_of_the_run_is_named(name, tmp_path):
    run = write_run(tmp_path)
    if name.endswith(".json"):
        for damage in ("{", "5"):
            (run / name).write_text(damage)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                publish.main([str(run), "--repo", REPO])
    (run / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        publish.main([str(run), "--repo", REPO])


def test_a_missing_fact_or_run_is_named_and_no_folder_made(tmp_path):
    with pytest.raises(ValueError, match="smok: no such folder"):
        publish.main([str(tmp_path / "smok"), "--repo", REPO])
    assert not (tmp_path / "smok").exists()
    run = write_run(tmp_path / "run")
    (run / "facts.json").write_text('{"model": "configuration/models/coe_tiny.json"}')
    with pytest.raises(ValueError, match=r"facts\.json lacks `dataset`"):
        publish.main([str(run), "--repo", REPO])


def test_a_record_without_what_the_card_needs_is_named_down_to_the_name(tmp_path):
    run = write_run(tmp_path)
    (run / "run.json").write_text('{"data": "digest", "training": {"seed": 3}}')
    with pytest.raises(ValueError, match=r"run\.json lacks `training\.world_size`"):
        publish.main([str(run), "--repo", REPO])


@pytest.mark.parametrize("dataset", ["/somewhere/gsm8k", "~/gsm8k", "../gsm8k", "C:\\gsm8k"])
def test_places_of_this_machine_are_published_nowhere(dataset, tmp_path):
    run = write_run(tmp_path / "run", model="/somewhere/presets/moe.json", dataset=dataset, log="/somewhere/run.log")
    with pytest.raises(ValueError, match="--dataset-id"):
        publish.main([str(run), "--repo", REPO, "--dataset-license", "mit"])
    publish.main([str(run), "--repo", REPO, "--dataset-license", "mit", "--dataset-id", "openai/gsm8k"])
    for path in filter(Path.is_file, (run / "hub").rglob("*")):
        content = path.read_bytes()
        assert not any(place.encode() in content for place in ("/somewhere", str(tmp_path), dataset)), path
    assert json.loads((run / "hub" / "facts.json").read_text())["run"]["model"] == "moe.json"


def test_a_run_whose_time_is_not_known_claims_no_energy(tmp_path):
    run = write_run(tmp_path, train_seconds=0.0)
    publish.main([str(run), "--repo", REPO])
    card = (run / "hub" / "README.md").read_text()
    assert "kWh" not in card and "| Time | not known |" in card


@pytest.mark.parametrize(
    ("device", "watts"), [("NVIDIA H100", 4 * 700), ("Some processor (CPU)", 4 * 6 * 15)], ids=["GPUs", "threads"]
)
def test_the_energy_is_that_of_the_machines_that_trained(device, watts, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # of the one that publishes
    run = write_run(tmp_path, device=device, threads=6)
    record = json.loads((run / "run.json").read_text())
    record["training"]["world_size"] = 4
    (run / "run.json").write_text(json.dumps(record))
    publish.main([str(run), "--repo", REPO])
    assert json.loads((run / "hub" / "facts.json").read_text())["energy"]["watts"] == watts


def test_an_adapter_beside_its_base_is_refused(tmp_path):
    run = write_run(tmp_path)
    (run / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`run=.* holds an adapter; merge it first"):
        publish.main([str(run), "--repo", REPO])


def test_published_weights_are_the_runs(tmp_path):
    run = write_run(tmp_path)
    publish.main([str(run), "--repo", REPO])
    ids = tokens(2, 7)
    logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (run, run / "hub")]
    assert torch.equal(*logits) and logits[0].shape[-1] == SMALL["vocab_size"]


def test_what_the_run_does_not_know_must_be_stated(tmp_path):
    run = write_run(tmp_path, dataset="/somewhere/gsm8k", model="runs/upcycled")
    for message, options in {
        "--dataset-license": [],
        "--dataset-id": ["--dataset-license", "mit"],
        "--base-model": ["--dataset-license", "mit", "--dataset-id", "openai/gsm8k"],
    }.items():
        with pytest.raises(ValueError, match=message):
            publish.main([str(run), "--repo", REPO, *options])
    options = ["--dataset-license", "mit", "--dataset-id", "openai/gsm8k", "--base-model", "allenai/OLMoE-1B-7B-0924"]
    publish.main([str(run), "--repo", REPO, *options, "--watts", "50"])
    for name in ("README.md", "facts.json"):
        text = (run / "hub" / name).read_text()
        assert "/somewhere" not in text and "runs/upcycled" not in text
    card = ModelCard.load(run / "hub" / "README.md")
    assert "fine-tuned from [allenai/OLMoE-1B-7B-0924]" in card.text
    assert card.data.base_model == "allenai/OLMoE-1B-7B-0924" and card.data.datasets == ["openai/gsm8k"]
    assert "0.1 kWh, assuming 50 W" in card.text  # two hours
    entries = yaml.safe_load((run / "hub" / ".eval_results" / "gsm8k.yaml").read_text())
    assert [(entry["dataset"]["id"], entry["value"]) for entry in entries] == [("openai/gsm8k", 0.2)]


SOURCE = {"model": "/somewhere/moe.json", "dataset": "/somewhere/gsm8k", "steps": 31, "tokens": 5678}
UPCYCLED = {
    "model": "/somewhere/mixtral",
    "base": SOURCE | {"validation_loss": 4.75},
    "upcycling": {"source_type": "mixtral", "changes_of_function": [], "num_iterations": 3, "seed": 0},
}
NAMES = ["--dataset-license", "mit", "--dataset-id", "openai/gsm8k"]


def write_upcycled_run(folder: Path, **facts) -> Path:
    facts = {"model": "/somewhere/chain", "base": UPCYCLED, "dataset": "/somewhere/gsm8k"} | facts
    return write_run(folder, iteration_scale=True, validation_loss_before=4.751, **facts)


def test_upcycled_run_names_its_source_without_pretending_that_the_hub_has_it(tmp_path):
    run = write_upcycled_run(tmp_path)
    publish.main([str(run), "--repo", REPO, *NAMES])
    card = ModelCard.load(run / "hub" / "README.md")
    assert card.data.base_model is None
    assert (
        "a Mixtral that is not on the Hub: 31 steps, 5,678 tokens of openai/gsm8k, validation loss 4.75." in card.text
    )
    assert "so the chain started with the logits of its source" in card.text
    assert "before this training |  | 4.751 |" in card.text and "contributed is not known" in card.text
    for path in filter(Path.is_file, (run / "hub").rglob("*")):
        assert b"/somewhere" not in path.read_bytes(), path


def test_chain_stands_beside_its_source_trained_on_for_the_same_steps(tmp_path):
    run, control = write_upcycled_run(tmp_path / "run"), write_run(tmp_path / "control", dataset="/somewhere/gsm8k")
    facts = json.loads((control / "facts.json").read_text())
    (control / "facts.json").write_text(json.dumps(facts | {"validation_loss": 4.125}))
    options = ["--repo", REPO, *NAMES, "--control", str(control)]
    publish.main([str(run), *options])
    card = ModelCard.load(run / "hub" / "README.md")
    assert "ends 0.1250 nats per token below this chain" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [4.25, 0.2]  # the source's are not ours
    (control / "facts.json").write_text(json.dumps(facts | {"steps": 18}))
    with pytest.raises(ValueError, match="`steps=18`, the run `17`"):
        publish.main([str(run), *options])


def test_a_fine_tune_stands_beside_its_control_by_the_loss_of_the_answers(tmp_path):
    losses = {"validation_loss": 1.25, "answer_loss_before": 3.5}
    run = write_upcycled_run(tmp_path / "run", answer_loss=2.5, **losses)
    record = json.loads((run / "run.json").read_text()) | {"lora": {}, "data": {"columns": ["prompt", "completion"]}}
    (run / "run.json").write_text(json.dumps(record))
    control = write_run(tmp_path / "control", dataset="/somewhere/gsm8k", answer_loss=2.25, **losses)
    options = ["--repo", REPO, *NAMES, "--control", str(control)]
    publish.main([str(run), *options])
    text = (run / "hub" / "README.md").read_text()
    assert "ends 0.2500 nats per token below this chain" in text
    assert "| loss of the answers, nats per token |  | 2.5 |" in text and "before this training |  | 3.5 |" in text
    facts = json.loads((control / "facts.json").read_text())
    del facts["answer_loss"]
    (control / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"control/facts\.json lacks `answer_loss`"):
        publish.main([str(run), *options])


def test_chain_with_another_function_than_its_source_says_so(tmp_path):
    changes = UPCYCLED["upcycling"] | {"changes_of_function": ["2 experts per iteration instead of 4"]}
    run = write_upcycled_run(tmp_path, base=UPCYCLED | {"upcycling": changes})
    publish.main([str(run), "--repo", REPO, *NAMES])
    text = (run / "hub" / "README.md").read_text()
    assert "(2 experts per iteration instead of 4)" in text and "logits of its source" not in text


def test_folder_that_the_source_was_trained_on_is_not_published(tmp_path):
    base = UPCYCLED | {"base": UPCYCLED["base"] | {"dataset": "/elsewhere/text"}}
    run = write_upcycled_run(tmp_path, base=base)
    with pytest.raises(ValueError, match=r"elsewhere.*--base-model"):
        publish.main([str(run), "--repo", REPO, *NAMES])
