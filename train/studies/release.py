# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Release the package and the checkpoints: everything but the uploads, which only `--push` does, with the keys.

    python train/studies/release.py runs/smoke=coe-demo runs/gsm8k=coe-gsm8k     # sends nothing
    python train/studies/release.py runs/smoke=coe-demo runs/gsm8k=coe-gsm8k --push

Every step is printed before it is taken. The token of the Hub comes from `hf auth login` or HF_TOKEN, that of the
package index from twine's own settings.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import modeling_coe
from modeling_coe.train import publish
from modeling_coe.train.arguments import command_line


ROOT = Path(__file__).parents[2]
TAG = f"v{modeling_coe.__version__}"
BUILD = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"]
# What sends something: the package, then the tag that says which commit it was.
SENDING = (["twine", "check", "--strict", "dist/*"], ["twine", "upload", "dist/*"], ["git", "tag", TAG],
           ["git", "push", "origin", TAG])  # fmt: skip


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="RUN=NAME: the folder of a run, and the name of its repository.")
    parser.add_argument("--owner", default="chain-of-experts", help="Of the repositories.")
    parser.add_argument("--push", action="store_true", help="Upload the package and the checkpoints, and set the tag.")
    options, for_publish = parser.parse_known_args(arguments)
    for run in options.runs:
        if "=" not in run:
            raise ValueError(f"`{run}` must be RUN=NAME, such as runs/smoke=coe-demo.")
    options.for_publish = for_publish
    return options


def take(command: list[str], is_wanted: bool = True):
    print(("$ " if is_wanted else "would run: ") + shlex.join(command), flush=True)
    if is_wanted:
        subprocess.run(" ".join(command), shell=True, cwd=ROOT, check=True)


@command_line
def main(arguments: list[str] | None = None):
    options = parse_arguments(arguments)
    take(BUILD)
    for run in options.runs:
        folder, name = run.split("=")
        command = [folder, "--repo", f"{options.owner}/{name}", *options.for_publish]
        command += ["--push"] if options.push else []
        print("$ coe-publish " + shlex.join(command), flush=True)
        publish.main(command)
    for command in SENDING:
        take(command, options.push)
    print(f"{TAG} is out." if options.push else f"Nothing was sent. With --push, {TAG} goes out.")


if __name__ == "__main__":
    main()
