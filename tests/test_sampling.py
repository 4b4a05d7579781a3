"""Samples, evaluation, pretrained weights and user errors through the command line."""
import csv
import functools
import importlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

import common
import data
import dfgan
from commands import SmallInception, TINY, call, flags, random_model, read_grid, whole_run
from conftest import ROOT

CAPTIONS = ["a red picture", "it is blue"]
DAMSM = "runs/damsm-own/encoder.pt"
INIT = f"--init released.pth --text-encoder {DAMSM}"


@pytest.fixture(autouse=True)
def in_home(home, empty_folder, monkeypatch):
    """Run in `home`, on one thread, because sums depend on it. Ctrl-C still ends the tests."""
    monkeypatch.chdir(home)
    torch.set_num_threads(1)
    monkeypatch.setattr("signal.signal", lambda *_: None)


@pytest.fixture
def output_path(capsys):
    """Return a function that runs a script and returns the path that it prints last."""
    def run_script(script, arguments):
        assert call(script, arguments) == 0
        return Path(capsys.readouterr().out.split()[-1])

    return run_script


def assert_same_pixels(images, expected):
    """Compare images in [-1, 1], of which the first are read from a file of 8 bits."""
    assert images.shape == expected.shape
    difference = (images - expected.clamp(-1, 1)).abs()
    assert difference.mean() < 0.004  # not the maximum: torchvision rounds some values down


# ---- Samples


@pytest.mark.parametrize("script", TINY)
@pytest.mark.parametrize("flag", ["--sample", "--interpolate", "--interpolate-noise"])
def test_grid_is_that_of_the_python_api(script, flag, output_path):
    """The grid has a row per caption and a column per noise."""
    module = importlib.import_module(script)
    folder = random_model(script)
    G, text_encoder = module.load_generator(folder / "last.pt")
    t = text_encoder.encode_prompts(CAPTIONS)
    z = module.sample_noise(3, seed=7)
    if flag == "--interpolate":
        t = torch.stack((t[0], (t[0] + t[1]) / 2, t[1]))
    if flag == "--interpolate-noise":
        z = torch.stack((z[0], (z[0] + z[2]) / 2, z[2]))
    images = module.generate(G, z.repeat(len(t), 1), t.repeat_interleave(3, 0))
    images = images.unflatten(0, (-1, 3))
    assert (images[0] - images[1]).abs().max() > 0.1, "captions change nothing"
    assert (images[:, 0] - images[:, 2]).abs().max() > 0.1, "noise changes nothing"

    options = ["--out-dir", folder, "--seed", 7, "--samples-per-caption", 3]
    path = output_path(script, options + [flag] + CAPTIONS)
    assert_same_pixels(read_grid(path, 3), images)
    assert path.with_suffix(".txt").read_text().splitlines() == CAPTIONS


@pytest.mark.parametrize("script", TINY)
def test_num_images_writes_a_file_per_image(script, output_path):
    module = importlib.import_module(script)
    folder = random_model(script)
    G, text_encoder = module.load_generator(folder / "last.pt")
    t = text_encoder.encode_prompts(CAPTIONS).repeat_interleave(2, 0)
    images = module.generate(G, module.sample_noise(2).repeat(2, 1), t)

    arguments = ["--out-dir", folder, "--num-images", 2, "--sample"] + CAPTIONS
    path = output_path(script, arguments)
    (path / "00004.png").write_bytes(b"of an earlier call with more images")
    assert output_path(script, arguments) == path
    files = sorted(path.glob("*.png"))
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png", "00003.png"]
    for i, file in enumerate(files):
        assert_same_pixels(to_tensor(Image.open(file)) * 2 - 1, images[i])
        assert file.with_suffix(".txt").read_text() == CAPTIONS[i // 2] + "\n"


def test_different_samples_have_different_files(output_path):
    """Long captions differ after the characters that a file name takes."""
    long_caption = "a red picture " * 20
    folder = random_model("dfgan")
    paths = set()
    for arguments in (
            ["--sample", "red", "picture"],
            ["--sample", "red picture"],
            ["--sample", "red picture", "--seed", 1],
            ["--sample", long_caption + "red"],
            ["--sample", long_caption + "blue"],
            ["--interpolate", "red", "picture"],
            ["--interpolate-noise", "red", "picture"]):
        path = output_path("dfgan", ["--out-dir", folder] + arguments)
        assert path.exists()
        assert path not in paths, arguments
        paths.add(path)


def test_stage_1_and_both_stages_have_different_files(output_path):
    arguments = ["--out-dir", random_model("stackgan"), "--sample"] + CAPTIONS
    stage1 = output_path("stackgan", arguments + ["--stage", 1])
    both = output_path("stackgan", arguments)
    assert read_grid(stage1, 8).shape[-1] == 64
    assert read_grid(both, 8).shape[-1] == 128


def save_released(path, G, D):
    """Save networks as the authors do: names begin with "module.", D is in two parts."""
    networks = {"netG": {}, "netD": {}, "netC": {}}
    for name, value in G.state_dict().items():
        networks["netG"][f"module.{name}"] = value
    for name, value in D.state_dict().items():
        part = "netC" if name.startswith("joint_conv") else "netD"
        networks[part][f"module.{name}"] = value
    torch.save({"model": networks}, path)


@pytest.fixture
def released_G(in_home):
    """Return G of released.pth, which is written like the authors' files."""
    torch.manual_seed(0)
    G, D, _, _ = dfgan.build(nf=2, size=32)
    for parameter in G.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    save_released("released.pth", G, D)
    return G


def test_init_draws_without_a_dataset(released_G, output_path):
    t = common.load_text_encoder(DAMSM).encode_prompts(CAPTIONS)
    noise = dfgan.sample_noise(8).repeat(2, 1)
    images = dfgan.generate(released_G, noise, t.repeat_interleave(8, 0))

    line = f"--data cub --nf 2 --size 32 --out-dir runs/released {INIT} --sample"
    path = output_path("dfgan", line.split() + CAPTIONS)
    assert_same_pixels(read_grid(path, 8), images.unflatten(0, (2, 8)))


def test_init_of_another_size_is_a_user_error(released_G, capsys):
    line = f"--data cub --nf 2 --size 64 --out-dir runs/new {INIT} --sample red"
    assert call("dfgan", line.split()) == 2
    error = "error: released.pth has other layers than a G of --size 64 and --nf 2"
    assert error in capsys.readouterr().err


# ---- Style transfer


@pytest.fixture
def style_transfer(output_path):
    """Return a function that draws two captions in the style of a red photo."""
    def draw(folder, *more):
        line = f"--out-dir {folder} --style-image own/red/0.png --style-steps 2 --sample"
        return output_path("gan_cls", line.split() + CAPTIONS + list(more))

    return draw


def test_style_grid_shows_the_photo_and_the_captions(style_transfer):
    path = style_transfer(random_model("gan_cls"))
    photo, first, second = read_grid(path, 3)[0]
    red = torch.tensor([230, 20, 20])[:, None, None] / 127.5 - 1
    assert (photo - red).abs().max() < 0.01
    assert (first - second).abs().max() > 0.1
    assert path.with_suffix(".txt").read_text().splitlines() == ["0"] + CAPTIONS


def test_style_encoder_is_kept_for_its_generator_and_seed_only(style_transfer, tmp_path):
    state = common.load_checkpoint(random_model("gan_cls") / "last.pt", "gan_cls")
    common.save_checkpoint(tmp_path / "last.pt", state)

    def style_encoders():
        return {path.name for path in tmp_path.glob("style-*.pt")}

    grid = read_grid(style_transfer(tmp_path), 3)
    first = style_encoders()
    assert len(first) == 1
    assert torch.equal(read_grid(style_transfer(tmp_path), 3), grid)
    assert style_encoders() == first

    style_transfer(tmp_path, "--seed", 1)
    assert len(style_encoders()) == 2
    weights = state["ema"]
    weights["net.0.weight"] = weights["net.0.weight"] + 1  # as after more training, same step
    common.save_checkpoint(tmp_path / "last.pt", state)
    style_transfer(tmp_path)
    assert len(style_encoders()) == 3


# ---- Evaluation


@pytest.mark.parametrize("script", TINY)
def test_evaluate_prints_what_training_logs(script, monkeypatch, capsys):
    monkeypatch.setattr(common, "FIDInception", SmallInception)
    name = f"evaluated-{script}"
    more = "--epochs 1 --eval-every 1 --fid-samples 20"
    assert call(script, flags(script, name, more)) == 0
    with open(f"runs/{name}/log.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    logged = {name: float(value) for name, value in row.items()}
    assert logged["fid"] > 0
    assert logged["inception_score"] >= 1
    capsys.readouterr()

    arguments = ["--out-dir", f"runs/{name}", "--evaluate", "--fid-samples", 20]
    assert call(script, arguments) == 0
    output = capsys.readouterr().out
    assert f"FID {logged['fid']:.2f} of 20 images against 2 real" in output
    assert f"Inception Score {logged['inception_score']:.2f}" in output
    assert f"diversity {logged['diversity']:.2f}" in output
    assert "no R-precision" in output  # the encoder of `home` has no Inception features


def test_evaluate_with_r_precision(monkeypatch, capsys):
    wide_inception = functools.partial(SmallInception, 2048)
    monkeypatch.setattr(common, "FIDInception", wide_inception)
    monkeypatch.setattr(common, "frechet_distance", lambda *_: 0.0)  # takes seconds at this width
    encoder = Path("damsm.pt")
    name = data.dataset_id("own")
    common.train_text_encoder("damsm", name, "", "cpu", encoder, 2, "inception")
    line = f"--evaluate --fid-samples 20 --r-precision-encoder {encoder} --out-dir"
    assert call("dfgan", line.split() + [random_model("dfgan")]) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("R-precision")
    assert 0 <= float(last_line.split()[-1].rstrip("%")) <= 100


# ---- User errors: one sentence on stderr, exit status 2

OLD = "--out-dir runs/whole-dfgan"  # a run that exists
USER_ERRORS = [
    # Numbers that are not positive
    ("dfgan", "--batch-size 0", "--batch-size: 0 is not a positive"),
    ("dfgan", "--epochs 0", "--epochs: 0 is not a positive"),
    ("stackgan", "--epochs -1", "--epochs: -1 is not a positive"),
    ("gan_cls", "--lr-decay-epochs 0", "--lr-decay-epochs: 0 is not a positive"),
    ("gan_cls", "--captions-per-image 0", "--captions-per-image: 0 is not a positive"),
    ("dfgan", f"{OLD} --sample red --num-images -2", "--num-images: -2 is not a positive"),
    ("dfgan", f"{OLD} --evaluate --fid-samples 0", "--fid-samples: 0 is not a positive"),
    ("dfgan", f"{OLD} --evaluate --fid-samples 1", "FID needs at least 2 generated"),

    # Batches that are too small or too large
    ("dfgan", "--size 32 --nf 2 --batch-size 1", "--batch-size must be at least 2"),
    ("dfgan", "--size 32 --nf 2 --batch-size 23", "--batch-size 23 is larger than"),

    # Devices
    ("dfgan", "--device gpu", "--device gpu is not one of auto, cpu, cuda"),
    ("dfgan", "--device cuda", "--device cuda: CUDA is not available"),
    ("stackgan", "--device mps", "--device mps: MPS is not available"),

    # Captions
    ("dfgan", f"{OLD} --sample zebra", "knows nothing of 'zebra'"),
    ("gan_cls", "--out-dir runs/whole-gan_cls --sample \u82b1", "knows nothing of '\u82b1'"),
    ("gan_cls", "--style-image own/red/0.png", "--style-image needs --sample"),

    # Datasets and runs
    ("stackgan", "--data nowhere", "there is no folder"),
    ("gan_cls", "--out-dir runs/none --sample red", "runs/none/last.pt does not exist"),
    ("dfgan", f"{OLD} --nf 4", "--nf 4 contradicts"),
    ("dfgan", f"{OLD} --data other", "--data other contradicts"),
    ("dfgan", "--out-dir own/red/0.png", "cannot write to own/red/0.png"),

    # Text encoders
    ("dfgan", "--text-encoder own/red/0.png", "cannot load the text encoder own/red/0.png"),
    ("gan_cls", f"--text-encoder {DAMSM}", "is not an encoder of the kind char-cnn-rnn"),
    ("dfgan", f"{OLD} --text-encoder {DAMSM}", "--text-encoder is for a new run"),

    # The authors' DF-GAN
    ("dfgan", "--init released.pth", "--init needs the text encoder"),
    ("dfgan", f"{OLD} {INIT}", "--init starts a new run, but"),
    ("dfgan", f"{OLD} {INIT} --sample red", "--init starts a new run, but"),
    ("dfgan", f"{OLD} {INIT} --evaluate", "--init starts a new run, but")]


@pytest.mark.parametrize("script, line, message", USER_ERRORS)
def test_user_error_is_one_sentence(script, line, message, monkeypatch, capfd):
    whole_run("dfgan")
    whole_run("gan_cls")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    capfd.readouterr()
    shared = ["--data", "own", "--out-dir", "runs/new"]  # of two equal flags, the last counts
    assert call(script, shared + line.split()) == 2
    errors = [row for row in capfd.readouterr().err.splitlines() if "error:" in row]
    assert len(errors) == 1
    assert message in errors[0]
    assert not Path("runs/new/last.pt").exists()


@pytest.mark.parametrize("arguments", [
    ["--sample", ""],
    ["--sample", "red", " \t"],
    ["--interpolate", "red", ""]])
def test_blank_caption_is_a_user_error(arguments, capfd):
    whole_run("dfgan")
    assert call("dfgan", OLD.split() + arguments) == 2
    assert "error: a caption is blank" in capfd.readouterr().err


# ---- Pretrained weights

FLOWERS = ["pink flower", "purple flower", "yellow flower", "white flower"]
BIRDS = ["a small yellow bird", "a small red bird", "a small blue bird"]


def is_right(caption, r, g, b):
    """Return whether a mean colour, 0 to 255, is that of a caption of FLOWERS."""
    if caption == "pink flower":
        return r > g + 15 and b > g
    if caption == "purple flower":
        return min(r, b) > g + 5
    if caption == "yellow flower":
        return min(r, g) > b + 30
    lightest, darkest = max(r, g, b), min(r, g, b)
    return darkest > 90 and lightest - darkest < 60


def check_flowers(colours):
    """Six of eight flowers have the colour of their caption. colours: captions -> (8, 3)."""
    for caption in FLOWERS:
        rows = colours[caption].tolist()
        hits = [is_right(caption, *row) for row in rows]
        assert sum(hits) >= 6, (caption, rows)


def check_birds(colours):
    """Yellow birds are yellower than blue ones, red birds redder. colours: captions -> (8, 3)."""
    means = [colours[caption].mean(0).tolist() for caption in BIRDS]
    yellowness = [min(r, g) - b for r, g, b in means]
    redness = [r - max(g, b) for r, g, b in means]
    yellow, red, blue = range(3)
    assert yellowness[yellow] > yellowness[blue] + 10, means
    assert redness[red] > redness[blue] + 10, means


WEIGHTS = {  # by dataset: captions, and the check of the mean colours of the middles of images
    "flowers": (FLOWERS, check_flowers),
    "cub": (BIRDS, check_birds)}


@pytest.mark.parametrize("path", sorted(ROOT.glob("weights/*.pt")), ids=lambda path: path.stem)
def test_shipped_weights_draw_the_colours_of_captions(path, tmp_path, monkeypatch, output_path):
    monkeypatch.chdir(tmp_path)
    script, dataset = path.stem.split("-")
    captions, check = WEIGHTS[dataset]
    assert path.stat().st_size <= 16e6
    grid = read_grid(output_path(script, ["--data", dataset, "--sample"] + captions), 8)
    grid = (grid + 1) * 127.5  # (captions, 8, 3, S, S)
    quarter = grid.shape[-1] // 4
    middle = grid[..., quarter:-quarter, quarter:-quarter].mean((3, 4))
    check(dict(zip(captions, middle)))
    for row in grid.flatten(2):
        distances = torch.pdist(row, 1) / row.shape[1]
        assert distances.min() > 10, "noise changes too little"


def test_without_data_the_flowers_are_drawn(tmp_path, monkeypatch, output_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["--samples-per-caption", 2, "--sample", "pink flower"]
    path = output_path("stackgan", arguments)
    assert path.parent == Path("runs/stackgan-flowers-weights")
    assert output_path("stackgan", arguments + ["--data", "flowers"]) == path
