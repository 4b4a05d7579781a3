"""Test data.py: datasets and archives, folders of photos, decoding, the cache, wrong captions."""
import collections
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
from conftest import equal, shared

NOISE = np.random.default_rng(0).integers(0, 256, (12, 3, 70, 80), np.uint8)  # 12 images


def png(i):
    """Return the bytes of a PNG file of image i."""
    file = io.BytesIO()
    Image.fromarray(NOISE[i % 12].transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def add_image(path, text="a caption", i=0):
    """Write image i and its captions, and return the path. text: a string or encoded bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(i))
    content = text if isinstance(text, bytes) else text.encode()
    path.with_suffix(".txt").write_bytes(content)
    return path


def load_folder(texts):
    """Write a folder of one image per text, of 12 images 2 in a, 4 in b and 6 in c. Return the
    training set."""
    for i, text in enumerate(texts):
        add_image(f"own/{'aabbbbcccccc'[i % 12]}/{i:02}.png", text, i)
    return data.load_dataset("own", "train", 16)


def make_dataset(captions, classes):
    """Return a dataset of toy flowers with given captions (one list per flower) and classes."""
    records = []
    for seed, (lines, label) in enumerate(zip(captions, classes)):
        attributes = dict(petal="red", centre="white", count="six", seed=seed)
        records.append(data.Record(None, lines, label, None, attributes))
    return data.CaptionDataset("made", "train", 16, records)


def decode(path, side, bbox=None):
    """Return one decoded image, (3, side, side) uint8."""
    return data.load_image(data.Record(Path(path), ["a caption"], 0, bbox), side)


# ---- Toy flowers


def test_toy_test_pairs_do_not_occur_in_training():
    pairs = {}
    for split in ("train", "test"):
        flowers = [record.attributes for record in data.toy(None, split)]
        pairs[split] = {(flower["petal"], flower["centre"]) for flower in flowers}
    assert not pairs["train"] & pairs["test"]
    petals = [{petal for petal, _ in pairs[split]} for split in ("train", "test")]
    assert petals[0] == petals[1] == set(data.PETALS)


def test_toy_classifier_reads_what_was_drawn():
    test_set = data.load_dataset("toy", "test", 64)
    shown = data.classify_toy(test_set.center_crop(torch.arange(len(test_set))))
    for name in ("petal", "centre", "count"):
        drawn = [record.attributes[name] for record in test_set.records]
        found = [flower[name] for flower in shown]
        assert np.mean(np.array(drawn) == np.array(found)) >= 0.99


# ---- Archives: image 0 is a test image, image 1 is a training image

CAPTIONS = [b"zero\n\n two \n", b"one\r\ntwo"]


def coco_notes(first_caption):
    """Return the COCO annotations of one image."""
    captions = [first_caption] + 6 * ["two"]  # more than the five that are used
    name = {"zero\n": "0.jpg", "one": "1.jpg"}[first_caption]
    return json.dumps({
        "images": [{"id": 9, "file_name": name}],
        "annotations": [{"image_id": 9, "caption": caption} for caption in captions]}).encode()


ARCHIVES = {  # of each dataset, in the order in which they are needed
    "flowers": {
        "cvpr2016_flowers.tar.gz": {
            "cvpr2016_flowers/text_c10/class_00020/image_00000.txt": CAPTIONS[0],
            "cvpr2016_flowers/text_c10/class_00021/image_00001.txt": CAPTIONS[1]},
        "102flowers.tgz": {"jpg/image_00000.jpg": png(0), "jpg/image_00001.jpg": png(1)}},
    "cub": {
        "CUB_200_2011.tgz": {
            "CUB_200_2011/images.txt": b"1 001.0/0.5.jpg\r\n2 002.1/1.5.jpg\r\n",
            "CUB_200_2011/bounding_boxes.txt":
                b"1 40.9 5.0 41.0 30.0\r\n2 0.0 51.0 20.0 10.9\r\n",
            "CUB_200_2011/images/001.0/0.5.jpg": png(0),
            "CUB_200_2011/images/002.1/1.5.jpg": png(1)},
        "text.zip": {
            "__MACOSX/text/001.0/0.5.txt": b"junk",
            "text/001.0/0.5.txt": CAPTIONS[0], "text/002.1/1.5.txt": CAPTIONS[1]}},
    "coco": {
        "annotations_trainval2014.zip": {
            "annotations/captions_train2014.json": coco_notes("one"),
            "annotations/captions_val2014.json": coco_notes("zero\n")},
        "train2014.zip": {"train2014/1.jpg": png(1)},
        "val2014.zip": {"val2014/0.jpg": png(0)}}}

CROPS = {  # what load_image must return, if it need not resize
    "flowers": (NOISE[0, :, :, 5:75], NOISE[1, :, :, 5:75]),
    "coco": (NOISE[0, :, :, 5:75], NOISE[1, :, :, 5:75]),
    # 0.75 * 41 is 30 about (60, 20), cut to 50 x 50; 0.75 * 20 is 15 about (10, 56), cut to 25 x 29
    "cub": (NOISE[0, :, :50, 30:], NOISE[1, :, 43:68, :25])}


def pack(path, files):
    """Write a .zip, .tgz or .tar.gz of {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ["flowers", "cub", "coco"])
def test_archives(name, monkeypatch):
    """Each missing archive is an error that names it. With all, both splits are right."""
    def find_download(url, root, name, md5):
        Path(root, name).stat()

    monkeypatch.setattr("torchvision.datasets.utils.download_url", find_download)
    for archive, files in ARCHIVES[name].items():
        with pytest.raises(data.UserError, match=archive):
            data.load_dataset(name, "train", 16, "root")
            data.load_dataset(name, "test", 16, "root")
        pack(Path("root", name, archive), files)

    for split, caption, crop in zip(("test", "train"), ("zero", "one"), CROPS[name]):
        dataset = data.load_dataset(name, split, 16, "root")
        assert dataset.captions == [caption] + ["two"] * (4 if name == "coco" else 1)
        assert np.array_equal(data.load_image(dataset.records[0], crop.shape[1]), crop)


def test_cub_without_a_file_of_captions():
    for name, content in ARCHIVES["cub"]["CUB_200_2011.tgz"].items():
        path = Path("root/cub", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    Path("root/cub/text").mkdir()
    with pytest.raises(data.UserError, match="cub: missing captions"):
        data.load_dataset("cub", "test", 16, "root")


@pytest.mark.parametrize("name", ["a.tgz", "a.zip"])
@pytest.mark.parametrize("member", ["../evil", "/evil", "x/../../../evil", "damaged"])
def test_hostile_and_damaged_archives(tmp_path, name, member):
    """An archive with paths that lead outside, or half of an archive, leaves no file behind."""
    archive = tmp_path / "in" / name
    target = str(tmp_path / "evil") if member == "/evil" else member
    pack(archive, {target: NOISE[0].tobytes(), "other/file": b""})
    if member == "damaged":
        archive.write_bytes(archive.read_bytes()[:9000])
    with pytest.raises(data.UserError, match=f"{name}, or delete that file if it is damaged"):
        data.fetch(name, archive.parent, "jpg")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [name, "in"]


def test_real_flowers_and_cub():
    flowers = shared("data", "flowers")
    assert len(data.flowers(flowers, "train")) == 7034
    assert len(data.flowers(flowers, "test")) == 1155
    cub = shared("data", "cub")  # all of it, or its first ten classes
    for split, expected in (("train", {2, 3, 5, 7, 10}), ("test", {1, 4, 6, 8, 9})):
        labels = {record.label for record in data.cub(cub, split)}
        assert labels & set(range(1, 11)) == expected
    names = shared("reference", "lists", "cub_test_classes.txt").read_text().split()
    assert data.CUB_TEST == {int(name[:3]) for name in names}


# ---- A folder of photos: which files, which classes, which split


def test_images_without_captions_are_counted(capsys):
    """An image without a text file and one with an empty text file are not used."""
    train_set = load_folder(["one\r\n\r\n two ", "\n", "three"])
    Path("own/a/without.png").write_bytes(png(0))
    train_set = data.load_dataset("own", "train", 16)
    assert "own: 2 of 4 images have captions\n" in capsys.readouterr().out
    assert train_set.captions == ["one", "two", "three"]
    assert [record.path.name for record in train_set.records] == ["00.png", "02.png"]


@pytest.mark.parametrize("hidden", ["own/.ipynb_checkpoints/3.png", "own/.trash/a/3.png",
                                    "own/a/.3.png"])
def test_hidden_files_and_folders_are_skipped(hidden, capsys):
    load_folder(["one", "two", "three"])
    add_image(hidden, "hidden")
    assert "hidden" not in data.load_dataset("own", "train", 16).captions
    assert "3 of 3 images" in capsys.readouterr().out.splitlines()[-3]


def test_an_image_directly_in_the_folder_is_a_class_of_its_own(capsys):
    for name in ("1.png", "2.png", "red/3.png", "red/4.png"):
        add_image(Path("own", name))
    train_set = data.load_dataset("own", "train", 16)
    assert train_set.classes.bincount().tolist() == [1, 1, 2]
    expected = "3 classes; the largest has 2 of 4 training images\n"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("num_images, expected", [(10, True), (360, False)])
def test_a_folder_of_few_images_says_what_to_expect(num_images, expected, capsys):
    for i in range(num_images):
        add_image(f"own/{i:03}.png", f"photo {i}", i % 256)
    data.load_dataset("own", "train", 16)
    assert ("few images: expect the colours" in capsys.readouterr().out) == expected


@pytest.mark.parametrize("folder", ["own", "own/photos"])
def test_a_stray_photo_in_a_sub_folder_does_not_supply_all_wrong_captions(folder):
    """The other 18 images are in the folder itself or in one sub-folder: each is a class."""
    for i in range(18):
        add_image(f"{folder}/{i:02}.png", f"photo {i}", i)
    add_image("own/extra/stray.png", "the stray photo")
    train_set = data.load_dataset("own", "train", 16)
    assert train_set.classes.unique().tolist() == list(range(19))
    drawn = collections.Counter()
    batches = data.Batches(train_set, 19)
    for step in range(100):
        _, _, wrong = batches(step)
        drawn.update(train_set.captions[i] for i in wrong[:, 0])
    assert len(drawn) == 19  # each caption about 100 times
    assert 60 < min(drawn.values()) <= max(drawn.values()) < 140


def test_a_class_with_over_nine_tenths_of_the_images_is_dissolved():
    kept = data.number_classes(["a"] * 18 + ["b", "c"])
    assert kept.tolist() == [0] * 18 + [1, 2]
    dissolved = data.number_classes(["b", "b"] + ["a"] * 19)
    assert dissolved[:2].tolist() == [0, 0]
    assert dissolved[2:].tolist() == list(range(1, 20))
    assert data.number_classes(["a", "a"]).tolist() == [0, 1]


def test_links_to_folders_are_followed_but_not_in_loops(capsys):
    """One link leads back to the folder. Of two links to another folder, the first is used."""
    add_image("own/a/1.png")
    elsewhere = add_image("elsewhere/2.png").resolve().parent
    Path("own/c").symlink_to(elsewhere)
    Path("own/b").symlink_to(elsewhere)
    Path("own/a/back").symlink_to(Path("own").resolve())
    train_set = data.load_dataset("own", "train", 16)
    names = [str(record.path.relative_to(Path("own").resolve())) for record in train_set.records]
    assert names == ["a/1.png", "b/2.png"]
    assert "2 of 2 images" in capsys.readouterr().out


def test_kinds_that_pillow_reads_are_found():
    """Upper case counts as well."""
    suffixes = ["bmp", "GIF", "jpeg", "JPG", "png", "ppm", "tga", "tif", "TIFF", "webp"]
    for suffix in suffixes:
        path = add_image(f"own/{suffix}/photo.{suffix}")
        Image.new("RGB", (20, 20), (0, 255, 0)).save(path)
    train_set = data.load_dataset("own", "train", 16)
    found = [record.path.suffix[1:] for record in train_set.records]
    assert sorted(found) == sorted(suffixes)
    green = torch.tensor([0, 255, 0])[:, None, None]
    assert (train_set.images.int() - green).abs().max() <= 3


def test_captioned_files_of_other_kinds_are_named(capsys):
    """Not named: photo.json beside photo.png, or a file without captions."""
    load_folder(["one", "two"])
    add_image("own/a/phone.heic")
    add_image("own/b/raw.CR2")
    Path("own/a/00.json").write_text("{}")
    Path("own/a/table.csv").write_text("")
    data.load_dataset("own", "train", 16)
    lines = capsys.readouterr().out.splitlines()
    warning = "warning: 2 captioned files are of kinds that Pillow cannot read: phone.heic, raw.CR2"
    assert lines[-3] == warning and lines[-4].endswith("own: 2 of 2 images have captions")


def test_unusual_file_names():
    """Names with emoji, many dots, 200 characters, and bytes that are not UTF-8."""
    names = ["\N{TULIP} ü.png", "a.b.c.png", "x" * 200 + ".png", os.fsdecode(b"caf\xe9.png")]
    for i, name in enumerate(names):
        add_image(Path("own", name), f"caption {i}", i)
    for i in range(20):  # enough to be split by the hash of the name
        add_image(f"own/{i}.png", "another caption", i)
    parts = [data.load_dataset("own", split, 16) for split in ("train", "test")]
    found = [record.path.name for part in parts for record in part.records]
    assert len(found) == 24 and set(names) <= set(found)
    assert len(parts[0].caption_hashes().unique()) == len(parts[0])


def splits_of(folder):
    """Return {path within the folder: its split}."""
    splits = {}
    for split in ("train", "test"):
        for record in data.image_folder(folder, split):
            name = record.path.relative_to(folder)
            assert name not in splits
            splits[name] = split
    return splits


def test_a_new_or_removed_image_moves_no_other_between_the_splits():
    """The split depends on the name within the folder, not on the folder's place."""
    for i in range(200):
        add_image(f"own/{i % 7}/{i}.png")
    before = splits_of(Path("own").resolve())
    assert len(before) == 200
    assert 10 <= list(before.values()).count("test") <= 30  # 20 plus or minus 2.4 sigma

    for i in range(5):
        add_image(f"own/{i}/0 is first.png")
    after = splits_of(Path("own").resolve())
    assert len(after) == 205 and before.items() <= after.items()

    Path("moved").mkdir()
    Path("own").rename("moved/renamed")
    for i in range(0, 200, 2):
        Path(f"moved/renamed/{i % 7}/{i}.png").unlink()
    remaining = splits_of(Path("moved/renamed").resolve())
    assert len(remaining) == 105 and remaining.items() <= after.items()


def colour_folder(number, name):
    """Write images of three classes, each `name` and its number, and return the folder."""
    for i in range(number):
        colour = ["red", "green", "blue"][i % 3]
        add_image(f"own/{colour}/{name}{i}.png")
    return Path("own").resolve()


def test_the_rule_of_the_split_does_not_change():
    """SHA-256 of "red/9.png" and "green/19.png" begins with less than a tenth of 2**32.

    Runs rely on this, and so do the tests with the fixture home."""
    splits = splits_of(colour_folder(24, ""))
    test_names = [str(name) for name in splits if splits[name] == "test"]
    assert test_names == ["green/19.png", "red/9.png"] and len(splits) == 24


def test_small_folders():
    """Below 20 images, all are in both sets. From 20 on, at least one is a test image."""
    folder = colour_folder(19, "square")
    assert len(data.image_folder(folder, "train")) == 19
    assert len(data.image_folder(folder, "test")) == 19
    folder = colour_folder(24, "square")  # the hash of none of these names is below a tenth
    assert list(splits_of(folder).values()).count("test") == 1


@pytest.mark.parametrize("number, message", [
    (0, "own is neither a dataset nor a folder with photo.jpg beside photo.txt"),
    (1, "own has 1 captioned image; at least 2 are needed")])
def test_one_photo_or_none(number, message):
    Path("own").mkdir()
    Path("own/without.png").write_bytes(png(0))
    for i in range(number):
        add_image(f"own/{i}.png")
    with pytest.raises(data.UserError, match=message):
        data.load_dataset("own", "train", 16)


@pytest.mark.parametrize("name", ["flower", "own/file.txt"])
def test_a_folder_that_does_not_exist(name):
    add_image("own/file.png")
    with pytest.raises(data.UserError, match=f"no folder .*{name}; give a dataset or a folder"):
        data.load_dataset(name)


# ---- Captions and their encodings

MARK = "\N{BYTE ORDER MARK}"
TEXT = "caf\u00e9\r\n\r\n  \N{TULIP} \u7ea2\u82b1\n"
READABLE = {
    "utf-8": TEXT.encode("utf-8"),
    "utf-8 with mark": (MARK + TEXT).encode("utf-8"),
    "utf-16-le with mark": (MARK + TEXT).encode("utf-16-le"),
    "utf-16-be with mark": (MARK + TEXT).encode("utf-16-be")}
UNREADABLE = {
    "latin-1": "caf\u00e9".encode("latin-1"),
    "gb18030": "\u7ea2\u82b1".encode("gb18030"),
    "utf-16 without mark": "a flower".encode("utf-16-le"),
    "utf-16 cut off": (MARK + "a flower").encode("utf-16-le")[:-1],
    "utf-32 with mark": (MARK + "a flower").encode("utf-32-le")}


@pytest.mark.parametrize("encoding", READABLE)
def test_captions_in_utf8_and_in_utf16_with_its_mark(encoding):
    Path("a.txt").write_bytes(READABLE[encoding])
    assert data.read_captions(Path("a.txt")) == ["caf\u00e9", "\N{TULIP} \u7ea2\u82b1"]


@pytest.mark.parametrize("encoding", UNREADABLE)
def test_captions_in_other_encodings_are_an_error_that_names_the_file(encoding):
    load_folder(["one", "two"])
    add_image("own/a/other.png", UNREADABLE[encoding])
    message = "own/a/other.txt is not UTF-8 text .*; save it as UTF-8"
    with pytest.raises(data.UserError, match=message):
        data.load_dataset("own", "train", 16)


def test_text_files_of_no_image_are_not_read():
    load_folder(["one", "two"])
    Path("own/notes.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert data.load_dataset("own", "train", 16).captions == ["one", "two"]


def test_equal_captions_have_equal_numbers():
    dataset = make_dataset([["a", "b"], ["c", "a", "a"], ["b"]], "xyz")
    assert dataset.captions == ["a", "b", "c", "a", "a", "b"]
    assert dataset.caption_owners.tolist() == [0, 0, 1, 1, 1, 2]
    number = dict(zip(dataset.captions, dataset.texts.tolist()))
    assert len(set(number.values())) == 3
    assert dataset.texts.tolist() == [number[text] for text in "abcaab"]
    assert dataset.image_texts.tolist() == [
        [number["a"], number["b"], -1],
        [number["c"], number["a"], number["a"]],
        [number["b"], -1, -1]]


def test_caption_hashes_depend_on_names_and_texts_only():
    """They find a caption again in a folder that was moved or that has new images."""
    before = load_folder(["one\nsame", "two", "same"]).caption_hashes().tolist()
    assert len(set(before)) == 4
    Path("own").rename("moved")
    Path("moved/a/01.txt").write_text("TWO")
    add_image("moved/a/000.png", "new")
    after = data.load_dataset("moved", "train", 16).caption_hashes().tolist()
    assert [i for i in after if i in before] == [before[0], before[1], before[3]]


# ---- Decoding

MODES = {  # mode: (kind of file, a pixel, the right values of red, green and blue)
    "1": ("png", 1, (255, 255, 255)),
    "L": ("png", 77, (77, 77, 77)),
    "LA": ("png", (55, 51), (215, 215, 215)),  # a fifth of 55, on white
    "P": ("png", 3, (10, 200, 30)),
    "PA": ("tif", (3, 51), (206, 244, 210)),
    "RGB": ("png", (1, 20, 200), (1, 20, 200)),
    "RGBA": ("png", (205, 5, 5, 51), (245, 205, 205)),
    "CMYK": ("tif", (0, 100, 200, 0), (255, 155, 55)),
    "YCbCr": ("tif", (128, 128, 178), (198, 92, 128)),  # 128 + 1.402 * 50, 128 - 0.714 * 50
    "LAB": ("tif", (200, 128, 128), (194, 194, 194)),  # L* = 78.4 is a luminance of 0.54 in sRGB
    "I;16": ("png", 257 * 100, (100, 100, 100)),  # white is 65535, or 257 * 255
    "I;16B": ("tif", 257 * 200, (200, 200, 200)),
    "I": ("tif", 100, (100, 100, 100)),
    "F": ("tif", 100, (100, 100, 100))}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_that_pillow_opens(mode):
    """32-bit and float grey is scaled from its own range, here -1000 to 1550 and -10 to 15.5."""
    suffix, pixel, expected = MODES[mode]
    ranges = {"I": (-1000, 1550), "F": (-10.0, 15.5)}
    low, high = ranges.get(mode, (0, 255))
    if mode in ranges:
        pixel = type(low)(low + (high - low) * pixel / 255)
    image = Image.new(mode, (4, 4), pixel)
    if mode in ranges:
        image.putpixel((0, 3), low)
        image.putpixel((3, 3), high)
    if mode in ("P", "PA"):
        image.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 10, 200, 30])
    image.save(f"photo.{suffix}")
    assert Image.open(f"photo.{suffix}").mode == mode
    pixels = decode(f"photo.{suffix}", 4)
    assert tuple(pixels[:, 0, 0]) == expected
    if mode in ranges:
        assert pixels[:, 3, 0].tolist() == [0, 0, 0]
        assert pixels[:, 3, 3].tolist() == [255, 255, 255]


def test_twelve_bits_in_a_file_of_16_are_not_black():
    Image.fromarray(np.full((4, 4), 2048, np.uint16)).save("scan.png")
    assert decode("scan.png", 4)[:, 0, 0].tolist() == [128, 128, 128]  # 2048 / 4095 of white


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_float_images_with_nan_or_infinity_are_refused_by_name(value):
    Image.fromarray(np.float32([[0, value], [1, 2]])).save("depth.tif")
    with pytest.raises(data.UserError, match="depth.tif .*NaN or infinity"):
        decode("depth.tif", 2)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_animated_files_show_their_first_frame(suffix):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(f"film.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(f"film.{suffix}").n_frames == 3
    assert decode(f"film.{suffix}", 8)[:, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode, transparent", [("P", 0), ("RGB", (0, 0, 0)), ("L", 0)])
def test_a_transparent_colour_becomes_white(mode, transparent):
    image = Image.new(mode, (4, 4))
    image.save("photo.png", transparency=transparent)
    assert decode("photo.png", 4)[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation, quarter_turns", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_turns_the_image_after_the_crop_to_its_bounding_box(orientation, quarter_turns):
    """A bounding box counts in the stored image. Quarter turns are counter-clockwise."""
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(NOISE[0].transpose(1, 2, 0)).save("photo.png", exif=exif)
    whole = np.rot90(NOISE[0, :, :, 5:75], quarter_turns, (1, 2))
    assert np.array_equal(decode("photo.png", 70), whole)
    part = np.rot90(NOISE[0, :, 10:50, 5:45], quarter_turns, (1, 2))
    assert np.array_equal(decode("photo.png", 40, bbox=[5, 10, 45, 50]), part)


def big_jpeg(path, orientation=1):
    """Write a smooth JPEG of 1600 x 1200 with an edge. Return the full image, as EXIF turns it."""
    y, x = np.mgrid[0:1200, 0:1600]
    red = 127 + 100 * np.sin(x / 90)
    green = y * 255 / 1200
    blue = np.where(x + y < 1100, 40, 220)
    image = Image.fromarray(np.stack((red, green, blue), 2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(path, quality=95, exif=exif)
    return ImageOps.exif_transpose(Image.open(path))


@pytest.mark.parametrize("side", [76, 152])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_reduced_while_it_is_read(orientation, side, monkeypatch):
    """It keeps at least twice the side, and its values close to those of the full image."""
    full = big_jpeg("photo.jpg", orientation)
    sizes = []
    fit = ImageOps.fit

    def recording_fit(image, *args):
        sizes.append(min(image.size))
        return fit(image, *args)

    monkeypatch.setattr(ImageOps, "fit", recording_fit)
    reduced = decode("photo.jpg", side).astype(float)
    assert 2 * side <= sizes[0] <= 600
    expected = np.asarray(fit(full, (side, side), Image.BILINEAR), float).transpose(2, 0, 1)
    difference = np.abs(reduced - expected)
    assert difference.mean() < 1 and np.quantile(difference, 0.99) < 8


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_large_jpeg_in_grey_or_cmyk(mode):
    colour = {"L": 100, "CMYK": (0, 100, 200, 0)}[mode]
    expected = {"L": (100, 100, 100), "CMYK": (255, 155, 55)}[mode]
    Image.new(mode, (400, 300), colour).save("photo.jpg", quality=95)
    pixels = decode("photo.jpg", 16).astype(int)
    assert np.abs(pixels - np.array(expected)[:, None, None]).max() <= 2


def test_all_broken_images_are_named_at_once(capsys):
    """At most ten of them, and their number. The cache is not written."""
    for i in range(14):
        add_image(f"own/{i:02}.png", "a caption", i)
    for i in range(12):
        Path(f"own/{i:02}.png").write_bytes(png(i)[:9000])
    Path("own/00.png").write_text("this is not an image")
    Path("own/01.png").unlink()
    Path("own/01.png").symlink_to("a file that does not exist")
    with pytest.raises(data.UserError) as error:
        data.load_dataset("own", "train", 16)
    first, *others = str(error.value).splitlines()
    assert first == "cannot read 12 of 14 images; repair or remove them:"
    names = [Path(line.split(" (")[0]).name for line in others]
    assert names == [f"{i:02}.png" for i in range(10)]
    assert list(Path("datasets/cache").iterdir()) == []


# ---- The cache of decoded images


def test_the_cache_is_used_again(monkeypatch):
    before = load_folder("abcd").images.clone()
    monkeypatch.setattr(data, "load_image", None)  # nothing is decoded again
    assert torch.equal(data.load_dataset("own", "train", 16).images, before)


def test_the_cache_is_rebuilt_after_a_change():
    before = load_folder("abcd").images.clone()
    Image.new("RGB", (80, 70), (244, 204, 204)).save("own/b/03.png")
    after = data.load_dataset("own", "train", 16).images
    assert torch.equal(after[:3], before[:3])
    assert after[3, :, 9, 9].tolist() == [244, 204, 204]


@pytest.mark.parametrize("same", ["time", "size"])
def test_a_replaced_image_of_the_same_time_or_size_is_decoded_again(same):
    load_folder("abcd")
    path = Path("own/b/03.png")
    before = path.stat()
    Image.new("RGB", (80, 70), (244, 204, 204)).save(path)
    if same == "time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.truncate(path, before.st_size)  # zeros after the end of a PNG are ignored
    images = data.load_dataset("own", "train", 16).images
    assert images[3, :, 9, 9].tolist() == [244, 204, 204]


def test_the_cache_depends_on_the_bounding_box():
    path = add_image("photo.png")
    boxes = [[0, 0, 19, 19], [20, 20, 39, 39]]
    for x, box in zip((0, 20), boxes):
        records = [data.Record(path, ["a caption"], 0, box)]
        images = data.CaptionDataset("made", "train", 16, records).images
        assert np.array_equal(images[0], NOISE[0, :, x:x + 19, x:x + 19])


def test_an_error_leaves_no_half_cache():
    load_folder("abcd")
    cached = list(Path("datasets/cache").iterdir())
    Path("own/b/03.png").write_bytes(png(3)[:9000])
    with pytest.raises(data.UserError, match="cannot read 1 of 4 images.*\n.*own/b/03.png"):
        data.load_dataset("own", "train", 16)
    assert list(Path("datasets/cache").iterdir()) == cached


def test_a_cache_above_two_gigabytes_is_announced_before_it_is_written(monkeypatch, capsys):
    """12 images of 7600 x 7600 pixels take 2.08 GB."""
    load_folder(["a caption"] * 12)
    assert "GB" not in capsys.readouterr().out

    def stop(*args):
        raise InterruptedError

    monkeypatch.setattr(data, "load_images", stop)
    with pytest.raises(InterruptedError):
        data.load_dataset("own", "train", 6400)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("writing 2 GB of decoded images to datasets/cache/own-train-")
    assert line.endswith("-7600px.u8")


def test_too_little_free_disk_is_an_error_before_decoding(monkeypatch):
    Usage = collections.namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10e9, 8.5e9, 1.5e9))
    load_folder(["a caption"] * 12)
    monkeypatch.setattr(data, "load_images", None)
    message = "-7600px.u8 needs 2.1 GB, but 1.5 GB are free; free some space"
    with pytest.raises(data.UserError, match=message):
        data.load_dataset("own", "train", 6400)


# ---- Batches


def test_crops_and_epochs():
    """Every image comes once per epoch, with crops from all corners, flipped or not."""
    dataset = load_folder(map(str, range(12)))
    pictures = {}  # the bytes of a crop: its image, corner and flip
    for i, top, left, flip in np.ndindex(12, 4, 4, 2):
        crop = dataset.images.numpy()[i, :, top:top + 16, left:left + 16]
        pictures[crop[..., ::-1 if flip else 1].tobytes()] = i, (top, left, flip)
    batches = data.Batches(dataset, 6)
    assert len(batches) == 2
    windows = set()
    for epoch in range(40):
        order = []
        for step in (2 * epoch, 2 * epoch + 1):
            images, captions, _ = batches(step)
            pixels = ((images + 1) * 127.5).round().byte().numpy()
            for image, caption in zip(pixels, captions[:, 0]):
                i, window = pictures[image.tobytes()]
                assert dataset.captions[caption] == str(i)
                order.append(i)
                windows.add(window)
        assert sorted(order) == list(range(12))
    assert len(windows) == 4 * 4 * 2


def test_captions_are_of_their_images_and_wrong_ones_of_another_class():
    """An image has 1 to 3 captions. Two of them are distinct if it has two."""
    texts = []
    for i in range(12):
        lines = [f"photo {i}", f"{i} again", f"{i} at last"]
        texts.append("\n".join(lines[:1 + i % 3]))
    dataset = load_folder(texts)
    owners = dataset.caption_owners
    batches = data.Batches(dataset, 6, captions_per_image=2)
    for step in range(80):
        index = batches.draw(step)[:, 0]
        _, captions, wrong = batches(step)
        assert torch.equal(owners[captions], index[:, None].expand(-1, 2))
        assert torch.equal(owners[wrong[:, 0]], owners[wrong[:, 1]])
        assert (dataset.classes[owners[wrong[:, 0]]] != dataset.classes[index]).all()
        for pair in (captions, wrong):
            distinct = pair[:, 0] != pair[:, 1]
            assert torch.equal(distinct, dataset.caption_counts[owners[pair[:, 0]]] > 1)


def test_other_classes_are_uniform():
    """The numbers of draws are within five standard deviations of their mean."""
    classes = torch.tensor([2, 0, 1, 2, 2, 1, 0, 2, 1, 2, 1, 2])
    rng = torch.Generator().manual_seed(0)
    drawn = data.sample_other_class(classes.argsort(), classes.bincount(), classes, 5000, rng)
    for i, row in enumerate(drawn):
        others = classes != classes[i]
        expected = 5000 * others / others.sum()
        assert ((row.bincount(minlength=12) - expected).abs() <= 5 * expected.sqrt()).all()


@pytest.mark.parametrize("rolled", [False, True])
def test_batches_are_a_function_of_seed_and_step(rolled):
    """Half of the captions are equal, so that wrong captions are replaced as well."""
    dataset = load_folder([f"same\n{i}\nb" for i in range(12)])
    batches = data.Batches(dataset, 6, 3, "cpu", 2, rolled=rolled)
    first = batches(5)
    second = batches(2)
    assert equal(first, batches(5))
    assert equal(first, data.Batches(dataset, 6, 3, "cpu", 2, rolled=rolled)(5))
    other_seed = data.Batches(dataset, 6, 4, "cpu", 2, rolled=rolled)(5)
    assert not equal(first[0], second[0]) and not equal(first[0], other_seed[0])
    window = batches.draw(5)[:, 1:4]  # corner and flip
    assert not equal(window, data.Batches(dataset, 6, 4, "cpu", 2, rolled=rolled).draw(5)[:, 1:4])


def test_batches_are_those_of_earlier_versions():
    """A run that was started with an older data.py goes on with the batches it would have seen."""
    texts = []
    for i in range(12):
        texts.append([f"{i} first", f"{i} second", f"{i} third"][:1 + i % 3])
    batches = data.Batches(make_dataset(texts, "aabbbbcccccc"), 6, seed=3, captions_per_image=2)
    assert batches.draw(5).tolist() == [  # image, top, left, flip, 2 captions, 2 wrong captions
        [8, 1, 1, 0, 17, 15, 0, 0],
        [5, 0, 1, 0, 11, 10, 1, 2],
        [6, 1, 1, 0, 12, 12, 0, 0],
        [4, 2, 3, 1, 7, 8, 12, 12],
        [9, 1, 0, 0, 18, 18, 11, 10],
        [11, 3, 3, 1, 23, 22, 10, 9]]


@pytest.mark.parametrize("rolled", [False, True])
def test_two_ranks_together_draw_the_batch_of_one(rolled):
    dataset = load_folder([f"same\n{i}\nb" for i in range(12)])
    for step in range(10):
        whole = data.Batches(dataset, 6, 3, "cpu", 2, rolled=rolled)(step)
        first = data.Batches(dataset, 6, 3, "cpu", 2, 0, 2, rolled)(step)
        second = data.Batches(dataset, 6, 3, "cpu", 2, 1, 2, rolled)(step)
        assert equal(whole, [torch.cat(parts) for parts in zip(first, second)])


def test_a_batch_larger_than_the_dataset_is_an_error():
    dataset = load_folder("abcde")
    assert len(data.Batches(dataset, 5)) == 1
    message = "--batch-size 6 is larger than the dataset of 5 training images"
    with pytest.raises(data.UserError, match=message):
        data.Batches(dataset, 6)


# ---- Wrong captions


@pytest.mark.parametrize("rolled", [False, True])
@pytest.mark.parametrize("k", [1, 4])
def test_no_wrong_caption_is_word_for_word_one_of_its_image(k, rolled):
    """Three classes share the texts "a flower" and "a leaf". Image, crop, flip and captions are
    those of a dataset without repeated texts, and so are wrong captions that need no replacement.
    """
    texts = []
    unique_texts = []
    for i in range(24):
        shared_text = ["a flower", "a leaf"][i % 2]
        texts.append([shared_text, f"photo {i}", shared_text][:1 + i % 3])
        unique_texts.append([f"first {i}", f"second {i}", f"third {i}"][:1 + i % 3])
    classes = [i % 3 for i in range(24)]
    dataset = make_dataset(texts, classes)
    batches = data.Batches(dataset, 8, 0, "cpu", k, rolled=rolled)
    without = data.Batches(make_dataset(unique_texts, classes), 8, 0, "cpu", k, rolled=rolled)
    num_replaced = 0
    for step in range(60):
        numbers = batches.draw(step)
        plain_numbers = without.draw(step)
        assert torch.equal(numbers[:, :4 + k], plain_numbers[:, :4 + k])
        for row, plain_row in zip(numbers.tolist(), plain_numbers.tolist()):
            own_texts = texts[row[0]]
            for wrong, plain_wrong in zip(row[4 + k:], plain_row[4 + k:]):
                assert dataset.captions[wrong] not in own_texts
                if dataset.captions[plain_wrong] not in own_texts:
                    assert wrong == plain_wrong
                else:
                    assert dataset.classes[dataset.caption_owners[wrong]] != classes[row[0]]
                    num_replaced += 1
    assert num_replaced > 100


def draw_wrong_texts(dataset, image, steps=400):
    """Return how often each text is a wrong caption of an image."""
    batches = data.Batches(dataset, len(dataset))
    drawn = collections.Counter()
    for step in range(steps):
        numbers = batches.draw(step)
        row = numbers[numbers[:, 0] == image][0]
        drawn[dataset.captions[row[5]]] += 1
    return drawn


def test_a_replaced_wrong_caption_is_of_another_class_if_possible():
    """Image 0 is red. Of the other class, only "blue" and "green" differ: "pink" is of its own."""
    dataset = make_dataset([["red"], ["pink"], ["red"], ["red"], ["blue", "green"]], "aabbb")
    drawn = draw_wrong_texts(dataset, 0)
    assert set(drawn) == {"blue", "green"}
    assert abs(drawn["blue"] - 200) < 50  # five standard deviations


def test_a_replaced_wrong_caption_is_of_the_same_class_if_no_other_differs():
    dataset = make_dataset([["red"], ["pink"], ["red"], ["red"]], "aabb")
    assert set(draw_wrong_texts(dataset, 0)) == {"pink"}
    assert set(draw_wrong_texts(dataset, 2)) == {"pink"}


def test_a_folder_where_all_captions_are_equal_trains_with_a_warning(capsys):
    dataset = load_folder(["a cat"] * 6)
    warning = "warning: 6 of 6 images have every caption of the dataset, so their wrong captions"
    assert capsys.readouterr().out.count(warning) == 1
    assert draw_wrong_texts(dataset, 0, 10) == {"a cat": 10}


@pytest.mark.parametrize("number, warned", [(0, False), (1, False), (2, True)])
def test_more_than_one_percent_of_images_without_a_wrong_caption_are_a_warning(
        number, warned, capsys):
    """Of 100 images, `number` have both captions "a cat" and "a dog", in any order."""
    texts = [["a cat"], ["a dog"]] * 50
    texts[:number] = [["a dog", "a cat", "a dog"]] * number
    dataset = make_dataset(texts, range(100))
    dataset.warn_of_equal_captions()
    assert (f"warning: {number} of 100 images" in capsys.readouterr().out) == warned
