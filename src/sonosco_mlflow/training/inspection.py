"""Looking at a model in the middle of its training without leaving a trace.

An evaluation must not change what the next training step does. It would, by drawing from a generator that training
draws from too, or by leaving a module in another mode than it was in.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sonosco_mlflow.determinism import preserved_generators


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode and without gradients; leave generators and every module's mode as found.

    What a module keeps of the block, such as a table that it makes longer when it is needed, serves training as well:
    a tensor of ``torch.inference_mode`` would not.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with preserved_generators(), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
