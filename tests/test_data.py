"""Test data.py: datasets and their archives, images, the cache, batches."""
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import equal, shared

NOISE = np.random.default_rng(0).integers(0, 256, (12, 70, 80, 3), np.uint8)


def png(i):
    """Return a file of image i, 80 x 70 pixels of noise, without loss."""
    Image.fromarray(NOISE[i % 12]).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def pack(path, files):
    """Write a .zip, .tgz or .tar.gz of {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") if path.suffix == ".zip" else tarfile.open(path, "w:gz") as file:
        for name, content in files.items():
            if path.suffix == ".zip":
                file.writestr(name, content)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def load_folder(name, captions):
    """Write an image folder, of each 12 images 2, 4 and 6 in sub-folders a, b and c; load it."""
    for i, text in enumerate(captions):
        path = Path(name, "aabbbbcccccc"[i % 12], f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
        path.with_suffix(".txt").write_bytes(text.encode())
    return [data.load_dataset(name, split, 16) for split in ("train", "test")]


def test_toy_split_and_classifier():
    train, test = (data.toy(None, split) for split in ("train", "test"))
    pairs = [{(r.attributes["petal"], r.attributes["centre"]) for r in s} for s in (train, test)]
    assert not pairs[0] & pairs[1] and {petal for petal, _ in pairs[1]} == set(data.PETALS)
    records = train[::10] + test[::4]
    images = torch.from_numpy(np.concatenate([*data.load_images(records, 64, "toy")]))
    shown = data.classify_toy(images / 127.5 - 1)
    for name in ("petal", "centre", "count"):
        assert np.mean([s[name] == r.attributes[name] for s, r in zip(shown, records)]) >= 0.99


TEXTS, CUB = (b"zero\n\n two \n", b"one\r\ntwo"), "CUB_200_2011/"
TABLES = [json.dumps({"images": [{"id": 9, "file_name": f"{i}.jpg"}], "annotations": [
    {"image_id": 9, "caption": c} for c in (("zero\n", "one")[i], *["two"] * 6)]}) for i in (0, 1)]
ARCHIVES = {    # in the order in which they are needed; image 0 is a test image, image 1 is not
    "flowers/cvpr2016_flowers.tar.gz": {
        f"cvpr2016_flowers/text_c10/class_0002{i}/image_0000{i}.txt": TEXTS[i] for i in (0, 1)},
    "flowers/102flowers.tgz": {f"jpg/image_0000{i}.jpg": png(i) for i in (0, 1)},
    "cub/CUB_200_2011.tgz": {
        CUB + "images.txt": b"1 001.A/a.5.jpg\r\n2 002.B/b.5.jpg\r\n",
        CUB + "bounding_boxes.txt": b"1 10.9 5.0 41.0 30.0\r\n2 30.0 20.0 20.0 10.0\r\n",
        CUB + "images/001.A/a.5.jpg": png(0), CUB + "images/002.B/b.5.jpg": png(1)},
    "cub/text.zip": {"__MACOSX/text/001.A/a.5.txt": b"junk", "text/001.A/a.5.txt": TEXTS[0],
                     "text/002.B/b.5.txt": TEXTS[1]},
    "coco/annotations_trainval2014.zip": {"annotations/captions_train2014.json": TABLES[1],
                                          "annotations/captions_val2014.json": TABLES[0]},
    "coco/train2014.zip": {"train2014/1.jpg": png(1)}, "coco/val2014.zip": {"val2014/0.jpg": png(0)}}


@pytest.mark.parametrize("name", ["flowers", "cub", "coco"])
def test_archives(name, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.utils.download_url",
                        lambda url, root, name, md5: Path(root, name).stat())
    for path in [path for path in ARCHIVES if path.startswith(name)]:
        with pytest.raises(data.UserError, match=path.split("/")[1]):
            [data.load_dataset(name, split, 16, "root") for split in ("train", "test")]
        pack(Path("root", path), ARCHIVES[path])
    crops = NOISE[0, :, 5:75], NOISE[1, :, 5:75]
    if name == "cub":
        # r = int(0.75 * 41) = 30 about (30, 20), cut to 60 x 50, of which the central square is
        # columns 5 to 54; r = int(0.75 * 20) = 15 about (40, 25)
        crops = NOISE[0, :50, 5:55], NOISE[1, 10:40, 25:55]
    for split, caption, crop in zip(("test", "train"), ("zero", "one"), crops):
        dataset = data.load_dataset(name, split, 16, "root")
        assert dataset.captions == [caption] + ["two"] * (4 if name == "coco" else 1)
        image = data.load_image(dataset.records[0], len(crop))
        assert len(dataset) == 1 and np.array_equal(image, crop.transpose(2, 0, 1))


def test_real_flowers_and_cub():
    flowers, cub = ([f(shared("data", f.__name__), split) for split in ("train", "test")]
                    for f in (data.flowers, data.cub))
    assert [len(records) for records in flowers] == [7034, 1155]
    assert [{r.label for r in records} for records in cub] == [{2, 3, 5, 7, 10}, {1, 4, 6, 8, 9}]
    names = shared("reference", "lists", "cub_test_classes.txt").read_text().split()
    assert data.CUB_TEST == {int(name[:3]) for name in names}


def test_image_folder(capsys):
    train, test = load_folder("own", ["\ufeffBlüte\r\n\r\n zwei\0 ", "\n", *map(str, range(2, 24))])
    assert "23 of 24 images have captions" in capsys.readouterr().out
    assert train.captions[:2] == ["Blüte", "zwei"] and len(train) == 21
    assert test.captions == ["16", "20"] and train.classes.bincount().tolist() == [3, 7, 11]
    for name, captions in (("one", ["x", ""]), ("none", [])):
        with pytest.raises(data.UserError, match="needs 2 or more|is no folder"):
            load_folder(name, captions)


@pytest.mark.parametrize("name", ["a.tgz", "a.zip"])
def test_hostile_and_damaged_archives(tmp_path, name):
    archive = tmp_path / "in" / name
    for member in ("../evil", str(tmp_path / "evil"), "x/../../../evil", "jpg/damaged"):
        pack(archive, {member: NOISE[0].tobytes(), "other/file": b""})
        if member == "jpg/damaged":
            archive.write_bytes(archive.read_bytes()[:9000])
        with pytest.raises(data.UserError, match=f"{name}.* if it is damaged"):
            data.fetch(name, archive.parent, "jpg")
        assert [path.name for path in tmp_path.rglob("*")] == ["in", name]


def test_cache_is_rebuilt_after_a_change_and_never_half(monkeypatch):
    before = load_folder("own", "abcd")[0].images.clone()
    with monkeypatch.context() as patch:
        patch.setattr(data, "load_image", None)    # nothing is decoded again
        assert torch.equal(data.load_dataset("own", size=16).images, before)
    Path("own/b/03.png").write_bytes(png(9)[:9000])
    files = sorted(Path("datasets/cache").iterdir())
    with pytest.raises(data.UserError, match="cannot read the image .*03.png"):
        data.load_dataset("own", size=16)
    assert sorted(Path("datasets/cache").iterdir()) == files
    Image.new("RGBA", (80, 70), (201, 1, 1, 51)).save("own/b/03.png")    # a fifth: on white
    after = data.load_dataset("own", size=16).images
    assert torch.equal(after[:3], before[:3])
    assert np.ptp(after[3], (1, 2)).max() == 0 and after[3, :, 0, 0].tolist() == [244, 204, 204]


def test_crops_captions_and_epochs():
    """Look up each crop in a table of all crops of all images."""
    dataset, _ = load_folder("own", [f"{i}\n" * (1 + i % 3) for i in range(12)])
    owners, table, corners = [int(caption) for caption in dataset.captions], {}, set()
    for i, top, left, flip in np.ndindex(12, 4, 4, 2):
        crop = dataset.images.numpy()[i, :, top:top + 16, left:left + 16]
        table[crop[..., ::-1 if flip else 1].tobytes()] = i, (top, left, flip)
    batches = data.Batches(dataset, 6, captions_per_image=3)
    for epoch in range(40):
        joint = [torch.cat(parts) for parts in zip(batches(2 * epoch), batches(2 * epoch + 1))]
        pixels = ((joint[0] + 1) * 127.5).round().byte().numpy()
        index, found = zip(*(table[image.tobytes()] for image in pixels))
        assert sorted(index) == [*range(12)]
        corners.update(found)
        for i, right, wrong in zip(index, joint[1].tolist(), joint[2].tolist()):
            j = owners[wrong[0]]
            assert dataset.classes[i] != dataset.classes[j]
            for k, captions in ((i, right), (j, wrong)):
                assert {owners[c] for c in captions} == {k} and len({*captions}) == 1 + k % 3
    assert len(corners) == 32


def test_other_classes_are_uniform():
    classes = torch.tensor([2, 0, 1, 2, 2, 1, 0, 2, 1, 2, 1, 2])
    drawn = data.sample_other_class(classes.argsort(), classes.bincount(), classes, 5000,
                                    torch.Generator().manual_seed(0))
    for i, row in enumerate(drawn):
        expect = 5000 * (classes != classes[i]) / (classes != classes[i]).sum()
        assert ((row.bincount(minlength=12) - expect).abs() <= 5 * expect.sqrt()).all()


def test_batches_are_a_function_of_seed_and_step():
    dataset, _ = load_folder("own", ["a\nb\nc"] * 5)    # fewer images than a batch
    batches, other = (data.Batches(dataset, 8, seed, "cpu", 2) for seed in (3, 4))
    first, second, again = batches(5), batches(2), batches(5)
    assert equal(first, again) and not equal(first, second) and not equal(first, other(5))
    shares = [data.Batches(dataset, 8, 3, "cpu", 2, rank, 2)(5) for rank in (0, 1)]
    assert equal(first, [torch.cat(pair) for pair in zip(*shares)])
    assert first[0].shape == (8, 3, 16, 16)
