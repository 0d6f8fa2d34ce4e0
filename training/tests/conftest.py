"""One thread: two of one small forward wait for each other, and on a busy machine they wait long."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    import torch
except ImportError:  # The generator's tests do without.
    pass
else:
    torch.set_num_threads(1)
