"""Captioned image datasets for text-to-image GANs.

    train_set = load_dataset("flowers", "train", size=64)    # downloaded and decoded once
    batches = Batches(train_set, batch_size=64, device="cuda")
    images, captions, wrong = batches(step=0)                # a pure function of (seed, step)

toy, flowers (Oxford-102), cub (CUB-200-2011), coco (COCO 2014), or the path of a folder with
photo.jpg beside photo.txt, one caption a line. In toy, flowers and cub the test classes are unseen.
"""
import contextlib
import hashlib
import itertools
import json
import math
import os
import sys
import tarfile
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


class UserError(Exception):
    """A mistake that the user can correct: one line on stderr and exit status 2."""


class Record(NamedTuple):
    path: Path | None           # None: a toy flower, rendered from `attributes`
    captions: list
    label: int | str            # class
    bbox: tuple | None = None   # left, top, right, bottom
    attributes: dict | None = None


class Progress:
    """Print progress, rate and time left on stderr; without a terminal, every 30 seconds."""

    def __init__(self, total, label, unit="images", done=0):
        self.total, self.label, self.unit, self.done, self.first = total, label, unit, done, done
        self.note = ""
        self.terminal, self.start = sys.stderr.isatty(), time.time()
        self.shown = self.start

    def update(self, n=1):
        self.done += n
        now, end = time.time(), self.done >= self.total
        if end or now - self.shown > (0.2 if self.terminal else 30):
            self.shown = now
            rate = (self.done - self.first) / max(now - self.start, 1e-9)
            left = int((self.total - self.done) / max(rate, 1e-9))
            print(f"\r{self.label} {self.done / self.total:4.0%}  {rate:.1f} {self.unit}/s  "
                  f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left  {self.note}  ",
                  end="" if self.terminal and not end else "\n", file=sys.stderr, flush=True)


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`: renamed to `path` on success, deleted on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---- Datasets

def fetch(url, folder, name, md5=None):
    """Return folder/name; download the archive `url` and extract its directory `name` if need be."""
    from torchvision.datasets.utils import download_url
    archive = folder / Path(url.split("?")[0]).name
    if not (folder / name).exists():
        try:
            if not archive.exists() or md5:    # an archive that exists is only verified
                download_url(url, folder, archive.name, md5)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                if archive.suffix == ".zip":
                    zipfile.ZipFile(archive).extractall(temporary)
                else:
                    with tarfile.open(archive) as tar:
                        tar.extractall(temporary, filter="data")    # refuses paths that lead outside
                found = [p for p in Path(temporary).rglob(name) if "__MACOSX" not in p.parts]
                found[0].rename(folder / name)
        except Exception as error:    # urllib, zlib, zipfile and tarfile have errors of their own
            raise UserError(f"cannot get {name} from {url} ({error}); fetch {archive} by hand, or "
                            f"delete it if it is damaged") from None
    return folder / name


def find_captions(folder):
    """Return the directory of Reed's captions, extracted from his archive if need be, or None."""
    for archive in folder.glob("cvpr2016_*.tar.gz"):
        return fetch(archive.name, folder, "text_c10")
    return next((p for p in (folder / "text_c10", folder / "text") if p.exists()), None)


def read_captions(path):
    """Return the captions of a text file, one a line; [] if the file does not exist."""
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    return [line.strip() for line in text.replace("\0", "").splitlines() if line.strip()]


def flowers(folder, split):
    """Oxford-102, zero-shot split of Reed et al.: 7,034 training and 1,155 test images."""
    captions = find_captions(folder)
    if captions is None:    # Google Drive wants a browser
        raise UserError("the captions of flowers need a browser: open https://drive.google.com/file"
                        "/d/0B0ywwgffWnLLcms2WWJQRFNSWXM/view?resourcekey=0-Av8zFbeDDvNcF1sSjDR32w"
                        f" and save cvpr2016_flowers.tar.gz in {folder}")
    images = fetch("https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz", folder,
                   "jpg", "52808999861908f626f3c1f4e79d11fa")
    records = []
    for path in sorted(captions.glob("class_*/image_*.txt")):
        label = int(path.parent.name[6:])
        if (label <= 20) == (split == "test"):
            records.append(Record(images / f"{path.stem}.jpg", read_captions(path), label))
    return records


CUB_TEST = {    # the 50 test classes of Reed et al.
    1, 4, 6, 8, 9, 14, 23, 29, 31, 33, 34, 35, 36, 37, 38, 43, 49, 51, 53, 66, 72, 79, 83, 84, 86,
    91, 95, 96, 98, 101, 102, 103, 112, 114, 119, 121, 130, 135, 138, 147, 156, 163, 165, 166, 180,
    183, 185, 186, 187, 197}


def cub(folder, split):
    """CUB-200-2011, zero-shot split of Reed et al.: 8,855 training and 2,933 test images."""
    base = fetch("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
                 folder, "CUB_200_2011", "97eceeb196236b17998738112f37df78")
    captions = find_captions(folder) or fetch(
        "https://huggingface.co/datasets/alkzar90/CC6204-Hackaton-Cub-Dataset/resolve/main/data/"
        "text.zip", folder, "text")
    names, boxes = ([line.split()[1:] for line in (base / file).read_text().splitlines()]
                    for file in ("images.txt", "bounding_boxes.txt"))
    records = []
    for (name,), box in zip(names, boxes):
        label = int(name[:3])
        if (label in CUB_TEST) == (split == "test"):
            # The crop of StackGAN, AttnGAN and DF-GAN: a square about the middle of the bounding
            # box, 1.5 times its longer side. Released GAN-CLS: the whole image.
            x, y, w, h = (int(float(v)) for v in box)
            r, cx, cy = int(max(w, h) * 0.75), (2 * x + w) // 2, (2 * y + h) // 2
            text = read_captions((captions / name).with_suffix(".txt"))
            records.append(Record(base / "images" / name, text, label,
                                  (cx - r, cy - r, cx + r, cy + r)))
    return records


def coco(folder, split):
    """COCO 2014, first five captions: train2014 (82,783 images) and val2014 (40,504)."""
    part, md5 = (("train2014", "0da8c0bd3d6becc4dcb32757491aca88") if split == "train" else
                 ("val2014", "a3d79f5ed8d289b7a7554ce06a5782b3"))
    url = "http://images.cocodataset.org/"    # https fails: its certificate is not valid
    notes = fetch(url + "annotations/annotations_trainval2014.zip", folder, "annotations",
                  "0a379cfc70b0e71301e0f377548639bd")
    images = fetch(url + f"zips/{part}.zip", folder, part, md5)
    table = json.loads((notes / f"captions_{part}.json").read_text())
    captions = {}
    for note in table["annotations"]:
        captions.setdefault(note["image_id"], []).append(" ".join(note["caption"].split()))
    return [Record(images / image["file_name"], captions[image["id"]][:5], image["id"])
            for image in table["images"]]


def image_folder(folder, split):
    """A folder. Every tenth image is a test image; below 20, all are training and test images."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; --data takes toy, flowers, cub, coco or a folder")
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    records = [Record(p, read_captions(p.with_suffix(".txt")), str(p.parent)) for p in paths]
    captioned = [r for r in records if r.captions]
    print(f"{folder}: {len(captioned)} of {len(records)} images have captions")
    if len(captioned) < 2:
        raise UserError(f"{folder} needs 2 or more captioned images, photo.jpg beside photo.txt")
    if len(captioned) < 20:
        return captioned
    return [r for i, r in enumerate(captioned) if (i % 10 == 9) == (split == "test")]


# ---- Toy flowers

PETALS = {"red": (205, 30, 45), "pink": (245, 140, 185), "orange": (245, 125, 25),
          "yellow": (245, 215, 50), "white": (242, 240, 235), "purple": (125, 45, 165),
          "blue": (50, 85, 215), "turquoise": (45, 195, 190)}
CENTRES = {"yellow": (250, 205, 40), "white": (250, 248, 240), "brown": (95, 55, 25),
           "green": (105, 160, 45)}
BACKGROUNDS = {"leaves": (30, 62, 34), "soil": (112, 86, 66), "sky": (175, 200, 222)}
PETAL_COUNTS = {"four": 4, "five": 5, "six": 6, "eight": 8}
TEMPLATES = ["a {petal} flower with {count} petals and a {centre} centre",
             "{count} {petal} petals, {centre} in the middle, {background} behind",
             "the petals are {petal} and the centre is {centre}",
             "this flower has {count} {petal} petals around a {centre} centre",
             "a {petal} flower before {background}",
             "{petal} flower"]


def toy(folder, split):
    """Rendered flowers, 40 of each petal colour, centre colour and petal count. Each petal colour
    is seen with one centre colour in the test set only."""
    rng = np.random.default_rng([0, split == "test"])
    records = []
    for petal, centre, count in itertools.product(PETALS, CENTRES, PETAL_COUNTS):
        test = (list(PETALS).index(petal) + list(CENTRES).index(centre)) % 4 == 0
        if petal != centre and test == (split == "test"):
            for _ in range(40):
                attributes = dict(petal=petal, centre=centre, count=count,
                                  background=str(rng.choice(list(BACKGROUNDS))),
                                  seed=int(rng.integers(2**31)))
                captions = [t.format(**attributes) for t in rng.choice(TEMPLATES, 4, replace=False)]
                records.append(Record(None, captions, petal + centre + count, None, attributes))
    return records


def render_flower(attributes, side):
    """Return one toy flower, (side, side, 3) uint8."""
    rng = np.random.default_rng(attributes["seed"])
    y, x = np.mgrid[0:side, 0:side] / side - 0.5 + rng.uniform(-0.05, 0.05, (2, 1, 1))
    r, angle = np.hypot(x, y), np.arctan2(y, x) + rng.uniform(0, 2 * np.pi)
    radius, tilt = rng.uniform(0.27, 0.45), rng.uniform(-40, 40, 2)
    # 1 along the middle of a petal, 0 between two petals
    lobe = np.abs(np.cos(PETAL_COUNTS[attributes["count"]] * angle / 2)) ** 0.6
    image = np.array(BACKGROUNDS[attributes["background"]]) + (tilt[0] * x + tilt[1] * y)[..., None]
    for colour, inside, light in (
            (PETALS[attributes["petal"]], radius * (0.38 + 0.62 * lobe) - r, 0.8 + 0.24 * lobe),
            (CENTRES[attributes["centre"]], 0.3 * radius - r, 1.05 - 0.3 * r / radius)):
        mask = np.clip(inside * side + 0.5, 0, 1)[..., None]    # edges are soft over one pixel
        image += mask * (np.array(colour) * light[..., None] + rng.normal(0, 7, 3) - image)
    return np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


def classify_toy(images):
    """Return petal colour, centre colour and petal count shown by images (B, 3, S, S) in [-1, 1].

    Colours by majority in the ring of the petals and in the middle. Count: the k with the largest
    Fourier component exp(i k angle) of the petals' shape."""
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    grid = torch.linspace(-0.5, 0.5, images.shape[-1])
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    r = torch.hypot(x, y)

    def nearest(pixels, colours):
        return torch.cdist(pixels, torch.tensor([*colours.values()], dtype=torch.float)).argmin(-1)

    colour = nearest(pixels, PETALS | BACKGROUNDS)                                  # (B, S, S)
    petal = colour[:, (r > 0.13) & (r < 0.2)].mode(1).values
    centre = nearest(pixels[:, r < 0.06], CENTRES).mode(1).values
    shape = ((colour == petal[:, None, None]) & (r < 0.48)).float()
    area = shape.sum((1, 2), keepdim=True).clamp(min=1)
    cx, cy = ((shape * axis).sum((1, 2), keepdim=True) / area for axis in (x, y))
    wave = torch.exp(1j * torch.atan2(y - cy, x - cx))
    count = torch.stack([(shape * wave ** k).sum((1, 2)).abs() for k in PETAL_COUNTS.values()], 1)
    return [dict(petal=[*PETALS, *BACKGROUNDS][p], centre=[*CENTRES][c], count=[*PETAL_COUNTS][k])
            for p, c, k in zip(petal, centre, count.argmax(1))]


# ---- Images

def load_image(record, side):
    """Return an image, (3, side, side) uint8: the bounding box, if any, then the central square.

    Released code: GAN-CLS and StackGAN squash to a square; DF-GAN crops from the full rectangle."""
    if record.path is None:
        return render_flower(record.attributes, side).transpose(2, 0, 1)
    try:
        image = ImageOps.exif_transpose(Image.open(record.path))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if record.bbox:
            left, top, right, bottom = record.bbox
            image = image.crop((max(0, left), max(0, top),
                                min(right, image.width), min(bottom, image.height)))
        image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
    except Exception as error:    # Pillow raises errors of many types on damaged files
        raise UserError(f"cannot read the image {record.path} ({error}); remove it") from None
    return np.asarray(image).transpose(2, 0, 1)


def load_images(records, side, label):
    """Decode images in parallel and yield them in blocks, (n, 3, side, side) uint8."""
    bar = Progress(len(records), label)
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(records), 64):
            block = records[i:i + 64]
            yield np.stack(list(pool.map(lambda r: load_image(r, side), block)))
            bar.update(len(block))


def memmap_tensor(path, shape, dtype=torch.uint8):
    """Map a file into memory as a tensor."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


class CaptionDataset:
    """Images with captions.

    images   (N, 3, L, L) uint8, memory-mapped    captions         a list of M captions
    classes  (N,) 0..C-1                          caption_offsets  (N + 1,); image i has captions
    size     S in pixels; L = 76/64 S                              offsets[i]:offsets[i + 1]
    """

    def __init__(self, name, split, size, records, cache_dir):
        if not records:
            raise UserError(f"{name} has no {split} images")
        self.name, self.split, self.size, self.records = name, split, size, records
        files = [(r.path, r.path and r.path.exists() and r.path.stat().st_mtime_ns, r.attributes)
                 for r in records]
        key = hashlib.sha256(repr(files).encode(errors="replace")).hexdigest()[:16]
        self.cache = cache_dir / f"{Path(name).name}-{split}-{key}"    # the start of file names
        side = math.ceil(size * 76 / 64)
        decoded = Path(f"{self.cache}-{side}px.u8")
        if not decoded.exists():
            with atomic_write(decoded) as part, open(part, "wb") as file:
                for block in load_images(records, side, f"decoding {decoded.name}"):
                    file.write(block.tobytes())
        self.images = memmap_tensor(decoded, (len(records), 3, side, side))

        labels = [r.label for r in records]
        if len(set(labels)) == 1:    # no classes: every image is a class of its own
            labels = range(len(labels))
        numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        self.classes = torch.tensor([numbers[label] for label in labels])
        self.captions = [caption for r in records for caption in r.captions]
        counts = torch.tensor([len(r.captions) for r in records])
        self.caption_offsets = F.pad(counts.cumsum(0), (1, 0))
        self.caption_owners = torch.arange(len(records)).repeat_interleave(counts)

    def __len__(self):
        return len(self.records)

    def center_crop(self, index):
        """Return the central crops of images `index` (B,): (B, 3, S, S) in [-1, 1]."""
        a = (self.images.shape[-1] - self.size) // 2
        return self.images[index, :, a:a + self.size, a:a + self.size].float() / 127.5 - 1

    def first_captions(self, n):
        """Return the first captions of n images, spread over the dataset."""
        offsets = self.caption_offsets[:-1:max(1, len(self) // n)][:n]
        return [self.captions[i] for i in offsets]


DATASETS = {"toy": toy, "flowers": flowers, "cub": cub, "coco": coco}


def dataset_id(name):
    """Return the name of a dataset, or the absolute path of a folder."""
    return name if name in DATASETS else str(Path(name).resolve())


def load_dataset(name, split="train", size=64, root="datasets", cache_dir="datasets/cache"):
    """Return the CaptionDataset of a name (its files are in root/name) or of a folder's path.

    Downloads what is missing. split: "train" or "test". size: S in pixels."""
    folder = Path(root) / name if name in DATASETS else Path(name)
    records = DATASETS.get(name, image_folder)(folder.resolve(), split)
    return CaptionDataset(name, split, size, records, Path(cache_dir))


# ---- Batches

def sample_other_class(by_class, counts, classes, k, rng):
    """Return (B, k) items drawn uniformly from all classes but `classes` (B,).

    by_class: all items in the order of their classes; counts (C,): items of each class."""
    size, start = counts[classes][:, None], (counts.cumsum(0) - counts)[classes][:, None]
    pick = torch.rand(len(classes), k, generator=rng, dtype=torch.double)
    pick = (pick * (len(by_class) - size)).long()
    return by_class[pick + size * (pick >= start)]    # skips the items of the own class


class Batches:
    """Random batches as a pure function of (seed, step): a resumed run sees the same ones.

    An epoch is a permutation of the images in len(self) batches. Each of several processes gets its
    rows `part` of the joint batch. Images that fit into a third of the GPU's memory stay there."""

    def __init__(self, dataset, batch_size, seed=0, device="cpu", captions_per_image=1, rank=0,
                 world_size=1):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.device, self.captions_per_image = torch.device(device), captions_per_image
        share = batch_size // world_size
        self.part = slice(rank * share, (rank + 1) * share)
        self.images, self.epoch = dataset.images, None
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
            if self.images.numel() < memory / 3:
                self.images = self.images.to(self.device)
        self.by_class = dataset.classes.argsort(stable=True)
        self.class_counts = dataset.classes.bincount()
        self.caption_counts = dataset.caption_offsets.diff()

    def __len__(self):
        return max(1, len(self.dataset) // self.batch_size)

    def __call__(self, step):
        """Return images (B, 3, S, S) in [-1, 1], the numbers of k captions of each image (B, k),
        and of k captions of an image of another class (B, k)."""
        epoch, batch = divmod(step, len(self))
        if epoch != self.epoch:
            rng = torch.Generator().manual_seed(self.seed * 2**20 + epoch)
            order = torch.randperm(len(self.dataset), generator=rng)
            self.order = order.repeat(math.ceil(self.batch_size / len(order)))
            self.epoch = epoch
        index = self.order[batch * self.batch_size:(batch + 1) * self.batch_size]
        rng = torch.Generator().manual_seed((self.seed * 2**20 + step) ^ 0x5DEECE66D)
        classes = self.dataset.classes[index]
        other = sample_other_class(self.by_class, self.class_counts, classes, 1, rng)[:, 0]
        margin = self.images.shape[-1] - self.dataset.size
        corner = torch.randint(margin + 1, (len(index), 2), generator=rng)
        flip = torch.randint(2, (len(index), 1), generator=rng)
        captions, wrong = self.sample_captions(index, rng), self.sample_captions(other, rng)

        # One asynchronous copy: separate copies block the host seven times a step.
        packed = torch.cat((index[:, None], corner, flip, captions, wrong), 1)[self.part]
        if self.device.type == "cuda":
            packed = packed.pin_memory()
        on_device = packed.to(self.device, non_blocking=True)
        crops = (on_device if self.images.device.type == self.device.type else packed)[:, :4]
        return self.random_crops(crops), *on_device[:, 4:].chunk(2, 1)

    def sample_captions(self, index, rng):
        """Return k captions of each image, (B, k); different ones as far as the image has them."""
        count, k = self.caption_counts[index][:, None], self.captions_per_image
        width = max(int(self.caption_counts.max()), k)
        order = torch.rand(len(index), width, generator=rng) + (torch.arange(width) >= count)
        return self.dataset.caption_offsets[index][:, None] + order.argsort(1)[:, :k] % count

    def random_crops(self, crops):
        """Return crops of images: (B, 4) of image, top, left, flip -> (B, 3, S, S) in [-1, 1]."""
        index, top, left, flip = crops.unbind(1)
        size = self.dataset.size
        windows = self.images.unfold(2, size, 1).unfold(3, size, 1)    # a view of all crops
        images = windows[index, :, top, left]
        images = torch.where(flip.bool()[:, None, None, None], images.flip(3), images)
        if self.device.type == "cuda" and not images.is_cuda:
            images = images.pin_memory()
        return images.to(self.device, non_blocking=True).float().div_(127.5).sub_(1)
