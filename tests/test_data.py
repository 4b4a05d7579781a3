"""Test data.py: datasets and their archives, images, the cache, batches."""
import io
import itertools
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets.utils
from PIL import Image

import data
from conftest import shared

NOISE = np.random.default_rng(0).integers(0, 256, (12, 70, 80, 3), np.uint8)


def png(i):
    """Return a file of image i, 80 x 70 pixels of noise, without loss."""
    Image.fromarray(NOISE[i % 12]).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def pack(path, files):
    """Write a .zip or .tgz of {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") if path.suffix == ".zip" else tarfile.open(path, "w:gz") as file:
        for name, content in files.items():
            if path.suffix == ".zip":
                file.writestr(name, content)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def write_folder(name, captions):
    """Write an image folder of 2, 4 and 6 of each 12 images in classes a, b, c, with captions."""
    for i, text in enumerate(captions):
        path = Path(name, "aabbbbcccccc"[i % 12], f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
        path.with_suffix(".txt").write_bytes(text.encode())


def load(name):
    return [data.load_dataset(name, split, 16, "root") for split in ("train", "test")]


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """Let the download succeed if the archive is there already."""
    def download_url(url, root, filename, md5):
        Path(root, filename).stat()
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download_url)


# ---- Datasets

def test_toy_split_and_classifier():
    train, test = (data.toy(None, split) for split in ("train", "test"))
    pairs = [{(r.attributes["petal"], r.attributes["centre"]) for r in s} for s in (train, test)]
    assert not pairs[0] & pairs[1] and {petal for petal, _ in pairs[1]} == set(data.PETALS)
    records = train[::5] + test[::2]
    images = torch.from_numpy(np.concatenate([*data.load_images(records, 64, "toy")]))
    shown = data.classify_toy(images / 127.5 - 1)
    for name in ("petal", "centre", "count"):
        assert np.mean([s[name] == r.attributes[name] for s, r in zip(shown, records)]) >= 0.99


def test_flowers_archives():
    with pytest.raises(data.UserError, match="save cvpr2016_flowers.tar.gz in .*root/flowers"):
        load("flowers")
    pack(Path("root/flowers/cvpr2016_flowers.tar.gz"), {
        f"cvpr2016_flowers/text_c10/class_{19 + i:05}/image_{i:05}.txt": b"a flower\n\nof %d" % i
        for i in (1, 2, 3)})
    with pytest.raises(data.UserError, match="fetch .*102flowers.tgz by hand"):
        load("flowers")
    pack(Path("root/flowers/102flowers.tgz"), {f"jpg/image_{i:05}.jpg": png(i) for i in (1, 2, 3)})
    train, test = load("flowers")
    assert [r.label for r in train.records] == [21, 22] and [r.label for r in test.records] == [20]
    assert train.captions == ["a flower", "of 2", "a flower", "of 3"]
    assert train.images.shape == (2, 3, 19, 19) and train.classes.tolist() == [0, 1]


def test_cub_archives_and_bounding_boxes():
    names = [f"{i:03}.Bird_{i}/Bird_{i}.5_0" for i in range(5)]
    boxes = ["10.9 5.0 41.0 30.0", "30.0 20.0 20.0 10.0"] * 2
    lists = {"images": [f"{n}.jpg" for n in names[1:]], "bounding_boxes": boxes}
    pack(Path("root/cub/CUB_200_2011.tgz"), {
        **{f"CUB_200_2011/images/{n}.jpg": png(i) for i, n in enumerate(names)},
        **{f"CUB_200_2011/{name}.txt": "".join(
            f"{i} {row}\r\n" for i, row in enumerate(rows, 1)).encode()
           for name, rows in lists.items()}})
    pack(Path("root/cub/text.zip"), {
        f"{folder}text/{n}.txt": f"{folder}{n}\n" for folder in ("__MACOSX/", "") for n in names})
    train, test = load("cub")
    assert train.captions == names[2:4] and test.captions == [names[1], names[4]]
    # r = int(0.75 * 20) = 15 about (40, 25); r = int(0.75 * 41) = 30 about (30, 20), cut at the
    # border to 60 x 50 pixels, of which the central square is columns 5 to 54
    assert [r.bbox for r in train.records] == [(25, 10, 55, 40), (0, -10, 60, 50)]
    for record, crop in zip(train.records, (NOISE[2, 10:40, 25:55], NOISE[3, :50, 5:55])):
        assert np.array_equal(data.load_image(record, len(crop)), crop.transpose(2, 0, 1))


def test_coco_archives():
    tables = {}
    for part, ids in {"train2014": (25, 9), "val2014": (42, 73, 74)}.items():
        names = {i: f"COCO_{part}_{i:012}.jpg" for i in ids}
        pack(Path(f"root/coco/{part}.zip"), {f"{part}/{name}": png(i) for i, name in names.items()})
        tables[f"annotations/captions_{part}.json"] = json.dumps({
            "images": [{"id": i, "file_name": name} for i, name in names.items()],
            "annotations": [{"image_id": i, "caption": f"Caption {k}\n of {i}. "}
                            for k in range(6) for i in ids]})
    pack(Path("root/coco/annotations_trainval2014.zip"), tables)
    train, test = load("coco")
    assert train.captions == [f"Caption {k} of {i}." for i in (25, 9) for k in range(5)]
    assert len(test) == 3 and train.classes.tolist() == [0, 1]


def test_real_flowers_and_cub():
    train, test = (data.flowers(shared("data", "flowers"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7034, 1155)
    names = shared("reference", "lists", "cub_test_classes.txt").read_text().split()
    assert data.CUB_TEST == {int(name[:3]) for name in names}
    classes = [{r.label for r in data.cub(shared("data", "cub"), s)} for s in ("train", "test")]
    assert classes == [{2, 3, 5, 7, 10}, {1, 4, 6, 8, 9}]


def test_image_folder(capsys):
    write_folder("own", ["\ufeffBlüte\r\n\r\n zwei\0 ", "\n", *(f"{i}\n" for i in range(2, 24))])
    Path("own/a/alone.JPG").write_bytes(png(0))
    train, test = load("own")
    assert "23 of 25 images have captions" in capsys.readouterr().out
    assert train.captions[:2] == ["Blüte", "zwei"] and len(train) == 21
    assert [r.path.name for r in test.records] == ["17.png", "21.png"]    # the 10th and the 20th
    assert train.classes.bincount().tolist() == [3, 7, 11]
    write_folder("few", "abcd")
    assert [len(dataset) for dataset in load("few")] == [4, 4]
    write_folder("one", "x")
    for name in ("one", "none"):
        with pytest.raises(data.UserError, match="needs 2 or more|is no folder"):
            load(name)


@pytest.mark.parametrize("name", ["a.tgz", "a.zip"])
def test_hostile_and_damaged_archives(tmp_path, name):
    archive = tmp_path / "in" / name
    for evil in ("../evil", str(tmp_path / "evil"), "jpg/../../../evil"):
        pack(archive, {evil: b"x", "other/file": b"y"})
        with pytest.raises(data.UserError):
            data.fetch(name, archive.parent, "jpg")
        assert [path.name for path in tmp_path.rglob("*")] == ["in", name]
    pack(archive, {f"jpg/{i}.jpg": png(i) for i in range(5)})
    for damaged in (archive.read_bytes()[:30000], b"not found"):
        archive.write_bytes(damaged)
        with pytest.raises(data.UserError, match=f"{name}.* if it is damaged"):
            data.fetch(name, archive.parent, "jpg")
        assert [path.name for path in tmp_path.rglob("*")] == ["in", name]


# ---- Images and the cache

def test_transparent_and_unreadable_images():
    pass
