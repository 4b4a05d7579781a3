"""Each script alone in a folder, where nothing but torch can be imported.

A student can copy one file into a project: its networks, losses, steps and update_ema need torch
only. Its command line says what is missing."""
import shutil

import pytest

from conftest import ROOT, run

# Lines before and after those of a script. An entry None of sys.modules makes an import fail.
BEFORE = """
import copy
import runpy
import sys
import torch

for name in ("common", "data", "numpy", "PIL", "torchvision"):
    sys.modules[name] = None
assert_close = torch.testing.assert_close
"""
AFTER = """
script.update_ema(ema, G, 0.7)
for name, average in ema.state_dict().items():
    old = before[name]
    new = G.state_dict()[name]
    if average.is_floating_point():
        assert_close(average, 0.7 * old + 0.3 * new)
    else:  # counters of batch norm
        assert torch.equal(average, old)

assert opt_g.defaults["betas"] == betas
assert opt_d.defaults["betas"] == betas
print("done")
runpy.run_path(script.__file__, run_name="__main__")
"""

GAN_CLS = """
import gan_cls as script
betas = (0.5, 0.999)

G, D, opt_g, opt_d = script.build(ngf=4, ndf=2)
ema = copy.deepcopy(G)
before = copy.deepcopy(G.state_dict())
real = torch.randn(4, 3, 64, 64)
z = torch.randn(4, script.NZ)
t = torch.randn(4, script.TEXT_DIM)
t_wrong = t.roll(1, 0)
fake = G(z, t)

expected = script.d_loss(D(real, t), D(real, t_wrong), D(fake.detach(), t))
losses = script.d_step(D, opt_d, real, fake, t, t_wrong)
assert_close(losses["loss_d"], expected)
expected = script.g_loss(D(fake, t))
assert_close(script.g_step(D, opt_g, fake, t), expected)
"""

STACKGAN = """
import stackgan as script
betas = (0.5, 0.999)

t = torch.randn(4, script.TEXT_DIM)
t_wrong = t.roll(1, 0)

# Stage-I
G, D, opt_g, opt_d = script.build(size=64, ngf=4, ndf=2)
real = torch.randn(4, 3, 64, 64)
z = torch.randn(4, script.NZ)
eps1 = torch.randn(4, script.NC)
s0, kl = G(z, eps1, t)

expected = script.d_loss(D(real, t), D(real, t_wrong), D(s0.detach(), t))
losses = script.d_step(D, opt_d, real, s0, t, t_wrong)
assert_close(losses["loss_d"], expected)
expected = script.g_loss(D(s0, t))
assert_close(script.g_step(D, opt_g, s0, t, kl), expected)
assert opt_g.defaults["betas"] == betas
assert opt_d.defaults["betas"] == betas

# Stage-II draws from the images of Stage-I. Its D scores images alone too
G, D, opt_g, opt_d = script.build(size=128, ngf=4, ndf=2, num_residual=1)
ema = copy.deepcopy(G)
before = copy.deepcopy(G.state_dict())
real = torch.randn(4, 3, 128, 128)
eps2 = torch.randn(4, script.NC)
fake, kl = G(s0.detach(), eps2, t)

real_image = D.unconditional(D.features(real)).flatten()
fake_image = D.unconditional(D.features(fake.detach())).flatten()
expected = script.d_loss_stage2(D(real, t), D(real, t_wrong), D(fake.detach(), t),
                                real_image, fake_image)
losses = script.d_step(D, opt_d, real, fake, t, t_wrong)
assert_close(losses["loss_d"], expected)
expected = script.g_loss(D(fake, t)) + script.g_loss(D.unconditional(D.features(fake)))
assert_close(script.g_step(D, opt_g, fake, t, kl), expected)
"""

DFGAN = """
import dfgan as script
betas = (0.0, 0.9)

G, D, opt_g, opt_d = script.build(nf=2, size=64)
ema = copy.deepcopy(G)
before = copy.deepcopy(G.state_dict())
real = torch.randn(4, 3, 64, 64)
z = torch.randn(4, script.NZ)
t = torch.randn(4, script.TEXT_DIM)
t_wrong = t.roll(1, 0)
fake = G(z, t)

expected = script.hinge_loss(D(real, t), D(real, t_wrong), D(fake.detach(), t))
losses = script.d_step(D, opt_d, real, fake, t, t_wrong)
assert losses["ma_gp"] > 0
assert_close(losses["loss_d"], expected + losses["ma_gp"])
expected = script.g_loss(D(fake, t))
assert_close(script.g_step(D, opt_g, fake, t), expected)
"""


@pytest.mark.parametrize("name, lines", [
    ("gan_cls", GAN_CLS), ("stackgan", STACKGAN), ("dfgan", DFGAN)])
def test_script_alone(name, lines, tmp_path):
    """The command line, in the last line of AFTER, prints one line and ends with status 1."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = run("-c", BEFORE + lines + AFTER, cwd=tmp_path)
    assert done.stdout == "done\n", done.stderr
    assert done.stderr == "needs common.py, data.py and requirements.txt\n"
    assert done.returncode == 1
