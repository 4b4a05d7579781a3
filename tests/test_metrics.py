"""Metrics: golden FID, closed forms and plain loops, and --evaluate and --eval-every from the command line."""
import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import dfgan
from conftest import call, same, shared


# ---- FID

def test_frechet_in_closed_form():
    rng = np.random.default_rng(0)
    a, b, m1, m2 = rng.uniform(0.1, 2, (4, 6))
    expect = ((m1 - m2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()       # diagonal covariances commute
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    given = [torch.from_numpy(x) for x in (turn @ m1, turn @ np.diag(a) @ turn.T, turn @ m2, turn @ np.diag(b) @ turn.T)]
    assert common.frechet(*given) == pytest.approx(expect, rel=1e-10)


def test_frechet_of_covariances_that_do_not_commute():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((50, 5)) @ rng.standard_normal((5, 5)), rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)) + 1
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expect = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * np.sqrt(np.linalg.eigvals(s1 @ s2)).sum().real
    ours = common.frechet(*common.gaussian(common.moments(torch.from_numpy(x))), *common.gaussian(common.moments(torch.from_numpy(y))))
    assert ours == pytest.approx(expect, rel=1e-10)


def test_moments_of_parts_add_up():
    x = torch.randn(101, 7) * 3 + 5
    mean, cov = common.gaussian(sum(common.moments(part) for part in x.split(13)))
    np.testing.assert_allclose(mean.numpy(), x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_golden_fid(inception_file):
    figures, net, sets = np.load(shared("golden", "fid_flowers.npz")), common.inception(), []
    for ids in (figures["ids_a"], figures["ids_b"]):
        pictures = []
        for i in ids:
            with Image.open(shared("data", "flowers", "jpg", f"image_{i:05}.jpg")) as image:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                pictures.append(np.asarray(image.convert("RGB").crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling.BILINEAR)))
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        sets.append(torch.cat([net(some)[0] for some in images.split(50)]))
    np.testing.assert_allclose(sets[0][:8].numpy(), figures["features_a"], atol=1e-4, rtol=0)
    for features, mean in zip(sets, (figures["mean_a"], figures["mean_b"])):
        np.testing.assert_allclose(features.mean(0).numpy(), mean, atol=1e-5, rtol=0)
    a, b = (common.gaussian(common.moments(features)) for features in sets)
    assert common.frechet(*a, *b) == pytest.approx(float(figures["fid"]), abs=0.01)
    assert common.frechet(*a, *a) == pytest.approx(0, abs=1e-3)


def test_pictures_are_measured_as_files_would_be(tmp_path):
    image = torch.rand(1, 3, 32, 32) * 2.4 - 1.2
    common.save_grid(tmp_path / "x.png", image, 1)
    with Image.open(tmp_path / "x.png") as file:
        stored = torch.from_numpy(np.asarray(file).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    # a grid of one picture has no frame
    assert (common.eight_bits(image) - stored).abs().max() < 1e-6


# ---- diversity and R-precision

def test_spread_is_the_mean_distance_of_pairs():
    x = torch.randn(3, 4, 5)
    pairs = [(x[g, i] - x[g, j]).norm() for g in range(3) for i in range(4) for j in range(i)]
    assert common.spread(x) == pytest.approx(float(sum(pairs)) / len(pairs), rel=1e-5)


class Unseen:
    """A data set of n pictures in classes, three captions each, pictures being their own features."""
    traits = None

    def __init__(self, n, classes):
        self.classes, self.first = torch.arange(n) % classes, torch.arange(n + 1) * 3
        self.captions = [f"{i} {k}" for i in range(n) for k in range(3)]

    def __len__(self):
        return len(self.classes)


class Scorer:
    """Text (M, dim) and pictures of one space, both given."""
    small = None

    def __init__(self, text):
        self.text = text

    def encode(self, captions, label=None):
        return self.text

    def embed(self, pooled):
        return pooled


@pytest.fixture
def given(monkeypatch):
    monkeypatch.setattr(common, "embeddings", lambda encoder, unseen: encoder.encode(unseen.captions))


def test_r_precision_is_won_by_the_own_caption_and_never_lost_to_the_own_class(given):
    unseen, rng = Unseen(40, 4), torch.Generator().manual_seed(0)
    owner = torch.arange(120) // 3
    axis = torch.nn.functional.one_hot(unseen.classes[owner], 4).float()
    text = torch.cat((axis, 0.01 * torch.randn(120, 8, generator=rng)), 1)        # a class is one direction: only classes differ
    scorer = Scorer(text)
    judge = common.Judge(unseen, text, None, (scorer, scorer, "test"))
    captions = torch.randperm(120, generator=rng)
    assert judge.precise(torch.nn.functional.pad(axis, (0, 8))[captions], None, captions, 0).mean() == 1
    wrong = torch.nn.functional.pad(axis, (0, 8))[captions].roll(1, 1)[:, :12]      # pictures of another class each
    assert judge.precise(wrong, None, captions, 0).mean() < 0.05


def test_r_precision_of_pictures_without_meaning_is_one_in_a_hundred(given):
    unseen, rng = Unseen(400, 50), torch.Generator().manual_seed(0)
    text = torch.randn(1200, 64, generator=rng)
    scorer = Scorer(text)
    judge = common.Judge(unseen, text, None, (scorer, scorer, "test"))
    hits = judge.precise(torch.randn(20000, 64, generator=rng), None, torch.randint(1200, (20000,), generator=rng), 0)
    assert abs(hits.mean() - 0.01) < 4 * math.sqrt(0.01 * 0.99 / 20000)


def test_toy_pictures_show_what_their_captions_say():
    unseen = data.load("toy", "test", 64)
    judge = common.Judge(unseen, torch.zeros(len(unseen.captions), 1), None)
    captions = torch.arange(0, len(unseen.captions), 7)
    right, of = judge.follow(unseen.centre(judge.owner[captions]), captions).unbind(1)
    assert (right / of > 0.998).all() and of[0] == len(captions) > of[1] > 0
    shuffled = judge.follow(unseen.centre(judge.owner[captions]).roll(1, 0).flip(0), captions)
    assert shuffled[0, 0] / shuffled[0, 1] < 0.25


# ---- the command line

@pytest.fixture(scope="module")
def trained(home):
    """A DF-GAN of three epochs, measured after each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(shared("weights")))
        done = call("dfgan.py", "--data", "own", "--run", "runs/measured", "--size", 32, "--nf", 2, "--batch-size", 8, "--epochs", 3,
                    "--eval-every", 1, "--eval-images", 20, cwd=home)
    assert done.returncode == 0, done.stderr
    return home / "runs" / "measured"


def test_training_measures_itself_and_keeps_the_best(trained):
    rows = list(csv.DictReader((trained / "log.csv").open()))
    assert len(rows) == 3 and all(float(row["fid"]) > 0 and float(row["diversity"]) >= 0 for row in rows)
    best = min(rows, key=lambda row: float(row["fid"]))
    state = common.load(trained / "best.pt", "dfgan")
    assert state["step"] == int(best["step"]) and state["rows"][-1]["fid"] == float(best["fid"])


def test_measuring_changes_nothing_in_the_run(home, inception_file):
    """Networks that are built to measure draw random numbers: not those of the training. Resumed and straight are equal to the bit."""
    flags = ("dfgan.py", "--data", "own", "--size", 32, "--nf", 1, "--batch-size", 8, "--eval-every", 0)
    assert call(*flags, "--run", "runs/straight", "--epochs", 2, cwd=home).returncode == 0
    for epochs in (1, 2):
        assert call(*flags, "--run", "runs/resumed", "--epochs", epochs, cwd=home).returncode == 0
    straight, resumed = (common.load(home / "runs" / name / "last.pt", "dfgan") for name in ("straight", "resumed"))
    assert all(same(straight[key], resumed[key]) for key in ("G", "D", "ema", "opt_g", "opt_d", "rows", "random"))
    assert all(row["diversity"] >= 0 and row["fid"] == "" for row in straight["rows"])


def test_evaluate_says_how_it_measured_and_an_independent_sum_agrees(trained, home, inception_file):
    command = ("dfgan.py", "--data", "own", "--run", "runs/measured", "--evaluate", "--eval-images", 24, "--truncation", 0.8)
    (trained / "evaluation.json").unlink(missing_ok=True)
    done = call(*command, cwd=home)
    assert done.returncode == 0, done.stderr
    for words in ("FID", "R-precision", "diversity", "24 pictures", "which trained the generator too", "of 4\n"):
        assert words in done.stdout, done.stdout
    call(*command, "--best", "--seed", 1, cwd=home)
    first, second = json.loads((trained / "evaluation.json").read_text())
    assert first["seed"] == 0 and second["seed"] == 1 and first["images"] == 24 and first["truncation"] == 0.8
    state = common.load(trained / "last.pt", "dfgan")
    G, D, *_ = dfgan.make(2, 32)
    assert (first["parameters_G"], first["parameters_D"]) == tuple(sum(p.numel() for p in net.parameters()) for net in (G, D))
    # the same pictures, drawn here, and Frechet's formula by numpy
    ema = dfgan.AveragedModel(G)
    ema.load_state_dict(state["ema"])
    unseen = data.load(str(home / "own"), "test", 32, cache=home / "datasets" / "cache")
    sentences = common.rebuild(state["text_encoder"]).encode(unseen.captions)
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))
    fake = torch.cat([dfgan.draw(ema, dfgan.noise(len(some), b, 0.8), sentences[order[some % len(order)]])
                      for b, some in enumerate(torch.arange(24).tensor_split(5))])
    net = common.inception()
    f, r = (net(((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1)[0].double().numpy() for x in (fake, unseen.centre(torch.arange(len(unseen)))))
    s1, s2 = np.cov(f, rowvar=False), np.cov(r, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
    assert first["fid"] == pytest.approx(((f.mean(0) - r.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * root, rel=1e-4)


def test_without_inception_evaluate_says_what_is_missing(trained, home, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    done = call("dfgan.py", "--data", "own", "--run", "runs/measured", "--evaluate", "--eval-images", 10, cwd=home)
    assert done.returncode == 0 and "no FID" in done.stdout and "R-precision" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("flags, words", [
    (["--best"], "--best says which model draws"),
    (["--evaluate", "--best", "--run", "runs/plain"], "no best.pt in runs/plain;"),
    (["--evaluate", "--size", "64"], "--size 64 contradicts the run in runs/measured, which has 32"),
    (["--evaluate", "--eval-images", "3"], "not between 10"),
    (["--evaluate", "--score-encoder", "nowhere.pt"], "nowhere.pt does not exist"),
    (["--evaluate", "--score-encoder", "own/red/0.png"], "is no checkpoint"),
    (["--evaluate", "--sample", "a"], "not allowed with"),
])
def test_bad_input_is_one_sentence(trained, home, flags, words):
    done = call("dfgan.py", "--data", "own", *(["--run", "runs/measured"] if "--run" not in flags else []), *flags, cwd=home)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_damaged_evaluation_json_is_not_overwritten(trained, home):
    (trained / "evaluation.json").write_text("[{")
    done = call("dfgan.py", "--data", "own", "--run", "runs/measured", "--evaluate", "--eval-images", 10, cwd=home)
    assert done.returncode == 2 and "is damaged" in done.stderr and (trained / "evaluation.json").read_text() == "[{"
    (trained / "evaluation.json").unlink()


@pytest.mark.parametrize("script, flags", [("gan_cls.py", ["--ngf", 4, "--ndf", 4, "--captions-per-image", 1]),
                                           ("stackgan.py", ["--ngf", 4, "--ndf", 2, "--size", 128, "--captions-per-image", 1])])
def test_the_other_scripts_evaluate_too(home, script, flags):
    train = (script, "--data", "own", "--run", f"runs/measured-{script}", "--batch-size", 8, "--epochs", 1, *flags)
    assert call(*train, cwd=home).returncode == 0
    done = call(*train[:5], "--evaluate", "--eval-images", 10, *(["--style-steps", 2] if script == "gan_cls.py" else []), cwd=home)
    assert done.returncode == 0, done.stderr
    report = json.loads((home / "runs" / f"measured-{script}" / "evaluation.json").read_text())[-1]
    assert "R-precision" in done.stdout and report["parameters_G"] > 0 and 0 <= report["r_precision"] <= 1
    assert "ROC AUC" in report["style"] if script == "gan_cls.py" else report["stage"] == 2
