"""stackgan.py: golden figures of the PyTorch release, losses, steps; each script on its own."""
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import stackgan
from conftest import ROOT, load_module, run, shared
from test_gan_cls import check_step

class ReleasedCA(stackgan.ConditioningAugmentation):
    """The PyTorch release has a ReLU before mu and log sigma^2."""
    def forward(self, t, eps):
        mu, log_variance = F.relu(self.fc(t)).chunk(2, 1)
        return mu + (log_variance / 2).exp() * eps, mu, log_variance / 2

def released(net, prefix, stage1=False):
    """Fill a network with golden weights of the released one, whose layers have the same order."""
    names = json.loads(shared("golden", "stackgan_released_names.json").read_text())[prefix]
    names = [name for name in names if name.startswith("STAGE1_G.") == stage1]
    net.text = torch.nn.Identity()    # the release gives mu to D
    if prefix.endswith("G"):
        net.ca = ReleasedCA()
    state = net.state_dict()
    fill = load_module(shared("golden", "golden_weights.py")).fill
    weights = fill(prefix, {name: v.shape for name, v in zip(names, state.values(), strict=True)})
    net.load_state_dict({key: weights.get(name, v) for name, (key, v) in zip(names, state.items())})
    return net

@pytest.mark.parametrize("dtype, rel", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_golden_figures(mode, dtype, rel):
    """Both stages and their D, within rel of the largest value of each figure."""
    golden = np.load(shared("golden", "stackgan.npz"))
    G1, inner, G2, D1, D2 = (released(*args).train(mode == "train").to(dtype) for args in (
        (stackgan.Stage1(16), "stage1_G"), (stackgan.Stage1(16), "stage2_G", True),
        (stackgan.Stage2(16, 256, 2), "stage2_G"), (stackgan.Discriminator(8, 64), "stage1_D"),
        (stackgan.Discriminator(8, 256), "stage2_D")))
    z, eps, t, x1, x2 = (torch.tensor(golden[name]).to(dtype) for name in (
        "noise", "eps", "text", "img64", "img256"))
    (fake, kl), (s0, _), h = G1(z, eps, t), inner(z, eps, t), D2.features(x2)
    _, mu, log_sigma = G1.ca(t, eps)
    ours = dict(stage1_fake=fake, mu=mu, logvar=2 * log_sigma, stage2_stage1_fake=s0,
                kl_mean=kl, D1_cond=D1(x1, mu).sigmoid(),
                stage2_fake_16x=G2(s0, eps, t)[0][..., ::16, ::16],
                D2_cond=D2.score(h, G2.ca(t, eps)[1]).sigmoid(),
                D2_uncond=D2.unconditional(h).flatten().sigmoid())
    for name, value in ours.items():
        theirs = torch.tensor(golden[f"{mode}_{name}"])
        assert (value - theirs).abs().max() <= rel * theirs.abs().max(), name

@pytest.mark.parametrize("stage, size, shape", [(1, 64, (100,)), (2, 128, (3, 64, 64))])
def test_steps_minimise_the_losses(stage, size, shape):
    """Stage-II scores images alone too: two scores of right and three of wrong images."""
    torch.manual_seed(0)
    G, D, opt_g, opt_d = stackgan.build(size, 4, 2, 1)
    G, D = G.double(), D.double()
    real, x, eps, t, t_wrong = (torch.randn(4, *s).double() for s in (
        (3, size, size), shape, (128,), (1024,), (1024,)))
    (fake, kl), (again, _), (c, mu, log_sigma) = G(x, eps, t), G(x, eps, t), G.ca(t, eps)
    hidden = F.leaky_relu(F.linear(t, *G.ca.fc.parameters()), 0.2)
    torch.testing.assert_close((mu, log_sigma), hidden.split(128, 1))
    torch.testing.assert_close(c, mu + log_sigma.exp() * eps)
    torch.testing.assert_close(D.text(t), F.leaky_relu(F.linear(t, *D.text[0].parameters()), 0.2))
    h, h_fake = D.features(real), D.features(again.detach())
    right, wrong = [D.score(h, t)], [D.score(h, t_wrong), D.score(h_fake, t)]
    probabilities = torch.stack((*right, *wrong)).sigmoid().mean(1).detach()
    if stage == 2:
        right.append(D.unconditional(h).flatten())
        wrong.append(D.unconditional(h_fake).flatten())
    loss = -F.logsigmoid(torch.stack(right)).mean() - F.logsigmoid(-torch.stack(wrong)).mean()
    stats = check_step(lambda: stackgan.d_step(D, opt_d, real, fake, t, t_wrong), loss, D, G)
    torch.testing.assert_close(stats[1:], probabilities)
    h = D.features(again)
    scores = [D.score(h, t)] if stage == 1 else [D.score(h, t), D.unconditional(h)]
    divergence = kl_divergence(Normal(mu, log_sigma.exp()), Normal(0.0, 1.0)).mean()
    loss = 2 * divergence - sum(F.logsigmoid(s).mean() for s in scores)
    check_step(lambda: stackgan.g_step(D, opt_g, fake, t, kl) + 2 * kl.detach(), loss, G, D)

def test_scripts_alone(tmp_path):
    """Both steps and update_ema need torch only. The command line prints a line."""
    for script in ("gan_cls", "stackgan", "dfgan"):
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    done = run("-c", """
import copy, runpy, sys
sys.modules.update(dict.fromkeys(["torchvision", "PIL", "common", "data"]))    # cannot be imported
import torch, dfgan, gan_cls, stackgan
for m, sizes, betas in ((dfgan, (2, 64), (0.0, 0.9)), (gan_cls, (4, 2), (0.5, 0.999)),
                        (stackgan, (64, 4, 2), (0.5, 0.999))):
    G, D, opt_g, opt_d = m.build(*sizes)
    z, eps, t = (torch.randn(4, n) for n in (m.NZ, 128, m.TEXT))
    fake, *kl = G(z, eps, t) if m is stackgan else [G(z, t)]
    real, ema, old = torch.randn(4, 3, 64, 64), copy.deepcopy(G), copy.deepcopy(G.state_dict())
    stats = m.d_step(D, opt_d, real, fake, t, t), m.g_step(D, opt_g, fake, t, *kl)
    assert all(x.isfinite().all() for x in stats)
    assert opt_g.defaults["betas"] == opt_d.defaults["betas"] == betas
    m.update_ema(ema, G, 0.7)
    for name, x in ema.state_dict().items():    # of integers: the counters of batch norm
        y = 0.7 * old[name] + 0.3 * G.state_dict()[name] if x.is_floating_point() else old[name]
        torch.testing.assert_close(x, y)
    try:
        runpy.run_module(m.__name__, run_name="__main__")
    except SystemExit as error:
        print(error)
""", cwd=tmp_path)
    line = "needs common.py, data.py and requirements.txt\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, 3 * line, "")
