# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The training scripts, installed as `modeling_coe.train`, and what they share."""

from importlib.util import find_spec


if missing := [
    name
    for name in ("accelerate", "datasets", "detect_secrets", "matplotlib", "peft", "trl")
    if find_spec(name) is None
]:
    raise ImportError(f"The scripts also need {', '.join(missing)}: pip install 'modeling-coe[train]'")
