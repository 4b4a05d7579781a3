"""Runs through the command line: resuming, signals, torchrun, sampling, user errors, weights/."""
import ast
import functools
import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_tensor

import common
import data
from conftest import ROOT, equal, run

FLAGS = {"dfgan": "--size 32 --nf 2",
         "gan_cls": "--ngf 4 --ndf 2 --captions-per-image 2 --lr-decay-epochs 1",
         "stackgan": "--ngf 4 --ndf 2 --size 128 --num-residual 1 --lr-decay-epochs 1"}
A, B = "a red picture", "it is blue"
COLOURS = {"pink flower": lambda r, g, b: r > g + 15 and b > g,
           "purple flower": lambda r, g, b: min(r, b) > g + 5,
           "yellow flower": lambda r, g, b: min(r, g) > b + 30,
           "white flower": lambda r, g, b: min(r, g, b) > 90 and max(r, g, b) - min(r, g, b) < 60}

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
# Runs a script after lines of a test that replace something
DRIVER = """
import os, runpy, signal, sys, torch, torch.distributed as dist
sys.path.insert(0, os.path.dirname(sys.argv[1]))
signal.signal(2, signal.default_int_handler)    # ignored in the background of a shell script
import common, data
{}
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SIGNAL = """
def batches(self, step, call=data.Batches.__call__):
    if step == 2 and os.environ.get("RANK", "1") == "1":    # the first of two steps of epoch 2
        os.kill(os.getpid(), {})
    return call(self, step)
data.Batches.__call__ = batches
"""
BETWEEN = """
def load_dataset(name, split, size, root, call=data.load_dataset):
    if (split, size) == ("train", 128):
        os.kill(os.getpid(), 2)
    return call(name, split, size, root)
data.load_dataset = load_dataset
"""
KILL = "torch.save = lambda _, path: (path.write_bytes(b'x'), os.kill(os.getpid(), 9))"
COMPARE_RANKS = """
def save(path, state, call=common.save_checkpoint):
    if "opt_g" in state:
        parameters, ranks = [p.detach() for k in "GD" for p in state[k].parameters()], [0, 0]
        dist.all_gather_object(ranks, parameters)
        assert all(map(torch.equal, *ranks))
    call(path, state)
common.save_checkpoint = save
"""

@pytest.fixture(autouse=True)
def in_home(home, empty_folder, monkeypatch):
    """Run in `home`, on one thread, on which sums depend. Ctrl-C still ends the tests."""
    monkeypatch.chdir(home)
    torch.set_num_threads(1)
    monkeypatch.setattr("signal.signal", lambda *_: None)

def flags(script, name, more=""):
    line = f"--data own --device cpu --batch-size 8 --epochs 2 --out-dir runs/{name}"
    return f"{line} {FLAGS[script]} {more}".split()

def call(script, arguments):
    """Run a script in this process; return its exit status."""
    try:
        return common.run(lambda: importlib.import_module(script).main(arguments)) or 0
    except SystemExit as end:    # argparse
        return end.code

def drive(patch, script, name, launcher=()):
    Path("driver.py").write_text(DRIVER.format(patch))
    return run(*launcher, "driver.py", ROOT / f"{script}.py", *flags(script, name), cwd=".")

def load(script, name):
    return common.load_checkpoint(f"runs/{name}/last.pt", script)

@functools.cache
def straight(script):
    """Return the checkpoint of a run of 2 epochs of 2 steps without interruption."""
    assert call(script, flags(script, f"straight-{script}")) == 0
    return load(script, f"straight-{script}")

def resume(script, name):
    """Run the command again: its run must end like the one without interruption."""
    assert call(script, flags(script, name)) == 0
    assert equal(load(script, name), straight(script))

@functools.cache
def random_model(script):
    """Return a run with random weights, so that captions and noise change the images."""
    state, path = dict(straight(script)), f"runs/random-{script}"
    torch.manual_seed(0)
    for part in sorted({"ema", "G0", "text_encoder"} & state.keys()):
        state[part] = {k: v + 0.15 * torch.randn_like(v) if "weight" in k or "bias" in k else v
                       for k, v in state[part].items()}
    state["text_encoder"]["_extra_state"] = state["text_encoder"]["_extra_state"] | {"scale": 1}
    common.save_checkpoint(Path(path, "last.pt"), state)
    return path

def read_grid(output, columns):
    """Return images (rows, columns, 3, S, S) of the grid named last in the output."""
    x = to_tensor(Image.open(output.split()[-1]))[:, 2:, 2:] * 2 - 1
    size = x.shape[2] // columns
    x = x.unflatten(1, (-1, size)).unflatten(3, (-1, size)).permute(1, 3, 0, 2, 4)[..., :-2, :-2]
    return x

@pytest.mark.parametrize("script, legs", [("dfgan", ["--epochs 1"]), ("gan_cls", ["--epochs 1"]),
    ("stackgan", ["--stage 1 --epochs 1", "--stage 1", "--epochs 1"])])
def test_resumed_run_is_bit_identical(script, legs):
    for leg in legs:
        assert call(script, flags(script, f"legs-{script}", leg)) == 0
    state = load(script, f"legs-{script}")
    encoder = common.text_encoder_from_state_dict(state["text_encoder"])
    x = encoder.encode(data.load_dataset(str(Path("own").resolve()), size=64).captions)
    assert x.norm() / len(x) ** 0.5 == pytest.approx({"dfgan": 3}.get(script, 1))
    assert state["step"] == 2
    resume(script, f"legs-{script}")

@pytest.mark.parametrize("script, number", [("gan_cls", 2), ("stackgan", 15)])
def test_signal_saves_in_the_middle_of_an_epoch(script, number):
    done = drive(SIGNAL.format(number), script, f"signal-{script}")
    assert done.returncode == 128 + number and "same command" in done.stderr, done.stderr
    state = load(script, f"signal-{script}")
    assert state["step"] == 3 and len(state["history"]) == 1 and state["sums"].any()
    resume(script, f"signal-{script}")

def test_signal_between_the_stages_stops_at_once():
    assert drive(BETWEEN, "stackgan", "between").returncode == 130
    assert load("stackgan", "between")["stage"] == 1
    resume("stackgan", "between")

def test_kill_while_writing_keeps_the_last_checkpoint():
    assert drive(KILL, "dfgan", "kill").returncode == -9 and not Path("runs/kill/last.pt").exists()
    assert call("dfgan", flags("dfgan", "kill", "--epochs 1")) == 0
    assert drive(KILL, "dfgan", "kill").returncode == -9 and load("dfgan", "kill")["step"] == 2
    resume("dfgan", "kill")

def test_two_processes_equal_one_with_the_joint_batch():
    done = drive(SIGNAL.format(15), "dfgan", "two-dfgan", TORCHRUN)    # to one process: both stop
    assert done.returncode and load("dfgan", "two-dfgan")["step"] == 3, done.stderr
    done = drive(COMPARE_RANKS, "dfgan", "two-dfgan", TORCHRUN)
    assert done.returncode == 0 and done.stdout.count("22 images") == 1, done.stderr
    two, one = load("dfgan", "two-dfgan"), straight("dfgan")
    for net in ("G", "D", "ema"):
        torch.testing.assert_close(two[net], one[net], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("script, more", [("gan_cls", "--epochs 1"), ("stackgan", "--stage 1")])
def test_other_scripts_go_on_with_two_processes(script, more):
    assert call(script, flags(script, f"two-{script}", more)) == 0
    done = drive(COMPARE_RANKS, script, f"two-{script}", TORCHRUN)
    assert done.returncode == 0, done.stderr
    epochs = [row["epoch"] for row in load(script, f"two-{script}")["history"]]
    assert epochs == {"gan_cls": [1, 2], "stackgan": [1, 2, 1, 2]}[script]

@pytest.mark.parametrize("script", FLAGS)
def test_samples_are_those_of_the_python_api(script, capsys):
    module, out_dir = importlib.import_module(script), random_model(script)
    G, text_encoder = module.load_generator(f"{out_dir}/last.pt")
    t, z = text_encoder.encode_prompts([A, B]), module.sample_noise(3, 7)
    line_t, line_z = (torch.stack((x[0], (x[0] + x[-1]) / 2, x[-1])) for x in (t, z))
    t3 = t.repeat_interleave(3, 0)
    for flag, noise, text in (("--sample", z.repeat(2, 1), t3),
                              ("--interpolate", z.repeat(3, 1), line_t.repeat_interleave(3, 0)),
                              ("--interpolate-noise", line_z.repeat(2, 1), t3)):
        command = f"--out-dir {out_dir} --seed 7 --samples-per-caption 3 {flag}".split() + [A, B]
        assert call(script, command) == 0
        x = module.generate(G, noise, text).unflatten(0, (-1, 3))
        assert (x[0] - x[1]).abs().max() > 0.1 < (x[:, 0] - x[:, 2]).abs().max()
        grid = read_grid(capsys.readouterr().out, 3)
        assert (grid - x).abs().mean() < 0.004    # 8 bits; rounding may flip a saturated pixel
    assert call(script, ["--out-dir", out_dir, "--sample", A, B, "--num-images", "2"]) == 0
    files = sorted(Path(capsys.readouterr().out.split()[-1]).iterdir())
    x = module.generate(G, module.sample_noise(2)[1:], t[1:])[0] / 2 + 0.5
    assert len(files) == 4 and (to_tensor(Image.open(files[3])) - x).abs().max() < 0.01

class SmallInception(torch.nn.Module):
    def forward(self, x):
        pooled = F.pad(F.adaptive_avg_pool2d(x, 26).flatten(1), (0, 20))    # (B, 2048)
        return pooled, F.adaptive_avg_pool2d(x, 96).reshape(-1, 768, 36)

@pytest.mark.parametrize("script", FLAGS)
def test_evaluate(script, monkeypatch, capsys):
    """R-precision needs an encoder with Inception features."""
    monkeypatch.setattr(common, "FIDInception", SmallInception)
    path = Path("damsm.pt")
    common.train_text_encoder("damsm", data.dataset_id("own"), "", "cpu", path, 2, "inception")
    assert call(script, ["--out-dir", random_model(script), "--evaluate", "--fid-samples", "40",
                         "--r-precision-encoder", str(path)]) == 0
    metrics = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert metrics["fid"] > 0 < metrics["diversity"] and 0 <= metrics["r_precision"] <= 1

def test_style_image(capsys):
    command = ["--out-dir", random_model("gan_cls"), "--style-image", "own/red/0.png"]
    for _ in range(2):    # the second time with the style encoder of the first
        assert call("gan_cls", [*command, "--style-steps", "2", "--sample", A, B]) == 0
        photo, a, b = read_grid(capsys.readouterr().out, 3)[0]
        assert (photo - torch.tensor([230, 20, 20])[:, None, None] / 127.5 + 1).abs().max() < 0.01
        assert (a - b).abs().max() > 0.1

@pytest.mark.parametrize("script, line, message", [
    ("dfgan", "--data own --out-dir runs/straight-dfgan --nf 4", "nf 4 contradicts"),
    ("dfgan", "--data other/own --out-dir runs/straight-dfgan", "other/own contradicts"),
    ("dfgan", "--data own --size 32 --device cuda", "CUDA"),
    ("dfgan", "--data own --size 32 --text-encoder own/red/0.png", "encoder own/red/0.png"),
    ("gan_cls", "--data own --text-encoder runs/damsm-own/encoder.pt", "char-cnn-rnn"),
    ("gan_cls", "--out-dir runs/none --sample red", "runs/none/last.pt"),
    ("stackgan", "--data nowhere", "nowhere")])
def test_user_error_is_one_line(script, line, message, monkeypatch, capfd):
    straight("dfgan")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(script, line.split()) == 2
    errors = [row for row in capfd.readouterr().err.splitlines() if "error:" in row]
    assert len(errors) == 1 and message in errors[0]

@pytest.mark.parametrize("path", sorted(ROOT.glob("weights/*.pt")), ids=lambda path: path.stem)
def test_shipped_weights(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(path.stem, ["--sample", *COLOURS]) == 0 and path.stat().st_size <= 16e6
    grid = (read_grid(capsys.readouterr().out, 8) + 1) * 127.5
    q = grid.shape[-1] // 4
    for row, (caption, is_colour) in zip(grid, COLOURS.items(), strict=True):
        middle = row[..., q:-q, q:-q].mean((2, 3)).tolist()
        assert sum(is_colour(*colour) for colour in middle) >= 6, (caption, middle)
        assert torch.pdist(row.flatten(1), 1).min() / row[0].numel() > 10, f"equal: {caption}"
