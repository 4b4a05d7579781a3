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


def test_sizes_are_those_counted_in_the_released_networks():
    """facts.md: 20,020,832 / 12,407,425 / 57,151,312 with Stage I / 159,889,538 at widths 192 and 96, 2 residual blocks. D's text
    layer is the TensorFlow code's, and not among them."""
    count = lambda net: sum(p.numel() for name, p in net.named_parameters() if not name.startswith("text."))
    G1, G2 = stackgan.Stage1(192), stackgan.Stage2(192)
    del G2.residual[2:]
    assert (count(G1), count(G1) + count(G2)) == (20_020_832, 57_151_312)
    assert (count(stackgan.Discriminator(96, 64)), count(stackgan.Discriminator(96, 256))) == (12_407_425, 159_889_538)


@pytest.mark.parametrize("size", [128, 256])
def test_shapes(size):
    G1, G2, D1, D2 = stackgan.Stage1(4), stackgan.Stage2(4, size), stackgan.Discriminator(2), stackgan.Discriminator(2, size)
    z, eps, t = torch.randn(2, 100), torch.randn(2, 128), torch.randn(2, 1024)
    sketch, mu, log_sigma = G1(z, eps, t)
    x = G2(sketch, eps, t)[0]
    assert sketch.shape == (2, 3, 64, 64) and x.shape == (2, 3, size, size) and mu.shape == log_sigma.shape == (2, 128)
    assert D1(sketch, t)[0].shape == (2,) and D1(sketch, t)[1] is None and all(s.shape == (2,) for s in D2(x, t))
    assert len(G2.residual) == {128: 2, 256: 4}[size]              # section 3.5


def test_conditioning_augmentation():
    ca, t, eps = stackgan.ConditioningAugmentation(), torch.randn(3, 1024), torch.randn(3, 128)
    c, mu, log_sigma = ca(t, eps)
    hidden = ca.fc(t)
    hidden = torch.where(hidden > 0, hidden, 0.2 * hidden)
    torch.testing.assert_close(c, hidden[:, :128] + hidden[:, 128:].exp() * eps)
    assert torch.equal(ca(t, None)[0], mu)                        # --no-ca
    assert (log_sigma < 0).any()                                  # sigma below 1 is possible, unlike in the PyTorch release


def test_up_conv_is_upsampling_and_a_convolution():
    conv = torch.nn.Conv2d(5, 7, 3, 1, 1, bias=False).double()
    x = torch.randn(15, 5, 6, 6, dtype=torch.double)              # 540 places: with fewer it is written out
    torch.testing.assert_close(stackgan.up_conv(x, conv), conv(F.interpolate(x, scale_factor=2)), rtol=1e-12, atol=1e-12)


# ---- losses

def test_kl_equals_torch_distributions():
    mu, log_sigma = torch.randn(2, 5, 128, dtype=torch.double)
    normal = torch.distributions.Normal
    expect = torch.distributions.kl_divergence(normal(mu, log_sigma.exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(stackgan.kl_loss(mu, log_sigma), expect)
    assert stackgan.kl_loss(torch.zeros(2, 128), torch.zeros(2, 128)) == 0


def test_losses_against_loops():
    rng = np.random.default_rng(0)
    real, wrong, fake, real_alone, fake_alone = rng.standard_normal((5, 7)) * 3
    log = lambda values: sum(np.log(1 / (1 + np.exp(-v))) for v in values) / len(values)      # mean log sigmoid
    t = torch.from_numpy
    one = stackgan.d_loss((t(real), None), (t(wrong), None), (t(fake), None))
    assert one.item() == pytest.approx(-log(real) - (log(-wrong) + log(-fake)) / 2, rel=1e-12)
    two = stackgan.d_loss((t(real), t(real_alone)), (t(wrong), None), (t(fake), t(fake_alone)))
    assert two.item() == pytest.approx(-(log(real) + log(real_alone)) / 2 - (log(-wrong) + log(-fake) + log(-fake_alone)) / 3, rel=1e-12)
    assert stackgan.g_loss((t(fake), None)).item() == pytest.approx(-log(fake), rel=1e-12)
    assert stackgan.g_loss((t(fake), t(fake_alone))).item() == pytest.approx(-log(fake) - log(fake_alone), rel=1e-12)


# ---- steps

@pytest.mark.parametrize("stage", [1, 2])
def test_steps_minimise_what_they_say(stage):
    torch.manual_seed(0)
    G, D, opt_g, opt_d = stackgan.make(stage, 4, 2, 128)
    size = 64 if stage == 1 else 128
    real, wrong, t, eps = torch.rand(4, 3, size, size), torch.rand(4, 3, size, size), torch.randn(4, 1024), torch.randn(4, 128)
    fake, mu, log_sigma = G(torch.randn(4, 100) if stage == 1 else torch.rand(4, 3, 64, 64), eps, t)
    expect = stackgan.d_loss(D(real, t), D(wrong, t), D(fake.detach(), t))
    grads = torch.autograd.grad(expect, list(D.parameters()))
    before = [p.clone() for p in D.parameters()], [p.clone() for p in G.parameters()]
    seen = stackgan.d_step(D, opt_d, real, wrong, fake, t)
    assert seen[0].item() == pytest.approx(expect.item(), rel=1e-5) and all(map(torch.equal, before[1], G.parameters()))
    for p, b, g in zip(D.parameters(), before[0], grads):         # Adam's first step: the sign of the gradient
        sure = g.abs() > 1e-5
        torch.testing.assert_close(p.detach()[sure], (b - 2e-4 * g.sign())[sure], atol=2e-6, rtol=1e-5)

    kl = stackgan.kl_loss(mu, log_sigma)
    expect = stackgan.g_loss(D(fake, t)) + 2 * kl
    grads = torch.autograd.grad(expect, list(G.parameters()), retain_graph=True)
    before = [p.clone() for p in D.parameters()], [p.clone() for p in G.parameters()]
    loss = stackgan.g_step(D, opt_g, fake, t, kl)
    assert loss.item() == pytest.approx((expect - 2 * kl).item(), rel=1e-5)
    assert all(map(torch.equal, before[0], D.parameters())) and all(p.requires_grad for p in D.parameters())
    for p, b, g in zip(G.parameters(), before[1], grads):
        sure = g.abs() > 1e-5
        torch.testing.assert_close(p.detach()[sure], (b - 2e-4 * g.sign())[sure], atol=2e-6, rtol=1e-5)


def test_compiled_steps_equal_eager_ones():
    """One graph each for G and D of Stage II, by the compiler's front end; its code generator runs where there is a GPU."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        G, D, opt_g, opt_d = stackgan.make(2, 4, 2, 128)
        if compiled:
            G, D = (torch.compile(net, backend="aot_eager", fullgraph=True) for net in (G, D))
        t, eps, (real, wrong) = torch.randn(4, 1024), torch.randn(4, 128), torch.rand(2, 4, 3, 128, 128)
        fake, mu, log_sigma = G(torch.rand(4, 3, 64, 64), eps, t)
        results.append((stackgan.d_step(D, opt_d, real, wrong, fake, t), stackgan.g_step(D, opt_g, fake, t, stackgan.kl_loss(mu, log_sigma))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_copied_alone_with_only_torch(tmp_path):
    """The file in an empty folder, the project's other files, torchvision and PIL refused: the steps of both stages run."""
    shutil.copy(SCRIPT, tmp_path)
    code = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in ('torchvision', 'PIL', 'common', 'data'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, stackgan
t, eps, x = torch.randn(4, 1024), torch.randn(4, 128), torch.randn(4, 100)
for stage, size in ((1, 64), (2, 128)):
    G, D, opt_g, opt_d = stackgan.make(stage, 4, 2, 128)
    fake, mu, log_sigma = G(x, eps, t)
    real, wrong = torch.randn(2, 4, 3, size, size)
    seen = stackgan.d_step(D, opt_d, real, wrong, fake, t)
    loss_g = stackgan.g_step(D, opt_g, fake, t, stackgan.kl_loss(mu, log_sigma))
    assert torch.isfinite(seen).all() and torch.isfinite(loss_g)
    x = fake.detach()
print('the steps ran')
"""
    done = run("-c", code, cwd=tmp_path)
    assert done.stdout.strip() == "the steps ran", done.stderr


# ---- runs

TINY = ("--data", "own", "--ngf", 4, "--ndf", 2, "--size", 128, "--batch-size", 4, "--captions-per-image", 1, "--device", "cpu",
        "--image-features", "small")            # 22 pictures: 5 steps an epoch


def train(home, name, epochs, *flags):
    return call(SCRIPT, *TINY, "--run", name, "--epochs", epochs, *flags, cwd=home)


def state(home, name):
    return common.load(home / name / "last.pt", "stackgan")


KEPT = ("G", "D", "G1", "ema", "opt_g", "opt_d", "rows", "random", "total", "step", "stage")


def test_both_stages_and_a_straight_run_equals_stage_by_stage(home):
    done = train(home, "st-straight", 2)
    assert done.returncode == 0, done.stderr
    assert "own: 22 pictures at 64 px" in done.stdout and "own: 22 pictures at 128 px" in done.stdout
    names = {p.name for p in (home / "st-straight").glob("*.png")}
    assert names == {f"stage{s}_epoch_000{e}.png" for s in (1, 2) for e in (1, 2)}
    lines = (home / "st-straight" / "log.csv").read_text().splitlines()
    assert lines[0] == "stage,epoch,step,loss_g,kl,loss_d,d_real,d_wrong,d_fake,diversity,fid,r_precision" and [line[:4] for line in lines[1:]] == ["1,1,", "1,2,", "2,1,", "2,2,"]
    assert train(home, "st-parts", 1, "--stage", 1).returncode == 0      # one epoch, the second, one of Stage II, the second
    assert train(home, "st-parts", 2, "--stage", 1).returncode == 0
    first = state(home, "st-parts")
    assert train(home, "st-parts", 1, "--stage", 2).returncode == 0
    assert train(home, "st-parts", 2).returncode == 0
    a, b = state(home, "st-straight"), state(home, "st-parts")
    assert all(same(a[k], b[k]) for k in KEPT)
    # Stage I's weights and running means are those of its average, untouched by Stage II
    assert all(torch.equal(v, first["ema"][f"module.{k}"]) for k, v in a["G1"].items())


@pytest.mark.parametrize("stage", [1, 2])
def test_stopped_in_the_middle_of_a_stage_it_goes_on_there(home, stage):
    """Stopped by a signal in the middle of an epoch; the same command continues to the bits of a straight run."""
    name = f"st-stop{stage}"
    if stage == 2:
        assert train(home, name, 1, "--stage", 1).returncode == 0
    command = [*map(str, TINY), "--run", name, "--epochs", "3000", "--stage", str(stage)]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *command], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((home / name).glob(f"stage{stage}_epoch_0001.png")) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and f"of Stage {'I' * stage}; the same command continues" in errors and "Traceback" not in errors
    stopped = state(home, name)
    assert stopped["stage"] == stage
    more = stopped["step"] // 5 + 1
    assert train(home, name, more, "--stage", stage).returncode == 0
    if stage == 2:
        assert train(home, f"{name}-straight", 1, "--stage", 1).returncode == 0
    assert train(home, f"{name}-straight", more, "--stage", stage).returncode == 0
    a, b = state(home, name), state(home, f"{name}-straight")
    assert a["step"] == 5 * more and all(same(a[k], b[k]) for k in KEPT)


def test_killed_in_the_middle_of_stage_ii_the_same_command_continues_stage_ii(home):
    command = [*map(str, TINY), "--run", "st-kill", "--epochs", "4"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *command], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (home / "st-kill" / "stage2_epoch_0002.png").exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    before = state(home, "st-kill")
    assert before["stage"] == 2 and 5 <= before["step"] < 20
    done = train(home, "st-kill", 4)
    assert done.returncode == 0 and "22 pictures at 128 px" in done.stdout and "22 pictures at 64 px" not in done.stdout, done.stderr
    assert train(home, "st-alive", 4).returncode == 0
    a, b = state(home, "st-kill"), state(home, "st-alive")
    assert all(same(a[k], b[k]) for k in KEPT)


def test_learning_rate_follows_the_epoch(home):
    """Halved at epoch 100 of either stage, also when the run is continued there. (A checkpoint is set forward: no 98 epochs.)"""
    assert train(home, "st-lr", 1, "--stage", 1).returncode == 0
    common.save(home / "st-lr" / "last.pt", {**state(home, "st-lr"), "step": 99 * 5})
    for epochs, lr in ((100, 2e-4), (101, 1e-4)):
        assert train(home, "st-lr", epochs, "--stage", 1).returncode == 0
        assert all(state(home, "st-lr")[k]["param_groups"][0]["lr"] == lr for k in ("opt_g", "opt_d"))


def test_ablation_sample_and_interpolate(home):
    assert train(home, "st-noca", 1, "--no-ca", "--bf16").returncode == 0
    assert state(home, "st-noca")["rows"][0]["kl"] == 0
    use = lambda *flags: call(SCRIPT, "--data", "own", "--run", "st-noca", "--device", "cpu", *flags, cwd=home)
    done = use("--sample", "a red picture", "it is blue", "--columns", 3)
    assert done.returncode == 0, done.stderr
    with Image.open(home / done.stdout.split()[-1]) as image:
        assert image.size == (3 * 130 + 2, 4 * 130 + 2)           # Stage I above Stage II for each caption
        above = torch.from_numpy(np.asarray(image)[2:130, 2:130].copy())
    assert torch.equal(above[::2, ::2], above[1::2, 1::2])         # its pixels doubled
    for flags, rows in (((), 8), (("--noise",), 4)):
        done = use("--interpolate", "a red picture", "it is blue", *flags)
        with Image.open(home / done.stdout.split()[-1]) as image:
            assert image.size == (8 * 130 + 2, rows * 130 + 2)
    done = use("--sample", "it is red", "--images", 3)
    assert len(list((home / done.stdout.split()[-1]).glob("*.png"))) == 3
    done = train(home, "st-noca", 1, "--size", 256)
    assert done.returncode == 2 and "--size 256 contradicts the run in st-noca, which has 128" in done.stderr


def test_sample_in_either_stage_with_conditioning_augmentation(home):
    """Stage I alone shows itself at 64 px; in Stage II its row is the same, doubled; the first column of an interpolation is
    the sample."""
    cells = lambda path, size: np.asarray(Image.open(path))[2:, 2:].reshape(-1, size + 2, 4, size + 2, 3).swapaxes(1, 2)[:, :, :size, :size].astype(int)
    draw = lambda *flags: home / call(SCRIPT, "--data", "own", "--run", "st-ca", "--device", "cpu", "--columns", 4, *flags, cwd=home).stdout.split()[-1]
    assert train(home, "st-ca", 1, "--stage", 1).returncode == 0
    first = cells(draw("--sample", "a red picture", "it is blue"), 64)
    assert train(home, "st-ca", 1, "--stage", 2).returncode == 0
    both = cells(draw("--sample", "a red picture", "it is blue"), 128)
    assert first.shape[:2] == (2, 4) and both.shape[:2] == (4, 4)
    assert np.abs(both[::2, :, ::2, ::2] - first).max() <= 1
    way = cells(draw("--interpolate", "a red picture", "it is blue"), 128)
    for row in range(4):                                           # four noises, Stage I above Stage II
        assert np.abs(way[2 * row:2 * row + 2, 0] - both[:2, row]).max() <= 1
        assert np.abs(way[2 * row:2 * row + 2, 3] - both[2:, row]).max() <= 1
    done = train(home, "st-ca", 3, "--stage", 1)
    assert done.returncode == 2 and "is in Stage II, on a Stage I that stays as it is" in done.stderr


@pytest.mark.parametrize("fails_at", [1, 2, 5, None])
def test_the_trial_of_compiled_networks_leaves_no_trace(home, fails_at, monkeypatch):
    """Whichever call of G and D fails (5: D in G's step) or none: the run is the eager one, to the bit."""
    calls = []

    def compile_(f, dynamic):
        def called(*args):
            calls.append(f)
            if len(calls) == fails_at:
                raise RuntimeError("cannot")
            return f(*args)
        called.requires_grad_ = f.requires_grad_
        return called

    monkeypatch.setattr(torch, "compile", compile_)
    name = f"st-trial-{fails_at}"
    done = train(home, name, 1, "--compile", "--stage", 1)
    assert done.returncode == 0 and len(calls) == (fails_at or 5 * 6), done.stderr
    if not (home / "st-eager").exists():
        train(home, "st-eager", 1, "--stage", 1)
    a, b = state(home, name), state(home, "st-eager")
    assert all(same(a[k], b[k]) for k in KEPT)


def test_rows_of_puts_stage_i_above_stage_ii():
    first, second = torch.arange(4.).view(4, 1, 1, 1).expand(4, 3, 2, 2), 10 + torch.arange(4.).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    assert stackgan.rows_of([first, second], 2)[:, 0, 0, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13]


@pytest.mark.parametrize("flags, words", [
    (("--stage", "2"), "there is no Stage I in runs/stackgan-own to build on"),
    (("--stage", "3"), "invalid choice: 3"),
    (("--size", "64"), "invalid choice: 64"),
    (("--run", "none", "--sample", "a"), "there is no model in none yet"),
    (("--text-encoder", "runs/damsm-own/encoder.pt"), "is a Damsm, this script needs char-cnn-rnn"),
])
def test_bad_input_is_one_sentence(home, flags, words):
    done = call(SCRIPT, "--data", "own", *flags, cwd=home)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("stackgan.py: error: ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_with_its_defaults(home):
    done = call(SCRIPT, *TINY[:10], *TINY[12:], "--run", "st-gpu", "--epochs", 1, cwd=home)
    assert done.returncode == 0 and "cuda" in done.stdout and "does not work here" not in done.stdout, done.stderr
