"""Settings for the tests of the facade."""

import torch

# Tiny models: more threads than one cost time, and the ranks of the tests have one as well.
torch.set_num_threads(1)
