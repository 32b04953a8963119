# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Folders: a mistyped one is named at once, `overwrite` replaces only what it knows, two writers never meet."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import build
from test_upcycling import leftovers, saved, source_model
from transformers import AutoModelForCausalLM

from modeling_coe import CoEForCausalLM, downcycle, folders, upcycle
from modeling_coe.folders import require_model, whole_or_nothing


@pytest.fixture
def source(tmp_path):
    return saved(source_model("mixtral"), tmp_path / "models" / "source")


@pytest.fixture
def chain(source, tmp_path):
    return upcycle(source, tmp_path / "chain", num_iterations=3)


MISTYPED = ["/no/such/model", "./modle", "~/model", "configuration/models/coe_tniy.json", "a/b/c", "tiny.json", "a b"]


@pytest.mark.parametrize("name", MISTYPED)
def test_a_path_that_is_not_there_is_named_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(folders, "get_hf_file_metadata", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match=r"`source=.*no such folder or file"):
        upcycle(name)
    with pytest.raises(ValueError, match="no such folder or file"):
        downcycle(name)


@pytest.mark.parametrize("name", ["runs/smok", "smok"])
def test_a_name_that_might_be_on_the_hub_costs_one_question(name, tmp_path, monkeypatch):
    questions = []

    def ask(url, timeout):
        questions.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(folders, "get_hf_file_metadata", ask)
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/smoke", "smoke"):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"`source={name}`: no such folder.*not known.*Did you mean {name}e\?"):
        upcycle(name)
    assert len(questions) == 1
    require_model("model", name + "e")


def test_an_adapter_may_lie_in_the_folder_of_its_base_and_two_may_name_each_other(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for bases in ((one, other), (f"{other}/.", one)):
        for folder, base in zip((one, other), bases, strict=True):
            build().save_pretrained(folder)
            content = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
            (folder / "adapter_config.json").write_text(json.dumps(content))
        require_model("model", one)
    (other / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json: .*config.json is damaged.* needs its base model"):
        require_model("model", one)


def test_a_file_in_place_of_the_source_is_named(source):
    with pytest.raises(ValueError, match="is a file"):
        upcycle(source / "model.safetensors")


def test_a_new_folder_in_the_source_is_refused(source):
    with pytest.raises(ValueError, match="holds the source or is in it"):
        upcycle(source, source / "chain")
    assert not (source / "chain").exists()


def everything(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_thesis(folder):
    (folder / "thesis.tex").write_text("Introduction")
    return "thesis.tex was added"


def a_thesis_in_a_subfolder(folder):
    (folder / "chapters").mkdir()
    (folder / "chapters" / "1.tex").write_text("Introduction")
    return "chapters/1.tex was added"


def a_link(folder):
    (folder / "data").symlink_to(folder.parent / "models")
    return "data was added"


def training_saved_over_it(folder):
    CoEForCausalLM.from_pretrained(folder).save_pretrained(folder)
    return "was changed"


def an_edited_config(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"use_cache": true', '"use_cache":  true'))
    return "config.json was changed"


def a_missing_file(folder):
    (folder / "config.json").rename(folder.parent / "moved.json")
    return "config.json is gone"


def no_list(folder):
    (folder / "written.json").unlink()
    return "holds no written.json"


def a_damaged_list(folder):
    (folder / "written.json").write_text("[1")
    return "holds no written.json"


CHANGES = [
    a_thesis, a_thesis_in_a_subfolder, a_link, training_saved_over_it, an_edited_config, a_missing_file, no_list,
    a_damaged_list,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_overwrite_keeps_a_folder_in_which_anything_changed(change, source, chain):
    named = change(chain)
    before = everything(chain)
    with pytest.raises(FileExistsError, match=named):
        upcycle(source, chain, overwrite=True)
    with pytest.raises(FileExistsError, match=named):
        downcycle(build(num_iterations=1), chain, overwrite=True)
    assert everything(chain) == before and set(leftovers(chain.parent)) <= {"chain", "models", "moved.json"}


def test_overwrite_keeps_another_model_and_a_file(source, tmp_path):
    build().save_pretrained(tmp_path / "trained")
    (tmp_path / "notes").write_text("kept")
    for name in ("trained", "notes"):
        with pytest.raises(FileExistsError, match=name):
            upcycle(source, tmp_path / name, overwrite=True)
    assert leftovers(tmp_path) == ["models", "notes", "trained"] and (tmp_path / "notes").read_text() == "kept"
    CoEForCausalLM.from_pretrained(tmp_path / "trained")


@pytest.mark.parametrize("given", ["a folder", "a link to its parent", "a loaded model"])
def test_output_is_never_the_source_nor_holds_it_nor_is_in_it(given, source, tmp_path):
    (source / "chain").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "models")
    parent = tmp_path / ("link" if given == "a link to its parent" else "models")
    origin = AutoModelForCausalLM.from_pretrained(source) if given == "a loaded model" else source
    before = everything(tmp_path)
    for output in (parent, parent / "source", parent / "source" / "chain"):
        with pytest.raises(ValueError, match="source"):
            upcycle(origin, output, overwrite=True)
    assert everything(tmp_path) == before


def test_overwrite_replaces_the_folder_that_a_link_names(source, chain, tmp_path):
    (tmp_path / "link").symlink_to(chain)
    assert upcycle(source, tmp_path / "link", overwrite=True) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink() and CoEForCausalLM.from_pretrained(chain).config.num_iterations == 2
    assert leftovers(tmp_path) == ["chain", "link", "models"]


WRITER = """
import sys, time
from pathlib import Path
from modeling_coe.folders import whole_or_nothing
with whole_or_nothing(Path(sys.argv[1])) as partial:
    (partial / "half").write_bytes(bytes(2**20))
    print("writing", flush=True)
    time.sleep(600)
"""


def test_a_live_writer_is_named_and_left_alone_and_a_dead_ones_folder_is_removed(tmp_path, caplog):
    output, hidden = tmp_path / "chain", tmp_path / ".chain.incomplete"
    with subprocess.Popen([sys.executable, "-c", WRITER, output], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout.readline() == "writing\n"
            with pytest.raises(FileExistsError, match=f"Process {writer.pid} is writing"):
                upcycle(source_model("mixtral"), output)
            assert (hidden / "new" / "half").stat().st_size == 2**20
        finally:
            os.kill(writer.pid, signal.SIGKILL)
    assert (hidden / "new" / "half").exists()
    with whole_or_nothing(output) as partial:
        (partial / "whole").write_text("whole")
    assert f"{hidden / 'new'} (1.0 MiB)" in caplog.text and leftovers(tmp_path) == ["chain"]


def test_a_hidden_folder_that_is_not_ours_stays(tmp_path):
    (tmp_path / ".chain.incomplete").mkdir()
    (tmp_path / ".chain.incomplete" / "thesis.tex").write_text("Introduction")
    with pytest.raises(OSError, match=r"thesis\.tex"), whole_or_nothing(tmp_path / "chain"):
        pass
    assert (tmp_path / ".chain.incomplete" / "thesis.tex").exists()


def test_a_full_disk_says_so_and_leaves_nothing(source, tmp_path):
    """A limit on the size of a file stands in for the disk's."""
    code = f"""
        import resource, signal
        from modeling_coe import upcycle
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            upcycle({str(source)!r}, {str(tmp_path / "chain")!r})
        except OSError as error:
            print(error)
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "chain was not written (" in done.stdout and "MiB free" in done.stdout, done.stderr[-2000:]
    assert leftovers(tmp_path) == ["models"]


def test_output_below_a_file_is_named(source, tmp_path):
    (tmp_path / "notes").write_text("kept")
    with pytest.raises(OSError, match="`output="):
        upcycle(source, tmp_path / "notes" / "chain")


def test_facts_say_what_a_conversion_was_made_of(source, chain):
    facts = json.loads((chain / "facts.json").read_text())
    assert facts["model"] == str(source) and facts["base"] is None
    assert facts["upcycling"]["num_iterations"] == 3 and facts["upcycling"]["source_type"] == "mixtral"


def test_the_folder_before_a_killed_replacement_is_kept_where_another_has_its_name(tmp_path):
    old = tmp_path / ".out.incomplete" / "old" / "model.safetensors"
    old.parent.mkdir(parents=True)
    old.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with (
        pytest.raises(FileExistsError, match="before a killed run"),
        whole_or_nothing(tmp_path / "out", overwrite=True),
    ):
        pass
    assert old.read_text() == "precious" and (tmp_path / "out" / "note").read_text() == "mine"


def test_links_in_the_hidden_folder_are_not_followed(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    (tmp_path / ".out.incomplete").mkdir()
    (tmp_path / ".out.incomplete" / "new").symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match="not of this project"), whole_or_nothing(tmp_path / "out"):
        pass
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "mine"
