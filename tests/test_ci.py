# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Hosted CI runs what exists: targets of the Makefile, the Pythons and oldest versions that pyproject.toml names."""

import re
import tomllib
from pathlib import Path

import yaml


ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
JOBS = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_every_job_makes_a_target_of_the_makefile():
    targets = {target for line in re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE) for target in line.split()}
    made = {command.removeprefix("make ") for job in JOBS.values() for command in commands(job)}
    assert made == {"lint", "test", "test-oldest", "test-slow"} <= targets
    assert {"make lint", "make test"} <= set((ROOT / ".ci/run").read_text().splitlines())


def test_ci_tests_every_python_of_the_classifiers():
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert set(JOBS["test"]["strategy"]["matrix"]["python"]) == named
    assert PROJECT["requires-python"] == f">={min(named)}"


def test_slow_tests_run_weekly_and_on_demand_only():
    triggers = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())[True]  # YAML reads `on` as true
    assert re.fullmatch(r"\d+ \d+ \* \* \d", triggers["schedule"][0]["cron"])
    assert "schedule" in JOBS["slow"]["if"] and "if" not in JOBS["test"]


def test_the_oldest_environment_has_the_oldest_versions_that_are_allowed():
    pinned = dict(re.findall(r"(torch|transformers)==([\d.]+)", MAKEFILE))
    allowed = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in PROJECT["dependencies"])
    for name, version in pinned.items():
        assert version.startswith(f"{allowed[name]}.") and version.removeprefix(allowed[name]) == ".0"
