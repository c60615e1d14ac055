"""On the path of every Python that a test starts with `--plain-processor`: bf16 isn't among what the processor can."""

import torch


torch.cpu.get_capabilities = dict
