"""stackgan.py: golden figures of the PyTorch release, parameter names, losses, steps, stages."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

import common
import stackgan
from conftest import GOLDEN, ROOT, check_step, equal, load_module

# ---- The released code

golden_weights = load_module(GOLDEN / "golden_weights.py")


class ReleasedConditioningAugmentation(stackgan.ConditioningAugmentation):
    """The PyTorch release has a ReLU before mu and log sigma^2. We have the leaky ReLU of the
    TensorFlow release before mu and log sigma."""

    def forward(self, t, eps):
        mu, log_variance = F.relu(self.fc(t)).chunk(2, 1)
        sigma = (log_variance / 2).exp()
        return mu + sigma * eps, mu, log_variance / 2


def released_shapes(network, inner=False):
    """Return {name: shape} of a released network. The released Stage-II contains a Stage-I, which
    `inner` chooses."""
    networks = json.loads((GOLDEN / "stackgan_released_names.json").read_text())
    return {name: shape for name, shape in networks[network].items()
            if name.startswith("STAGE1_G.") == inner}


def fill_as_released(net, network, inner=False):
    """Give a network the text layers of the PyTorch release and the weights of the golden figures.

    Its parameters have other names than the released ones, but the same order."""
    net.text = nn.Identity()  # the release gives mu of G to D
    if network.endswith("G"):
        net.ca = ReleasedConditioningAugmentation()
    names = list(released_shapes(network, inner))
    state = net.state_dict()
    assert len(names) == len(state)
    shapes = {name: value.shape for name, value in zip(names, state.values())}
    weights = golden_weights.fill(network, shapes)
    for name, our_name in zip(names, state):
        if name in weights:  # counters of batch norm are not
            state[our_name] = weights[name]
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_golden_figures(mode, dtype, rtol):
    """Every figure of both stages and their D, within rtol of its largest value."""
    figures = dict(np.load(GOLDEN / "stackgan.npz"))
    inputs = {name: torch.tensor(value).to(dtype)
              for name, value in golden_weights.stackgan_inputs().items()}
    z = inputs["noise"]
    eps = inputs["eps"]
    t = inputs["text"]
    G1 = fill_as_released(stackgan.Stage1(16), "stage1_G")
    G2 = fill_as_released(stackgan.Stage2(16, 256, num_residual=2), "stage2_G")
    inner_G1 = fill_as_released(stackgan.Stage1(16), "stage2_G", inner=True)
    D1 = fill_as_released(stackgan.Discriminator(8, 64), "stage1_D")
    D2 = fill_as_released(stackgan.Discriminator(8, 256), "stage2_D")
    for net in (G1, G2, inner_G1, D1, D2):
        net.to(dtype).train(mode == "train")
    ours = {}

    # Stage-I
    fake, kl = G1(z, eps, t)
    _, mu, log_sigma = G1.ca(t, eps)
    ours["stage1_fake_3x"] = fake[..., ::3, ::3]
    ours["kl_mean"] = kl
    ours["mu"] = mu
    ours["logvar"] = 2 * log_sigma
    ours["D1_cond"] = D1(inputs["img64"], mu).sigmoid()

    # Stage-II, with a Stage-I of its own
    s0, _ = inner_G1(z, eps, t)
    fake, _ = G2(s0, eps, t)
    _, mu, _ = G2.ca(t, eps)
    features = D2.features(inputs["img256"])
    ours["stage2_stage1_fake_3x"] = s0[..., ::3, ::3]
    ours["stage2_fake_16x"] = fake[..., ::16, ::16]
    ours["D2_cond"] = D2.score(features, mu).sigmoid()
    ours["D2_uncond"] = D2.unconditional(features).flatten().sigmoid()

    assert {f"{mode}_{name}" for name in ours} == {n for n in figures if n.startswith(mode)}
    for name, value in ours.items():
        figure = torch.tensor(figures[f"{mode}_{name}"])
        assert value.shape == figure.shape, name
        assert (value - figure).abs().max() <= rtol * figure.abs().max(), name


# Each released network of COCO (ngf 192, ndf 96, 2 residual blocks), whether it is the Stage-I
# inside of Stage-II, and ours. The device meta has shapes, but no values.
with torch.device("meta"):
    OUR_NETWORKS = [
        ("stage1_G", False, stackgan.Stage1(192)),
        ("stage2_G", True, stackgan.Stage1(192)),
        ("stage2_G", False, stackgan.Stage2(192, 256, num_residual=2)),
        ("stage1_D", False, stackgan.Discriminator(96, 64)),
        ("stage2_D", False, stackgan.Discriminator(96, 256))]


@pytest.mark.parametrize("network, inner, net", OUR_NETWORKS)
def test_shapes_of_released_networks(network, inner, net):
    """Our networks have the released parameters in the same order, and D a text layer more."""
    ours = [list(value.shape) for name, value in net.state_dict().items()
            if not name.startswith("text.")]
    assert ours == list(released_shapes(network, inner).values())


# ---- Names of the parameters


def names_and_shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def test_old_checkpoints_load():
    """Both stages of a checkpoint of before have the same names and shapes as today's."""
    paths = sorted((ROOT / "weights").glob("stackgan-*.pt"))
    assert paths
    for path in paths:
        state = common.load_checkpoint(path, "stackgan")
        args = state["args"]
        G1 = stackgan.Stage1(args["ngf"])
        G2 = stackgan.Stage2(args["ngf"], args["size"], args["num_residual"])
        assert names_and_shapes(G1.state_dict()) == names_and_shapes(state["G0"])
        assert names_and_shapes(G2.state_dict()) == names_and_shapes(state["ema"])
        G1.load_state_dict(state["G0"], strict=True)
        G2.load_state_dict(state["ema"], strict=True)


# The image layers of D and their numbers in checkpoints: from the second convolution on, each is
# followed by its norm. Entries: number, channels in, channels out (both times ndf), kernel.
STAGE1_LAYERS = [(2, 1, 2, 4), (5, 2, 4, 4), (8, 4, 8, 4)]
STAGE2_128PX_LAYERS = STAGE1_LAYERS + [(11, 8, 16, 4), (14, 16, 8, 3)]
STAGE2_256PX_LAYERS = STAGE1_LAYERS + [(11, 8, 16, 4), (14, 16, 32, 4), (17, 32, 16, 3),
                                       (20, 16, 8, 3)]


@pytest.mark.parametrize("size, layers", [
    (64, STAGE1_LAYERS), (128, STAGE2_128PX_LAYERS), (256, STAGE2_256PX_LAYERS)])
def test_names_and_shapes_of_d(size, layers):
    """They are those of the checkpoints of runs, which must go on."""
    expected = {"image.0.weight": (2, 3, 4, 4)}
    for number, channels_in, channels_out, kernel in layers:
        shape = (2 * channels_out, 2 * channels_in, kernel, kernel)
        expected[f"image.{number}.weight"] = shape
        expected[f"image.{number + 1}.weight"] = (2 * channels_out,)
        expected[f"image.{number + 1}.bias"] = (2 * channels_out,)
    expected["joint.0.weight"] = (16, 16 + 128, 3, 3)
    expected["joint.1.weight"] = (16,)
    expected["joint.1.bias"] = (16,)
    expected["joint.3.weight"] = (1, 16, 4, 4)
    expected["joint.3.bias"] = (1,)
    expected["text.0.weight"] = (128, 1024)
    expected["text.0.bias"] = (128,)
    if size > 64:
        expected["unconditional.weight"] = (1, 16, 4, 4)
        expected["unconditional.bias"] = (1,)
    D = stackgan.Discriminator(ndf=2, size=size)
    assert names_and_shapes(dict(D.named_parameters())) == expected


def test_initialisation():
    """Weights start from N(0, 0.02), those of batch norm from N(1, 0.02), biases from 0."""
    torch.manual_seed(0)
    G = stackgan.Stage1(32)
    convolution = G.up[0].conv.weight
    norm = G.fc[1].weight
    assert convolution.mean().item() == pytest.approx(0, abs=1e-4)
    assert convolution.std().item() == pytest.approx(0.02, rel=0.01)
    assert norm.mean().item() == pytest.approx(1, abs=0.002)
    assert norm.std().item() == pytest.approx(0.02, rel=0.05)
    assert not G.ca.fc.bias.any()


# ---- Text layers


def test_conditioning_augmentation():
    """c = mu + sigma eps, where mu and log sigma are a leaky ReLU of a linear layer of t."""
    ca = stackgan.ConditioningAugmentation().double()
    t = torch.randn(4, 1024).double()
    eps = torch.randn(4, 128).double()
    hidden = F.leaky_relu(t @ ca.fc.weight.T + ca.fc.bias, 0.2)
    c, mu, log_sigma = ca(t, eps)
    torch.testing.assert_close(mu, hidden[:, :128])
    torch.testing.assert_close(log_sigma, hidden[:, 128:])
    torch.testing.assert_close(c, mu + log_sigma.exp() * eps)


def test_text_layer_of_d():
    """D projects t by a linear layer and a leaky ReLU, as in the TensorFlow release."""
    D = stackgan.Discriminator(ndf=2).double()
    t = torch.randn(4, 1024).double()
    layer = D.text[0]
    expected = F.leaky_relu(t @ layer.weight.T + layer.bias, 0.2)
    torch.testing.assert_close(D.text(t), expected)


# ---- Losses


def random_scores():
    return 4 * torch.randn(9, dtype=torch.double)


def probability(score):
    return 1 / (1 + math.exp(-score))


def right_losses(scores):
    """Return -log D of each score, the loss of what D should call real."""
    return [-math.log(probability(score)) for score in scores.tolist()]


def wrong_losses(scores):
    """Return -log(1 - D) of each score, the loss of what D should call wrong or fake."""
    return [-math.log(1 - probability(score)) for score in scores.tolist()]


def mean(values):
    return sum(values) / len(values)


def test_d_loss_of_stage1_against_a_loop():
    """Equation 3 with the wrong pairs of GAN-CLS."""
    real = random_scores()
    wrong = random_scores()
    fake = random_scores()
    expected = mean(right_losses(real))
    expected += (mean(wrong_losses(wrong)) + mean(wrong_losses(fake))) / 2
    assert stackgan.d_loss(real, wrong, fake).item() == pytest.approx(expected, rel=1e-9)


def test_d_loss_of_stage2_against_a_loop():
    """The released loss: one mean over real pairs and real images, and one mean over wrong pairs,
    fake pairs and fake images."""
    real = random_scores()
    wrong = random_scores()
    fake = random_scores()
    real_image = random_scores()
    fake_image = random_scores()
    expected = mean(right_losses(real) + right_losses(real_image))
    expected += mean(wrong_losses(wrong) + wrong_losses(fake) + wrong_losses(fake_image))
    loss = stackgan.d_loss_stage2(real, wrong, fake, real_image, fake_image)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_g_loss_against_a_loop():
    """Equations 4 and 6, non-saturating form."""
    fake = random_scores()
    assert stackgan.g_loss(fake).item() == pytest.approx(mean(right_losses(fake)), rel=1e-9)


def test_losses_of_large_scores():
    """A probability of 0 in float32 would make the logarithm infinite. -log sigmoid(-s) is s."""
    large = torch.full((2,), 1e4)
    assert stackgan.d_loss(-large, large, large).item() == 2e4
    assert stackgan.d_loss_stage2(-large, large, large, -large, large).item() == 2e4
    assert stackgan.g_loss(-large).item() == 1e4


def test_kl_loss():
    """Equation 2, as the mean over the dimensions."""
    mu = torch.randn(4, 128).double()
    log_sigma = torch.randn(4, 128).double()
    expected = kl_divergence(Normal(mu, log_sigma.exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(stackgan.kl_loss(mu, log_sigma), expected)


# ---- Steps


@pytest.mark.parametrize("text_dim", [1024, 512, 768])
@pytest.mark.parametrize("stage, size", [(1, 64), (2, 128)])
def test_steps_equal_adam_on_the_plain_losses(stage, size, text_dim):
    """D of Stage-I scores pairs. D of Stage-II scores images alone too."""
    torch.manual_seed(0)
    G, D, opt_g, opt_d = stackgan.build(size, ngf=4, ndf=2, num_residual=1, text_dim=text_dim)
    G.double()
    D.double()
    real = torch.randn(4, 3, size, size).double()
    z_or_s0 = torch.randn(4, 100) if stage == 1 else torch.randn(4, 3, 64, 64)
    z_or_s0 = z_or_s0.double()
    eps = torch.randn(4, 128).double()
    t = torch.randn(4, text_dim).double()
    t_wrong = torch.randn(4, text_dim).double()
    fake, kl = G(z_or_s0, eps, t)
    plain_fake, _ = G(z_or_s0, eps, t)

    # The step of D
    features = D.features(real)
    fake_features = D.features(plain_fake.detach())
    real_score = D.score(features, t)
    wrong_score = D.score(features, t_wrong)
    fake_score = D.score(fake_features, t)
    if stage == 1:
        loss = -F.logsigmoid(real_score).mean()
        loss = loss - F.logsigmoid(-wrong_score).mean() / 2 - F.logsigmoid(-fake_score).mean() / 2
    else:
        real_image_score = D.unconditional(features).flatten()
        fake_image_score = D.unconditional(fake_features).flatten()
        right = torch.stack((real_score, real_image_score))
        wrong = torch.stack((wrong_score, fake_score, fake_image_score))
        loss = -F.logsigmoid(right).mean() - F.logsigmoid(-wrong).mean()
    losses = check_step(lambda: stackgan.d_step(D, opt_d, real, fake, t, t_wrong), loss, D, G)
    torch.testing.assert_close(losses["d_real"], real_score.sigmoid().mean().detach())
    torch.testing.assert_close(losses["d_wrong"], wrong_score.sigmoid().mean().detach())
    torch.testing.assert_close(losses["d_fake"], fake_score.sigmoid().mean().detach())

    # The step of G, by the D that was just updated. The KL divergence counts twice
    features = D.features(plain_fake)
    adversarial_loss = -F.logsigmoid(D.score(features, t)).mean()
    if stage == 2:
        adversarial_loss = adversarial_loss - F.logsigmoid(D.unconditional(features)).mean()
    _, mu, log_sigma = G.ca(t, eps)
    divergence = kl_divergence(Normal(mu, log_sigma.exp()), Normal(0.0, 1.0)).mean()
    loss = adversarial_loss + 2 * divergence

    def step():
        """Update G. Add its second loss, which g_step does not return."""
        return stackgan.g_step(D, opt_g, fake, t, kl) + 2 * kl.detach()

    d_gradients = [weight.grad.clone() for weight in D.parameters()]
    check_step(step, loss, G, D)

    # G's step must not waste time on gradients of D: those of D's step are still there
    assert equal([weight.grad for weight in D.parameters()], d_gradients)


# ---- Training


def test_learning_rate_halves_every_100_epochs(home, monkeypatch):
    """Here every 2 epochs (section 3.5)."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Ctrl-C still ends the tests
    g_step = stackgan.g_step
    rates = []

    def recorded(D, opt_g, fake, t, kl):
        rates.append(opt_g.param_groups[0]["lr"].item())
        return g_step(D, opt_g, fake, t, kl)

    monkeypatch.setattr(stackgan, "g_step", recorded)
    encoder_path = home / "runs" / "char-cnn-rnn-own" / "encoder.pt"
    stackgan.main(["--data", str(home / "own"), "--device", "cpu", "--out-dir", "run",
                   "--text-encoder", str(encoder_path), "--captions-per-image", "1", "--stage", "1",
                   "--ngf", "2", "--ndf", "2", "--epochs", "4", "--batch-size", "20",
                   "--lr", "0.004", "--lr-decay-epochs", "2"])
    assert rates == [0.004, 0.004, 0.002, 0.002]


# ---- Faster layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("height, width", [(4, 4), (8, 8), (9, 12)])
def test_nearest_up_conv_equals_its_plain_line(height, width, bias):
    """Forward and gradients equal those of a 3x3 convolution of the interpolated image."""
    layer = stackgan.NearestUpConv(3, 5, 3, 1, 1, bias=bias).double()
    x = torch.randn(2, 3, height, width, dtype=torch.double, requires_grad=True)
    output = layer(x)
    plain = F.conv2d(F.interpolate(x, scale_factor=2.0), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(output, plain)

    variables = [x, *layer.parameters()]
    output_gradient = torch.randn_like(plain)
    gradients = torch.autograd.grad(output, variables, output_gradient)
    plain_gradients = torch.autograd.grad(plain, variables, output_gradient)
    torch.testing.assert_close(gradients, plain_gradients)


# ---- Sampling


@pytest.mark.parametrize("stage", [1, 2])
def test_export_with_a_dynamic_batch(stage):
    """A program that torch.export made with a batch of 4 draws batches of other sizes."""
    if stage == 1:
        G = stackgan.Stage1(ngf=2).eval()
    else:
        G = stackgan.Stage2(ngf=4, size=128, num_residual=1).eval()

    def draw_inputs(size):
        """Return z or s0, eps and t."""
        z_or_s0 = torch.randn(size, 100) if stage == 1 else torch.randn(size, 3, 64, 64)
        return z_or_s0, torch.randn(size, 128), torch.randn(size, 1024)

    batch = torch.export.Dim("batch")
    dynamic_shapes = ({0: batch}, {0: batch}, {0: batch})
    program = torch.export.export(G, draw_inputs(4), dynamic_shapes=dynamic_shapes)
    for size in (2, 7):
        inputs = draw_inputs(size)
        images, kl = program.module()(*inputs)
        expected_images, expected_kl = G(*inputs)
        torch.testing.assert_close(images, expected_images, rtol=0, atol=1e-6)
        torch.testing.assert_close(kl, expected_kl)


def test_generate_draws_at_most_64_images_at_once():
    """A large grid must fit into memory. Columns 0 to 99 of the noise are z, 100 to 227 are eps1 of
    Stage-I, 228 to 355 are eps2 of Stage-II."""
    G1 = stackgan.Stage1(ngf=2).eval()
    G2 = stackgan.Stage2(ngf=4, size=128, num_residual=1).eval()
    noise = stackgan.sample_noise(70)
    t = torch.randn(70, 1024)
    with torch.no_grad():
        stage1_images, _ = G1(noise[:, :100], noise[:, 100:228], t)
        stage2_images, _ = G2(stage1_images, noise[:, 228:], t)
    batch_sizes = []
    G1.register_forward_pre_hook(lambda G, inputs: batch_sizes.append(len(inputs[0])))
    images = stackgan.generate([G1], noise, t)
    torch.testing.assert_close(images, stage1_images, rtol=0, atol=1e-6)
    images = stackgan.generate([G1, G2], noise, t)
    torch.testing.assert_close(images, stage2_images, rtol=0, atol=1e-6)
    assert batch_sizes == [64, 6, 64, 6]


def test_noise_is_standard_normal_and_depends_on_the_seed():
    noise = stackgan.sample_noise(2000, seed=1)
    assert noise.shape == (2000, 100 + 128 + 128)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.005)
    assert torch.equal(noise, stackgan.sample_noise(2000, seed=1))
    assert not torch.equal(noise, stackgan.sample_noise(2000, seed=2))
