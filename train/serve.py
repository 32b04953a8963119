# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server for a CoE checkpoint: `transformers serve`, which by itself knows no custom class.

python train/serve.py runs/smoke --port 8000                 # any option of `transformers serve --help`
python train/serve.py runs/smoke --continuous-batching --cb-num-blocks 64 --cb-max-batch-tokens 256

transformers chat runs/smoke http://localhost:8000/v1        # in another terminal; or the `openai` client
"""

import transformers
import typer
from transformers.cli.serve import Serve

import modeling_coe


# The server looks its model class up on this module and not among the Auto classes (transformers 5.23).
transformers.CoEForCausalLM = modeling_coe.CoEForCausalLM

if __name__ == "__main__":
    typer.run(Serve)
