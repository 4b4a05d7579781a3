"""gan_cls.py: networks against Figure 2 in plain functions, losses against loops, both steps."""
import math

import pytest
import torch
import torch.nn.functional as F

import gan_cls

def norm(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, training=True)

def plain_generator(G, z, t, nearest):
    """Figure 2, left: the projected text and z, then five deconvolutions, four of them normed."""
    weight, bias, *p = G.parameters()
    x = torch.cat((z, F.leaky_relu(t @ weight.T + bias, 0.2)), 1)[:, :, None, None]
    x = F.relu(norm(F.conv_transpose2d(x, p[0]), *p[1:3]))
    for i in (3, 6, 9, 12):
        big = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = F.conv2d(big, p[i], None, 1, 1) if nearest else F.conv_transpose2d(x, p[i], None, 2, 1)
        x = torch.tanh(x) if i == 12 else F.relu(norm(x, *p[i + 1:i + 3]))
    return x

def plain_discriminator(D, x, t):
    """Figure 2, right: four convolutions down to 4x4, the text beside them, a 1x1, a 4x4."""
    p = list(D.parameters())
    x = F.leaky_relu(F.conv2d(x, p[0], stride=2, padding=1), 0.2)
    for i in (1, 4, 7):
        x = F.leaky_relu(norm(F.conv2d(x, p[i], stride=2, padding=1), *p[i + 1:i + 3]), 0.2)
    t = F.leaky_relu(norm(t @ p[10].T + p[11], *p[12:14]), 0.2)
    x = torch.cat((x, t[:, :, None, None].repeat(1, 1, 4, 4)), 1)
    return F.conv2d(F.leaky_relu(norm(F.conv2d(x, p[14]), *p[15:17]), 0.2), p[17]).flatten()

def check_step(step, loss, net, other, lr=2e-4, rtol=1e-7):
    """Adam's first step moves each weight of net by lr g / (|g| + 1e-8); those of other stay."""
    weights, others = list(net.parameters()), list(other.parameters())
    grads = torch.autograd.grad(loss, weights)
    before, kept = ([w.detach().clone() for w in ws] for ws in (weights, others))
    result = step()
    torch.testing.assert_close([w.grad for w in weights], [*grads], rtol=rtol, atol=1e-9)
    moved = [w - lr * p.grad / (p.grad.abs() + 1e-8) for w, p in zip(before, weights)]
    torch.testing.assert_close([w.detach() for w in weights], moved, rtol=0, atol=1e-12)
    assert all(map(torch.equal, kept, others)) and all(w.requires_grad for w in others)
    torch.testing.assert_close(result.flatten()[0], loss.detach(), rtol=1e-6, atol=0)
    return result

@pytest.mark.parametrize("upsample, kernel", [("transposed", 16), ("nearest", 9)])
def test_number_of_parameters(upsample, kernel):
    nets = gan_cls.Generator(upsample=upsample), gan_cls.Discriminator(), gan_cls.StyleEncoder()
    text, up = 1024 * 128 + 128, 1024 * 512 + 512 * 256 + 256 * 128 + 128 * 3
    g = text + 228 * 1024 * 16 + kernel * up + 2 * (1024 + 512 + 256 + 128)
    image = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + 2 * (128 + 256 + 512)
    d, s = image + text + 2 * 128 + 640 * 512 + 2 * 512 + 512 * 16, image + 8192 * 100 + 100
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [g, d, s]
    assert nets[0].net[0].weight.std().item() == pytest.approx(0.02, rel=0.01)    # as released

def test_losses_against_loops():
    s = torch.randn(3, 9, dtype=torch.double) * 4
    p = s.sigmoid().tolist()
    loss = sum(-math.log(r) - (math.log(1 - w) + math.log(1 - f)) / 2 for r, w, f in zip(*p)) / 9
    assert gan_cls.d_loss(*s).item() == pytest.approx(loss, rel=1e-9)
    assert gan_cls.g_loss(s[2]).item() == pytest.approx(-sum(map(math.log, p[2])) / 9, rel=1e-9)
    assert gan_cls.d_loss(*1e4 * s).isfinite()
    t = torch.arange(10.).view(5, 2)    # the last row has no partner
    assert gan_cls.interpolate_embeddings(t).tolist() == [[2, 3], [4, 5]]
    assert gan_cls.style_loss(lambda x: x + 0 * t, t, 2) == sum(v * v for v in range(-2, 8)) / 5

@pytest.mark.parametrize("upsample, wrong", [("transposed", True), ("nearest", False)])
def test_steps_are_those_of_adam_on_the_plain_networks(upsample, wrong):
    """Without wrong captions the loss of D is that of a plain GAN."""
    torch.manual_seed(0)
    G, D, opt_g, opt_d = gan_cls.build(4, 2, upsample)
    real, z = torch.randn(5, 3, 64, 64).double(), torch.randn(5, 100).double()
    t, t_wrong = (torch.randn(5, 1024).double() if used else None for used in (True, wrong))
    fake, plain = G.double()(z, t), plain_generator(G, z, t, upsample == "nearest")
    torch.testing.assert_close(fake, plain, rtol=1e-10, atol=1e-10)
    p_real, p_fake = (plain_discriminator(D.double(), x, t).sigmoid() for x in (real, fake.data))
    p_wrong = plain_discriminator(D, real, t_wrong).sigmoid() if wrong else p_fake
    loss = -(p_real.log() + ((1 - p_wrong).log() + (1 - p_fake).log()) / 2).mean()
    stats = check_step(lambda: gan_cls.d_step(D, opt_d, real, fake, t, t_wrong), loss, D, G)
    torch.testing.assert_close(stats[1:], torch.stack((p_real, p_wrong, p_fake)).mean(1).detach())
    loss = -plain_discriminator(D, plain, t).sigmoid().log().mean()
    check_step(lambda: gan_cls.g_step(D, opt_g, fake, t), loss, G, D)
