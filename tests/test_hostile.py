"""Hostile files, kills and a full disk. The long runs: python tests/fuzz.py, python tests/kill.py."""
import subprocess
import sys

import pytest
import torch

import common
import data
import fuzz
from conftest import ROOT, call


@pytest.mark.filterwarnings("ignore")            # Pillow's about damaged pictures
@pytest.mark.parametrize("name", fuzz.NAMES)
def test_damaged_and_hostile_files(tmp_path, name):
    counts = fuzz.fuzz(name, 12, 1, tmp_path)
    assert sum(counts.values()) >= 13 and counts["read"]


def test_one_bit_turned_anywhere_in_a_checkpoint_is_noticed(tmp_path):
    common.save(tmp_path / "good.pt", {"kind": "x", "weights": torch.randn(300)})
    good, noticed = (tmp_path / "good.pt").read_bytes(), 0
    places = range(0, len(good), 7)
    for i in places:
        damaged = bytearray(good)
        damaged[i] ^= 4
        (tmp_path / "bad.pt").write_bytes(damaged)
        try:                                     # a bit of the padding, a date or a name in the zip's own records changes nothing
            same = torch.equal(common.load(tmp_path / "bad.pt", "x")["weights"], common.load(tmp_path / "good.pt", "x")["weights"])
            assert same
        except data.UserError:
            noticed += 1
    assert noticed > len(places) / 2


def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path):
    for archive, make in (("a.tgz", fuzz.tarred), ("a.zip", fuzz.zipped)):
        (tmp_path / archive).write_bytes(make({"jpg/a.jpg": bytes(500_000_000)}))
        with pytest.raises(data.UserError, match="200 times its size"):
            data.extract(tmp_path / archive, tmp_path, "jpg")
        assert not (tmp_path / "jpg").exists()


def test_a_picture_of_900_million_pixels_is_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(next(fuzz.evil("png", b"", ".png")))
    assert data.decode(data.Picture(tmp_path / "a.png", [], 0), 16) is None


@pytest.mark.parametrize("lacks", ["args", "ema", "text_encoder", "rows"])
def test_a_checkpoint_that_lacks_something_is_one_sentence(home, lacks):
    run = ("dfgan.py", "--data", "own", "--size", 32, "--nf", 1, "--batch-size", 8, "--epochs", 1, "--run", f"runs/lacks-{lacks}")
    assert call(*run, cwd=home).returncode == 0
    path = home / "runs" / f"lacks-{lacks}" / "last.pt"
    state = torch.load(path, weights_only=True)
    del state[lacks]
    torch.save(state, path)
    before = path.read_bytes()
    done = call(*run[:-4], "--epochs", 2, *run[-2:], cwd=home)
    assert done.returncode == 2 and f"holds no '{lacks}'" in done.stderr and path.read_bytes() == before


def test_killed_at_random_moments_nothing_is_lost():
    """A few of the 200 kills of tests/kill.py."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "kill.py", "--kills", "4", "--only", "dfgan"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "4 kills and 1 of the caches" in done.stdout, done.stdout + done.stderr


def test_a_full_disk_is_one_sentence_and_costs_no_checkpoint(tmp_path):
    """A small file system that is full when the second epoch is to be saved; emptied, the same command goes on."""
    from PIL import Image
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(9):
        Image.new("RGB", (40, 40), (25 * i, 200, 90)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}\n")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = (f"{sys.executable} {ROOT}/dfgan.py --data {pictures} --image-features small --size 32 --nf 2 --batch-size 4 --device cpu "
               f"--eval-every 0 --run {disk}/run")
    script = f"""
        mount -t tmpfs -o size=8m tmpfs {disk} || exit 77
        cd {tmp_path}
        {sys.executable} {ROOT}/common.py --encoder damsm --data {pictures} --image-features small --iterations 2 || exit 1
        {command} --epochs 1 || exit 2
        cp {disk}/run/last.pt {tmp_path}/before.pt
        head -c 100000000 /dev/zero > {disk}/filler                # takes what is left
        {command} --epochs 3 2> {tmp_path}/said; echo $? > {tmp_path}/code
        cmp {disk}/run/last.pt {tmp_path}/before.pt || exit 3
        ls {disk}/run | grep part && exit 4
        rm {disk}/filler
        {command} --epochs 3 || exit 5
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0, done.stdout + done.stderr
    said = (tmp_path / "said").read_text()
    assert (tmp_path / "code").read_text() == "2\n" and "could not write" in said and "intact" in said and "Traceback" not in said, said


def test_a_checkpoint_draws_where_its_pictures_are_not(home, tmp_path):
    import shutil
    run = ("dfgan.py", "--data", "own", "--size", 32, "--nf", 1, "--batch-size", 8, "--epochs", 1, "--run", "runs/moving")
    assert call(*run, cwd=home).returncode == 0
    shutil.copytree(home / "runs" / "moving", tmp_path / "there")
    for flags in ([], ["--data", "elsewhere"]):
        done = call("dfgan.py", "--run", "there", *flags, "--sample", "a red picture", cwd=tmp_path)
        assert done.returncode == 0 and (tmp_path / done.stdout.split()[-1]).is_file(), done.stderr
    done = call(*run[:1], "--data", "toy", *run[3:], cwd=home)     # to train on other pictures is another run
    assert done.returncode == 2 and "--data toy contradicts" in done.stderr
