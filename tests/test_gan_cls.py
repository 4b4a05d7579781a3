"""gan_cls.py: shapes, losses and steps against loops, resume, sampling, the command line."""
import csv
import math
import os
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
import data
import gan_cls
from conftest import ROOT, call, run, same

SCRIPT = ROOT / "gan_cls.py"


# ---- networks

def test_shapes_and_sizes_of_the_released_networks():
    G, D, S = gan_cls.Generator(), gan_cls.Discriminator(), gan_cls.StyleEncoder(8)
    x = G(torch.randn(2, 100), torch.randn(2, 1024))
    assert x.shape == (2, 3, 64, 64) and x.abs().max() <= 1 and D(x, torch.randn(2, 1024)).shape == (2,) and S(x).shape == (2, 100)
    # counted by hand from the layers of main_cls.lua, convolutions without their zeroed biases
    conv = lambda a, b, k: a * b * k * k
    block = lambda c, h: conv(c, h, 1) + conv(h, h, 3) + conv(h, c, 3) + 2 * (h + h + c)
    g = 1024 * 128 + 128 + conv(228, 1024, 4) + 2 * 1024 + block(1024, 256) + conv(1024, 512, 4) + 2 * 512 + block(512, 128)
    g += conv(512, 256, 4) + 2 * 256 + conv(256, 128, 4) + 2 * 128 + conv(128, 3, 4)
    d = conv(3, 64, 4) + conv(64, 128, 4) + 2 * 128 + conv(128, 256, 4) + 2 * 256 + conv(256, 512, 4) + 2 * 512 + block(512, 128)
    d += 1024 * 128 + 128 + 2 * 128 + conv(640, 512, 1) + 2 * 512 + conv(512, 1, 4)
    assert sum(p.numel() for p in G.parameters()) == g and sum(p.numel() for p in D.parameters()) == d


def test_initialisation_is_the_released_one():
    G = gan_cls.Generator(64)
    convolutions = torch.cat([m.weight.flatten() for m in G.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))])
    norms = torch.cat([m.weight for m in G.modules() if isinstance(m, torch.nn.BatchNorm2d)])
    assert convolutions.std().item() == pytest.approx(0.02, rel=0.01) and norms.mean().item() == pytest.approx(1, abs=0.003)


# ---- losses

def test_losses_are_algorithm_1():
    rng = np.random.default_rng(0)
    real, wrong, fake = rng.standard_normal((3, 9)) * 4
    sigmoid = lambda s: 1 / (1 + math.exp(-s))
    mean = lambda values: sum(values) / len(values)
    s_r, s_w, s_f = (mean([math.log(sigmoid(v)) for v in real]), mean([math.log(1 - sigmoid(v)) for v in wrong]),
                     mean([math.log(1 - sigmoid(v)) for v in fake]))
    t = lambda a: torch.from_numpy(a)
    assert gan_cls.d_loss(t(real), t(wrong), t(fake)).item() == pytest.approx(-(s_r + (s_w + s_f) / 2), rel=1e-12)
    assert gan_cls.d_loss(t(real), None, t(fake)).item() == pytest.approx(-(s_r + s_f), rel=1e-12)
    assert gan_cls.g_loss(t(fake)).item() == pytest.approx(-mean([math.log(sigmoid(v)) for v in fake]), rel=1e-12)


def test_losses_are_finite_for_sure_logits():
    huge = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = gan_cls.d_loss(huge, huge, huge) + gan_cls.g_loss(huge)
    loss.backward()
    assert loss.isfinite() and huge.grad.isfinite().all()


def test_style_loss_and_halfway():
    z = torch.randn(4, 100)
    expect = sum(float(z[i, j] - 0.25) ** 2 for i in range(4) for j in range(100)) / 4
    assert gan_cls.style_loss(lambda x: torch.full((4, 100), 0.25), z, None).item() == pytest.approx(expect, rel=1e-5)
    t = torch.arange(10.).view(5, 2)
    assert gan_cls.halfway(t).tolist() == [[2, 3], [4, 5]]         # of 0 and 2, 1 and 3; the odd one out has no partner


def test_auc_equals_counting_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 40) + 1, rng.integers(0, 6, 30)
    expect = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert gan_cls.auc(torch.tensor(a), torch.tensor(b)) == pytest.approx(expect)


# ---- steps

def parts(seed=0, n=6):
    torch.manual_seed(seed)
    G, D, opt_g, opt_d = gan_cls.make(4, 4)
    real, wrong = torch.rand(2, n, 3, 64, 64) * 2 - 1
    return G, D, opt_g, opt_d, real, wrong, torch.randn(n, 1024)


def adam(weight, gradient, lr=2e-4):
    """Adam's first step with betas (0.5, 0.999), in closed form."""
    m, v = gradient * 0.5 / 0.5, gradient ** 2 * 0.001 / 0.001
    return weight - lr * m / (v.sqrt() + 1e-8)


@pytest.mark.parametrize("variant", ["gan", "cls", "int", "int-cls"])
def test_steps_minimise_what_they_say(variant):
    G, D, opt_g, opt_d, real, wrong, t = parts()
    t_g = torch.cat((t, gan_cls.halfway(t))) if "int" in variant else t
    fake = G(torch.randn(len(t_g), 100), t_g)
    s = [D(x, t) for x in ((real, wrong, fake[:6].detach()) if "cls" in variant else (real, fake[:6].detach()))]
    expect = -F.logsigmoid(s[0]).mean() - sum(F.logsigmoid(-x).mean() for x in s[1:]) / len(s[1:])
    weights = list(D.parameters())
    grads = torch.autograd.grad(expect, weights)
    before_g = [p.clone() for p in G.parameters()]
    want = [adam(p.detach(), g) for p, g in zip(weights, grads)]
    loss, *seen = gan_cls.d_step(D, opt_d, real, wrong if "cls" in variant else None, fake[:6], t)
    assert loss.item() == pytest.approx(expect.item(), rel=1e-5)
    assert seen[0].item() == pytest.approx(s[0].sigmoid().mean().item(), rel=1e-5)
    assert seen[1].isnan() == ("cls" not in variant)
    for p, w, g in zip(weights, want, grads):
        sure = g.abs() > 1e-6                                      # Adam's first step is the sign: unsure where g is rounding
        torch.testing.assert_close(p.detach()[sure], w[sure], atol=1e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before_g, G.parameters()))

    expect = -F.logsigmoid(D(fake, t_g)).mean()
    grads = torch.autograd.grad(expect, list(G.parameters()), retain_graph=True)
    before_d = [p.clone() for p in D.parameters()]
    loss = gan_cls.g_step(D, opt_g, fake, t_g)
    assert loss.item() == pytest.approx(expect.item(), rel=1e-5)
    for p, b, g in zip(G.parameters(), before_g, grads):
        sure = g.abs() > 1e-6
        torch.testing.assert_close(p.detach()[sure], adam(b, g)[sure], atol=1e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before_d, D.parameters())) and all(p.requires_grad for p in D.parameters())


def test_copied_alone_with_only_torch(tmp_path):
    """The file in an empty folder, the project's other files, torchvision and PIL refused: both steps run."""
    shutil.copy(SCRIPT, tmp_path)
    code = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in ('torchvision', 'PIL', 'common', 'data'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, gan_cls
G, D, opt_g, opt_d = gan_cls.make(8, 8)
t, real, wrong = torch.randn(4, 1024), torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64)
fake = G(torch.randn(4, 100), t)
loss_d = gan_cls.d_step(D, opt_d, real, wrong, fake, t)[0]
loss_g = gan_cls.g_step(D, opt_g, fake, t)
assert torch.isfinite(loss_d + loss_g)
print('both steps ran')
"""
    done = run("-c", code, cwd=tmp_path)
    assert done.stdout.strip() == "both steps ran", done.stderr


# ---- runs

TINY = ("--data", "own", "--ngf", 4, "--ndf", 4, "--batch-size", 4, "--device", "cpu")   # 22 pictures: 5 steps an epoch


def train(home, name, epochs, *flags, **how):
    return (run if how else call)(SCRIPT, *TINY, "--run", name, "--epochs", epochs, *flags, cwd=home, **how)


def test_a_run_leaves_what_it_promises(home):
    done = train(home, "whole", 2)
    assert done.returncode == 0, done.stderr
    assert "text encoder: char-cnn-rnn trained here on own" in done.stdout and "2 epochs done" in done.stdout
    for epoch in (1, 2):
        with Image.open(home / "whole" / f"epoch_{epoch:04}.png") as image:
            assert image.size == (8 * 66 + 2, 8 * 66 + 2)          # 8 captions down, 8 noises across
        assert len((home / "whole" / f"epoch_{epoch:04}.txt").read_text().splitlines()) == 8
    with open(home / "whole" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["epoch"] for r in rows] == ["1", "2"] and [r["step"] for r in rows] == ["5", "10"]
    assert all(0 < float(r[k]) < 1 for r in rows for k in ("d_real", "d_wrong", "d_fake"))


def test_resumed_equals_uninterrupted_to_the_bit(home):
    """Two epochs at once; one and one more; and one stopped by SIGTERM in the middle of an epoch."""
    assert train(home, "straight", 2).returncode == 0
    assert train(home, "resumed", 1).returncode == 0
    assert train(home, "resumed", 2).returncode == 0
    states = [common.load(home / name / "last.pt", "gan_cls") for name in ("straight", "resumed")]
    for name in ("G", "D", "ema", "opt_g", "opt_d", "rows", "random", "total", "step"):
        assert same(states[0][name], states[1][name]), name
    assert (home / "straight" / "epoch_0002.png").read_bytes() == (home / "resumed" / "epoch_0002.png").read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle_it_saves_and_continues(home, number, code):
    epochs, name = 3000, f"stop{code}"
    process = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, TINY), "--run", name, "--epochs", str(epochs)], cwd=home,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (home / name / "last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.4)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "the same command continues" in errors and "Traceback" not in errors
    step = common.load(home / name / "last.pt", "gan_cls")["step"]
    more = step // 5 + 1
    assert train(home, name, more).returncode == 0 and train(home, f"straight{code}", more).returncode == 0
    states = [common.load(home / n / "last.pt", "gan_cls") for n in (name, f"straight{code}")]
    assert states[0]["step"] == 5 * more and all(same(states[0][k], states[1][k]) for k in ("G", "D", "ema", "rows"))


def test_a_contradicting_flag_names_both_values(home):
    train(home, "flags", 1)
    done = train(home, "flags", 2, "--text-encoder", "x.pt")
    assert done.returncode == 2 and f"--text-encoder {home / 'x.pt'} contradicts the run in flags, which has None" in done.stderr
    done = train(home, "flags", 2, "--variant", "gan")
    assert done.returncode == 2 and "--variant gan contradicts the run in flags, which has int-cls" in done.stderr
    done = call(SCRIPT, "--data", "own", "--run", "flags", "--epochs", 2, "--device", "cpu", cwd=home)      # widths from the checkpoint
    assert done.returncode == 0 and "ngf 4, ndf 4" in done.stdout


@pytest.mark.parametrize("variant", ["gan", "cls", "int"])
def test_every_variant_trains(home, variant):
    assert train(home, f"variant-{variant}", 1, "--variant", variant).returncode == 0


def test_bf16_runs_on_a_cpu(home):
    done = train(home, "bf16", 1, "--bf16")
    assert done.returncode == 0, done.stderr


def test_compiled_steps_equal_eager_ones():
    """One graph each for G and D, by the compiler's front end; its code generator runs where there is a GPU (below)."""
    results = []
    for compiled in (False, True):
        G, D, opt_g, opt_d, real, wrong, t = parts()
        if compiled:
            G.compile(backend="aot_eager", fullgraph=True), D.compile(backend="aot_eager", fullgraph=True)
        fake = G(torch.randn(6, 100, generator=torch.Generator().manual_seed(0)), t)
        results.append((gan_cls.d_step(D, opt_d, real, wrong, fake, t), gan_cls.g_step(D, opt_g, fake, t)))
        assert not any(name.startswith("_orig_mod") for name in G.state_dict())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_with_its_defaults(home):
    done = call(SCRIPT, *TINY[:-2], "--run", "gpu", "--epochs", 2, cwd=home)
    assert done.returncode == 0 and "cuda" in done.stdout and "does not work here" not in done.stdout, done.stderr


def test_sample_interpolate_and_style(home):
    train(home, "use", 1)
    use = lambda *flags: call(SCRIPT, "--data", "own", "--run", "use", "--device", "cpu", *flags, cwd=home)
    done = use("--sample", "a red picture", "it is blue", "--columns", 5)
    assert done.returncode == 0, done.stderr
    path = home / done.stdout.split()[-1]
    assert "text encoder: char-cnn-rnn trained here on" in done.stdout
    with Image.open(path) as image:
        assert image.size == (5 * 66 + 2, 2 * 66 + 2)
    assert path.with_suffix(".txt").read_text() == "a red picture\nit is blue\n"
    before = path.read_bytes()
    assert use("--sample", "a red picture", "it is blue", "--columns", 5).returncode == 0 and path.read_bytes() == before
    other = use("--sample", "a red picture", "it is blue", "--columns", 5, "--seed", 1).stdout.split()[-1]
    assert (home / other).read_bytes() != before
    for flags, rows in (((), 4), (("--noise",), 2)):
        done = use("--interpolate", "a red picture", "it is blue", *flags)
        with Image.open(home / done.stdout.split()[-1]) as image:
            assert image.size == (8 * 66 + 2, rows * 66 + 2)
    done = use("--style", "own/red/0.png", "--sample", "it is blue", "a green picture", "--style-steps", 2)
    assert done.returncode == 0, done.stderr
    assert "ROC AUC of same against different style" in done.stdout
    with Image.open(home / done.stdout.split()[-1]) as image:
        assert image.size == (3 * 66 + 2, 66 + 2)                  # the photo, then a picture for each caption
    done = use("--style", "none.jpg", "--sample", "it is blue")
    assert done.returncode == 2 and "none.jpg is no picture that can be read" in done.stderr
    train(home, "use", 2)                                          # another G: another S
    assert "style encoder [" in use("--style", "own/red/0.png", "--sample", "it is blue", "--style-steps", 2).stderr
    assert "style encoder [" not in use("--style", "own/red/0.png", "--sample", "it is red", "--style-steps", 2).stderr


@pytest.mark.parametrize("flags, words", [
    (("--data", "no/such/folder"), "is no folder; --data takes"),
    (("--data", "own", "--run", "none", "--sample", "a"), "there is no model in none yet"),
    (("--data", "own", "--style", "own/red/0.png"), "add --sample"),
    (("--data", "own", "--text-encoder", "none.pt"), "none.pt does not exist"),
    (("--data", "own", "--batch-size", "1"), "1 is not between 2 and"),
    (("--data", "own", "--lr", "-1"), "-1 is not between 0 and 1"),
    (("--data", "own", "--columns", "0"), "0 is not between 1 and"),
    (("--data", "own", "--seed", "99999999999999"), "is not between 0 and"),
    (("--data", "own", "--device", "cuda:77"), "--device cuda:77 is not to be had here"),
    (("--data", "own", "--epoch", "x"), "invalid int value"),
    (("--dta", "own"), "unrecognized arguments"),
])
def test_bad_input_is_one_sentence(home, flags, words):
    done = call(SCRIPT, *flags, cwd=home)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("gan_cls.py: error: ")


def test_a_caption_of_unknown_characters_only(home):
    train(home, "unknown", 1)
    done = call(SCRIPT, "--data", "own", "--run", "unknown", "--sample", "花", cwd=home)
    assert done.returncode == 2 and "knows nothing of" in done.stderr


def test_a_damaged_checkpoint_is_named_and_kept(home):
    train(home, "damaged", 1)
    path = home / "damaged" / "last.pt"
    path.write_bytes(path.read_bytes()[:3000])
    done = train(home, "damaged", 2)
    assert done.returncode == 2 and "damaged" in done.stderr and path.stat().st_size == 3000
