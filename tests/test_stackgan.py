"""stackgan.py: golden figures of the PyTorch release, losses, steps; what all scripts share."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dfgan
import gan_cls
import stackgan
from conftest import ROOT, load_module, run, shared


class ReleasedCA(stackgan.ConditioningAugmentation):
    """The PyTorch release has a ReLU before mu and log sigma^2."""

    def forward(self, t, eps):
        mu, log_variance = F.relu(self.fc(t)).chunk(2, 1)
        return mu + (log_variance / 2).exp() * eps, mu, log_variance / 2


def filled(net, prefix, part=""):
    """Fill a network with the golden weights of a released one, whose layers have the same order."""
    names = json.loads(shared("golden", "stackgan_released_names.json").read_text())[prefix]
    names = [name for name in names if name.startswith("STAGE1_G.") == bool(part)]
    if hasattr(net, "ca"):
        net.ca = ReleasedCA()
    else:
        net.text = torch.nn.Identity()    # the release gives mu to D
    state = net.state_dict()
    assert len(state) == len(names)
    weights = load_module(shared("golden", "golden_weights.py")).fill(
        prefix, {name: value.shape for name, value in zip(names, state.values())})
    net.load_state_dict({ours: weights.get(name, 0) ...})
    return net
