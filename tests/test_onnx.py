# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A chain exported to ONNX and run by ONNX Runtime, with the default experts."""

import pytest
import torch
from conftest import build, tokens


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("fields", [{}, {"router_bias": True, "num_null_experts": 3}], ids=["chain", "null experts"])
def test_exported_chain_gives_the_same_logits_for_every_batch_length_and_padding(tmp_path, fields):
    model = build(num_iterations=2, **fields)
    assert model.config._experts_implementation == "coe"
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    ids = tokens(2, 9)
    program = torch.onnx.export(
        model,
        kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False},
        dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic, "use_cache": None},
    )
    program.save(tmp_path / "chain.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "chain.onnx")
    for batch, length, padding in ((1, 1, 0), (1, 17, 0), (2, 9, 0), (5, 8, 3)):
        ids = tokens(batch, length, seed=length)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(torch.from_numpy(logits)[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)
