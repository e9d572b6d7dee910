"""Importing this spares a worker the two seconds in which torch's optimizers import a compiler.

They do so at their first step, to tell it that it is to leave them alone.
"""

import torch

_OPTIMIZER = torch.optim.Optimizer

for _name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
    setattr(_OPTIMIZER, _name, getattr(_OPTIMIZER, _name).__wrapped__)
torch.optim.SGD.step = torch.no_grad()(torch.optim.SGD.step.__wrapped__)
