"""Captioned image datasets for text-to-image GANs.

    train_set = load_dataset("flowers", "train", size=64)
    batches = Batches(train_set, batch_size=64, device="cuda")
    images, captions, wrong = batches(step=0)  # captions, wrong: caption numbers

A dataset is one of toy, flowers (Oxford-102), cub (CUB-200-2011), coco (COCO 2014), or a folder
with photo.jpg beside photo.txt, one caption per line. The test classes of toy, flowers and cub do
not occur in training.
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
    """One image with its captions."""

    path: Path | None  # None: a toy flower
    captions: list
    label: int | str
    bbox: list | None = None  # left, top, right, bottom, in the stored image
    attributes: dict | None = None


class Progress:
    """Print progress on stderr: the share done, the rate, the time left and a note."""

    enabled = True  # False on all ranks but 0
    note = ""

    def __init__(self, total, label, unit="images", done=0):
        self.total = total
        self.label = label
        self.unit = unit
        self.done = self.initial = done
        self.start = self.shown = time.time()

    def update(self, n=1):
        """Count n more units."""
        self.done += n
        finished = self.done >= self.total
        terminal = sys.stderr.isatty()
        pause = 0.2 if terminal else 10  # seconds
        now = time.time()
        if self.enabled and (finished or now - self.shown > pause):
            self.shown = now
            rate = (self.done - self.initial) / (now - self.start + 1e-9)
            minutes = (self.total - self.done) / (rate + 1e-9) / 60
            print(f"\r{self.label} {self.done / self.total:4.0%}  {rate:.1f} {self.unit}/s  "
                  f"{minutes:.0f} min left  {self.note}  ",
                  end="" if terminal and not finished else "\n", file=sys.stderr)


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path. It is renamed to `path` on success and deleted on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ---- Datasets

def fetch(url, folder, name, md5=None):
    """Return folder/name. If it is missing, download the archive `url` and extract it."""
    from torchvision.datasets.utils import download_url
    archive = folder / Path(url).name.split("?")[0]
    target = folder / name
    if target.exists():
        return target
    try:
        download_url(url, folder, archive.name, md5)  # skips an archive with this md5
        with tempfile.TemporaryDirectory(dir=folder) as temp:
            # The filter "data" refuses paths that lead outside; shutil skips those of a zip
            options = {} if archive.suffix == ".zip" else {"filter": "data"}
            shutil.unpack_archive(archive, temp, **options)
            next(Path(temp).rglob(name)).rename(target)
    except Exception as error:
        raise UserError(f"cannot get {name} ({error!r}); save {url} as {archive}, "
                        "or delete that file if it is damaged")
    return target


def read_captions(path):
    """Return the lines of a text file, or an empty list if there is no such file."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # its byte order mark
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        if "\0" in text:  # UTF-32, or UTF-16 without its mark
            raise ValueError("it contains null characters")
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def flowers(folder, split):
    """Load Oxford-102: 7,034 train or 1,155 test images, split as by Reed et al."""
    # The captions need a browser. The part after # names the archive
    captions = fetch("https://drive.google.com/file/d/0B0ywwgffWnLLcms2WWJQRFNSWXM/view?"
                     "resourcekey=0-Av8zFbeDDvNcF1sSjDR32w#/cvpr2016_flowers.tar.gz",
                     folder, "text_c10")
    images = fetch("https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz", folder,
                   "jpg", "52808999861908f626f3c1f4e79d11fa")
    records = []
    for path in sorted(captions.glob("class_*/image_*.txt")):
        label = path.parent.name
        label_split = "test" if label <= "class_00020" else "train"
        if label_split == split:
            records.append(Record(images / f"{path.stem}.jpg", read_captions(path), label))
    return records


CUB_TEST = {  # the 50 test classes of Reed et al.
    1, 4, 6, 8, 9, 14, 23, 29, 31, 33, 34, 35, 36, 37, 38, 43, 49, 51, 53, 66, 72, 79, 83, 84, 86,
    91, 95, 96, 98, 101, 102, 103, 112, 114, 119, 121, 130, 135, 138, 147, 156, 163, 165, 166, 180,
    183, 185, 186, 187, 197}


def cub(folder, split):
    """Load CUB-200-2011: 8,855 train or 2,933 test images, split as by Reed et al."""
    base = fetch("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
                 folder, "CUB_200_2011", "97eceeb196236b17998738112f37df78")
    text = "text_c10" if (folder / "text_c10").exists() else "text"  # Reed's archive or a copy
    captions = fetch("https://huggingface.co/datasets/alkzar90/CC6204-Hackaton-Cub-Dataset/resolve/"
                     "main/data/text.zip", folder, text)
    names = np.loadtxt(base / "images.txt", str)[:, 1]
    x, y, width, height = np.loadtxt(base / "bounding_boxes.txt").astype(int)[:, 1:].T
    # StackGAN, DF-GAN: a square of 1.5 times the longer side of the bounding box
    centre_x, centre_y = x + width // 2, y + height // 2
    r = np.maximum(width, height) * 3 // 4
    boxes = np.stack((centre_x - r, centre_y - r, centre_x + r, centre_y + r), 1).tolist()
    records = []
    for name, box in zip(names, boxes):
        label = int(name[:3])
        label_split = "test" if label in CUB_TEST else "train"
        if label_split == split:
            lines = read_captions((captions / name).with_suffix(".txt"))
            records.append(Record(base / "images" / name, lines, label, box))
    return records


def coco(folder, split):
    """Load COCO 2014: 82,783 train or 40,504 test images with five captions each."""
    part = {"train": "train2014", "test": "val2014"}[split]
    md5 = {"train": "0da8c0bd3d6becc4dcb32757491aca88",
           "test": "a3d79f5ed8d289b7a7554ce06a5782b3"}[split]
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


def find_files(folder):
    """Return the visible files below a folder. Follow links to folders, each folder once."""
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real_path = os.path.realpath(parent)
        if real_path in seen:
            folders.clear()  # os.walk enters no sub-folder
            continue
        seen.add(real_path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def image_folder(folder, split):
    """Load a folder. About a tenth of the images are test images; below 20, all are in both sets.

    A sub-folder is a class; an image directly in the folder is a class of its own."""
    Image.init()
    readable = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    files = [path for path in find_files(folder) if path.suffix != ".txt"]
    images = [path for path in files if path.suffix.lower() in readable]
    records = []
    for path in images:
        captions = read_captions(path.with_suffix(".txt"))
        label = path if path.parent == folder else path.parent
        if captions:
            records.append(Record(path, captions, str(label)))
    print(f"{folder}: {len(records)} of {len(images)} images have captions")

    stems = {path.with_suffix("") for path in images}
    # A file that shares its name with an image, such as photo.json, is not meant as an image
    others = [path for path in files if path.with_suffix("") not in stems]
    unreadable = [path.name for path in others if read_captions(path.with_suffix(".txt"))]
    if unreadable:
        print(f"warning: {len(unreadable)} captioned files are of kinds that Pillow cannot read:",
              ", ".join(unreadable[:5]))
    if not records:
        raise UserError(f"{folder} is neither a dataset nor a folder with photo.jpg beside "
                        "photo.txt")
    if len(records) == 1:
        raise UserError(f"{folder} has 1 captioned image; at least 2 are needed")
    if len(records) < 20:
        return records
    # Split by name, not by position, so that a new image does not move the others
    names = [record.path.relative_to(folder).as_posix() for record in records]
    digests = [hashlib.sha256(os.fsencode(name)).hexdigest() for name in names]
    values = [int(digest[:8], 16) / 2**32 for digest in digests]
    limit = max(0.1, min(values))  # at least one test image
    return [record for record, value in zip(records, values)
            if ("test" if value <= limit else "train") == split]


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
    """Make 27 flowers of each combination. One centre per petal colour is for testing only."""
    rng = np.random.default_rng([0, split == "test"])
    records = []
    for petal, centre, count in itertools.product(PETALS, CENTRES, PETAL_COUNTS):
        diagonal = list(PETALS).index(petal) + list(CENTRES).index(centre)
        pair_split = "test" if diagonal % 6 == 0 else "train"
        if petal == centre or pair_split != split:
            continue
        for _ in range(27):
            attributes = dict(petal=petal, centre=centre, count=count, seed=len(records))
            templates = rng.choice(TEMPLATES, 4, replace=False)
            captions = [template.format(**attributes) for template in templates]
            records.append(Record(None, captions, petal + centre + count, None, attributes))
    return records


def render_flower(attributes, side):
    """Return one toy flower, (side, side, 3) uint8."""
    rng = np.random.default_rng(attributes["seed"])
    image = np.full((side, side, 3), rng.choice(list(BACKGROUNDS.values())), float)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5 + rng.uniform(-0.03, 0.03, (2, 1, 1))
    r = np.hypot(x, y)
    angle = np.arctan2(y, x) + rng.uniform(-0.15, 0.15)
    radius = rng.uniform(0.36, 0.46)
    # lobe: 1 in the middle of a petal, 0 between two
    lobe = np.abs(np.cos(PETAL_COUNTS[attributes["count"]] * angle / 2)) ** 0.8
    petals = radius * (0.25 + 0.75 * lobe) - r  # positive inside
    centre = 0.3 * radius - r
    for colour, inside, light in (
            (PETALS[attributes["petal"]], petals, 0.8 + 0.24 * lobe),
            (CENTRES[attributes["centre"]], centre, 1.05 - 0.3 * r / radius)):
        mask = np.clip(inside * side + 0.5, 0, 1)[..., None]
        image += mask * (np.array(colour) * light[..., None] + rng.normal(0, 7, 3) - image)
    return np.clip(image, 0, 255).astype(np.uint8)


def classify_toy(images):
    """Return a dict per image of images (B, 3, S, S) in [-1, 1]: petal and centre colour, petal
    count.

    Colours are those of most pixels. The count is the largest Fourier component of the petals."""
    pixels = (images.float().cpu().permute(0, 2, 3, 1) + 1) * 127.5
    axis = torch.linspace(-0.5, 0.5, images.shape[-1])
    position = axis + 1j * axis[:, None]
    r = position.abs()

    def nearest(pixels, colours):
        return torch.cdist(pixels, torch.tensor(list(colours.values())).float()).argmin(-1)

    colour = nearest(pixels, PETALS | BACKGROUNDS)  # (B, S, S)
    petal = colour[:, (r > 0.14) & (r < 0.25)].mode(1)[0]
    centre = nearest(pixels[:, r < 0.06], CENTRES).mode(1)[0]
    mask = (colour == petal[:, None, None])
    middle = (mask * position).sum((1, 2)) / mask.sum((1, 2))
    wave = mask * (position - middle[:, None, None]).sgn()  # exp(i angle)
    waves = [(wave ** k).sum((1, 2)).abs() for k in PETAL_COUNTS.values()]
    count = torch.stack(waves, 1).argmax(1)
    petals = list(PETALS | BACKGROUNDS)
    centres = list(CENTRES)
    counts = list(PETAL_COUNTS)
    return [dict(petal=petals[p], centre=centres[c], count=counts[k])
            for p, c, k in zip(petal, centre, count)]


def attribute_accuracy(images, captions, dataset):
    """Return the share of images (N, 3, S, S) that show the petal colour, centre colour and petal
    count of their captions. captions: caption numbers (N,)."""
    hits = dict(petal=[], centre=[], count=[])
    for shown, i in zip(classify_toy(images), captions):
        true = dataset.records[dataset.caption_owners[i]].attributes
        for name in hits:
            if true[name] in dataset.captions[i]:  # a caption may name one attribute only
                hits[name].append(shown[name] == true[name])
    return {name: sum(hit) / max(1, len(hit)) for name, hit in hits.items()}


# ---- Images

def load_image(record, side):
    """Return the central square of an image or of its bounding box, (3, side, side) uint8.

    Raise UserError if Pillow cannot read the file."""
    if record.path is None:
        return render_flower(record.attributes, side).transpose(2, 0, 1)
    try:
        image = Image.open(record.path)
        if record.bbox:
            limits = image.size * 2  # (width, height, width, height)
            image = image.crop(np.clip(record.bbox, 0, limits).tolist())
        else:
            image.draft(None, (2 * side, 2 * side))  # large JPEGs: ten times faster
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # grey of 16 or 32 bits: Pillow would clip it to white or black
            pixels = np.asarray(image, float)
            if not np.isfinite(pixels).all():
                raise ValueError("it contains NaN or infinity")
            low, high = pixels.min(), pixels.max()
            if ";16" in image.mode:  # of 12 or 16 bits
                low, high = 0, 4095 if high <= 4095 else 65535
            grey = (pixels - low) / max(high - low, 1e-9) * 255
            image = Image.fromarray(grey.round().astype(np.uint8))
        white = Image.new("RGBA", image.size, "white")  # behind transparent pixels
        image = Image.alpha_composite(white, image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (side, side), Image.BILINEAR)
    except Exception as error:
        raise UserError(f"{record.path} ({error})")
    return np.asarray(image).transpose(2, 0, 1)


def load_images(records, side, label):
    """Decode images in parallel. Yield them in blocks (n, 3, side, side) uint8.

    Raise UserError with the names of all images that cannot be read."""
    bar = Progress(len(records), label)
    broken = []

    def load(record):
        try:
            return load_image(record, side)
        except UserError as error:
            broken.append(str(error))

    with ThreadPoolExecutor() as pool:
        for i in range(0, len(records), 64):
            block = list(pool.map(load, records[i:i + 64]))
            if not broken:
                yield np.stack(block)
            bar.update(len(block))
    if broken:
        names = "\n".join(sorted(broken)[:10])
        raise UserError(f"cannot read {len(broken)} of {len(records)} images; repair or remove "
                        f"them:\n{names}")


def number_classes(labels):
    """Return class numbers (N,) of labels (N,).

    If one class holds over nine tenths of the images, each of its images becomes a class of its
    own. Otherwise the few other images would supply almost all wrong captions."""
    classes = np.unique(labels, return_inverse=True)[1]
    in_largest = classes == np.bincount(classes).argmax()
    if in_largest.mean() > 0.9:
        classes[in_largest] = len(labels) + np.arange(in_largest.sum())
        classes = np.unique(classes, return_inverse=True)[1]
    return torch.from_numpy(classes)


class CaptionDataset:
    """N images and their M captions.

    records: one Record per image. cache: how the paths of its files in datasets/cache begin.
    images: (N, 3, L, L) uint8, memory-mapped; L = 76/64 size. classes: (N,) in 0..C-1.
    captions: a list, in the order of the images; caption_owners: (M,), the image of each caption.
    caption_counts, caption_offsets: (N,), the captions of each image and the first one's number.
    texts: (M,), equal numbers for equal captions. image_texts: (N, K), padded by -1."""

    def __init__(self, name, split, size, records):
        self.name = name
        self.size = size
        self.records = records
        if not all(record.captions for record in records):
            raise UserError(f"{name}: missing captions")
        self.cache = f"datasets/cache/{Path(name).name}-{split}-{self.fingerprint()}"
        self.images = self.decode()
        self.classes = number_classes([record.label for record in records])
        self.captions = [caption for record in records for caption in record.captions]
        self.caption_counts = torch.tensor([len(record.captions) for record in records])
        self.caption_offsets = self.caption_counts.cumsum(0) - self.caption_counts
        self.caption_owners = torch.arange(len(records)).repeat_interleave(self.caption_counts)
        numbers = {}
        self.texts = torch.tensor([numbers.setdefault(c, len(numbers)) for c in self.captions])
        rows = self.texts.split(self.caption_counts.tolist())
        self.image_texts = torch.nn.utils.rnn.pad_sequence(rows, True, -1)

    def __len__(self):
        return len(self.records)

    def fingerprint(self):
        """Return 16 letters that change with the path, the size or the time of any image file."""
        keys = []
        for record in self.records:
            version = None
            if record.path and record.path.exists():  # load_images names missing files
                stat = record.path.stat()
                version = (stat.st_size, stat.st_mtime_ns)
            keys.append((record.path, version, record.bbox, record.attributes))
        return hashlib.sha256(repr(keys).encode()).hexdigest()[:16]

    def decode(self):
        """Return the images, decoded once into datasets/cache."""
        side = self.size * 76 // 64
        path = Path(f"{self.cache}-{side}px.u8")
        if not path.exists():
            gigabytes = len(self) * 3 * side * side / 1e9
            if gigabytes > 2:
                print(f"writing {gigabytes:.0f} GB of decoded images to {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free / 1e9
            if free < gigabytes:
                raise UserError(f"{path} needs {gigabytes:.1f} GB, but {free:.1f} GB are free; "
                                "free some space, or make datasets/cache a link")
            with atomic_write(path) as part, open(part, "wb") as file:
                for block in load_images(self.records, side, "decoding"):
                    file.write(block.tobytes())
        return torch.from_numpy(np.memmap(path, shape=(len(self), 3, side, side)))

    def center_crop(self, index):
        """Return the central crops of the images `index` (B,), (B, 3, S, S) in [-1, 1]."""
        start = (self.images.shape[-1] - self.size) // 2
        crop = slice(start, start + self.size)
        return self.images[index, :, crop, crop].float() / 127.5 - 1

    def sample_captions(self, index, k, rng):
        """Return k caption numbers of each image, (B, k), distinct if it has k captions."""
        count = self.caption_counts[index, None]
        width = max(int(self.caption_counts.max()), k)
        missing = torch.arange(width) >= count
        keys = torch.rand(len(index), width, generator=rng) + missing  # missing ones come last
        order = keys.argsort(1)[:, :k] % count  # and repeat those that exist
        return self.caption_offsets[index, None] + order

    def caption_hashes(self):
        """Return a number per caption, (M,), that depends on the name of its image and on its text.

        A folder may move, so the rest of the path does not count."""
        hashes = []
        for caption, i in zip(self.captions, self.caption_owners.tolist()):
            path = self.records[i].path
            key = f"{path and path.name}:{caption}".encode(errors="surrogateescape")
            digest = hashlib.sha256(key).digest()
            hashes.append(int.from_bytes(digest[:7], "big"))
        return torch.tensor(hashes)

    def replace_right_captions(self, wrong, index, rng):
        """Replace wrong captions (B, k), in place, that are word for word captions of their images
        `index` (B,)."""
        right = (self.texts[wrong][:, :, None] == self.image_texts[index][:, None]).any(2)
        for i, j in right.nonzero().tolist():
            different = ~torch.isin(self.texts, self.image_texts[index[i]])
            other_class = self.classes[self.caption_owners] != self.classes[index[i]]
            preference = different * (1 + other_class.int())  # 2: of another class too
            choices = (preference == preference.max()).nonzero()
            wrong[i, j] = choices[torch.randint(len(choices), (1,), generator=rng)]

    def warn_of_equal_captions(self):
        """Print a warning if over 1% of the images have no wrong caption."""
        num_texts = len(set(self.captions))
        same = sum(len(set(record.captions)) == num_texts for record in self.records)
        if same > len(self) / 100:
            print(f"warning: {same} of {len(self)} images have every caption of the dataset, so "
                  "their wrong captions are right ones")


DATASETS = dict(toy=toy, flowers=flowers, cub=cub, coco=coco)


def dataset_id(name):
    """Return the name of a dataset, or the absolute path of a folder."""
    return name if name in DATASETS else str(Path(name).resolve())


def load_dataset(name, split="train", size=64, root="datasets"):
    """Return the "train" or "test" split of root/name or of a folder, at S = size."""
    folder = Path(root, dataset_id(name)).resolve()  # a folder's id is an absolute path
    if name not in DATASETS and not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a dataset or a folder as --data")
    records = DATASETS.get(name, image_folder)(folder, split)
    dataset = CaptionDataset(name, split, size, records)
    if name not in DATASETS and split == "train":
        counts = dataset.classes.bincount()
        print(f"{len(counts)} classes; the largest has {counts.max()} of {len(dataset)} "
              "training images")
        if len(dataset) < 300:  # 137 gave patches of colour, 456 bodies (docs/results.md)
            print("few images: expect the colours of the captions rather than shapes")
        dataset.warn_of_equal_captions()
    return dataset


# ---- Batches

EPOCH_SEEDS = 2**20  # seeds * EPOCH_SEEDS + epoch or step are all different
STEP_KEY = 0x5DEECE66D  # makes the random numbers of step n differ from those of epoch n


def sample_other_class(by_class, counts, classes, k, rng):
    """Return k random items of other classes for each of `classes` (B,), (B, k).

    by_class: all items, sorted by class. counts: (C,), the number of items of each class."""
    size = counts[classes, None]
    start = counts.cumsum(0)[classes, None] - size  # of the own class in by_class
    uniform = torch.rand(len(classes), k, generator=rng, dtype=torch.double)
    pick = (uniform * (len(by_class) - size)).long()
    return by_class[pick + size * (pick >= start)]  # skips the own class


class Batches:
    """Draw batches as a pure function of (seed, step): a resumed run sees the same ones.

    An epoch is a permutation of the images, without an incomplete last batch. Each rank gets its
    part of a batch. Wrong captions are of other classes; with `rolled`, they are the captions of
    the batch, rolled by one. None is word for word a caption of its image, where possible."""

    def __init__(self, dataset, batch_size, seed=0, device="cpu", captions_per_image=1, rank=0,
                 world_size=1, rolled=False):
        if batch_size > len(dataset):
            raise UserError(f"--batch-size {batch_size} is larger than the dataset of "
                            f"{len(dataset)} training images")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.cuda = "cuda" in device
        self.captions_per_image = captions_per_image
        self.rank = rank
        self.world_size = world_size
        self.rolled = rolled
        self.epoch = None  # of self.order
        self.by_class = dataset.classes.argsort(stable=True)
        self.class_counts = dataset.classes.bincount()
        # On a GPU, all images are kept in its memory if they take less than a third of it
        self.images = dataset.images
        if self.cuda and self.images.numel() < torch.cuda.mem_get_info(device)[1] / 3:
            self.images = self.images.to(device)

    def __len__(self):
        return len(self.dataset) // self.batch_size

    def draw(self, step):
        """Return the numbers of a batch, (B, 4 + 2 k): image, top, left, flip, k caption numbers,
        k wrong caption numbers."""
        epoch, batch = divmod(step, len(self))
        rng = torch.Generator()
        if epoch != self.epoch:
            self.epoch = epoch
            rng.manual_seed(self.seed * EPOCH_SEEDS + epoch)
            self.order = torch.randperm(len(self.dataset), generator=rng)
        index = self.order[batch * self.batch_size:(batch + 1) * self.batch_size]

        rng.manual_seed((self.seed * EPOCH_SEEDS + step) ^ STEP_KEY)
        classes = self.dataset.classes[index]
        other = sample_other_class(self.by_class, self.class_counts, classes, 1, rng)[:, 0]
        margin = self.images.shape[-1] - self.dataset.size
        corner = torch.randint(margin + 1, (len(index), 2), generator=rng)
        flip = torch.randint(2, (len(index), 1), generator=rng)
        captions = self.dataset.sample_captions(index, self.captions_per_image, rng)
        if self.rolled:
            wrong = captions.roll(1, 0)
        else:
            wrong = self.dataset.sample_captions(other, self.captions_per_image, rng)
        self.dataset.replace_right_captions(wrong, index, rng)
        return torch.cat((index[:, None], corner, flip, captions, wrong), 1)

    def __call__(self, step):
        """Return images (B, 3, S, S) in [-1, 1], caption numbers (B, k) and wrong ones (B, k)."""
        rows = self.draw(step).chunk(self.world_size)[self.rank]
        on_device = self.to_device(rows)  # one copy instead of five
        crops = on_device if self.images.is_cuda else rows
        index, top, left, flip = crops[:, :4].T
        size = self.dataset.size
        windows = self.images.unfold(2, size, 1).unfold(3, size, 1)  # a view of all crops
        images = windows[index, :, top, left]
        images = torch.where(flip.bool()[:, None, None, None], images.flip(3), images)
        images = self.to_device(images).float() / 127.5 - 1
        captions, wrong = on_device[:, 4:].chunk(2, 1)
        return images, captions, wrong

    def to_device(self, x):
        """Copy a tensor to the device. A copy to a GPU does not block."""
        if self.cuda and not x.is_cuda:
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)
