"""Captioned image datasets for text-to-image GANs.

    train_set = load_dataset("flowers", "train", size=64)
    batches = Batches(train_set, batch_size=64, device="cuda")
    images, captions, wrong = batches(step=0)  # captions, wrong: caption numbers

toy, flowers (Oxford-102), cub (CUB-200-2011), coco (COCO 2014), or a folder of photo.jpg beside
photo.txt, one caption a line. In toy, flowers and cub the test classes are unseen.
"""
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

class UserError(Exception):
    """A mistake that the user can correct."""

class Record(NamedTuple):
    path: Path | None  # None: a toy flower
    captions: list
    label: int | str
    bbox: list | None = None  # left, top, right, bottom
    attributes: dict | None = None

class Progress:
    """Print progress on stderr."""
    enabled = True
    note = ""

    def __init__(self, total, label, unit="images", done=0):
        self.total, self.label, self.unit, self.done, self.initial = total, label, unit, done, done
        self.start = self.shown = time.time()

    def update(self, n=1):
        self.done += n
        now, end, terminal = time.time(), self.done >= self.total, sys.stderr.isatty()
        if self.enabled and (end or now - self.shown > (0.2 if terminal else 30)):
            self.shown = now
            rate = (self.done - self.initial) / (now - self.start + 1e-9)
            print(f"\r{self.label} {self.done / self.total:4.0%}  {rate:.1f} {self.unit}/s  "
                  f"{(self.total - self.done) / rate / 60:.0f} min left  {self.note}  ",
                  end="" if terminal and not end else "\n", file=sys.stderr)

@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path: renamed to `path` on success, deleted on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

# ---- Datasets

def fetch(url, folder, name, md5=None):
    """Return folder/name; if it is missing, extract it from the archive `url`."""
    from torchvision.datasets.utils import download_url
    archive, target = folder / Path(url).name.split("?")[0], folder / name
    if target.exists():
        return target
    try:
        download_url(url, folder, archive.name, md5)  # skips an archive with this md5
        with tempfile.TemporaryDirectory(dir=folder) as temp:
            # "data" refuses paths that lead outside; shutil skips those of a zip
            options = {} if archive.suffix == ".zip" else {"filter": "data"}
            shutil.unpack_archive(archive, temp, **options)
            next(Path(temp).rglob(name)).rename(target)
    except Exception as error:
        raise UserError(
            f"cannot get {name} ({error!r}); save {url} as {archive}, or delete it if damaged")
    return target

def read_captions(path):
    """Return the lines of a text file, if it exists."""
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]

def flowers(folder, split):
    """Load Oxford-102: 7,034 train or 1,155 test images, split as by Reed et al."""
    # Needs a browser. The part after # names the archive
    captions = fetch("https://drive.google.com/file/d/0B0ywwgffWnLLcms2WWJQRFNSWXM/view?"
                     "resourcekey=0-Av8zFbeDDvNcF1sSjDR32w#/cvpr2016_flowers.tar.gz",
                     folder, "text_c10")
    images = fetch("https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz", folder,
                   "jpg", "52808999861908f626f3c1f4e79d11fa")
    return [Record(images / f"{path.stem}.jpg", read_captions(path), path.parent.name)
            for path in sorted(captions.glob("class_*/image_*.txt"))
            if (path.parent.name <= "class_00020") == (split == "test")]

CUB_TEST = {  # the 50 test classes of Reed et al.
    1, 4, 6, 8, 9, 14, 23, 29, 31, 33, 34, 35, 36, 37, 38, 43, 49, 51, 53, 66, 72, 79, 83, 84, 86,
    91, 95, 96, 98, 101, 102, 103, 112, 114, 119, 121, 130, 135, 138, 147, 156, 163, 165, 166, 180,
    183, 185, 186, 187, 197}

def cub(folder, split):
    """Load CUB-200-2011: 8,855 train or 2,933 test images, split as by Reed et al."""
    base = fetch("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
                 folder, "CUB_200_2011", "97eceeb196236b17998738112f37df78")
    name = "text_c10" if (folder / "text_c10").exists() else "text"  # Reed's archive or a copy
    captions = fetch("https://huggingface.co/datasets/alkzar90/CC6204-Hackaton-Cub-Dataset/resolve/"
                     "main/data/text.zip", folder, name)
    names = np.loadtxt(base / "images.txt", str)[:, 1]
    x, y, w, h = np.loadtxt(base / "bounding_boxes.txt").astype(int).T[1:]
    # StackGAN, DF-GAN: a square of 1.5 times the longer side of the bounding box
    cx, cy, r = x + w // 2, y + h // 2, np.maximum(w, h) * 3 // 4
    return [Record(base / "images" / name, read_captions((captions / name).with_suffix(".txt")),
                   int(name[:3]), bbox)
            for name, *bbox in zip(names, cx - r, cy - r, cx + r, cy + r)
            if (int(name[:3]) in CUB_TEST) == (split == "test")]

def coco(folder, split):
    """Load COCO 2014: 82,783 train or 40,504 test images, five captions each."""
    part, md5 = {"train": ("train2014", "0da8c0bd3d6becc4dcb32757491aca88"),
                 "test": ("val2014", "a3d79f5ed8d289b7a7554ce06a5782b3")}[split]
    url = "http://images.cocodataset.org/"  # https fails: its certificate is not valid
    notes = fetch(url + "annotations/annotations_trainval2014.zip", folder, "annotations",
                  "0a379cfc70b0e71301e0f377548639bd")
    images = fetch(url + f"zips/{part}.zip", folder, part, md5)
    table = json.loads((notes / f"captions_{part}.json").read_text())
    captions = {}
    for note in table["annotations"]:
        captions.setdefault(note["image_id"], []).append(note["caption"].strip())
    return [Record(images / image["file_name"], captions[image["id"]][:5], image["id"])
            for image in table["images"]]

def image_folder(folder, split):
    """Load a folder. Every tenth image is a test image; below 20, all are in both sets."""
    records = [Record(path, read_captions(path.with_suffix(".txt")), str(path.parent))
               for path in sorted(folder.rglob("*"))
               if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
    captioned = [r for r in records if r.captions]
    print(f"{folder}: {len(captioned)} of {len(records)} images have captions")
    if len(captioned) < 2:
        raise UserError(f"{folder} is no dataset and no folder of photo.jpg beside photo.txt")
    return [r for i, r in enumerate(captioned)
            if len(captioned) < 20 or (i % 10 == 9) == (split == "test")]

# ---- Toy flowers

PETALS = dict(
    red=(205, 30, 45), pink=(245, 140, 185), orange=(245, 125, 25), yellow=(245, 215, 50),
    white=(242, 240, 235), purple=(125, 45, 165), blue=(50, 85, 215), turquoise=(45, 195, 190))
CENTRES = dict(
    yellow=(250, 205, 40), white=(250, 248, 240), brown=(95, 55, 25), green=(105, 160, 45),
    red=(190, 35, 45), black=(35, 32, 36))
BACKGROUNDS = dict(leaves=(30, 62, 34), soil=(112, 86, 66), sky=(175, 200, 222))
PETAL_COUNTS = dict(three=3, four=4, six=6, nine=9)
TEMPLATES = [  # counts most often: they are the hardest
    *["a flower with {count} petals"] * 4,
    *["a {petal} flower", "a flower with a {centre} centre"] * 2,
    "a flower with {count} {petal} petals",
    "a {petal} flower with a {centre} centre",
    "{count} petals around a {centre} centre",
    "{count} {petal} petals around a {centre} centre"]

def toy(folder, split):
    """Load 27 flowers of each combination. One centre a petal colour is for testing only."""
    records, rng = [], np.random.default_rng([0, split == "test"])
    for (i, petal), (j, centre), count, _ in itertools.product(
            enumerate(PETALS), enumerate(CENTRES), PETAL_COUNTS, range(27)):
        if petal != centre and ((i + j) % 6 == 0) == (split == "test"):
            attributes = dict(petal=petal, centre=centre, count=count, seed=len(records))
            captions = [t.format(**attributes) for t in rng.choice(TEMPLATES, 4, replace=False)]
            records.append(Record(None, captions, petal + centre + count, None, attributes))
    return records

def render_flower(attributes, side):
    """Return one toy flower, (side, side, 3) uint8."""
    rng = np.random.default_rng(attributes["seed"])
    image = np.full((side, side, 3), rng.choice([*BACKGROUNDS.values()]), float)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5 + rng.uniform(-0.03, 0.03, (2, 1, 1))
    r, angle = np.hypot(x, y), np.arctan2(y, x) + rng.uniform(-0.15, 0.15)
    radius = rng.uniform(0.36, 0.46)
    # 1 in the middle of a petal, 0 between two
    lobe = np.abs(np.cos(PETAL_COUNTS[attributes["count"]] * angle / 2)) ** 0.8
    for colour, inside, light in (
            (PETALS[attributes["petal"]], radius * (0.25 + 0.75 * lobe) - r, 0.8 + 0.24 * lobe),
            (CENTRES[attributes["centre"]], 0.3 * radius - r, 1.05 - 0.3 * r / radius)):
        mask = np.clip(inside * side + 0.5, 0, 1)[..., None]
        image += mask * (np.array(colour) * light[..., None] + rng.normal(0, 7, 3) - image)
    return np.clip(image, 0, 255).astype(np.uint8)

def classify_toy(images):
    """Return petal colour, centre colour and petal count of images (B, 3, S, S) in [-1, 1].

    Colours: by majority. Count: the largest Fourier component of the petals' mask."""
    pixels = (images.float().cpu().permute(0, 2, 3, 1) + 1) * 127.5
    axis = torch.linspace(-0.5, 0.5, images.shape[-1])
    position = axis + 1j * axis[:, None]
    r = position.abs()

    def nearest(pixels, colours):
        return torch.cdist(pixels, torch.tensor([*colours.values()]).float()).argmin(-1)

    colour = nearest(pixels, PETALS | BACKGROUNDS)  # (B, S, S)
    petal = colour[:, (r > 0.14) & (r < 0.25)].mode(1)[0]
    centre = nearest(pixels[:, r < 0.06], CENTRES).mode(1)[0]
    mask = (colour == petal[:, None, None])
    middle = (mask * position).sum((1, 2)) / mask.sum((1, 2))
    wave = mask * (position - middle[:, None, None]).sgn()  # exp(i angle)
    count = torch.stack([(wave ** k).sum((1, 2)).abs() for k in PETAL_COUNTS.values()], 1)
    return [dict(petal=[*PETALS, *BACKGROUNDS][p], centre=[*CENTRES][c], count=[*PETAL_COUNTS][k])
            for p, c, k in zip(petal, centre, count.argmax(1))]

def attribute_accuracy(images, captions, dataset):
    """Return how often images (N, 3, S, S) show the attributes in their captions, numbers (N,)."""
    hits = dict(petal=[], centre=[], count=[])
    for shown, i in zip(classify_toy(images), captions):
        true = dataset.records[dataset.caption_owners[i]].attributes
        for name in hits:
            if true[name] in dataset.captions[i]:
                hits[name].append(shown[name] == true[name])
    return {name: sum(hit) / max(1, len(hit)) for name, hit in hits.items()}

# ---- Images

def load_image(record, side):
    """Return the central square of an image or of its bounding box, (3, side, side) uint8."""
    if record.path is None:
        return render_flower(record.attributes, side).transpose(2, 0, 1)
    try:
        image = ImageOps.exif_transpose(Image.open(record.path))
        if record.bbox:
            image = image.crop(np.clip(record.bbox, 0, image.size * 2).tolist())
        white = Image.new("RGBA", image.size, "white")  # behind transparent pixels
        image = Image.alpha_composite(white, image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (side, side), Image.BILINEAR)
    except Exception as error:
        raise UserError(f"cannot read the image {record.path} ({error}); fix it")
    return np.asarray(image).transpose(2, 0, 1)

def load_images(records, side, label):
    """Decode images in parallel, yield them in blocks (n, 3, side, side) uint8."""
    bar = Progress(len(records), label)
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(records), 64):
            block = [*pool.map(lambda r: load_image(r, side), records[i:i + 64])]
            yield np.stack(block)
            bar.update(len(block))

class CaptionDataset:
    """Images with captions.

    images: (N, 3, L, L) uint8, memory-mapped; L = 76/64 size. classes: (N,) in 0..C-1.
    captions: a list; image i has caption_counts[i] from caption_offsets[i] on."""
    def __init__(self, name, split, size, records):
        self.name, self.size, self.records = name, size, records
        if not all(r.captions for r in records):
            raise UserError(f"{name}: missing captions")
        files = [(r.path, r.path and r.path.stat().st_mtime_ns, r.attributes) for r in records]
        key = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
        self.cache = f"datasets/cache/{Path(name).name}-{split}-{key}"
        side = size * 76 // 64
        decoded = Path(f"{self.cache}-{side}px.u8")
        if not decoded.exists():
            with atomic_write(decoded) as part, open(part, "wb") as file:
                for block in load_images(records, side, "decoding"):
                    file.write(block.tobytes())
        self.images = torch.from_numpy(np.memmap(decoded, shape=(len(records), 3, side, side)))
        classes = np.unique([r.label for r in records], return_inverse=True)[1]
        if not classes.any():  # a single class: each image is its own
            classes = np.arange(len(records))
        self.classes = torch.from_numpy(classes)
        self.captions = [caption for r in records for caption in r.captions]
        self.caption_counts = torch.tensor([len(r.captions) for r in records])
        self.caption_offsets = self.caption_counts.cumsum(0) - self.caption_counts
        self.caption_owners = torch.arange(len(records)).repeat_interleave(self.caption_counts)

    def __len__(self):
        return len(self.records)

    def center_crop(self, index):
        """Return the central crops of images, (B,) -> (B, 3, S, S) in [-1, 1]."""
        a = (self.images.shape[-1] - self.size) // 2
        return self.images[index, :, a:a + self.size, a:a + self.size].float() / 127.5 - 1

    def sample_captions(self, index, k, rng):
        """Return k caption numbers of each image, (B, k), distinct if it has k captions."""
        width, count = max(int(self.caption_counts.max()), k), self.caption_counts[index, None]
        order = torch.rand(len(index), width, generator=rng) + (torch.arange(width) >= count)
        return self.caption_offsets[index, None] + order.argsort(1)[:, :k] % count

DATASETS = dict(toy=toy, flowers=flowers, cub=cub, coco=coco)

def dataset_id(name):
    """Return the name of a dataset, or the absolute path of a folder."""
    return name if name in DATASETS else str(Path(name).resolve())

def load_dataset(name, split="train", size=64, root="datasets"):
    """Return the "train" or "test" split of root/name or a folder, at S = size."""
    folder = Path(root, dataset_id(name)).resolve()  # a folder's id is an absolute path
    records = DATASETS.get(name, image_folder)(folder, split)
    return CaptionDataset(name, split, size, records)

# ---- Batches

def sample_other_class(by_class, counts, classes, k, rng):
    """Return (B, k) items of other classes than `classes` (B,).

    by_class: all items, sorted by class. counts (C,): items of each class."""
    size = counts[classes, None]
    start = counts.cumsum(0)[classes, None] - size
    uniform = torch.rand(len(classes), k, generator=rng, dtype=torch.double)
    pick = (uniform * (len(by_class) - size)).long()
    return by_class[pick + size * (pick >= start)]  # skips the own class

class Batches:
    """Draw batches as a pure function of (seed, step): a resumed run sees the same ones.

    An epoch is a permutation of the images, without an incomplete last batch. Each rank gets its
    part of a batch. Wrong captions are of other classes; rolled: the batch's, rolled by one."""

    def __init__(self, dataset, batch_size, seed=0, device="cpu", captions_per_image=1, rank=0,
                 world_size=1, rolled=False):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.device, self.k, self.rolled = device, captions_per_image, rolled
        self.rank, self.world_size, self.epoch = rank, world_size, None
        self.images, self.cuda = dataset.images, "cuda" in device
        if self.cuda and self.images.numel() < torch.cuda.mem_get_info(device)[1] / 3:
            self.images = self.images.to(device)
        self.by_class = dataset.classes.argsort(stable=True), dataset.classes.bincount()

    def __len__(self):
        return max(1, len(self.dataset) // self.batch_size)

    def __call__(self, step):
        """Return images (B, 3, S, S) in [-1, 1], caption numbers (B, k) and wrong ones (B, k)."""
        dataset, size = self.dataset, self.dataset.size
        epoch, batch = divmod(step, len(self))
        rng = torch.Generator().manual_seed(self.seed * 2**20 + epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, torch.randperm(len(dataset), generator=rng)
        index = (batch * self.batch_size + torch.arange(self.batch_size)) % len(dataset)
        index = self.order[index]
        rng.manual_seed((self.seed * 2**20 + step) ^ 0x5DEECE66D)
        other = sample_other_class(*self.by_class, dataset.classes[index], 1, rng)[:, 0]
        corner = torch.randint(self.images.shape[-1] - size + 1, (len(index), 2), generator=rng)
        flip = torch.randint(2, (len(index), 1), generator=rng)
        captions = dataset.sample_captions(index, self.k, rng)
        wrong = captions.roll(1, 0) if self.rolled else dataset.sample_captions(other, self.k, rng)
        rows = torch.cat((index[:, None], corner, flip, captions, wrong), 1)
        rows = rows.chunk(self.world_size)[self.rank]
        on_device = self.to_device(rows)  # one copy instead of five
        index, top, left, flip = (on_device if self.images.is_cuda else rows)[:, :4].T
        windows = self.images.unfold(2, size, 1).unfold(3, size, 1)  # a view: all crops
        images = windows[index, :, top, left]
        images = torch.where(flip.bool()[:, None, None, None], images.flip(3), images)
        images = self.to_device(images).float() / 127.5 - 1
        return images, *on_device[:, 4:].chunk(2, 1)

    def to_device(self, x):
        """Copy to the device; to a GPU, without blocking."""
        if self.cuda and not x.is_cuda:
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)
