"""dfgan.py: golden figures of the released code, its checkpoints, losses, steps, MA-GP."""
import argparse
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import data
import dfgan
from conftest import GOLDEN, ROOT, check_step, equal, load_module

# ---- The released code


def fill_as_released(net, released_part):
    """Give a network the weights of the golden figures.

    released_part(name) tells which of the three released networks has a parameter."""
    fill = load_module(GOLDEN / "golden_weights.py").fill
    for name, parameter in net.named_parameters():
        value = fill(released_part(name), {name: parameter.shape})[name]
        parameter.data.copy_(value)


def part_of_d(name):
    """Return which released network has a parameter of our D: image layers or the joint ones."""
    return "netC" if name.startswith("joint_conv") else "netD"


def gradient_norm(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()]).norm()


def test_golden_forward_losses_gradients_and_one_update():
    """Every figure of the released code (float64, nf 8, 64 px) within 1e-5 of its largest value."""
    figures = dict(np.load(GOLDEN / "dfgan_64.npz"))
    real = torch.tensor(figures.pop("images")).double().requires_grad_()
    t = torch.tensor(figures.pop("sentences")).double().requires_grad_()
    z = torch.tensor(figures.pop("noise")).double()
    G, D, opt_g, opt_d = dfgan.build(nf=8, size=64)
    G.double()
    D.double()
    fill_as_released(G, lambda name: "netG")
    fill_as_released(D, part_of_d)
    ours = {}

    # Networks, and the gradient that MA-GP bounds
    t_wrong = t.roll(1, 0)
    fake = G(z, t)
    features = D.features(real)
    real_score = D.score(features, t)
    wrong_score = D.score(features, t_wrong)
    fake_score = D(fake, t)
    grad_x, grad_t = torch.autograd.grad(real_score.sum(), (real, t))
    ours["fake"] = fake
    ours["features"] = features
    ours["logits"] = real_score
    ours["grad_norm"] = torch.cat((grad_x.flatten(1), grad_t), 1).norm(dim=1)

    # The three parts of the hinge loss: the scores of the other two have no loss
    good = torch.full_like(real_score, 1e9)
    ours["loss_real"] = dfgan.hinge_loss(real_score, -good, -good)
    ours["loss_mismatch"] = 2 * dfgan.hinge_loss(good, wrong_score, -good)
    ours["loss_fake"] = 2 * dfgan.hinge_loss(good, -good, fake_score)

    # One update of D, then of G
    real = real.detach()
    t = t.detach()
    losses = dfgan.d_step(D, opt_d, real, fake, t, t.roll(1, 0))
    ours["loss_D"] = losses["loss_d"]
    ours["loss_magp"] = losses["ma_gp"]
    ours["grad_D_norm"] = gradient_norm(D)
    ours["grad_D.conv_img.weight"] = D.conv_img.weight.grad
    ours["grad_C.joint_conv.0.weight.mean"] = D.joint_conv[0].weight.grad.mean()
    ours["loss_G"] = dfgan.g_step(D, opt_g, fake, t)
    ours["grad_G_norm"] = gradient_norm(G)
    ours["fake_after_step"] = G(z, t)
    ours["logits_after_step"] = D(real, t)

    assert ours.keys() == figures.keys()
    for name, figure in figures.items():
        value = ours[name].detach().flatten()
        figure = torch.tensor(figure).flatten()
        assert (value - figure).abs().max() <= 1e-5 * figure.abs().max(), name


def names_and_shapes(net):
    return {name: list(value.shape) for name, value in net.state_dict().items()}


def test_names_and_shapes_of_released_checkpoints():
    released = json.loads((GOLDEN / "dfgan_released_names.json").read_text())
    assert names_and_shapes(dfgan.Generator()) == released["netG"]
    # The released code has shortcuts in blocks of equal widths, but does not use them
    unused = {f"DBlocks.{block}.conv_s.{name}"
              for block in (3, 4, 5) for name in ("weight", "bias")}
    released_d = released["netD"] | released["netC"]
    used = {name: shape for name, shape in released_d.items() if name not in unused}
    assert names_and_shapes(dfgan.Discriminator()) == used


def save_released(G, D, path):
    """Write networks as the authors did: three dicts, the prefix of nn.DataParallel, and a layer
    that their code does not use."""
    released = {"netG": G.state_dict(), "netD": {}, "netC": {}}
    for name, value in D.state_dict().items():
        released[part_of_d(name)][name] = value
    released["netD"]["DBlocks.3.conv_s.bias"] = torch.ones(16)
    for part, weights in released.items():
        released[part] = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"model": released, "optimizers": {}, "epoch": 9}, path)


def test_load_released():
    G, D, _, _ = dfgan.build(nf=2, size=64)
    save_released(G, D, "state_epoch_009.pth")
    encoder = common.DAMSMTextEncoder(["<end>", "flower"])
    torch.save({"text_encoder": encoder.state_dict()}, "encoder.pt")
    args = argparse.Namespace(nf=2, size=64, init="state_epoch_009.pth", text_encoder="encoder.pt")
    state = dfgan.load_released(args)
    assert equal(state["G"], G.state_dict())
    assert equal(state["D"], D.state_dict())
    assert equal(state["text_encoder"], encoder.state_dict())

    loaded, _ = dfgan.load_generator(state)
    z = torch.randn(2, 100)
    t = torch.randn(2, 256)
    torch.testing.assert_close(loaded(z, t), G(z, t))


def refused(arguments, capsys):
    """Run main(), which must refuse its arguments. Return the message."""
    with pytest.raises(SystemExit) as end:
        dfgan.main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_init_needs_a_text_encoder(capsys):
    message = refused(["--init", "state_epoch_009.pth", "--device", "cpu"], capsys)
    assert "--init needs the text encoder of the same authors" in message


@pytest.mark.parametrize("content", [None, b"no checkpoint", {"netG": {}}])
def test_init_of_another_file_is_a_user_error(content):
    if isinstance(content, dict):
        torch.save(content, "file.pth")
    elif content:
        Path("file.pth").write_bytes(content)
    with pytest.raises(data.UserError, match="file.pth is not a state_epoch"):
        dfgan.load_released(argparse.Namespace(init="file.pth"))


@pytest.mark.parametrize("action", [[], ["--sample", "a red bird"], ["--evaluate"]])
def test_init_is_refused_where_the_run_exists(action, capsys):
    """Else the command would use the model of the run, not that of the file."""
    Path("run").mkdir()
    Path("run/last.pt").touch()
    message = refused(["--init", "state_epoch_009.pth", "--text-encoder", "encoder.pt",
                       "--out-dir", "run", "--device", "cpu", *action], capsys)
    assert "--init starts a new run, but run/last.pt exists; set another --out-dir" in message


def test_old_checkpoints_load():
    """The G of a checkpoint of before has the same names and shapes as today's."""
    paths = sorted((ROOT / "weights").glob("dfgan-*.pt"))
    assert paths
    for path in paths:
        state = common.load_checkpoint(path, "dfgan")
        G = dfgan.Generator(state["args"]["nf"], state["args"]["size"])
        G.load_state_dict(state["ema"], strict=True)


# ---- Losses


def test_hinge_loss_against_a_loop():
    """Equation 1."""
    scores = 2 * torch.randn(3, 9, dtype=torch.double)
    expected = 0
    for i in range(9):
        real, wrong, fake = scores[:, i].tolist()
        expected += max(0, 1 - real) + (max(0, 1 + wrong) + max(0, 1 + fake)) / 2
    loss = dfgan.hinge_loss(scores[0], scores[1], scores[2])
    assert loss.item() == pytest.approx(expected / 9, rel=1e-12)


def test_g_loss_is_the_negative_mean_score():
    assert dfgan.g_loss(torch.tensor([1., 2., 6.])).item() == -3


def test_ma_gp_of_the_paper():
    """k = 2 and p = 6 are the defaults. The norms of these gradients are 1 and 2."""
    grad_x = torch.zeros(2, 3, 8, 8)
    grad_t = torch.zeros(2, 256)
    grad_x[0, 1, 2, 3] = 0.6
    grad_t[0, 4] = 0.8
    grad_t[1, 5] = 2
    assert dfgan.ma_gp(grad_x, grad_t).item() == pytest.approx(2 * (1 ** 6 + 2 ** 6) / 2)


@pytest.mark.parametrize("k, p", [(2, 6), (0.5, 4), (3, 1), (1, 2.5)])
def test_ma_gp_against_a_loop(k, p):
    grad_x = torch.randn(4, 3, 8, 8) / 14
    grad_t = torch.randn(4, 256) / 16
    expected = 0
    for i in range(4):
        values = grad_x[i].flatten().tolist() + grad_t[i].tolist()
        norm = math.sqrt(sum(value * value for value in values))
        expected += k * norm ** p / 4
    assert dfgan.ma_gp(grad_x, grad_t, k, p).item() == pytest.approx(expected, rel=1e-5)


def test_ma_gp_has_a_finite_gradient_at_zero():
    grad_x = torch.zeros(2, 3, 8, 8, requires_grad=True)
    dfgan.ma_gp(grad_x, torch.zeros(2, 256)).backward()
    assert torch.equal(grad_x.grad, torch.zeros(2, 3, 8, 8))


# ---- Steps


def build_double(nf, size, text_dim=256):
    """Return float64 networks, without the weights that start at 0 and would hide errors."""
    torch.manual_seed(0)
    G, D, opt_g, opt_d = dfgan.build(nf, size, text_dim=text_dim)
    G.double()
    D.double()
    for parameter in G.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for parameter in D.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(0.6)  # gamma and biases
        else:
            parameter.data *= 2
    return G, D, opt_g, opt_d


def draw_batch(size, text_dim=256, batch_size=3):
    """Return random real images, z and t in float64."""
    real = torch.randn(batch_size, 3, size, size).double()
    z = torch.randn(batch_size, 100).double()
    t = torch.randn(batch_size, text_dim).double()
    return real, z, t


@pytest.fixture
def ma_gp_in_float64(monkeypatch):
    """Let ma_gp, which converts its gradients to float32, convert them to float64, so that a test
    can compare all digits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def plain_d_loss(D, real, fake, t, t_wrong, k=2, p=6):
    """Compute equation 1 and MA-GP with PyTorch's convolutions and torch.autograd.grad."""
    x = real.clone().requires_grad_()
    t_real = t.clone().requires_grad_()
    with mock.patch.object(dfgan.DoubleBackwardConv2d, "forward", nn.Conv2d.forward):
        real_score = D(x, t_real)
        wrong_score = D(real, t_wrong)
        fake_score = D(fake.detach(), t)
    hinge = F.relu(1 - real_score) + F.relu(1 + wrong_score) / 2 + F.relu(1 + fake_score) / 2

    grad_x, grad_t = torch.autograd.grad(real_score.sum(), (x, t_real), create_graph=True)
    norm = torch.cat((grad_x.flatten(1), grad_t), 1).norm(dim=1)
    return hinge.mean() + k * (norm ** p).mean()


@pytest.mark.usefixtures("ma_gp_in_float64")
@pytest.mark.parametrize("text_dim", [256, 512, 768])
def test_steps_equal_adam_on_the_plain_losses(text_dim):
    G, D, opt_g, opt_d = build_double(nf=1, size=32, text_dim=text_dim)
    real, z, t = draw_batch(32, text_dim)
    t_wrong = t.roll(1, 0)
    fake = G(z, t)
    loss = plain_d_loss(D, real, fake, t, t_wrong)
    check_step(lambda: dfgan.d_step(D, opt_d, real, fake, t, t_wrong), loss, D, G,
               lr=4e-4)
    loss = -D(G(z, t), t).mean()
    d_gradients = [weight.grad.clone() for weight in D.parameters()]
    check_step(lambda: dfgan.g_step(D, opt_g, fake, t), loss, G, D, lr=1e-4)

    # G's step must not waste time on gradients of D: those of D's step are still there
    assert equal([weight.grad for weight in D.parameters()], d_gradients)


def test_d_step_returns_the_mean_scores():
    """They are those before the update."""
    G, D, _, opt_d = build_double(nf=1, size=32)
    real, z, t = draw_batch(32)
    t_wrong = t.roll(1, 0)
    fake = G(z, t)
    expected = {"d_real": D(real, t), "d_wrong": D(real, t_wrong), "d_fake": D(fake, t)}
    losses = dfgan.d_step(D, opt_d, real, fake, t, t_wrong)
    assert losses.keys() == {"loss_d", "d_real", "d_wrong", "d_fake", "ma_gp"}
    for name, score in expected.items():
        torch.testing.assert_close(losses[name], score.mean().detach())


@pytest.mark.usefixtures("ma_gp_in_float64")
def test_gradient_of_d_loss_against_finite_differences():
    """Move D's weights along random directions: the slope of the loss equals gradient times
    direction."""
    G, D, _, _ = build_double(nf=1, size=32)
    real, z, t = draw_batch(32)
    t_wrong = t.roll(1, 0)
    fake = G(z, t).detach()
    weights = list(D.parameters())
    loss = dfgan.d_losses(D, real, fake, t, t_wrong)["loss_d"]
    gradients = torch.autograd.grad(loss, weights)

    def loss_at(distance, direction):
        for weight, change in zip(weights, direction):
            weight.data += distance * change
        loss = plain_d_loss(D, real, fake, t, t_wrong).item()
        for weight, change in zip(weights, direction):
            weight.data -= distance * change
        return loss

    for _ in range(3):
        direction = [torch.randn_like(weight) * weight.abs().mean() for weight in weights]
        slope = (loss_at(1e-6, direction) - loss_at(-1e-6, direction)) / 2e-6
        expected = sum((g * change).sum().item() for g, change in zip(gradients, direction))
        assert slope == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("ma_gp_in_float64")
@pytest.mark.parametrize("k, p", [(0.5, 4), (3, 1), (1, 2.5)])
def test_steps_with_other_k_and_p(k, p):
    G, D, _, opt_d = build_double(nf=1, size=32)
    real, z, t = draw_batch(32)
    t_wrong = t.roll(1, 0)
    fake = G(z, t)
    loss = plain_d_loss(D, real, fake, t, t_wrong, k, p)
    check_step(lambda: dfgan.d_step(D, opt_d, real, fake, t, t_wrong, k, p), loss, D, G,
               lr=4e-4)


def fail(*arguments, **options):
    raise AssertionError("a gradient for MA-GP was computed")


def test_step_without_ma_gp(monkeypatch):
    """With k = 0 the loss is the hinge loss alone, and no double backward is paid for."""
    G, D, _, opt_d = build_double(nf=1, size=32)
    real, z, t = draw_batch(32)
    t_wrong = t.roll(1, 0)
    fake = G(z, t)
    hinge = F.relu(1 - D(real, t)) + F.relu(1 + D(real, t_wrong)) / 2
    hinge = hinge + F.relu(1 + D(fake.detach(), t)) / 2
    monkeypatch.setattr("torch.func.grad", fail)
    losses = check_step(lambda: dfgan.d_step(D, opt_d, real, fake, t, t_wrong, k=0),
                        hinge.mean(), D, G, lr=4e-4)
    assert losses["ma_gp"].item() == 0


def train_tiny(home, monkeypatch, *flags):
    """Train two steps at 32 px on the images of `home`. Return the checkpoint."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Ctrl-C still ends the tests
    encoder_path = home / "runs" / "damsm-own" / "encoder.pt"
    dfgan.main(["--data", str(home / "own"), "--device", "cpu", "--out-dir", "run",
                "--text-encoder", str(encoder_path), "--epochs", "1", "--batch-size", "10",
                "--size", "32", "--nf", "2", *flags])
    return common.load_checkpoint("run/last.pt", "dfgan")


def test_flag_ma_gp_weight_0(home, monkeypatch):
    """The ablation of the paper: a run without MA-GP logs a penalty of 0."""
    monkeypatch.setattr("torch.func.grad", fail)
    state = train_tiny(home, monkeypatch, "--ma-gp-weight", "0")
    assert state["args"]["ma_gp_weight"] == 0
    assert state["history"][0]["ma_gp"] == 0


def test_flags_of_ma_gp_reach_the_step(home, monkeypatch):
    d_step = dfgan.d_step
    calls = []

    def recorded(D, opt_d, real, fake, t, t_wrong, k, p):
        calls.append((k, p))
        return d_step(D, opt_d, real, fake, t, t_wrong, k, p)

    monkeypatch.setattr(dfgan, "d_step", recorded)
    train_tiny(home, monkeypatch, "--ma-gp-weight", "0.5", "--ma-gp-power", "4")
    assert calls == [(0.5, 4), (0.5, 4)]


# ---- Sizes


@pytest.mark.usefixtures("ma_gp_in_float64")
def test_512_px():
    """G doubles 4 x 4 seven times and D halves 512 x 512 seven times. Both steps work."""
    G, D, opt_g, opt_d = build_double(nf=1, size=512)
    real, z, t = draw_batch(512, batch_size=2)
    t_wrong = t.roll(1, 0)
    sides = []
    for block in [*G.GBlocks, *D.DBlocks]:
        block.register_forward_hook(lambda block, inputs, output: sides.append(output.shape[2]))
    fake = G(z, t)
    features = D.features(real)
    assert fake.shape == (2, 3, 512, 512)
    assert features.shape == (2, 8, 4, 4)
    assert sides == [8, 16, 32, 64, 128, 256, 512] + [256, 128, 64, 32, 16, 8, 4]

    loss = plain_d_loss(D, real, fake, t, t_wrong)
    check_step(lambda: dfgan.d_step(D, opt_d, real, fake, t, t_wrong), loss, D, G,
               lr=4e-4)
    loss = -D(G(z, t), t).mean()
    check_step(lambda: dfgan.g_step(D, opt_g, fake, t), loss, G, D, lr=1e-4)


@pytest.mark.parametrize("size", [16, 48, 1024])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError):
        dfgan.Generator(2, size)


# ---- Faster layers


def check_equal_gradients(output, plain, variables):
    """Check that two outputs and their gradients by the variables are equal."""
    torch.testing.assert_close(output, plain)
    output_gradient = torch.randn_like(plain)
    gradients = torch.autograd.grad(output, variables, output_gradient, retain_graph=True)
    plain_gradients = torch.autograd.grad(plain, variables, output_gradient, retain_graph=True)
    torch.testing.assert_close(gradients, plain_gradients)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("height, width", [(4, 4), (8, 8), (9, 12)])
def test_nearest_up_conv_equals_its_plain_line(height, width, bias):
    layer = dfgan.NearestUpConv(3, 5, 3, 1, 1, bias=bias).double()
    x = torch.randn(2, 3, height, width, dtype=torch.double, requires_grad=True)
    plain = F.conv2d(F.interpolate(x, scale_factor=2.0), layer.weight, layer.bias, padding=1)
    check_equal_gradients(layer(x), plain, [x, *layer.parameters()])


def test_upsample_equals_its_plain_line():
    """The dtype stays that of autocast, and the memory format channels_last."""
    x = torch.randn(2, 3, 5, 7, dtype=torch.double, requires_grad=True)
    check_equal_gradients(dfgan.upsample(x), F.interpolate(x, scale_factor=2.0), [x])

    x = torch.randn(2, 3, 5, 7).bfloat16().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = dfgan.upsample(x)
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output, F.interpolate(x, scale_factor=2.0))


# Kernel, stride, padding and bias of D's convolutions
CONVOLUTIONS = [(4, 2, 1, False), (3, 1, 1, False), (3, 1, 1, True), (1, 1, 0, True),
                (4, 1, 0, False)]


@pytest.mark.parametrize("kernel, stride, padding, bias", CONVOLUTIONS)
def test_conv2d_function_equals_its_plain_line(kernel, stride, padding, bias):
    """Forward, gradients, and gradients of a function of the gradients, as in MA-GP."""
    x = torch.randn(2, 3, 8, 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn(5, 3, kernel, kernel, dtype=torch.double, requires_grad=True)
    variables = [x, weight]
    bias_vector = None
    if bias:
        bias_vector = torch.randn(5, dtype=torch.double, requires_grad=True)
        variables.append(bias_vector)
    stride = (stride, stride)
    padding = (padding, padding)
    output = dfgan.Conv2dFunction.apply(x, weight, bias_vector, stride, padding)
    plain = F.conv2d(x, weight, bias_vector, stride, padding)
    check_equal_gradients(output, plain, variables)

    def penalty(output):
        """Return the sum of the cubes of the gradient of the output's squares."""
        gradient = torch.autograd.grad(output.square().sum(), x, create_graph=True)[0]
        return gradient.pow(3).sum()

    check_equal_gradients(penalty(output), penalty(plain), variables)


def test_double_backward_conv2d_under_autocast():
    """The saved float32 input meets a gradient in bfloat16, whose eight bits leave errors of 0.4%.
    The truth is the gradient of PyTorch's layer in float32."""
    layer = dfgan.DoubleBackwardConv2d(3, 5, 3, 1, 1)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    variables = [x, layer.weight, layer.bias]
    plain = nn.Conv2d.forward(layer, x)
    plain_gradients = torch.autograd.grad(plain.square().sum(), variables)

    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.float().square().sum(), variables)
    for gradient, plain_gradient in zip(gradients, plain_gradients):
        assert (gradient - plain_gradient).norm() < 0.01 * plain_gradient.norm()


# ---- Sampling


def test_export_with_a_dynamic_batch():
    """A program that torch.export made with a batch of 4 draws batches of other sizes."""
    G = dfgan.Generator(nf=1, size=64).eval()
    batch = torch.export.Dim("batch")
    example = (torch.randn(4, 100), torch.randn(4, 256))
    program = torch.export.export(G, example, dynamic_shapes=({0: batch}, {0: batch}))
    for size in (2, 7):
        z = torch.randn(size, 100)
        t = torch.randn(size, 256)
        torch.testing.assert_close(program.module()(z, t), G(z, t), rtol=0, atol=1e-6)


def test_generate_draws_at_most_64_images_at_once():
    """A large grid must fit into memory. The images equal those of one call of G."""
    G = dfgan.Generator(nf=1, size=32).eval()
    z = dfgan.sample_noise(70)
    t = torch.randn(70, 256)
    expected = G(z, t).detach()
    batch_sizes = []
    G.register_forward_pre_hook(lambda G, inputs: batch_sizes.append(len(inputs[0])))
    torch.testing.assert_close(dfgan.generate(G, z, t), expected, rtol=0, atol=1e-6)
    assert batch_sizes == [64, 6]


def test_noise_is_standard_normal_and_depends_on_the_seed():
    z = dfgan.sample_noise(2000, seed=1)
    assert z.shape == (2000, 100)
    assert z.mean().item() == pytest.approx(0, abs=0.01)
    assert z.std().item() == pytest.approx(1, abs=0.005)
    assert torch.equal(z, dfgan.sample_noise(2000, seed=1))
    assert not torch.equal(z, dfgan.sample_noise(2000, seed=2))
