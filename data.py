"""Captioned images for text-to-image GANs: toy, flowers, cub, coco, or a folder of one's own.

    train = data.load("flowers", "train", size=64)              # pictures of the training classes, prepared once
    batches = data.Batches(train, batch_size=64, device="cuda")
    images, wrong, captions, classes = batches(step=0)          # a pure function of (seed, step)

toy      drawn here, no download: flowers of four petal counts, eight petal and four centre colours, five backgrounds
flowers  Oxford-102 with the captions of Reed et al. (CVPR 2016); test = classes 1-20, train = classes 21-102
cub      CUB-200-2011 with the captions of Reed et al.; 150 / 50 classes, cropped to the enlarged bounding box
coco     COCO 2014, train2014 / val2014; every picture is a class of its own
a path   a folder of any depth, photo.jpg beside photo.txt with one caption a line; sub-folders are classes

Train and test classes are disjoint in toy, flowers and cub (zero-shot); of a folder every tenth picture is held out.
Pictures are decoded once, in parallel, into a uint8 file of (N, 3, L, L), L = 76/64 of the training size, that is
memory-mapped: resident memory does not grow with the number of pictures (COCO at 256 px: 23 GB of disk, not of RAM);
start-up opens every caption file and asks for every picture's size and time. The store lives in ./datasets/cache (a link
moves it to another disk), so that a folder of pictures is never written to.
"""
import contextlib
import errno
import glob
import gzip
import hashlib
import http.client
import itertools
import json
import math
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

CACHE = Path("datasets/cache")


class UserError(Exception):
    """Something the user can put right: one sentence saying what is wrong and what to do. Scripts exit with status 2."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))           # it may quote an error of several lines


class Picture(NamedTuple):
    path: Path | None               # None: drawn from `traits`
    captions: list
    label: int | str                # class; pictures of equal label are never each other's wrong picture
    box: tuple | None = None        # CUB: left, top, right, bottom
    traits: dict | None = None      # toy: what was drawn


class Progress:
    """A bar on stderr with rate and time left. Where stderr is no terminal: a line every half minute. label None: nothing."""

    def __init__(self, total, label, unit="images", done=0):
        self.total, self.label, self.unit, self.done, self.begun, self.note = total, label, unit, done, done, ""
        self.start, self.tty = time.time(), sys.stderr.isatty()
        self.shown = self.start

    def step(self, n=1, note=None):
        self.done, self.note = self.done + n, self.note if note is None else note
        if time.time() - self.shown > (0.2 if self.tty else 30) and self.done < self.total:
            self.show("" if self.tty else "\n")

    def show(self, end="\n"):
        if self.label is None:
            return
        self.shown = time.time()
        rate = (self.done - self.begun) / max(self.shown - self.start, 1e-9)
        left = int((self.total - self.done) / rate) if rate else 0
        bar = "#" * int(20 * self.done / max(self.total, 1))
        with contextlib.suppress(OSError):                        # Ctrl-C also ends the `tee` that it is piped into
            sys.stderr.write(("\r\033[K" if self.tty else "") +
                             f"{self.label} [{bar:<20}] {self.done:.0f}/{self.total:.0f}  {rate:.{0 if rate > 9 else 1}f} {self.unit}/s"
                             f"  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left  {self.note}{end}")
            sys.stderr.flush()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.show()


@contextlib.contextmanager
def refused(sentence):
    """Any error of the block becomes a UserError of this sentence, {error} in it the cause: a damaged file makes zipfile, pickle, torch
    and each decoder raise errors of their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(sentence.replace("{error}", str(error))) from None


@contextlib.contextmanager
def writing(path):
    """A temporary name beside path, which takes its place when the block ends well and goes when it does not. What dead
    processes left behind under such names is swept. A full or forbidden disk is a UserError."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{glob.escape(path.name)}.part[0-9]*"):
            try:
                if old != part:                                   # in a container a dead process may have had our number
                    os.kill(int(old.name.rpartition(".part")[2]), 0)
                    continue
            except PermissionError:                               # somebody else's, and alive
                continue
            except (ValueError, OverflowError, ProcessLookupError):
                pass
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UserError(f"could not write {path} ({error.strerror}); make room or permit it; what was there before is intact") from None
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- downloads
# Addresses and checksums as published (Caltech, VGG, cocodataset.org). COCO's host has no valid certificate: http.

URLS = {
    "cub": [("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1", "CUB_200_2011.tgz",
             "97eceeb196236b17998738112f37df78", "CUB_200_2011"),
            ("https://huggingface.co/datasets/alkzar90/CC6204-Hackaton-Cub-Dataset/resolve/main/data/text.zip",
             "text.zip", None, "text")],
    "flowers": [("https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz", "102flowers.tgz",
                 "52808999861908f626f3c1f4e79d11fa", "jpg")],
    "coco": [("http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
              "annotations_trainval2014.zip", "0a379cfc70b0e71301e0f377548639bd", "annotations"),
             ("http://images.cocodataset.org/zips/train2014.zip", "train2014.zip",
              "0da8c0bd3d6becc4dcb32757491aca88", "train2014"),
             ("http://images.cocodataset.org/zips/val2014.zip", "val2014.zip",
              "a3d79f5ed8d289b7a7554ce06a5782b3", "val2014")],
}
# Google Drive wants a browser for files this old; no direct address of the original captions is known.
FLOWERS_CAPTIONS = ("https://drive.google.com/file/d/0B0ywwgffWnLLcms2WWJQRFNSWXM/view"
                    "?resourcekey=0-Av8zFbeDDvNcF1sSjDR32w")


def download(url, path, md5=None, sha256=None):
    """Fetch url to path. An interrupted download is kept as path.part and continued; a wrong checksum is an error."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"User-Agent": "text-to-image-gans", "Range": f"bytes={have}-"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                have = have if answer.status == 206 else 0        # 200: the server starts over
                total = have + int(answer.headers.get("Content-Length") or 0)
                with open(part, "ab" if have else "wb") as file, Progress(total / 1e6, path.name, "MB", have / 1e6) as bar:
                    while block := answer.read(1 << 20):
                        file.write(block)
                        bar.step(len(block) / 1e6)
            if part.stat().st_size < total:
                raise UserError(f"the download of {url} broke off at {part.stat().st_size} of {total} bytes; "
                                f"run the same command again to continue")
        except urllib.error.HTTPError as error:
            if error.code != 416:                                 # 416: nothing is left to fetch
                raise UserError(f"{url} answered {error.code} {error.reason}; put the file at {path} by hand") from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"could not download {url} ({getattr(error, 'reason', error)}); run the same command again "
                            f"to continue, or put the file at {path} by hand") from None
        os.replace(part, path)
    for kind, published in (("md5", md5), ("sha256", sha256)):
        with open(path, "rb") as file:
            if published and hashlib.file_digest(file, kind).hexdigest() != published:
                os.replace(path, bad := path.with_name(path.name + ".bad"))
                raise UserError(f"{path} has not the published {kind} and is now {bad.name}; run the same command again")
    return path


def fits(archive, size):
    """An archive that unpacks to more than 200 times its size holds no pictures and no captions: it fills a disk."""
    if size > 200 * Path(archive).stat().st_size + (1 << 20):
        raise UserError(f"{archive} would unpack to {size >> 20} MB and more, 200 times its size: no data set does; remove it")


def extract(archive, folder, name):
    """Unpack what lies under a folder called `name` inside the archive to folder/name, whole or not at all."""
    def inside(member):   # the path below `name`, or None: never absolute, never with ..
        parts = PurePosixPath(member).parts
        if name not in parts or "__MACOSX" in parts or ".." in parts or member.startswith("/"):
            return None
        return "/".join(parts[parts.index(name) + 1:])

    def wanted(members):  # of a tar, under their new names
        for member in members:
            if member.size < 0:                               # tarfile would read the same header for ever
                raise tarfile.TarError("a negative size")
            if (to := inside(member.name)) and (member.isfile() or member.isdir()):
                yield member.replace(name=to, deep=False)

    with (refused(f"{archive} could not be unpacked ({{error}}); remove it and run the same command again"),
          writing(Path(folder) / name) as part, Progress(1, f"unpacking {Path(archive).name}", "archives") as bar):
        part.mkdir()
        if str(archive).endswith(".zip"):
            with zipfile.ZipFile(archive) as z:
                fits(archive, sum(member.file_size for member in z.infolist()))
                for member in z.infolist():
                    if (to := inside(member.filename)) and not member.is_dir():
                        member.filename = to
                        z.extract(member, part)
        else:
            with gzip.open(archive) as stream:                # its checksum first: tarfile takes damage for the end
                while stream.read(1 << 20):
                    fits(archive, stream.tell())
            with tarfile.open(archive) as t:
                t.extractall(part, wanted(t), filter="data")  # refuses what would land outside the folder
        if not any(part.iterdir()):
            raise UserError(f"{archive} holds no folder {name}; remove it and run the same command again")
        bar.step()


def fetch(name, folder):
    """Download and unpack what is not in the folder yet."""
    for url, file, md5, inner in URLS[name]:
        if not (folder / inner).exists() and not (inner == "text" and captions_of(folder, "cub")):
            extract(download(url, folder / file, md5), folder, inner)


def captions_of(folder, name):
    """The folder of Reed's captions, unpacked from his archive where somebody has put it; None where there is neither."""
    archive = folder / f"cvpr2016_{name}.tar.gz"
    places = [folder / "text_c10", folder / f"cvpr2016_{name}" / "text_c10", folder / "text"]
    if archive.exists() and not any(p.is_dir() for p in places):
        extract(archive, folder, "text_c10")
    return next((p for p in places if p.is_dir()), None)


# ---------------------------------------------------------------------------------------------------- the sources

def read_captions(path):
    """One caption a line; empty lines and null bytes are dropped, bytes that are no UTF-8 replaced."""
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "") if path.is_file() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def flowers(folder, split):
    """Reed's zero-shot split: class = Oxford label, 1-20 test (1,155 pictures), 21-102 train (7,034)."""
    text = captions_of(folder, "flowers")
    if text is None:                                              # said before 345 MB are fetched
        raise UserError(f"the captions of flowers need a browser: open {FLOWERS_CAPTIONS} and put "
                        f"cvpr2016_flowers.tar.gz into {folder}")
    fetch("flowers", folder)
    return [Picture(folder / "jpg" / f"{t.stem}.jpg", read_captions(t), int(t.parent.name[6:]))
            for t in sorted(text.glob("class_*/image_*.txt")) if (int(t.parent.name[6:]) <= 20) == (split == "test")]


CUB_TEST = {  # the 50 unseen classes of Reed et al. and everyone since
    1, 4, 6, 8, 9, 14, 23, 29, 31, 33, 34, 35, 36, 37, 38, 43, 49, 51, 53, 66, 72, 79, 83, 84, 86, 91, 95, 96, 98,
    101, 102, 103, 112, 114, 119, 121, 130, 135, 138, 147, 156, 163, 165, 166, 180, 183, 185, 186, 187, 197
}


def cub(folder, split):
    """150 / 50 classes, 8,855 / 2,933 pictures. train_test_split.txt is another split: of pictures, not classes."""
    fetch("cub", folder)
    base, text = folder / "CUB_200_2011", captions_of(folder, "cub")
    table = lambda file: dict(line.split(maxsplit=1) for line in (base / file).read_text().splitlines())
    names, boxes = table("images.txt"), table("bounding_boxes.txt")
    pictures = []
    for number, name in names.items():
        if (int(name[:3]) in CUB_TEST) == (split == "test"):
            # the box of StackGAN, AttnGAN and DF-GAN: a square about its middle, 1.5 times as wide as the longer side
            x, y, w, h = (int(float(v)) for v in boxes[number].split())
            r, cx, cy = int(max(w, h) * 0.75), (2 * x + w) // 2, (2 * y + h) // 2
            captions = read_captions(text / Path(name.strip()).with_suffix(".txt"))
            pictures.append(Picture(base / "images" / name.strip(), captions, int(name[:3]), (cx - r, cy - r, cx + r, cy + r)))
    return pictures


def coco(folder, split):
    """train2014 (82,783) / val2014 (40,504), the first five captions. No classes: each picture is its own."""
    fetch("coco", folder)
    part = "train2014" if split == "train" else "val2014"
    table = json.loads((folder / "annotations" / f"captions_{part}.json").read_text(encoding="utf-8"))
    captions = {}
    for note in table["annotations"]:
        captions.setdefault(note["image_id"], []).append(" ".join(note["caption"].split()))
    return [Picture(folder / part / image["file_name"], captions.get(image["id"], [])[:5], image["id"])
            for image in table["images"]]


def own(folder, split):
    """A folder of one's own. Every tenth picture is held out as the test split; below 20 the same ones serve both."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; --data takes toy, flowers, cub, coco or a folder of pictures and captions")
    kinds = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    paths = sorted(Path(d) / f for d, _, files in os.walk(folder) for f in files if Path(f).suffix.lower() in kinds)
    if len(paths) < 2:
        raise UserError(f"{folder} holds {len(paths)} pictures; a folder needs at least 2, each photo.jpg beside photo.txt")
    pictures = [Picture(p, read_captions(p.with_suffix(".txt")), str(p.parent.relative_to(folder))) for p in paths]
    useful, mute = [p for p in pictures if p.captions], [p for p in pictures if not p.captions]
    if len(useful) >= 20:
        useful = [p for i, p in enumerate(useful) if (i % 10 == 9) == (split == "test")]
    elif split == "test":
        print(f"{folder}: fewer than 20 pictures with captions: the test pictures are those of training, scores say nothing of unseen ones",
              file=sys.stderr)
    return useful + mute * (split == "train")                     # the mute ones only to be named, once


# ---------------------------------------------------------------------------------------------------- toy flowers

PETALS = {"red": (205, 30, 45), "pink": (245, 140, 185), "orange": (245, 125, 25), "yellow": (245, 215, 50),
          "white": (242, 240, 235), "purple": (125, 45, 165), "blue": (50, 85, 215), "turquoise": (45, 195, 190)}
CENTRES = {"yellow": (250, 205, 40), "white": (250, 248, 240), "brown": (95, 55, 25), "green": (105, 160, 45)}
GROUNDS = {"dark leaves": (30, 62, 34), "a meadow": (120, 150, 75), "a pale sky": (175, 200, 222), "a dusky sky": (62, 62, 84),
           "bare soil": (112, 86, 66)}
COUNTS = {"four": 4, "five": 5, "six": 6, "eight": 8}
PAIRS = [(p, c) for p in PETALS for c in CENTRES if p != c]
HELD_OUT = {(p, [c for c in CENTRES if c != p][i % 3]) for i, p in enumerate(PETALS)}   # each petal colour once
WORDINGS = ["a {petal} flower with {count} petals and a {centre} centre", "this flower has {count} {petal} petals around a {centre} centre",
            "{count} {petal} petals, {centre} in the middle, {ground} behind", "a {size} {petal} flower with a {centre} centre",
            "the petals are {petal} and the centre is {centre}", "a {petal} flower with {count} petals before {ground}",
            "a flower with a {centre} centre and {petal} petals", "{petal} flower", "a {size} flower, {petal}, with {count} petals",
            "{count} petals of {petal} colour and a {centre} middle", "this is a {petal} flower whose centre is {centre}"]


def toy(split, per_class=40):
    """Flowers of (petal colour, centre colour, petal count); the colour pairs of the test split are never trained on."""
    rng = np.random.default_rng([0, split == "test"])
    pairs = [p for p in PAIRS if (p in HELD_OUT) == (split == "test")]
    pictures = []
    for label, ((petal, centre), count) in enumerate(itertools.product(pairs, COUNTS)):
        for _ in range(per_class):
            radius = rng.uniform(0.27, 0.45)
            traits = dict(petal=petal, centre=centre, count=count, ground=str(rng.choice(list(GROUNDS))), radius=radius,
                          size="small" if radius < 0.36 else "large", seed=int(rng.integers(2**31)))
            captions = [WORDINGS[i].format(**traits) for i in rng.choice(len(WORDINGS), 5, replace=False)]
            pictures.append(Picture(None, captions, label, traits=traits))
    return pictures


def draw(traits, side):
    """One toy flower in polar coordinates about its middle: (side, side, 3) uint8, edges soft over one pixel."""
    rng = np.random.default_rng(traits["seed"])
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    shade = lambda name, table: np.clip(np.array(table[name]) + rng.normal(0, 7, 3), 0, 255)
    soft = lambda inside: np.clip(inside * side + 0.5, 0, 1)[..., None]
    # ground: one colour, lighter towards the top, with a few broad waves
    waves = sum(rng.uniform(-9, 9) * np.sin(2 * np.pi * (rng.uniform(-3, 3) * x + rng.uniform(-3, 3) * y) + rng.uniform(0, 6))
                for _ in range(5))
    picture = shade(traits["ground"], GROUNDS) + (waves - 25 * y)[..., None]
    dx, dy = rng.uniform(-0.05, 0.05, 2)
    x, y = x - dx, y - dy
    stem = soft(0.02 - np.abs(x - 0.1 * rng.uniform(-1, 1) * np.sin(3 * y))) * (y > 0)[..., None]
    picture += stem * (np.array((50, 105, 40)) - picture)
    r, angle = np.hypot(x, y), np.arctan2(y, x) + rng.uniform(0, 2 * np.pi)
    lobe = np.abs(np.cos(COUNTS[traits["count"]] * angle / 2))       # 1 along a petal, 0 in the gap beside it
    edge = traits["radius"] * (0.38 + 0.62 * lobe ** 0.6)
    light = 0.80 + 0.24 * lobe ** 0.5 - 0.10 * (r / traits["radius"]) ** 2
    picture += soft(edge - r) * (shade(traits["petal"], PETALS) * light[..., None] - picture)
    heart = 0.30 * traits["radius"]
    light = 1.08 - 0.35 * (r / heart) ** 2 + 0.06 * np.sin(40 * x) * np.sin(40 * y)
    picture += soft(heart - r) * (shade(traits["centre"], CENTRES) * light[..., None] - picture)
    return np.clip(picture + rng.normal(0, 2, picture.shape), 0, 255).astype(np.uint8)


def judge(images):
    """What toy pictures (B, 3, S, S) in [-1, 1] show: [{"petal": ..., "centre": ..., "count": ...}]. Each is right for 99.9% and
    more of the drawn ones (tests).

    Petal colour: pixels of the ring where petals are vote for the nearest of the colours of petals and grounds. Centre:
    those of the middle vote among centres. Count: the k whose wave exp(ik angle) about the flower's middle is strongest."""
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)            # (B, S, S, 3)
    grid = torch.linspace(-0.5, 0.5, images.shape[-1])
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    r = torch.hypot(x, y)
    colours = lambda table: torch.tensor(list(table.values()), dtype=torch.float32)          # (n, 3)
    nearest = lambda where, known: torch.cdist(where, known).argmin(-1)
    most = lambda votes, n: torch.nn.functional.one_hot(votes).sum(1)[:, :n].argmax(1)        # (B, votes) -> (B,)
    colour = nearest(pixels, torch.cat((colours(PETALS), colours(GROUNDS))))                  # (B, S, S)
    petal = most(colour[:, (r > 0.12) & (r < 0.24)], len(PETALS))
    centre = most(nearest(pixels[:, r < 0.06], colours(CENTRES)), len(CENTRES))
    flower = ((colour == petal[:, None, None]) & (r < 0.48)).float()
    middle = [(flower * axis).sum((1, 2)) / flower.sum((1, 2)).clamp(min=1) for axis in (x, y)]
    angle = torch.atan2(y - middle[1][:, None, None], x - middle[0][:, None, None])
    waves = torch.stack([(flower * torch.exp(1j * k * angle)).sum((1, 2)).abs() for k in COUNTS.values()], 1)
    return [dict(petal=list(PETALS)[p], centre=list(CENTRES)[c], count=list(COUNTS)[k])
            for p, c, k in zip(petal, centre, waves.argmax(1))]


# ---------------------------------------------------------------------------------------------------- preparation

def decode(picture, side):
    """(3, side, side) uint8, or None where the file is no readable picture.

    One preparation serves all three scripts: the box where there is one, then the central square. (GAN-CLS's code
    squashed whole pictures to a square and StackGAN's squashed the box; DF-GAN's kept the aspect, as here.)"""
    if picture.path is None:
        return draw(picture.traits, side).transpose(2, 0, 1)
    try:
        with Image.open(picture.path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                                     # 16 bits a pixel: keep the upper eight
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if picture.box:
                left, top, right, bottom = picture.box
                image = image.crop((max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)))
            image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)
    except Exception:   # Pillow's readers raise nearly every kind of error on a damaged file
        return None


def decoded(pictures, side, label):
    """Every picture decoded in order, in parallel, a few hundred ahead of the reader at most."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(len(pictures), label) as bar:
        for i in range(0, len(pictures), 256):
            for array in pool.map(lambda p: decode(p, side), pictures[i:i + 256]):
                bar.step()
                yield array


def digest(pictures):
    """Changes with any picture's name, size, time, box or traits; the 2 with how they are decoded or drawn."""
    h = hashlib.sha256(b"2")
    for p in pictures:
        s = p.path.stat() if p.path else None
        h.update(repr((str(p.path), s and (s.st_size, s.st_mtime_ns), p.box, p.traits)).encode())
    return h.hexdigest()


def mapped(path, shape, dtype=torch.uint8):
    """A file as a tensor that the system pages in and out: not one private to us, which would need memory set aside."""
    try:
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    except RuntimeError as error:
        raise UserError(f"{path} could not be mapped ({error}); it must be writable") from None


def store(pictures, side, stem, key):
    """Decode once to <stem>.u8, a (N, 3, side, side) uint8 array, and map it into memory. Returns it and the broken ones.

    The description <stem>.json is written last: without it, or with another source, the store is built again."""
    images, about = stem.with_name(stem.name + ".u8"), stem.with_name(stem.name + ".json")
    try:
        known = json.loads(about.read_text())
        fresh = (known["key"] == key and known["count"] + len(known["broken"]) == len(pictures)
                 and images.stat().st_size == known["count"] * 3 * side * side)
    except Exception:     # not there, or damaged: built again
        fresh = False
    if not fresh:
        broken = []
        about.unlink(missing_ok=True)
        with writing(images) as part, open(part, "wb") as file:
            for picture, array in zip(pictures, decoded(pictures, side, f"preparing {stem.name} ({len(pictures) * 3 * side**2 >> 20} MB)")):
                if array is None:
                    broken.append(str(picture.path))
                else:
                    file.write(array.tobytes())
        known = {"key": key, "count": len(pictures) - len(broken), "broken": broken}
        with writing(about) as part:
            part.write_text(json.dumps(known))
    return mapped(images, (known["count"], 3, side, side)) if known["count"] else None, set(known["broken"])


class Dataset:
    """Prepared pictures with their captions.

    images   (N, 3, L, L) uint8, mapped from disk        captions  every caption, a flat list
    classes  (N,) 0..C-1                                 first     (N + 1,) picture i has captions first[i]:first[i+1]
    size     S, the training size; L = 76/64 S           traits    toy: what was drawn, one dict a picture"""

    def __init__(self, name, split, size, pictures, stem):
        self.name, self.split, self.size, self.stem = name, split, size, stem
        load_size = math.ceil(size * 76 / 64)
        mute = [str(p.path) for p in pictures if not p.captions]
        lost = [str(p.path) for p in pictures if p.captions and p.path and not p.path.is_file()]
        pictures, broken = [p for p in pictures if p.captions and (p.path is None or p.path.is_file())], set()
        if pictures:
            self.key = digest(pictures)
            self.images, broken = store(pictures, load_size, stem.with_name(f"{stem.name}-{size}"), self.key)
        self.pictures = [p for p in pictures if str(p.path) not in broken]
        left_out = [f"{len(names)} {why} ({', '.join(Path(n).name for n in sorted(names)[:5])}{', ...' if len(names) > 5 else ''})"
                    for why, names in (("without a caption", mute), ("missing", lost), ("broken", broken)) if names]
        if left_out:
            print(f"{name} {split}: left out " + ", ".join(left_out), file=sys.stderr)
        least = 1 if split == "test" else 2
        if len(self.pictures) < least:
            raise UserError(f"{name} has {len(self.pictures)} usable pictures for {split}; it needs at least {least} with captions")
        labels = [p.label for p in self.pictures]
        if len(set(labels)) == 1:             # no classes to tell apart: every picture is its own
            labels = range(len(labels))
        numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        self.classes = torch.tensor([numbers[label] for label in labels])
        self.captions = [c for p in self.pictures for c in p.captions]
        self.first = torch.tensor([0] + [len(p.captions) for p in self.pictures]).cumsum(0)
        self.traits = [p.traits for p in self.pictures] if self.pictures[0].traits else None

    def __len__(self):
        return len(self.pictures)

    def centre(self, index):
        """The central crops of some pictures: (B, 3, S, S) in [-1, 1]."""
        a = (self.images.shape[-1] - self.size) // 2
        return self.images[index, :, a:a + self.size, a:a + self.size].float() / 127.5 - 1


NAMED = {"toy": lambda folder, split: toy(split), "flowers": flowers, "cub": cub, "coco": coco}


def source(name):
    """The data set as runs remember it: toy, flowers, cub, coco, or the absolute path of a folder."""
    return name if name in NAMED else str(Path(name).resolve())


def load(name, split="train", size=64, root="datasets", cache=None):
    """A data set by name, or a folder of one's own by path. split: train or test. size: S, in pixels."""
    folder = (Path(root) / name if name in NAMED else Path(name)).resolve()
    with refused(f"{folder} is not laid out as {name} should be ({{error}}); remove the damaged part and run again"):
        pictures = NAMED.get(name, own)(folder, split)
    where = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]  # two folders of one name must not evict each other
    return Dataset(folder.name, split, size, pictures, Path(cache or CACHE) / f"{folder.name}-{where}-{split}")


# ---------------------------------------------------------------------------------------------------- batches

def of_other_classes(by_class, count, label, k, rng):
    """(B, k) numbers of things whose class is not label (B,), uniform. by_class: all of them in order of class; count: of each class."""
    own, start = count[label][:, None], (count.cumsum(0) - count)[label][:, None]
    pick = (torch.rand(len(label), k, generator=rng, dtype=torch.double) * (len(by_class) - own)).long()
    return by_class[pick + own * (pick >= start)]                  # step over the own class


class Batch(NamedTuple):
    images: torch.Tensor      # (B, 3, S, S) in [-1, 1], randomly cropped and flipped
    wrong: torch.Tensor       # as `wrong` of Batches says: (B, 3, S, S) images or (B, k) captions
    captions: torch.Tensor    # (B, k) numbers into dataset.captions
    classes: torch.Tensor     # (B,)


class Batches:
    """Batches as a pure function of (seed, step): a resumed run needs only the step to see the same ones.

    An epoch is a permutation of the pictures, in len(self) batches. Sets of up to a quarter of the device's memory live
    there; a larger one stays in the memory map and only its batches travel. wrong: "image" or "caption" of another class,
    "previous" (the caption of the picture before, whatever its class) or None. part: (i, n), the i-th of n equal shares of each
    batch, for the i-th of n processes."""

    def __init__(self, dataset, batch_size, seed=0, device="cpu", captions=1, wrong="image", part=(0, 1)):
        self.data, self.batch_size, self.seed, self.device = dataset, batch_size, seed, torch.device(device)
        self.k, self.wrong, share = captions, wrong, batch_size // part[1]
        self.part = slice(part[0] * share, (part[0] + 1) * share)
        images = dataset.images
        if self.device.type == "cuda" and images.numel() < torch.cuda.get_device_properties(self.device).total_memory / 4:
            images = images.to(self.device)
        s = dataset.size                       # every crop of every picture, as a view: (N, 3, L-S+1, L-S+1, S, S)
        self.crops = images.unfold(2, s, 1).unfold(3, s, 1)
        self.by_class = dataset.classes.argsort(stable=True)
        self.count = dataset.classes.bincount()
        self.start = self.count.cumsum(0) - self.count
        self.caption_count = dataset.first.diff()

    def __len__(self):
        return max(1, len(self.data) // self.batch_size)

    def look(self, index, rng, part=slice(None)):
        """A random crop of each picture, every other one mirrored, gathered in one go: (B, 3, S, S) in [-1, 1]."""
        d = self.crops.device
        y, x = torch.randint(self.crops.shape[2], (2, len(index)), generator=rng)
        crops = self.crops[index[part].to(d), :, y[part].to(d), x[part].to(d)].to(self.device)
        odd = (torch.arange(len(index))[part] % 2).nonzero().flatten().to(self.device)     # in random order: half of the time
        crops[odd] = crops[odd].flip(3)
        return crops.float().div_(127.5).sub_(1)

    def say(self, index, rng):
        """k captions of each picture, different ones while it has as many: (B, k)."""
        count = self.caption_count[index][:, None]
        width = max(int(self.caption_count.max()), self.k)
        order = (torch.rand(len(index), width, generator=rng) + (torch.arange(width) >= count)).argsort(1)
        return self.data.first[index][:, None] + order[:, :self.k] % count

    def another(self, index, rng):
        """A picture of another class for each, uniform over all of them."""
        return of_other_classes(self.by_class, self.count, self.data.classes[index], 1, rng)[:, 0]

    def __call__(self, step):
        epoch, at = divmod(step, len(self))
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.seed * 2**20 + epoch))
        order = order.repeat(-(-self.batch_size // len(order)))              # fewer pictures than a batch: repeat
        index = order[at * self.batch_size:(at + 1) * self.batch_size]
        rng = torch.Generator().manual_seed((self.seed * 2**20 + step) ^ 0x5DEECE66D)
        other, part = self.another(index, rng), self.part
        both = torch.cat((index, other)) if self.wrong == "image" else index
        images = self.look(both, rng, torch.arange(len(both)).view(-1, self.batch_size)[:, part].flatten()).split(part.stop - part.start)
        wrong = images[1] if self.wrong == "image" else self.say(other, rng) if self.wrong == "caption" else None
        captions = self.say(index, rng)
        if self.wrong == "previous":
            wrong = captions.roll(1, 0)
        if self.wrong in ("caption", "previous"):
            wrong = wrong[part].to(self.device)
        return Batch(images[0], wrong, captions[part].to(self.device), self.data.classes[index[part]].to(self.device))
