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

NOISE = np.random.default_rng(0).integers(0, 256, (12, 3, 70, 80), np.uint8)    # 12 images

def png(i):
    Image.fromarray(NOISE[i % 12].transpose(1, 2, 0)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()

def pack(path, files):
    """Write a .zip, .tgz or .tar.gz of {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") if path.suffix == ".zip" else tarfile.open(path, "w:gz") as out:
        for name, content in files.items():
            if path.suffix == ".zip":
                out.writestr(name, content)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))

def load_folder(name, captions):
    """Write an image folder, of each 12 images 2, 4 and 6 in sub-folders a, b and c; load it."""
    for i, text in enumerate(captions):
        path = Path(name, "aabbbbcccccc"[i % 12], f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
        path.with_suffix(".txt").write_bytes(text.encode())
    return [data.load_dataset(name, split, 16) for split in ("train", "test")]

def test_toy_split_and_classifier():
    train, test = data.toy(None, "train"), data.load_dataset("toy", "test", 64)
    pairs = [{(r.attributes["petal"], r.attributes["centre"]) for r in records}
             for records in (train, test.records)]
    assert not pairs[0] & pairs[1] and {p for p, _ in pairs[1]} == {p for p, _ in pairs[0]}
    shown = data.classify_toy(test.center_crop(torch.arange(len(test))))
    right = [[s[name] == r.attributes[name] for name in s] for s, r in zip(shown, test.records)]
    assert (np.mean(right, 0) >= 0.99).all()

TEXTS, CUB = (b"zero\n\n two \n", b"one\r\ntwo"), "CUB_200_2011/"
NOTES = {f"annotations/captions_{part}2014.json": json.dumps({
    "images": [{"id": 9, "file_name": f"{i}.jpg"}],
    "annotations": [{"image_id": 9, "caption": c} for c in (("zero\n", "one")[i], *["two"] * 6)]})
    for i, part in enumerate(("val", "train"))}
ARCHIVES = {    # in the order in which they are needed; image 0 is a test image, image 1 is not
    "flowers/cvpr2016_flowers.tar.gz": {
        f"cvpr2016_flowers/text_c10/class_0002{i}/image_0000{i}.txt": TEXTS[i] for i in (0, 1)},
    "flowers/102flowers.tgz": {f"jpg/image_0000{i}.jpg": png(i) for i in (0, 1)},
    "cub/CUB_200_2011.tgz": {
        CUB + "images.txt": b"1 001.0/0.5.jpg\r\n2 002.1/1.5.jpg\r\n",
        CUB + "bounding_boxes.txt": b"1 40.9 5.0 41.0 30.0\r\n2 0.0 51.0 20.0 10.9\r\n",
        **{f"{CUB}images/00{i + 1}.{i}/{i}.5.jpg": png(i) for i in (0, 1)}},
    "cub/text.zip": {"__MACOSX/text/001.0/0.5.txt": b"junk",
                     **{f"text/00{i + 1}.{i}/{i}.5.txt": TEXTS[i] for i in (0, 1)}},
    "coco/annotations_trainval2014.zip": NOTES,
    "coco/train2014.zip": {"train2014/1.jpg": png(1)},
    "coco/val2014.zip": {"val2014/0.jpg": png(0)}}

@pytest.mark.parametrize("name", ["flowers", "cub", "coco"])
def test_archives(name, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.utils.download_url",
                        lambda url, root, name, md5: Path(root, name).stat())
    for path in [path for path in ARCHIVES if path.startswith(name)]:
        with pytest.raises(data.UserError, match=path.split("/")[1]):
            [data.load_dataset(name, split, 16, "root") for split in ("train", "test")]
        pack(Path("root", path), ARCHIVES[path])
    # CUB: 0.75 * 41 -> 30 about (60, 20), cut to 50 x 50; 0.75 * 20 -> 15 about (10, 56), 25 x 29
    crops = (NOISE[0, :, :50, 30:], NOISE[1, :, 43:68, :25]) if name == "cub" else NOISE[..., 5:75]
    for split, caption, crop in zip(("test", "train"), ("zero", "one"), crops):
        dataset = data.load_dataset(name, split, 16, "root")
        assert dataset.captions == [caption] + ["two"] * (4 if name == "coco" else 1)
        assert np.array_equal(data.load_image(dataset.records[0], crop.shape[1]), crop)
    if name == "cub":
        Path("root/cub/text/001.0/0.5.txt").unlink()
        with pytest.raises(data.UserError, match="cub: missing captions"):
            data.load_dataset(name, "test", 16, "root")

def test_real_flowers_and_cub():
    flowers, cub = ([f(shared("data", f.__name__), split) for split in ("train", "test")]
                    for f in (data.flowers, data.cub))
    assert [len(records) for records in flowers] == [7034, 1155]
    assert [{r.label for r in records} for records in cub] == [{2, 3, 5, 7, 10}, {1, 4, 6, 8, 9}]
    names = shared("reference", "lists", "cub_test_classes.txt").read_text().split()
    assert data.CUB_TEST == {int(name[:3]) for name in names}

def test_image_folder(capsys):
    train, test = load_folder("own", ["\ufeffüb\r\n\r\n zwei ", "\n", *map(str, range(2, 24))])
    assert "23 of 24 images have captions" in capsys.readouterr().out
    assert train.captions[:2] == ["üb", "zwei"] and len(train) == 21
    assert test.captions == ["16", "20"] and train.classes.bincount().tolist() == [3, 7, 11]

@pytest.mark.parametrize("name", ["a.tgz", "a.zip"])
def test_hostile_and_damaged_archives(tmp_path, name):
    archive = tmp_path / "in" / name
    for member in ("../evil", str(tmp_path / "evil"), "x/../../../evil", "jpg/image"):
        pack(archive, {member: NOISE[0].tobytes(), "other/file": b""})
        archive.write_bytes(archive.read_bytes()[:9000 if member == "jpg/image" else None])
        with pytest.raises(data.UserError, match=f"{name}.* if damaged"):
            data.fetch(name, archive.parent, "jpg")
        assert [path.name for path in tmp_path.rglob("*")] == ["in", name]

def test_cache_is_rebuilt_after_a_change_and_never_half(monkeypatch):
    before = load_folder("own", "abcd")[0].images.clone()
    with monkeypatch.context() as patch:
        patch.setattr(data, "load_image", None)    # nothing is decoded again
        assert torch.equal(data.load_dataset("own", size=16).images, before)
    Path("own/b/03.png").write_bytes(png(9)[:9000])
    with pytest.raises(data.UserError, match="cannot read the image .*03.png"):
        data.load_dataset("own", size=16)
    assert len([*Path("datasets/cache").iterdir()]) == 2    # of the two splits before
    Image.new("RGBA", (80, 70), (201, 1, 1, 51)).save("own/b/03.png")    # a fifth: on white
    after = data.load_dataset("own", size=16).images
    assert torch.equal(after[:3], before[:3]) and after[3, :, 9, 9].tolist() == [244, 204, 204]

def test_crops_captions_and_epochs():
    dataset, _ = load_folder("own", [f"{i}\n" * (1 + i % 3) for i in range(12)])
    owners, table, corners = [int(caption) for caption in dataset.captions], {}, set()
    for i, top, left, flip in np.ndindex(12, 4, 4, 2):
        crop = dataset.images.numpy()[i, :, top:top + 16, left:left + 16]
        table[crop[..., ::-1 if flip else 1].tobytes()] = i, (top, left, flip)
    batches = data.Batches(dataset, 6, captions_per_image=2)
    for epoch in range(40):
        joint = [torch.cat(parts) for parts in zip(batches(2 * epoch), batches(2 * epoch + 1))]
        pixels = ((joint[0] + 1) * 127.5).round().byte().numpy()
        index, found = zip(*(table[image.tobytes()] for image in pixels))
        assert sorted(index) == [*range(12)]
        corners.update(found)
        for i, right, wrong in zip(index, joint[1].tolist(), joint[2].tolist()):
            assert dataset.classes[i] != dataset.classes[owners[wrong[0]]]
            for k, pair in ((i, right), (owners[wrong[0]], wrong)):
                assert {owners[c] for c in pair} == {k} and len({*pair}) == min(2, 1 + k % 3)
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
    batches = data.Batches(dataset, 8, 3, "cpu", 2)
    first, second, again = batches(5), batches(2), batches(5)
    orders = {str(b[1] // 3) for b in (first, second, data.Batches(dataset, 8, 4, "cpu", 2)(5))}
    assert equal(first, again) and len(orders) == 3 and len(first[0]) == 8
    shares = [data.Batches(dataset, 8, 3, "cpu", 2, rank, 2)(5) for rank in (0, 1)]
    assert equal(first, [torch.cat(pair) for pair in zip(*shares)])
