"""dfgan.py: the released network's numbers, losses and gradients of gradients, compiled steps, resume, the command line."""
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
from torch import nn
from PIL import Image

import common
import dfgan
from conftest import ROOT, call, module, run, same, shared

SCRIPT = ROOT / "dfgan.py"


# ---- the released network

def golden(dtype=torch.float32):
    """The released networks' weights and figures of dfgan_64.npz, in our networks; nf 8, 64 px."""
    fill = module(shared("golden", "golden_weights.py")).fill
    z = np.load(shared("golden", "dfgan_64.npz"))
    G, D, opt_g, opt_d = dfgan.make(8, 64)
    shapes = lambda net, head: {n: tuple(v.shape) for n, v in net.state_dict().items() if n.startswith("joint_conv") == head}
    G.load_state_dict(fill("netG", shapes(G, False)))
    D.load_state_dict({**fill("netD", shapes(D, False)), **fill("netC", shapes(D, True))})
    t = lambda name: torch.from_numpy(z[name]).to(dtype)
    return z, t, G.to(dtype), D.to(dtype), opt_g, opt_d


def close(ours, theirs, rel=1e-4):
    """Within rel of the largest figure."""
    ours, theirs = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, dtype=np.float64) for x in (ours, theirs))
    assert np.abs(ours.reshape(theirs.shape) - theirs).max() <= rel * np.abs(theirs).max()


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_golden_forward_losses_gradients_and_one_update(backend):
    z, t, G, D, opt_g, opt_d = golden()
    x, e, noise = t("images"), t("sentences"), t("noise")
    if backend and subprocess.run(["which", "c++"], capture_output=True).returncode:
        pytest.skip("torch.compile needs a C++ compiler")
    wrap = (lambda f: torch.compile(f, backend=backend, fullgraph=True)) if backend else lambda f: f
    draw, loss_d, loss_g = wrap(G), wrap(dfgan.d_loss), wrap(dfgan.g_loss)
    fake = draw(noise, e)
    close(fake, z["fake"])
    h = D.features(x)
    close(h, z["features"]), close(D.score(h, e), z["logits"])

    loss, seen = loss_d(D, x, e.roll(1, 0), fake.detach(), e)
    close(loss, z["loss_D"]), close(seen[4], z["loss_magp"])
    grads = torch.autograd.grad(loss, list(D.parameters()))
    close(torch.cat([g.flatten() for g in grads]).norm(), z["grad_D_norm"])
    by_name = dict(zip(dict(D.named_parameters()), grads))
    close(by_name["conv_img.weight"], z["grad_D.conv_img.weight"])
    close(by_name["joint_conv.0.weight"].mean(), z["grad_C.joint_conv.0.weight.mean"], 1e-3)      # a mean of 1e5 that cancel

    dfgan.d_step(D, opt_d, x, e.roll(1, 0), fake, e, loss_of=loss_d)
    loss = dfgan.g_step(D, opt_g, fake, e, loss_of=loss_g)
    close(loss, z["loss_G"])
    close(torch.cat([p.grad.flatten() for p in G.parameters()]).norm(), z["grad_G_norm"])
    # Adam's first step is the sign of the gradient: where that is nearly 0, float32 may take the other sign, a few pixels' 1e-4
    for ours, theirs in ((G(noise, e), z["fake_after_step"]), (D.score(D.features(x), e), z["logits_after_step"])):
        difference = ours.detach().double().flatten() - torch.from_numpy(theirs).double().flatten()
        assert difference.norm() <= 1e-4 * np.linalg.norm(theirs) and difference.abs().max() <= 5e-4 * np.abs(theirs).max()


def test_golden_hinge_terms_and_gradient_norm():
    z, t, G, D, *_ = golden(torch.float64)
    x, e = t("images").requires_grad_(), t("sentences").requires_grad_()
    h = D.features(x)
    real, wrong, fake = D.score(h, e), D.score(h.roll(-1, 0), e), D.score(D.features(t("fake")), e)
    zero = torch.full_like(real, 1e9)          # sure scores: no loss from them
    close(dfgan.d_hinge(real, -zero, -zero), z["loss_real"])
    close(dfgan.d_hinge(zero, wrong, -zero), z["loss_mismatch"] / 2), close(dfgan.d_hinge(zero, -zero, fake), z["loss_fake"] / 2)
    grads = torch.autograd.grad(real.sum(), (x, e))
    close(torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1), z["grad_norm"])
    close(dfgan.ma_gp(*grads), z["loss_magp"])


def test_names_and_shapes_are_those_of_the_released_checkpoint():
    released = json.loads(shared("golden", "dfgan_released_names.json").read_text())
    shapes = lambda net: {name: list(value.shape) for name, value in net.state_dict().items()}
    assert shapes(dfgan.Generator(32, 256)) == released["netG"]
    ours, theirs = shapes(dfgan.Discriminator(32, 256)), released["netD"] | released["netC"]
    assert all(theirs[name] == shape for name, shape in ours.items())
    assert {name[:16] for name in theirs.keys() - ours.keys()} == {f"DBlocks.{i}.conv_s" for i in (3, 4, 5)}      # unused there


# ---- the same function with less work

def test_up_conv_is_upsampling_and_a_convolution():
    conv = torch.nn.Conv2d(5, 7, 3, 1, 1).double()
    x = torch.randn(15, 5, 6, 6, dtype=torch.double)              # 540 places: with fewer it is written out
    torch.testing.assert_close(dfgan.up_conv(x, conv), conv(F.interpolate(x, scale_factor=2)), rtol=1e-12, atol=1e-12)


def test_blocks_are_the_plain_ones():
    torch.manual_seed(0)
    block, c = dfgan.GBlock(6, 4, "dfblock").double(), torch.randn(2, 356, dtype=torch.double)
    for p in block.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    x = torch.randn(2, 6, 4, 4, dtype=torch.double)
    big = F.interpolate(x, scale_factor=2)
    torch.testing.assert_close(block(x, c), block.c_sc(big) + block.c2(block.fuse2(block.c1(block.fuse1(big, c)), c)))
    down = dfgan.DBlock(3, 5).double()
    torch.nn.init.constant_(down.gamma, 0.7)
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    torch.testing.assert_close(down(x), F.avg_pool2d(down.conv_s(x), 2) + 0.7 * down.conv_r(x))


def test_first_is_the_first_two_convolutions_and_so_are_its_gradients():
    torch.manual_seed(0)
    D = dfgan.Discriminator(2, 128).double()
    nn.init.constant_(D.DBlocks[0].gamma, 0.7)
    x, v = torch.randn(2, 2, 3, 128, 128, dtype=torch.double)
    x.requires_grad_()
    results = []
    for h in (D.first(x), D.DBlocks[0](D.conv_img(x))):
        gx, = torch.autograd.grad(h.square().sum(), x, create_graph=True)
        results.append((h, gx, *torch.autograd.grad((gx * v).sum(), (*D.conv_img.parameters(), *D.DBlocks[0].parameters()))))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    z = torch.cat((x[:1], x[1:] * 0))                              # the bias alone, border included
    torch.testing.assert_close(D.features(z), D.DBlocks(D.conv_img(z)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_whole_loss_is_one_graph_where_convolutions_are_merged(bf16):
    """The defaults on a GPU: d_loss with MA-GP inside, at 128 px and more, under autocast; here with the backend aot_eager."""
    torch.manual_seed(0)
    D = dfgan.Discriminator(4, 128)
    real, fake, e = torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128), torch.randn(2, 256)
    results = []
    for loss_of in (dfgan.d_loss, torch.compile(dfgan.d_loss, backend="aot_eager", fullgraph=True, dynamic=False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, seen = loss_of(D, real, e.roll(1, 0), fake, e)
        results.append((loss.detach().float(), seen[4].float(), *(g.norm() for g in torch.autograd.grad(loss, list(D.parameters())))))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled, rtol=0.05 if bf16 else 1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
def test_every_size_is_drawn_and_judged(size):
    G, D = dfgan.Generator(1, size), dfgan.Discriminator(1, size)
    x = G(torch.randn(2, 100), torch.randn(2, 256))
    assert x.shape == (2, 3, size, size) and x.abs().max() <= 1
    h = D.features(x)
    assert h.shape == (2, 8, 4, 4) and D.score(h, torch.randn(2, 256)).shape == (2,)


# ---- losses and gradients of gradients

def test_hinge_against_a_loop():
    rng = np.random.default_rng(0)
    real, wrong, fake = rng.standard_normal((3, 9)) * 2
    mean = lambda values: sum(values) / len(values)
    expect = mean([max(0, 1 - v) for v in real]) + (mean([max(0, 1 + v) for v in wrong]) + mean([max(0, 1 + v) for v in fake])) / 2
    assert dfgan.d_hinge(*map(torch.from_numpy, (real, wrong, fake))).item() == pytest.approx(expect, rel=1e-12)
    assert dfgan.g_hinge(torch.from_numpy(fake)).item() == pytest.approx(-mean(fake), rel=1e-12)


def test_ma_gp_against_a_loop_and_where_the_gradient_is_zero():
    x, e = torch.randn(4, 3, 8, 8, dtype=torch.double) / 14, torch.randn(4, 256, dtype=torch.double) / 16
    expect = sum(2 * sum(v * v for v in [*x[i].flatten().tolist(), *e[i].tolist()]) ** 3 for i in range(4)) / 4
    assert dfgan.ma_gp(x, e).item() == pytest.approx(expect, rel=1e-6)
    zero = torch.zeros(2, 3, 4, 4, requires_grad=True)
    dfgan.ma_gp(zero).backward()
    assert zero.grad.isfinite().all()


def small(output="one-way"):
    """A small D in float64 with a batch; the gate open, so that the residual path counts."""
    torch.manual_seed(0)
    D = dfgan.Discriminator(2, 32, output).double()
    for block in D.DBlocks:
        torch.nn.init.constant_(block.gamma, 0.6)
    for p in D.parameters():
        p.data.mul_(1.5)
    real, fake = torch.rand(2, 3, 3, 32, 32, dtype=torch.double) * 2 - 1
    return D, real, fake, torch.randn(3, 256, dtype=torch.double)


def test_gradients_of_gradients_against_finite_differences():
    """d MA-GP / d weights, and the inner gradient itself, along random directions in float64."""
    D, real, fake, e = small()
    score = lambda x, e: D.score(D.features(x), e)
    inner = torch.func.grad(lambda x, e: score(x, e).sum(), (0, 1))(real, e)
    rng, h = torch.Generator().manual_seed(1), 1e-6
    along = lambda like: torch.randn(like.shape, generator=rng, dtype=torch.double)
    dx, de = along(real), along(e)
    slope = (score(real + h * dx, e + h * de) - score(real - h * dx, e - h * de)).sum().item() / (2 * h)
    assert slope == pytest.approx(((inner[0] * dx).sum() + (inner[1] * de).sum()).item(), rel=1e-6)

    weights = list(D.parameters())
    loss = dfgan.d_loss(D, real, e.roll(1, 0), fake, e, "ma")[0] - dfgan.d_loss(D, real, e.roll(1, 0), fake, e, "none")[0]      # MA-GP alone
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    assert loss.item() > 1e-4
    for _ in range(5):
        way = [along(w) * w.abs().mean() for w in weights]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for w, v in zip(weights, way):
                    w.add_(v, alpha=sign * h)
            grad = torch.func.grad(lambda x, e: score(x, e).sum(), (0, 1))(real, e)
            values.append(2 * (grad[0].flatten(1).square().sum(1) + grad[1].square().sum(1)).pow(3).mean().item())
            with torch.no_grad():
                for w, v in zip(weights, way):
                    w.sub_(v, alpha=sign * h)
        expect = sum((g * v).sum() for g, v in zip(grads, way) if g is not None).item()
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(expect, rel=1e-4)


@pytest.mark.parametrize("output", ["one-way", "two-way"])
@pytest.mark.parametrize("penalty", ["ma", "real", "none"])
def test_ablations_are_what_they_say(output, penalty):
    D, real, fake, e = small(output)
    loss, seen = dfgan.d_loss(D, real, e.roll(1, 0), fake, e, penalty)
    x, t = real.clone().requires_grad_(), e.clone().requires_grad_()
    h, h_fake = D.features(x), D.features(fake)
    s = D.score(h, t), D.score(h.roll(-1, 0), e), D.score(h_fake, e)
    expect = dfgan.d_hinge(*s)
    if output == "two-way":
        expect = expect + F.relu(1 - D.alone_conv(h)).mean() + F.relu(1 + D.alone_conv(h_fake)).mean()
    gx, ge = torch.autograd.grad(s[0].sum(), (x, t))
    square = {"ma": gx.square().flatten(1).sum(1) + ge.square().sum(1), "real": gx.square().flatten(1).sum(1), "none": torch.zeros(3)}[penalty]
    expect = expect + 2 * (square ** 3).mean()
    assert loss.item() == pytest.approx(expect.item(), rel=1e-6) and seen[4].item() == pytest.approx(2 * (square ** 3).mean().item(), rel=1e-5)
    assert dfgan.g_loss(D, fake, e).item() == pytest.approx(-s[2].mean().item() - (D.alone_conv(h_fake).mean().item() if output == "two-way" else 0), rel=1e-9)


def test_bf16_gradients_of_d_are_those_of_float32():
    """Penalty and hinge under autocast, as a run with --bf16 has them; the norm of MA-GP is taken in float32. The fakes differ
    from the real ones: where they do not, the terms of the hinge cancel and what is left is rounding, in any bf16 D."""
    torch.manual_seed(0)
    D = dfgan.Discriminator(8, 32)
    for block in D.DBlocks:
        torch.nn.init.constant_(block.gamma, 0.5)
    real, e = torch.rand(8, 3, 32, 32) * 2 - 1, torch.randn(8, 256) / 16
    fake = torch.randn(8, 3, 4, 4).tanh().repeat_interleave(8, 2).repeat_interleave(8, 3)
    flat = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = dfgan.d_loss(D, real, e.roll(1, 0), fake, e)[0]
        flat.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(D.parameters()), materialize_grads=True)]))
    assert F.cosine_similarity(*flat, 0) > 0.98 and (flat[1].norm() / flat[0].norm()).item() == pytest.approx(1, abs=0.01)


def test_one_affine_instead_of_the_dfblock():
    block, x, c = dfgan.DFBlock(4, "affine"), torch.randn(2, 4, 3, 3), torch.randn(2, 356)
    for p in block.parameters():
        torch.nn.init.normal_(p)
    gamma, beta = block.affine0.fc_gamma(c)[..., None, None], block.affine0.fc_beta(c)[..., None, None]
    torch.testing.assert_close(block(x, c), F.leaky_relu(gamma * x + beta, 0.2))


def test_g_step_leaves_d_alone_and_copied_alone_with_only_torch(tmp_path):
    """The file in an empty folder, the project's other files, torchvision and PIL refused: both steps run, MA-GP is
    finite where the gradient is zero."""
    shutil.copy(SCRIPT, tmp_path)
    code = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in ('torchvision', 'PIL', 'common', 'data'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, dfgan
G, D, opt_g, opt_d = dfgan.make(2, 32)
e, real = torch.randn(4, 256), torch.randn(4, 3, 32, 32)
fake = G(torch.randn(4, 100), e)
seen = dfgan.d_step(D, opt_d, real, e.roll(1, 0), fake, e)
before = [p.clone() for p in D.parameters()]
loss_g = dfgan.g_step(D, opt_g, fake, e)
assert torch.isfinite(seen).all() and torch.isfinite(loss_g)
assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, D.parameters()))
torch.nn.init.zeros_(D.joint_conv[2].weight)
assert dfgan.d_step(D, opt_d, real, e.roll(1, 0), fake, e)[4] == 0
assert all(torch.isfinite(p.grad).all() for p in D.parameters() if p.grad is not None)
print('both steps ran')
"""
    done = run("-c", code, cwd=tmp_path)
    assert done.stdout.strip() == "both steps ran", done.stderr


# ---- runs

TINY = ("--data", "own", "--nf", 2, "--size", 32, "--batch-size", 4, "--device", "cpu", "--image-features", "small")   # 5 steps an epoch


def train(home, name, epochs, *flags, **how):
    return (run if how else call)(SCRIPT, *TINY, "--run", name, "--epochs", epochs, *flags, cwd=home, **how)


def states(home, *names):
    return [common.load(home / name / "last.pt", "dfgan") for name in names]


def test_resumed_equals_uninterrupted_to_the_bit(home):
    done = train(home, "df-straight", 2)
    assert done.returncode == 0 and "2 epochs done" in done.stdout, done.stderr
    assert "text encoder: damsm trained here on own" in done.stdout
    assert train(home, "df-resumed", 1).returncode == 0 and train(home, "df-resumed", 2).returncode == 0
    a, b = states(home, "df-straight", "df-resumed")
    for name in ("G", "D", "ema", "opt_g", "opt_d", "rows", "random", "total", "step"):
        assert same(a[name], b[name]), name
    assert (home / "df-straight" / "epoch_0002.png").read_bytes() == (home / "df-resumed" / "epoch_0002.png").read_bytes()
    lines = (home / "df-straight" / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,loss_g,loss_d,d_real,d_wrong,d_fake,ma_gp,diversity,fid,r_precision" and len(lines) == 3


def test_stopped_in_the_middle_it_saves_and_continues(home):
    process = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, TINY), "--run", "df-stop", "--epochs", "3000"], cwd=home,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (home / "df-stop" / "last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in errors and "Traceback" not in errors
    more = states(home, "df-stop")[0]["step"] // 5 + 1
    assert train(home, "df-stop", more).returncode == 0 and train(home, "df-unstopped", more).returncode == 0
    a, b = states(home, "df-stop", "df-unstopped")
    assert a["step"] == 5 * more and all(same(a[k], b[k]) for k in ("G", "D", "ema", "rows"))


@pytest.mark.parametrize("flags", [("--output", "two-way"), ("--penalty", "real"), ("--penalty", "none", "--fusion", "affine"), ("--bf16",)])
def test_every_ablation_trains_samples_and_keeps_its_shape(home, flags):
    name = "df-" + "".join(flags).replace("--", "-")
    done = train(home, name, 1, *flags)
    assert done.returncode == 0, done.stderr
    done = call(SCRIPT, "--data", "own", "--run", name, "--device", "cpu", "--sample", "it is red", cwd=home)
    assert done.returncode == 0 and done.stdout.split()[-1].endswith(".png"), done.stderr


def test_compile_falls_back_with_one_line(home):
    """Without a C++ compiler the run goes on eagerly, to the same bits."""
    done = train(home, "df-nocompiler", 1, "--compile", CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(home / "empty-cache"))
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if "torch.compile does not work here" in line]) == 1
    assert "Traceback" not in done.stderr
    if not (home / "df-eager").exists():
        train(home, "df-eager", 1)
    a, b = states(home, "df-nocompiler", "df-eager")
    assert same(a["G"], b["G"]) and same(a["opt_d"], b["opt_d"])


@pytest.mark.parametrize("fails_at", [1, 2, 3, None])
def test_the_trial_of_compiled_functions_leaves_no_trace(home, fails_at, monkeypatch):
    """Whichever of the compiled calls fails (G, D's loss, G's loss) or none: the run is the eager one, to the bit."""
    calls = []

    def compile_(f, dynamic):
        def called(*args):
            calls.append(f)
            if len(calls) == fails_at:
                raise RuntimeError("cannot")
            return f(*args)
        return called

    monkeypatch.setattr(torch, "compile", compile_)
    name = f"df-trial-{fails_at}"
    done = train(home, name, 1, "--compile")
    assert done.returncode == 0 and len(calls) == (fails_at or 3 * 6), done.stderr
    assert ("torch.compile does not work here (RuntimeError: cannot)" in done.stdout) == bool(fails_at)
    if not (home / "df-eager").exists():
        train(home, "df-eager", 1)
    a, b = states(home, name, "df-eager")
    assert all(same(a[k], b[k]) for k in ("G", "D", "ema", "opt_g", "opt_d", "random"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_with_its_defaults(home):
    done = call(SCRIPT, *TINY[:4], "--size", 128, "--batch-size", 4, "--image-features", "small", "--run", "df-gpu", "--epochs", 2, cwd=home)
    assert done.returncode == 0 and "cuda" in done.stdout and "does not work here" not in done.stdout, done.stderr


def test_sample_truncation_images_and_interpolate(home):
    train(home, "df-use", 1)
    use = lambda *flags: call(SCRIPT, "--data", "own", "--run", "df-use", "--device", "cpu", *flags, cwd=home)
    done = use("--sample", "a red picture", "it is blue", "--columns", 5)
    assert done.returncode == 0, done.stderr
    path = home / done.stdout.split()[-1]
    with Image.open(path) as image:
        assert image.size == (5 * 34 + 2, 2 * 34 + 2)
    before = path.read_bytes()
    assert use("--sample", "a red picture", "it is blue", "--columns", 5, "--truncation", 0.88).returncode == 0
    assert path.read_bytes() != before
    cells = lambda path: np.asarray(Image.open(path))[2:, 2:].reshape(-1, 34, 8, 34, 3).swapaxes(1, 2)[:, :, :32, :32]
    sampled = cells(home / use("--sample", "a red picture", "it is blue").stdout.split()[-1])
    sentence = cells(home / use("--interpolate", "a red picture", "it is blue").stdout.split()[-1])
    noise = cells(home / use("--interpolate", "a red picture", "it is blue", "--noise").stdout.split()[-1])
    assert sampled.shape[:2] == (2, 8) and sentence.shape[:2] == (4, 8) and noise.shape[:2] == (2, 8)
    z = torch.equal(dfgan.noise(8, 0)[:4], dfgan.noise(4, 0))      # the same noise in a longer draw?
    for row in range(4 if z else 1):                               # from A to B at the noises of the sample's columns
        assert np.abs(sentence[row, 0].astype(int) - sampled[0, row]).max() <= 1
        assert np.abs(sentence[row, -1].astype(int) - sampled[1, row]).max() <= 1
    assert not np.array_equal(noise[0, 0], noise[0, -1]) and not np.array_equal(noise[0, 0], noise[1, 0])
    done = use("--sample", "a red picture", "it is blue", "--images", 70)
    folders = [home / line for line in done.stdout.splitlines()[-2:]]
    assert [len(list(f.glob("*.png"))) for f in folders] == [70, 70] and (folders[1] / "caption.txt").read_text() == "it is blue\n"
    few = folders[0].joinpath("00009.png").read_bytes(), folders[0].joinpath("00065.png").read_bytes()
    use("--sample", "a red picture", "--images", 66)
    assert few == (folders[0].joinpath("00009.png").read_bytes(), folders[0].joinpath("00065.png").read_bytes())


def test_truncated_noise():
    z = dfgan.noise(2000, 0, 0.88)
    assert z.abs().max() <= 1.76 and z.std().item() == pytest.approx(0.773, abs=0.005)        # papers: std 0.773
    assert dfgan.noise(2000, 0).std().item() == pytest.approx(1, abs=0.01)


def state_epoch(path, nf=2, size=64, prefix=""):
    """A file of the released layout: weights and Adam's moments of networks of width nf, the unused conv_s included."""
    torch.manual_seed(1)
    G, D, opt_g, opt_d = dfgan.make(nf, size)
    fake = G(torch.randn(4, 100), e := torch.randn(4, 256))
    dfgan.d_step(D, opt_d, torch.randn(4, 3, size, size), e.roll(1, 0), fake, e), dfgan.g_step(D, opt_g, fake, e)
    d, moments, number = {}, {}, 0
    for i, (name, p) in enumerate(D.named_parameters()):
        if name.startswith("joint_conv.0") and size > 32:      # after the last block: conv_s of its equal widths, never used
            d[f"DBlocks.{len(D.DBlocks) - 1}.conv_s.weight"], d[f"DBlocks.{len(D.DBlocks) - 1}.conv_s.bias"] = torch.ones(8 * nf, 8 * nf, 1, 1), torch.ones(8 * nf)
            number += 2
        d[name] = p.detach()
        if i in opt_d.state_dict()["state"]:
            moments[number] = opt_d.state_dict()["state"][i]
        number += 1
    c = {name: d.pop(name) for name in list(d) if name.startswith("joint_conv")}
    named = lambda weights: {prefix + name: value for name, value in weights.items()}
    torch.save({"model": {"netG": named(G.state_dict()), "netD": named(d), "netC": named(c)}, "epoch": 1220, "optimizers": {
        "optimizer_G": opt_g.state_dict(), "optimizer_D": {"state": moments, "param_groups": [{"params": list(range(number))}]}}}, path)
    return G, D, opt_g, opt_d


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_checkpoint_samples_and_continues(home, prefix):
    G, D, opt_g, opt_d = state_epoch(home / "state_epoch_1220.pth", prefix=prefix)
    name = f"df-init{prefix}"
    flags = ("--data", "own", "--run", name, "--device", "cpu", "--init", "state_epoch_1220.pth", "--text-encoder",
             "runs/damsm-own/encoder.pt", "--batch-size", 4)
    done = call(SCRIPT, *flags, "--sample", "it is red", cwd=home)
    assert done.returncode == 0 and "epoch 1220, nf 2, 64 px" in done.stdout, done.stderr
    with Image.open(home / done.stdout.split()[-1]) as image:
        assert image.size == (8 * 66 + 2, 66 + 2)
    first = dfgan.released(type("Flags", (), dict(init=home / "state_epoch_1220.pth", text_encoder=home / "runs/damsm-own/encoder.pt",
                                                                     data="own", root="datasets", lr_g=1e-4, lr_d=4e-4, seed=0))())
    assert same(first["G"], G.state_dict()) and same(first["D"], D.state_dict())
    assert same(first["opt_g"]["state"], opt_g.state_dict()["state"]) and same(first["opt_d"]["state"], opt_d.state_dict()["state"])
    done = call(SCRIPT, *flags, "--evaluate", "--eval-images", 10, cwd=home)       # no Inception here: R-precision alone
    assert done.returncode == 0 and f"checkpoint    {home / 'state_epoch_1220.pth'}" in done.stdout and "as released" in done.stdout, done.stderr
    done = call(SCRIPT, *flags, "--epochs", 1, cwd=home)
    assert done.returncode == 0 and "nf 2" in done.stdout, done.stderr
    done = call(SCRIPT, *flags, "--epochs", 2, cwd=home)           # the same command continues
    assert done.returncode == 0 and states(home, name)[0]["step"] == 10, done.stderr
    done = call(SCRIPT, *flags, "--epochs", 2, "--nf", 64, cwd=home)
    assert done.returncode == 2 and "--nf 64 contradicts the run" in done.stderr


def test_two_starts_from_a_released_checkpoint_are_equal(home):
    state_epoch(home / "twice.pth", size=32)
    flags = ("--data", "own", "--device", "cpu", "--init", "twice.pth", "--text-encoder", "runs/damsm-own/encoder.pt", "--batch-size", 4, "--epochs", 1)
    for name in ("df-once", "df-twice"):
        assert call(SCRIPT, *flags, "--run", name, cwd=home).returncode == 0
    a, b = states(home, "df-once", "df-twice")
    assert same(a["G"], b["G"]) and same(a["D"], b["D"])
    done = call(SCRIPT, *flags, "--run", "df-thrice", "--size", 128, cwd=home)
    assert done.returncode == 2 and f"--size 128 contradicts {home / 'twice.pth'}, which has 32" in done.stderr


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other", "missing", "no encoder", "no epoch", "no moments", "odd moments"])
def test_a_wrong_released_file_is_one_sentence(home, damage):
    path = home / f"{damage}.pth"
    state_epoch(path)
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[:len(whole) // 2])
    if damage == "flipped":
        path.write_bytes(whole[:200] + bytes(b ^ 255 for b in whole[200:900]) + whole[900:])
    if damage == "other":
        torch.save({"model": {"netG": {"a": torch.zeros(2)}}}, path)
    if damage == "missing":
        path.unlink()
    if damage in ("no epoch", "no moments", "odd moments"):
        file = torch.load(path)
        moments = file["optimizers"]["optimizer_D"]["state"]
        if damage == "no epoch":
            del file["epoch"]
        elif damage == "no moments":
            del moments[max(moments)]
        else:
            moments[0]["exp_avg"] = torch.zeros(7)
        torch.save(file, path)
    flags = () if damage == "no encoder" else ("--text-encoder", "runs/damsm-own/encoder.pt")
    done = call(SCRIPT, "--data", "own", "--run", "df-bad", "--init", path, *flags, cwd=home)
    words = {"missing": "does not exist", "no encoder": "needs the DAMSM encoder"}.get(damage, "is no released DF-GAN checkpoint, or is damaged")
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr and not (home / "df-bad").exists()


@pytest.mark.parametrize("flags, words", [
    (("--size", "100"), "invalid choice: 100"),
    (("--run", "none", "--sample", "a"), "there is no model in none yet"),
    (("--text-encoder", "runs/char-cnn-rnn-own/encoder.pt"), "is a CharCnnRnn, this script needs damsm"),
    (("--truncation", "-1", "--sample", "a"), "-1 is not between 0 and"),
    (("--images", "0", "--sample", "a"), "0 is not between 1 and"),
    (("--images", "3"), "--images says how to draw; add --sample"),
    (("--noise",), "--noise says how to draw; add --interpolate"),
    (("--truncation", "1"), "--truncation says how to draw"),
    (("--sample", "a", "--interpolate", "a", "b"), "not allowed with argument"),
    (("--run", "own/red/0.png"), "is a file; give a folder"),
    (("--device", "meta"), "--device meta is not to be had here"),
    (("--nf", "100000000"), "out of memory; give a smaller --batch-size"),
])
def test_bad_input_is_one_sentence(home, flags, words):
    done = call(SCRIPT, "--data", "own", *flags, cwd=home)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("dfgan.py: error: ")
