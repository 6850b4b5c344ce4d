"""Small tensors: one thread is quicker than two. Without a GPU Triton has its interpreter only."""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
