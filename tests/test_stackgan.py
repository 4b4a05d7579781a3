"""stackgan.py: the released networks' numbers, losses against torch.distributions and loops, both stages' runs, the command line."""
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import stackgan
from conftest import ROOT, call, module, run, same, shared

SCRIPT = ROOT / "stackgan.py"


# ---- the released networks

class ReleasedCA(stackgan.ConditioningAugmentation):
    """The accident of the PyTorch release: a ReLU before mu and log sigma^2."""

    def forward(self, t, eps):
        mu, log_variance = F.relu(self.fc(t)).chunk(2, 1)
        return mu + (log_variance / 2).exp() * eps, mu, log_variance / 2


def filled(net, prefix, kept=lambda name: True):
    """Our network with the released one's golden weights; its layers stand in the same order. kept: released names it has."""
    released = json.loads(shared("golden", "stackgan_released_names.json").read_text())[prefix]
    theirs = [name for name in released if kept(name)]
    ours = [name for name in net.state_dict() if not name.startswith("text.")]
    assert len(ours) == len(theirs)
    weights = module(shared("golden", "golden_weights.py")).fill(prefix, {
        name: tuple(net.state_dict()[our].shape) for our, name in zip(ours, theirs)})
    net.load_state_dict({**net.state_dict(), **{our: weights[name] for our, name in zip(ours, theirs) if name in weights}})
    return net


def released_generators():
    """Stage I, and Stage II with the Stage I inside it, of 2 residual blocks as released, and the released CA."""
    G1, inner, G2 = stackgan.Stage1(16), stackgan.Stage1(16), stackgan.Stage2(16)
    del G2.residual[2:]
    for G in (G1, inner, G2):
        G.ca = ReleasedCA()
    return (filled(G1, "stage1_G"), filled(inner, "stage2_G", lambda name: name.startswith("STAGE1_G.")),
            filled(G2, "stage2_G", lambda name: not name.startswith("STAGE1_G.")))


def released_discriminators():
    """D of both stages; the release compresses no text: it is given mu."""
    out = filled(stackgan.Discriminator(8, 64), "stage1_D"), filled(stackgan.Discriminator(8, 256), "stage2_D")
    for D in out:
        D.text = torch.nn.Identity()
    return out


@pytest.mark.parametrize("dtype, rel", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_golden_generators_and_discriminators(mode, dtype, rel):
    """Within rel of each figure's largest value. (In eval mode the filled networks hardly see their input: train counts.)"""
    z = np.load(shared("golden", "stackgan.npz"))
    t = lambda name: torch.from_numpy(z[name]).to(dtype)
    G1, inner, G2 = (G.train(mode == "train").to(dtype) for G in released_generators())
    D1, D2 = (D.train(mode == "train").to(dtype) for D in released_discriminators())

    def close(ours, theirs):
        assert np.abs(ours.detach().double().numpy() - theirs).max() <= rel * np.abs(theirs).max()

    x, mu, log_sigma = G1(t("noise"), t("eps"), t("text"))
    close(x, z[f"{mode}_stage1_fake"])
    close(mu, z[f"{mode}_mu"]), close(2 * log_sigma, z[f"{mode}_logvar"])
    # the release's mean over dimensions, of mu and log sigma^2, in closed form
    close(stackgan.kl_loss(mu, log_sigma), z[f"{mode}_kl_mean"])
    close(D1(t("img64"), mu)[0].sigmoid(), z[f"{mode}_D1_cond"])
    cond, alone = D2(t("img256"), G2.ca(t("text"), t("eps"))[1])
    close(cond.sigmoid(), z[f"{mode}_D2_cond"]), close(alone.sigmoid(), z[f"{mode}_D2_uncond"])
    sketch = inner(t("noise"), t("eps"), t("text"))[0]
    x = G2(sketch, t("eps"), t("text"))[0]
    close(sketch, z[f"{mode}_stage2_stage1_fake"]), close(x[..., ::16, ::16], z[f"{mode}_stage2_fake_16x"])
