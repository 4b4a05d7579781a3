"""dfgan.py: golden figures of the released code, its checkpoints, losses, double backward."""
import argparse
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import dfgan
from conftest import equal, load_module, shared
from test_gan_cls import check_step

def test_golden_forward_losses_gradients_and_one_update():
    """Figures of the released code in float64, nf 8 and 64 px, with its weights in our networks."""
    figures = dict(np.load(shared("golden", "dfgan_64.npz")))
    fill = load_module(shared("golden", "golden_weights.py")).fill
    G, D, opt_g, opt_d = dfgan.build(8, 64)
    for net in (G.double(), D.double()):
        for name, p in net.named_parameters():
            part = "netG" if net is G else "netC" if name.startswith("joint_conv") else "netD"
            p.data.copy_(fill(part, {name: p.shape})[name])
    x, e, z = (torch.tensor(figures[name]).double() for name in ("images", "sentences", "noise"))

    fake, h = G(z, e), D.features(x.requires_grad_())
    real, wrong = D.score(h, e.requires_grad_()), D.score(h, e.roll(1, 0))
    grads = torch.autograd.grad(real.sum(), (x, e))
    sure = torch.full_like(real, 1e9)    # scores without loss
    ours = dict(fake=fake, features=h, logits=real,
                grad_norm=torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1),
                loss_real=dfgan.hinge_loss(real, -sure, -sure),
                loss_mismatch=2 * dfgan.hinge_loss(sure, wrong, -sure),
                loss_fake=2 * dfgan.hinge_loss(sure, -sure, D(fake, e)))
    stats = dfgan.d_step(D, opt_d, x, fake, e, e.roll(1, 0))
    ours |= dict(loss_D=stats[0], loss_magp=stats[4], loss_G=dfgan.g_step(D, opt_g, fake, e))
    for name, net in (("grad_D_norm", D), ("grad_G_norm", G)):
        ours[name] = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    ours["grad_D.conv_img.weight"] = D.conv_img.weight.grad
    ours["grad_C.joint_conv.0.weight.mean"] = D.joint_conv[0].weight.grad.mean()
    ours |= dict(fake_after_step=G(z, e), logits_after_step=D(x, e))
    for name, value in ours.items():
        value, figure = value.detach().flatten(), torch.tensor(figures[name]).flatten()
        assert (value - figure).abs().max() <= 1e-5 * figure.abs().max(), name

def test_names_and_shapes_of_released_checkpoints():
    released = json.loads(shared("golden", "dfgan_released_names.json").read_text())
    G, D = ({name: list(value.shape) for name, value in net.state_dict().items()}
            for net in (dfgan.Generator(), dfgan.Discriminator()))
    assert G == released["netG"]
    assert D == {name: shape for name, shape in (released["netD"] | released["netC"]).items()
                 if "conv_s" not in name or name[8] not in "345"}    # those are unused

def test_load_released():
    """The file has prefixes and a layer that the release does not use."""
    G, D = dfgan.Generator(2, 64), dfgan.Discriminator(2, 64)
    nets = {"netG": G.state_dict(), "netC": {}, "netD": {"DBlocks.3.conv_s.bias": torch.ones(16)}}
    for name, value in D.state_dict().items():
        nets["netC" if name.startswith("joint_conv") else "netD"][name] = value
    nets = {net: {f"module.{name}": value for name, value in nets[net].items()} for net in nets}
    torch.save({"model": nets, "optimizers": {}, "epoch": 9}, "state_epoch_009.pth")
    encoder = common.DAMSMTextEncoder(["<end>", "flower"])
    torch.save({"text_encoder": encoder.state_dict()}, "encoder.pt")
    state = dfgan.load_released(argparse.Namespace(
        nf=2, size=64, init="state_epoch_009.pth", text_encoder="encoder.pt"))
    assert equal(state["D"], D.state_dict()) and equal(state["G"], G.state_dict())
    z, e = torch.randn(2, 100), torch.randn(2, 256)
    torch.testing.assert_close(dfgan.load_generator(state)[0](z, e), G(z, e))
    assert equal(state["text_encoder"], encoder.state_dict())

def test_losses_against_loops():
    s = torch.randn(3, 9).double() * 2
    loss = sum(max(0, 1 - r) + (max(0, 1 + w) + max(0, 1 + f)) / 2 for r, w, f in s.T.tolist()) / 9
    assert dfgan.hinge_loss(*s).item() == pytest.approx(loss, rel=1e-12)
    assert dfgan.g_loss(s[2]).item() == pytest.approx(-sum(s[2].tolist()) / 9, rel=1e-12)
    x, e = torch.randn(4, 3, 8, 8) / 14, torch.randn(4, 256) / 16
    loss = 2 * sum(sum(v * v for v in g) ** 3 for g in torch.cat((x.flatten(1), e), 1).tolist()) / 4
    assert dfgan.ma_gp(x, e).item() == pytest.approx(loss, rel=1e-5)
    zero = torch.zeros(2, 3, 8, 8, requires_grad=True)
    dfgan.ma_gp(zero, torch.zeros(2, 256)).backward()
    assert zero.grad.isfinite().all()

def test_steps_and_double_backward():
    """Against torch.autograd.grad, and along random directions against finite differences."""
    torch.manual_seed(0)
    G, D, opt_g, opt_d = dfgan.build(1, 32)
    for p in D.double().parameters():
        p.data.mul_(2) if p.ndim > 1 else p.data.fill_(0.6)    # gamma, 0 at first, too
    real, z, e = (torch.randn(3, *shape).double() for shape in ((3, 32, 32), (100,), (256,)))

    def plain():
        x, t = real.clone().requires_grad_(), e.clone().requires_grad_()
        s_real, s_wrong, s_fake = D(x, t), D(real, e.roll(1, 0)), D(fake.detach(), e)
        grads = torch.autograd.grad(s_real.sum(), (x, t), create_graph=True)
        hinge = F.relu(1 - s_real) + F.relu(1 + s_wrong) / 2 + F.relu(1 + s_fake) / 2
        return (hinge + 2 * sum(g.square().flatten(1).sum(1) for g in grads) ** 3).mean()

    fake, again, weights = G.double()(z, e), G(z, e), list(D.parameters())
    grads = torch.autograd.grad(dfgan.d_loss(D, real, fake.detach(), e, e.roll(1, 0))[0], weights)
    for _ in range(3):
        direction, values = [torch.randn_like(w) * w.abs().mean() for w in weights], []
        for distance in (1e-6, -2e-6, 1e-6):    # to both sides, and back
            torch._foreach_add_([w.data for w in weights], direction, alpha=distance)
            values.append(plain().item())
        slope = sum((g * v).sum().item() for g, v in zip(grads, direction))
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)
    check_step(lambda: dfgan.d_step(D, opt_d, real, fake, e, e.roll(1, 0)),
               plain(), D, G, 4e-4, 1e-4)    # MA-GP is in float32
    check_step(lambda: dfgan.g_step(D, opt_g, fake, e), -D(again, e).mean(), G, D, 1e-4)

def test_noise_and_sizes():
    assert dfgan.sample_noise(2000).std().item() == pytest.approx(1, abs=0.005)
    for size in (16, 48, 1024):
        with pytest.raises(ValueError):
            dfgan.Generator(2, size)
