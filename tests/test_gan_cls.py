"""gan_cls.py: networks against Figure 2 in plain functions, losses against loops, both steps."""
import math

import pytest
import torch
import torch.nn.functional as F

import gan_cls


def norm(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, training=True)


def plain_generator(G, z, t, upsample):
    """Figure 2, left: project the text, join it with z, five deconvolutions, four of them normed."""
    weight, bias, *p = G.parameters()
    x = torch.cat((z, F.leaky_relu(t @ weight.T + bias, 0.2)), 1)[:, :, None, None]
    x = F.relu(norm(F.conv_transpose2d(x, p[0]), *p[1:3]))
    for i in (3, 6, 9, 12):
        if upsample == "transposed":
            x = F.conv_transpose2d(x, p[i], stride=2, padding=1)
        else:
            x = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), p[i], padding=1)
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


@pytest.mark.parametrize("upsample, kernel", [("transposed", 16), ("nearest", 9)])
def test_number_of_parameters(upsample, kernel):
    nets = gan_cls.Generator(upsample=upsample), gan_cls.Discriminator(), gan_cls.StyleEncoder()
    text, up = 1024 * 128 + 128, 1024 * 512 + 512 * 256 + 256 * 128 + 128 * 3
    g = text + 228 * 1024 * 16 + kernel * up + 2 * (1024 + 512 + 256 + 128)
    image = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + 2 * (128 + 256 + 512)
    d = image + text + 2 * 128 + 640 * 512 + 2 * 512 + 512 * 16
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert counts == [g, d, image + 8192 * 100 + 100]
    assert nets[0].net[0].weight.std().item() == pytest.approx(0.02, rel=0.01)    # as released


def test_losses_against_loops():
    s = torch.randn(3, 9, dtype=torch.double) * 4
    log_d, log_not_d = s.sigmoid().log().tolist(), (1 - s.sigmoid()).log().tolist()
    loss = -sum(r + (w + f) / 2 for r, w, f in zip(log_d[0], log_not_d[1], log_not_d[2])) / 9
    assert gan_cls.d_loss(*s).item() == pytest.approx(loss, rel=1e-9)
    assert gan_cls.g_loss(s[2]).item() == pytest.approx(-math.fsum(log_d[2]) / 9, rel=1e-9)
    assert gan_cls.d_loss(*1e4 * s).isfinite()
    t = torch.arange(10.).view(5, 2)    # the last one has no partner
    assert gan_cls.interpolate_embeddings(t).tolist() == [[2, 3], [4, 5]]
    z = torch.randn(4, 100, dtype=torch.double)
    distance = sum((v - 0.25) ** 2 for row in z.tolist() for v in row) / 4
    assert gan_cls.style_loss(lambda x: 0 * z + x, z, 0.25).item() == pytest.approx(distance)


@pytest.mark.parametrize("upsample, wrong", [("transposed", True), ("nearest", False)])
def test_steps_are_those_of_adam_on_the_plain_networks(upsample, wrong):
    torch.manual_seed(0)
    G, D, opt_g, opt_d = gan_cls.build(4, 2, upsample)
    G, D = G.double(), D.double()
    weights_g, weights_d = list(G.parameters()), list(D.parameters())
    real, t, t_wrong, z = (torch.randn(5, *shape, dtype=torch.double)
                           for shape in ((3, 64, 64), (1024,), (1024,), (100,)))

    def check_step(step, loss, weights, others):
        """Adam's first step moves each weight by lr g / (|g| + 1e-8); other weights stay."""
        grads = torch.autograd.grad(loss, weights)
        moved = [w.detach() - 2e-4 * g / (g.abs() + 1e-8) for w, g in zip(weights, grads)]
        kept = [w.detach().clone() for w in others]
        result = step()
        torch.testing.assert_close(result[0] if result.ndim else result, loss.detach())
        torch.testing.assert_close([w.detach() for w in weights], moved, rtol=1e-9, atol=1e-9)
        assert all(map(torch.equal, kept, others)) and all(w.requires_grad for w in others)
        return result

    fake, plain = G(z, t), plain_generator(G, z, t, upsample)
    torch.testing.assert_close(fake, plain, rtol=1e-10, atol=1e-10)
    p_real, p_wrong, p_fake = (plain_discriminator(D, x, c).sigmoid() for x, c in (
        (real, t), (real, t_wrong), (plain.detach(), t)))
    p_wrong = p_wrong if wrong else p_fake
    loss = -(p_real.log() + ((1 - p_wrong).log() + (1 - p_fake).log()) / 2).mean()
    stats = check_step(lambda: gan_cls.d_step(D, opt_d, real, fake, t, t_wrong if wrong else None),
                       loss, weights_d, weights_g)
    torch.testing.assert_close(stats[1:], torch.stack((p_real, p_wrong, p_fake)).mean(1).detach())
    loss = -plain_discriminator(D, plain, t).sigmoid().log().mean()
    check_step(lambda: gan_cls.g_step(D, opt_g, fake, t), loss, weights_g, weights_d)
