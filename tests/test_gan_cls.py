"""gan_cls.py: networks, losses, steps and variants, each against a plain form of the paper."""
import argparse
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import gan_cls
from conftest import ROOT, check_step, equal

# ---- Networks


def batch_norm(x, weight, bias):
    """Normalise with the statistics of the batch, as in training."""
    return F.batch_norm(x, None, None, weight, bias, training=True)


def plain_generator(G, z, t, upsample):
    """Compute Figure 2, left: the projected text beside z, then five layers up to 64 x 64.

    Layer 0 of G.net makes 4 x 4. Then come, four times, a norm, a ReLU and a layer that doubles
    the sides."""
    p = dict(G.named_parameters())
    text = F.leaky_relu(F.linear(t, p["text.0.weight"], p["text.0.bias"]), 0.2)
    x = torch.cat((z, text), 1)[:, :, None, None]
    x = F.conv_transpose2d(x, p["net.0.weight"])
    for i in (1, 4, 7, 10):
        x = F.relu(batch_norm(x, p[f"net.{i}.weight"], p[f"net.{i}.bias"]))
        weight = p[f"net.{i + 2}.weight"]
        if upsample == "nearest":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = F.conv2d(x, weight, padding=1)
        else:
            x = F.conv_transpose2d(x, weight, stride=2, padding=1)
    return torch.tanh(x)


def plain_discriminator(D, x, t):
    """Compute the logits of Figure 2, right: four convolutions down to 4 x 4, the projected text
    beside each of the 16 positions, a 1x1 and a 4x4 convolution."""
    p = dict(D.named_parameters())
    x = F.leaky_relu(F.conv2d(x, p["image.0.weight"], stride=2, padding=1), 0.2)
    for i in (2, 5, 8):
        x = F.conv2d(x, p[f"image.{i}.weight"], stride=2, padding=1)
        x = batch_norm(x, p[f"image.{i + 1}.weight"], p[f"image.{i + 1}.bias"])
        x = F.leaky_relu(x, 0.2)

    text = F.linear(t, p["text.0.weight"], p["text.0.bias"])
    text = F.leaky_relu(batch_norm(text, p["text.1.weight"], p["text.1.bias"]), 0.2)
    text = text[:, :, None, None].repeat(1, 1, 4, 4)

    x = F.conv2d(torch.cat((x, text), 1), p["joint.0.weight"])
    x = F.leaky_relu(batch_norm(x, p["joint.1.weight"], p["joint.1.bias"]), 0.2)
    return F.conv2d(x, p["joint.3.weight"]).flatten()


def number_of_parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("upsample, kernel", [("transposed", 4 * 4), ("nearest", 3 * 3)])
def test_number_of_parameters_of_g(upsample, kernel):
    """The released widths are 1024, 512, 256 and 128 channels."""
    text = 1024 * 128 + 128
    first_layer = (100 + 128) * 1024 * 4 * 4
    other_layers = (1024 * 512 + 512 * 256 + 256 * 128 + 128 * 3) * kernel
    norms = 2 * (1024 + 512 + 256 + 128)
    G = gan_cls.Generator(upsample=upsample)
    assert number_of_parameters(G) == text + first_layer + other_layers + norms


def test_number_of_parameters_of_d_and_s():
    """The style encoder S has the image layers of D and a linear layer to z."""
    image_layers = (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) * 4 * 4
    image = image_layers + 2 * (128 + 256 + 512)
    text = 1024 * 128 + 128 + 2 * 128
    joint = (512 + 128) * 512 + 2 * 512 + 512 * 4 * 4
    assert number_of_parameters(gan_cls.Discriminator()) == image + text + joint
    to_noise = 512 * 4 * 4 * 100 + 100
    assert number_of_parameters(gan_cls.StyleEncoder()) == image + to_noise


def test_initialisation():
    """Convolutions start from N(0, 0.02), weights of batch norm from N(1, 0.02), as released."""
    torch.manual_seed(0)
    G = gan_cls.Generator()
    convolution = G.net[0].weight
    norm = G.net[1].weight
    assert convolution.mean().item() == pytest.approx(0, abs=1e-4)
    assert convolution.std().item() == pytest.approx(0.02, rel=0.01)
    assert norm.mean().item() == pytest.approx(1, abs=0.003)
    assert norm.std().item() == pytest.approx(0.02, rel=0.1)


def test_old_checkpoints_load():
    """The G of a checkpoint of before has the same names and shapes as today's."""
    paths = sorted((ROOT / "weights").glob("gan_cls-*.pt"))
    assert paths
    for path in paths:
        state = common.load_checkpoint(path, "gan_cls")
        G = gan_cls.Generator(state["args"]["ngf"], state["args"]["upsample"])
        G.load_state_dict(state["ema"], strict=True)


# ---- Losses


def test_d_loss_against_a_loop():
    """Algorithm 1, line 10, of probabilities."""
    scores = 4 * torch.randn(3, 9, dtype=torch.double)
    expected = 0
    for i in range(9):
        p_real, p_wrong, p_fake = scores[:, i].sigmoid().tolist()
        wrong_and_fake = (math.log(1 - p_wrong) + math.log(1 - p_fake)) / 2
        expected -= (math.log(p_real) + wrong_and_fake) / 9
    loss = gan_cls.d_loss(scores[0], scores[1], scores[2])
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_g_loss_against_a_loop():
    """Algorithm 1, line 12, of probabilities."""
    scores = 4 * torch.randn(9, dtype=torch.double)
    expected = -sum(math.log(p) for p in scores.sigmoid().tolist()) / 9
    assert gan_cls.g_loss(scores).item() == pytest.approx(expected, rel=1e-9)


def test_losses_of_large_scores():
    """A probability of 0 in float32 would make the logarithm infinite. -log sigmoid(-s) is s."""
    large = torch.full((2,), 1e4)
    assert gan_cls.d_loss(-large, large, large).item() == 2e4
    assert gan_cls.g_loss(-large).item() == 1e4


def test_interpolated_embeddings():
    """Each is the mean of two embeddings (eq. 5, beta = 1/2). The fifth has no partner."""
    t = torch.tensor([[0., 1.], [2., 3.], [4., 5.], [6., 7.], [8., 9.]])
    interpolated = gan_cls.interpolate_embeddings(t)
    assert interpolated.tolist() == [[2, 3], [4, 5]]


def test_style_loss():
    """The squared distances of this case are 5^2 and 1^2 (eq. 6)."""
    z = torch.tensor([[1., 1.], [0., 2.]])
    recovered = torch.tensor([[4., 5.], [0., 1.]])
    loss = gan_cls.style_loss(lambda fake: recovered, z, fake=None)
    assert loss.item() == (25 + 1) / 2


# ---- Steps


@pytest.mark.parametrize("text_dim", [1024, 512, 768])
@pytest.mark.parametrize("with_wrong", [True, False])
@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_steps_equal_adam_on_the_plain_networks(upsample, with_wrong, text_dim):
    """Both steps minimise the losses of Algorithm 1, of probabilities.

    Without wrong captions, D's loss is that of a plain GAN: -log D(x) - log(1 - D(G(z)))."""
    torch.manual_seed(0)
    G, D, opt_g, opt_d = gan_cls.build(ngf=4, ndf=2, upsample=upsample, text_dim=text_dim)
    G.double()
    D.double()
    real = torch.randn(5, 3, 64, 64).double()
    z = torch.randn(5, 100).double()
    t = torch.randn(5, text_dim).double()
    t_wrong = torch.randn(5, text_dim).double() if with_wrong else None

    # The forward of G
    fake = G(z, t)
    plain_fake = plain_generator(G, z, t, upsample)
    torch.testing.assert_close(fake, plain_fake, rtol=1e-10, atol=1e-10)

    # The step of D
    p_real = plain_discriminator(D, real, t).sigmoid()
    p_fake = plain_discriminator(D, plain_fake.detach(), t).sigmoid()
    p_wrong = plain_discriminator(D, real, t_wrong).sigmoid() if with_wrong else p_fake
    if with_wrong:
        loss = -(p_real.log() + ((1 - p_wrong).log() + (1 - p_fake).log()) / 2).mean()
    else:
        loss = -(p_real.log() + (1 - p_fake).log()).mean()
    losses = check_step(lambda: gan_cls.d_step(D, opt_d, real, fake, t, t_wrong), loss, D, G)
    torch.testing.assert_close(losses["d_real"], p_real.mean().detach())
    torch.testing.assert_close(losses["d_wrong"], p_wrong.mean().detach())
    torch.testing.assert_close(losses["d_fake"], p_fake.mean().detach())

    # The step of G, by the D that was just updated
    p_fake = plain_discriminator(D, plain_fake, t).sigmoid()
    loss = -p_fake.log().mean()
    d_gradients = [weight.grad.clone() for weight in D.parameters()]
    check_step(lambda: gan_cls.g_step(D, opt_g, fake, t), loss, G, D)

    # G's step must not waste time on gradients of D: those of D's step are still there
    assert equal([weight.grad for weight in D.parameters()], d_gradients)


# ---- Training


def train_tiny(home, monkeypatch, *flags):
    """Train narrow networks on the images of `home`, 22 for training. Write run/last.pt."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Ctrl-C still ends the tests
    encoder_path = home / "runs" / "char-cnn-rnn-own" / "encoder.pt"
    gan_cls.main(["--data", str(home / "own"), "--device", "cpu", "--out-dir", "run",
                  "--text-encoder", str(encoder_path), "--captions-per-image", "1",
                  "--ngf", "2", "--ndf", "2", *flags])


def test_learning_rate_halves_every_100_epochs(home, monkeypatch):
    """Here every 2 epochs. As released, epochs count from 1: the second is the first with half the
    rate."""
    g_step = gan_cls.g_step
    rates = []

    def recorded(D, opt_g, fake, t):
        rates.append(opt_g.param_groups[0]["lr"].item())
        return g_step(D, opt_g, fake, t)

    monkeypatch.setattr(gan_cls, "g_step", recorded)
    train_tiny(home, monkeypatch, "--epochs", "4", "--batch-size", "20", "--lr", "0.004",
               "--lr-decay-epochs", "2")
    assert rates == [0.004, 0.002, 0.002, 0.001]


def record_calls(monkeypatch, name):
    """Let a function of gan_cls.py keep the arguments of its calls. Return the list of them."""
    function = getattr(gan_cls, name)
    calls = []

    def recorded(*arguments):
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(gan_cls, name, recorded)
    return calls


@pytest.mark.parametrize("variant", ["gan", "cls", "int", "int-cls"])
def test_variants(variant, home, monkeypatch):
    """--variant decides which texts D and G see in a run of two steps.

    Every variant trains D on real captions and their images. Only "cls" gives D wrong captions,
    always of another class. Only "int" gives G interpolated embeddings, and D never trains on their
    images."""
    d_calls = record_calls(monkeypatch, "d_step")
    g_calls = record_calls(monkeypatch, "g_step")
    train_tiny(home, monkeypatch, "--variant", variant, "--epochs", "1", "--batch-size", "10")

    # The run has one embedding for each of these captions, two per class
    captions = ["a red picture", "it is red", "a green picture", "it is green",
                "a blue picture", "it is blue"]
    encoder = gan_cls.load_generator("run/last.pt")[1]
    known = encoder.encode(captions)

    def classes(t):
        """Return the class of each embedding (B, 1024), which must be one of a caption."""
        distances = torch.cdist(t, known)
        assert distances.amin(1).max() < 1e-3 * torch.pdist(known).min()
        return distances.argmin(1) // 2

    assert len(d_calls) == len(g_calls) == 2
    for d_call, g_call in zip(d_calls, g_calls):
        _, _, real, fake_d, t_d, t_wrong = d_call
        _, _, fake_g, t_g = g_call
        assert real.shape == (10, 3, 64, 64)
        # The images are of one colour: its largest channel is the class
        assert torch.equal(real.mean((2, 3)).argmax(1), classes(t_d))

        if "cls" in variant:
            assert (classes(t_wrong) != classes(t_d)).all()
        else:
            assert t_wrong is None

        assert torch.equal(t_g[:10], t_d)
        assert torch.equal(fake_d, fake_g[:10])
        if "int" in variant:
            assert torch.equal(t_g[10:], (t_d[:5] + t_d[5:]) / 2)
            assert len(fake_g) == 15
        else:
            assert len(fake_g) == len(t_g) == 10


# ---- Faster layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("height, width", [(4, 4), (8, 8), (9, 12)])
def test_nearest_up_conv_equals_its_plain_line(height, width, bias):
    """Forward and gradients equal those of a 3x3 convolution of the interpolated image."""
    layer = gan_cls.NearestUpConv(3, 5, 3, 1, 1, bias=bias).double()
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


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_export_with_a_dynamic_batch(upsample):
    """A program that torch.export made with a batch of 4 draws batches of other sizes."""
    G = gan_cls.Generator(ngf=2, upsample=upsample).eval()
    batch = torch.export.Dim("batch")
    example = (torch.randn(4, 100), torch.randn(4, 1024))
    program = torch.export.export(G, example, dynamic_shapes=({0: batch}, {0: batch}))
    for size in (2, 7):
        z = torch.randn(size, 100)
        t = torch.randn(size, 1024)
        torch.testing.assert_close(program.module()(z, t), G(z, t), rtol=0, atol=1e-6)


def test_generate_draws_at_most_64_images_at_once():
    """A large grid must fit into memory. The images equal those of one call of G."""
    G = gan_cls.Generator(ngf=2).eval()
    z = gan_cls.sample_noise(70)
    t = torch.randn(70, 1024)
    expected = G(z, t).detach()
    batch_sizes = []
    G.register_forward_pre_hook(lambda G, inputs: batch_sizes.append(len(inputs[0])))
    torch.testing.assert_close(gan_cls.generate(G, z, t), expected, rtol=0, atol=1e-6)
    assert batch_sizes == [64, 6]


def test_noise_is_standard_normal_and_depends_on_the_seed():
    z = gan_cls.sample_noise(2000, seed=1)
    assert z.shape == (2000, 100)
    assert z.mean().item() == pytest.approx(0, abs=0.01)
    assert z.std().item() == pytest.approx(1, abs=0.005)
    assert torch.equal(z, gan_cls.sample_noise(2000, seed=1))
    assert not torch.equal(z, gan_cls.sample_noise(2000, seed=2))


# ---- Style transfer


def test_a_folder_that_cannot_be_written_is_noticed_before_the_training_of_s(monkeypatch):
    Image.new("RGB", (64, 64), "red").save("photo.png")
    Path("file").write_text("")
    monkeypatch.setattr(gan_cls, "train_style_encoder", None)  # is not called
    args = argparse.Namespace(style_image="photo.png", captions=["a red flower"], device="cpu",
                              out_dir=Path("file/run"), ndf=2, seed=0, style_steps=1)
    with pytest.raises(data.UserError, match="cannot write to file/run"):
        gan_cls.style_transfer(gan_cls.Generator(ngf=2), None, args)


def test_style_encoder_is_kept_for_one_g_one_seed_and_one_number_of_steps(monkeypatch):
    """S learned to invert one G, so that its file must not serve another one."""
    Image.new("RGB", (64, 64), "red").save("photo.png")
    trainings = []
    monkeypatch.setattr(gan_cls, "train_style_encoder", lambda *_: trainings.append("trained"))
    G = gan_cls.Generator(ngf=2).eval()
    encoder = common.CharCNNRNN((4, 4, 4)).eval()
    args = argparse.Namespace(style_image="photo.png", captions=["a red flower"], device="cpu",
                              out_dir=Path("run"), ndf=2, seed=0, style_steps=1)

    gan_cls.style_transfer(G, encoder, args)
    gan_cls.style_transfer(G, encoder, args)
    assert len(trainings) == 1
    args.seed = 1
    gan_cls.style_transfer(G, encoder, args)
    assert len(trainings) == 2
    args.style_steps = 2
    gan_cls.style_transfer(G, encoder, args)
    assert len(trainings) == 3
    G.net[0].weight.data += 1
    gan_cls.style_transfer(G, encoder, args)
    assert len(trainings) == 4
