"""Small tensors: one thread is quicker than two, and sums have the same bits everywhere."""

import torch

torch.set_num_threads(1)
