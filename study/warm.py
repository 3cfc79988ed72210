"""What a sweep's processes share: imported before the first of them forks, on a single thread.

A process that has run a parallel operation must not fork; the generated images are made once here.
"""

import torch

import data

torch.set_num_threads(1)
data.synthetic_dataset()
