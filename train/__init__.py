# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The training scripts, installed as `modeling_coe.train`, and what they share."""
