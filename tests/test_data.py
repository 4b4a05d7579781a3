"""data.py: sources, preparation, batches, downloads, bad input."""
import http.server
import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import run, shared, tarred, zipped


def picture(path, colour=(200, 30, 40), size=(90, 80), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **how)


def folder(path, n=6, classes=2):
    for i in range(n):
        picture(path / f"class{i % classes}" / f"{i}.jpg", (40 * i % 255, 100, 255 - 40 * i % 255))
        (path / f"class{i % classes}" / f"{i}.txt").write_text(f"picture number {i}\nthe {i}th picture\n")
    return path


# ---- toy

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return [data.load("toy", split, 64, cache=tmp_path_factory.getbasetemp() / "cache") for split in ("train", "test")]


def test_toy_is_judged_by_what_was_drawn(toy):
    for dataset in toy:
        images = torch.cat([dataset.centre(i) for i in torch.arange(len(dataset)).split(500)])
        seen = data.judge(images)
        for trait in ("petal", "centre", "count"):
            assert sum(s[trait] == t[trait] for s, t in zip(seen, dataset.traits)) / len(seen) > 0.998, trait
        for traits, start in zip(dataset.traits, dataset.first):
            assert traits["petal"] in dataset.captions[start]


def test_toy_test_colours_are_never_trained_on(toy):
    pairs = [{(t["petal"], t["centre"]) for t in dataset.traits} for dataset in toy]
    assert len(pairs[0]) + len(pairs[1]) == len(data.PAIRS) and not pairs[0] & pairs[1]
    assert {p for p, _ in pairs[1]} == set(data.PETALS)


def test_toy_is_the_same_every_time():
    a, b = data.toy("train", per_class=1), data.toy("train", per_class=1)
    assert a == b and (data.draw(a[0].traits, 38) == data.draw(b[0].traits, 38)).all()


# ---- batches

def test_batch_equals_slicing_each_picture(toy):
    """The gather against a plain loop over pictures, with the same random numbers."""
    batches = data.Batches(toy[0], 16, seed=3)
    index = torch.arange(16) * 7
    got = batches.look(index, torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(1)
    y, x = torch.randint(13, (2, 16), generator=rng)
    for i, k in enumerate(index):
        crop = toy[0].images[k].numpy()[:, y[i]:y[i] + 64, x[i]:x[i] + 64].astype(np.float64) / 127.5 - 1
        assert np.abs(got[i].numpy() - (crop[..., ::-1] if i % 2 else crop)).max() < 1e-6


def test_batches_are_a_function_of_seed_and_step(toy):
    a, b = (data.Batches(toy[0], 32, seed=5, captions=2) for _ in range(2))
    for x, y in zip(a(40), b(40)):
        assert torch.equal(x, y)
    assert not torch.equal(a(40).images, a(41).images)
    assert not torch.equal(a(40).images, data.Batches(toy[0], 32, seed=6)(40).images)


def test_an_epoch_shows_every_picture_once(toy):
    batches = data.Batches(toy[0], 32)
    owner = torch.repeat_interleave(torch.arange(len(toy[0])), toy[0].first.diff())
    seen = torch.cat([owner[batches(s).captions[:, 0]] for s in range(len(batches))])
    assert len(seen) == len(seen.unique()) == len(toy[0])


def test_wrong_is_of_another_class_and_uniform(toy):
    batches = data.Batches(toy[0], 32)
    index = torch.full((20000,), 100)
    other = batches.another(index, torch.Generator().manual_seed(0))
    assert (toy[0].classes[other] != toy[0].classes[100]).all()
    count = other.bincount(minlength=len(toy[0]))
    assert (count > 0).sum() > 0.99 * (len(toy[0]) - 40) and count.max() < 30      # mean 5.7
    batch = data.Batches(toy[0], 32, captions=3, wrong="caption")(0)
    owner = torch.repeat_interleave(torch.arange(len(toy[0])), toy[0].first.diff())
    assert batch.wrong.shape == (32, 3) and (toy[0].classes[owner[batch.wrong]] != batch.classes[:, None]).all()


def test_captions_belong_to_their_picture_and_differ(toy):
    batches = data.Batches(toy[0], 64, captions=4)
    index = torch.randperm(len(toy[0]))[:64]
    captions = batches.say(index, torch.Generator().manual_seed(0))
    first = toy[0].first
    assert (captions >= first[index][:, None]).all() and (captions < first[index + 1][:, None]).all()
    assert all(len(set(row.tolist())) == 4 for row in captions)


def test_fewer_pictures_than_a_batch(tmp_path):
    dataset = data.load(str(folder(tmp_path / "few", 4)), size=32)
    batches = data.Batches(dataset, 10, captions=3)
    assert len(batches) == 1 and batches(7).images.shape == (10, 3, 32, 32) and batches(7).captions.shape == (10, 3)


def test_images_are_in_range(toy):
    images = data.Batches(toy[0], 64)(0).images
    assert -1 <= images.min() < -0.7 and 0.7 < images.max() <= 1


# ---- a folder of one's own

def test_folder_leaves_out_what_it_cannot_use(tmp_path, capsys):
    own = folder(tmp_path / "own", 8)
    (own / "class0" / "0.txt").unlink()
    (own / "class1" / "1.txt").write_text("\n  \n")
    whole = (own / "class0" / "2.jpg").read_bytes()
    (own / "class0" / "2.jpg").write_bytes(whole[:len(whole) // 2])
    (own / "class1" / "3.jpg").write_bytes(b"")
    dataset = data.load(str(own), size=32)
    assert len(dataset) == 4 and dataset.classes.tolist() == [0, 0, 1, 1]
    warning = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(warning) == 1
    assert "2 without a caption (0.jpg, 1.jpg)" in warning[0] and "2 broken (2.jpg, 3.jpg)" in warning[0]
    assert [t for t in dataset.captions if "5" in t] == ["picture number 5", "the 5th picture"]
    data.load(str(own), size=32)                                    # from the cache: said again
    assert "2 broken" in capsys.readouterr().err


def test_folder_without_classes_and_with_one(tmp_path):
    assert data.load(str(folder(tmp_path / "one", 5, classes=1)), size=32).classes.tolist() == [0, 1, 2, 3, 4]


def test_one_bad_held_out_picture_does_not_stop_a_folder_of_twenty(tmp_path):
    own = folder(tmp_path / "own", 21)
    (own / "class1" / "9.txt").unlink()
    (own / "class0" / "18.jpg").write_bytes(b"broken")
    assert len(data.load(str(own), "train", 32)) + len(data.load(str(own), "test", 32)) == 19


def test_one_folder_by_any_spelling_is_one_store(tmp_path, monkeypatch):
    folder(tmp_path / "own", 6)
    keys = {data.load(spelling, size=32).key for spelling in ("own", "./own", str(tmp_path / "own"))}
    assert len(keys) == 1 and len(list(data.CACHE.glob("*.u8"))) == 1


def test_what_dead_processes_left_is_swept(tmp_path):
    own = str(folder(tmp_path / "own", 6))
    data.load(own, size=32)
    store = next(data.CACHE.glob("*.u8"))
    dead, alive = (store.with_name(f"{store.name}.part{pid}") for pid in (2**22 + 1, 1))
    dead.write_text("half"), alive.write_text("somebody's"), store.unlink()
    data.load(own, size=32)
    assert not dead.exists() and alive.exists()


def test_folder_holds_out_every_tenth(tmp_path):
    own = str(folder(tmp_path / "own", 40))
    train, test = (data.load(own, split, 32) for split in ("train", "test"))
    assert (len(train), len(test)) == (36, 4) and not {p.path for p in train.pictures} & {p.path for p in test.pictures}


@pytest.mark.parametrize("n, words", [(0, "holds 0 pictures"), (1, "holds 1 pictures"), (None, "is no folder")])
def test_too_little_is_an_error(tmp_path, n, words):
    if n is not None:
        folder(tmp_path / "own", n)
        (tmp_path / "own").mkdir(exist_ok=True)
    with pytest.raises(data.UserError, match=words):
        data.load(str(tmp_path / "own"), size=32)


def test_captions_of_any_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffeine Blüte\r\n\0 zwei \0\n\n花 🌸\n".encode() + b"\xff\xfe latin")
    captions = data.read_captions(tmp_path / "a.txt")
    assert captions[:3] == ["eine Blüte", "zwei", "花 🌸"] and len(captions) == 4 and "\0" not in "".join(captions)


def test_pictures_of_every_kind(tmp_path):
    red = Image.new("RGB", (60, 40), (200, 30, 40))
    red.save(tmp_path / "rgb.png")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg")
    red.convert("P").save(tmp_path / "palette.png")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (60, 40))])
    Image.fromarray(np.full((40, 60), 200 * 256, np.uint16)).save(tmp_path / "deep.png")
    clear = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    Image.new("RGB", (1, 50), (200, 30, 40)).save(tmp_path / "narrow.png")
    Image.new("RGB", (30000, 20), (200, 30, 40)).save(tmp_path / "wide.png")
    expect = {"deep": (200, 200, 200), "clear": (255, 255, 255)}
    for path in sorted(tmp_path.iterdir()):
        array = data.decode(data.Picture(path, [], 0), 32)
        assert array.shape == (3, 32, 32) and array.dtype == np.uint8
        assert np.abs(array.mean((1, 2)) - expect.get(path.stem, (200, 30, 40))).max() < 12, path.name


def test_turned_by_exif(tmp_path):
    image = Image.new("RGB", (60, 40), "black")
    image.paste("white", (0, 0, 60, 20))                           # white above
    exif = Image.Exif()
    exif[0x0112] = 3                                               # to be shown upside down
    image.save(tmp_path / "a.jpg", exif=exif)
    array = data.decode(data.Picture(tmp_path / "a.jpg", [], 0), 32)
    assert array[:, :8].mean() < 30 and array[:, -8:].mean() > 220


# ---- the store

def test_store_is_rebuilt_when_the_source_changes_and_never_half(tmp_path, monkeypatch):
    own = folder(tmp_path / "own", 6)
    before = data.load(str(own), size=32).images.clone()
    calls = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda p, s: calls.append(p) or decode(p, s))
    assert torch.equal(data.load(str(own), size=32).images, before) and not calls       # cached
    picture(own / "class0" / "0.jpg", (9, 9, 9), (91, 81))
    assert not torch.equal(data.load(str(own), size=32).images, before) and len(calls) == 6
    data.load(str(own), size=64)
    assert len(calls) == 12

    def interrupted(p, s):
        if p.path.name == "4.jpg":
            raise KeyboardInterrupt
        return decode(p, s)
    monkeypatch.setattr(data, "decode", interrupted)
    picture(own / "class0" / "0.jpg", (99, 9, 9), (92, 82))
    with pytest.raises(KeyboardInterrupt):
        data.load(str(own), size=32)
    assert not [p for p in data.CACHE.iterdir() if ".part" in p.name]
    monkeypatch.setattr(data, "decode", decode)
    assert data.load(str(own), size=32).images[0, 0].float().mean() > 80


def test_truncated_store_is_rebuilt(tmp_path):
    own = str(folder(tmp_path / "own", 6))
    before = data.load(own, size=32).images.clone()
    store = next(data.CACHE.glob("*.u8"))
    store.write_bytes(store.read_bytes()[:100])
    assert torch.equal(data.load(own, size=32).images, before)


GROWTH = """
import resource, sys, numpy as np, torch, data
n = int(sys.argv[1])
data.decode = lambda picture, side: np.full((3, side, side), 7, np.uint8)
pictures = [data.Picture(None, ["a"], i, traits={"i": i}) for i in range(n)]
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
set_ = data.Dataset("x", "train", 256, pictures, data.CACHE / "x")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start, set_.images.numel() // 1024)
"""


def test_memory_does_not_grow_with_the_pictures(tmp_path):
    """Peak resident KB of preparing n pictures at 256 px: 270 KB each would be 23 GB for COCO; it must stay near nothing."""
    grown, stored = zip(*(map(int, run("-c", GROWTH, n, cwd=tmp_path, PYTHONPATH=str(shared_root())).stdout.split())
                          for n in (500, 3500)))
    assert stored[1] - stored[0] > 800_000                         # 3,000 more pictures are 830 MB of store ...
    assert grown[1] - grown[0] < 100_000                           # ... and under 100 MB of memory


def test_start_up_grows_in_proportion(tmp_path, monkeypatch):
    """What a ready store costs to open again: for each picture its caption file, its size and time, and no decoding."""
    monkeypatch.setattr(data, "decode", lambda picture, side: np.zeros((3, side, side), np.uint8))
    calls = []
    for n in (40, 80):
        own = folder(tmp_path / f"own{n}", n)
        data.load(str(own), size=32)
        opened, read = [], data.read_captions
        with monkeypatch.context() as m:
            m.setattr(data, "read_captions", lambda path: opened.append(path) or read(path))
            m.setattr(data, "decode", None)
            data.load(str(own), size=32)
        calls.append(len(opened))
    assert calls == [40, 80]


def test_a_store_larger_than_memory_can_be_mapped(tmp_path):
    """A sparse file of a terabyte: a private mapping would be refused."""
    with open(tmp_path / "big.u8", "wb") as file:
        file.truncate(2**40)
    assert data.mapped(tmp_path / "big.u8", (2**20, 2**20))[2**19, 5] == 0


def shared_root():
    return data.__file__.rsplit("/", 1)[0]


# ---- the archives

def test_flowers_is_the_zero_shot_split():
    root = shared("data", "flowers").parent
    train, test = (data.load("flowers", split, 64, root, cache="cache") for split in ("train", "test"))
    assert (len(train), len(test)) == (7034, 1155)
    assert (int(train.classes.max()) + 1, int(test.classes.max()) + 1) == (82, 20)
    assert len(train.captions) + len(test.captions) == 45038
    assert {p.path.name for p in test.pictures}.isdisjoint(p.path.name for p in train.pictures)


def test_cub_is_cropped_to_the_enlarged_box():
    root = shared("data", "cub").parent
    train, test = (data.load("cub", split, 64, root, cache="cache") for split in ("train", "test"))
    classes = [sorted({p.label for p in d.pictures}) for d in (train, test)]
    assert classes == [[2, 3, 5, 7, 10], [1, 4, 6, 8, 9]]
    assert len(train) + len(test) == 543 and len(train.captions) == 10 * len(train)
    boxes = dict(line.split(maxsplit=1) for line in (root / "cub/CUB_200_2011/bounding_boxes.txt").read_text().splitlines())
    names = dict(reversed(line.split()) for line in (root / "cub/CUB_200_2011/images.txt").read_text().splitlines())
    for p in train.pictures[::50]:
        x, y, w, h = map(float, boxes[names[f"{p.path.parent.name}/{p.path.name}"]].split())
        half = 0.75 * max(w, h)                                    # the box: a square 1.5 times the longer side about the middle
        expect = np.array([x + w / 2 - half, y + h / 2 - half, x + w / 2 + half, y + h / 2 + half])
        assert np.abs(np.array(p.box) - expect).max() < 4                # released: every figure cut to an integer
        with Image.open(p.path) as image:
            crop = image.convert("RGB").crop(tuple(np.clip(p.box, 0, image.size * 2)))
        side = min(crop.size)
        left, top = (crop.width - side) // 2, (crop.height - side) // 2
        plain = np.asarray(crop.crop((left, top, left + side, top + side)).resize((76, 76), Image.Resampling.BILINEAR))
        assert np.abs(data.decode(p, 76).transpose(1, 2, 0).astype(int) - plain).mean() < 2


def test_birds_as_a_folder_of_ones_own():
    root = shared("data", "birds")
    train, test = (data.load(str(root), split, 64, cache="cache") for split in ("train", "test"))
    assert (len(train), len(test)) == (5591, 621) and int(train.classes.max()) + 1 == 106
    assert len(train.captions) == 55910 and not [f for f in root.rglob("*.u8")]


def test_cub_test_classes_are_the_published_fifty():
    names = shared("reference", "lists", "cub_test_classes.txt").read_text().split()
    assert data.CUB_TEST == {int(n[:3]) for n in names} and len(data.CUB_TEST) == 50


def jpeg(colour=(10, 200, 30)):
    file = io.BytesIO()
    Image.new("RGB", (80, 70), colour).save(file, "JPEG")
    return file.getvalue()


def coco_zips():
    """The three archives of COCO 2014 in their exact layout, a few pictures large."""
    zips = {}
    for split, ids in (("train", (9, 25, 30)), ("val", (42, 73))):
        zips[f"{split}2014.zip"] = {f"{split}2014/COCO_{split}2014_{i:012}.jpg": jpeg() for i in ids}
        table = {"info": {}, "licenses": [],
                 "images": [{"id": i, "file_name": f"COCO_{split}2014_{i:012}.jpg", "height": 70, "width": 80} for i in ids],
                 "annotations": [{"id": 10 * i + k, "image_id": i, "caption": f"Caption {k} of {i}.\n"}
                                 for k in range(6) for i in ids]}
        zips.setdefault("annotations_trainval2014.zip", {})[f"annotations/captions_{split}2014.json"] = json.dumps(table).encode()
    return {name: zipped(files) for name, files in zips.items()}


@pytest.fixture
def server():
    """files: what it serves; cut: names it breaks off half-way, once; asked: the Range headers it saw."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/").split("?")[0]
            body, start = state.files.get(name), int((self.headers.get("Range") or "bytes=0-")[6:-1])
            state.asked.append((name, start))
            if body is None or start >= len(body) > 0:
                return self.send_error(404 if body is None else 416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            end = len(body) // 2 if name in state.cut and not start else len(body)
            self.wfile.write(body[start:end])

        def log_message(self, *_):
            pass

    state = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.files, state.cut, state.asked = {}, set(), []
    threading.Thread(target=state.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{state.server_port}/"
    yield state
    state.shutdown()
    state.server_close()


def serve(server, monkeypatch, name, files):
    import hashlib
    server.files = files
    served = [(server.url + file, file, md5 and hashlib.md5(files[file]).hexdigest(), inner)
              for _, file, md5, inner in data.URLS[name]]
    monkeypatch.setitem(data.URLS, name, served)


def load_with_interruptions(server, name, root):
    """Every download breaks off once in the middle; the same call again continues it."""
    server.cut = set(server.files)
    for _ in server.files:
        with pytest.raises(data.UserError, match="broke off.*same command again"):
            data.load(name, "train", 32, root)
    return [data.load(name, split, 32, root) for split in ("train", "test")]


def check_resumed(server):
    for name, body in server.files.items():
        assert (name, 0) in server.asked and (name, len(body) // 2) in server.asked


def test_coco_is_downloaded_and_resumed(server, monkeypatch, tmp_path):
    serve(server, monkeypatch, "coco", coco_zips())
    train, test = load_with_interruptions(server, "coco", tmp_path)
    assert (len(train), len(test)) == (3, 2) and train.classes.tolist() == [0, 1, 2]
    assert train.captions[:5] == [f"Caption {k} of 9." for k in range(5)] and len(train.captions) == 15
    check_resumed(server)
    asked = len(server.asked)
    data.load("coco", "train", 32, tmp_path)
    assert len(server.asked) == asked                              # nothing is fetched twice


def test_cub_is_downloaded_and_resumed(server, monkeypatch, tmp_path):
    names = ["001.A/a", "002.B/b", "003.C/c", "004.D/d"]
    files = {f"CUB_200_2011/images/{n}.jpg": jpeg() for n in names}
    files["CUB_200_2011/images.txt"] = "".join(f"{i} {n}.jpg\r\n" for i, n in enumerate(names, 1)).encode()
    files["CUB_200_2011/bounding_boxes.txt"] = "".join(f"{i} 10.0 5.0 40.0 30.0\r\n" for i in range(1, 5)).encode()
    files["attributes.txt"] = b"1 has_bill_shape::curved\n"
    text = {f"text/{n}.txt": b"a bird\nanother bird\n" for n in names}
    text["__MACOSX/text/._a.txt"] = b"junk"
    serve(server, monkeypatch, "cub", {"CUB_200_2011.tgz": tarred(files), "text.zip": zipped(text)})
    train, test = load_with_interruptions(server, "cub", tmp_path)
    assert [p.label for p in train.pictures] == [2, 3] and [p.label for p in test.pictures] == [1, 4]
    check_resumed(server)


def test_flowers_is_downloaded_and_asks_for_its_captions_first(server, monkeypatch, tmp_path):
    serve(server, monkeypatch, "flowers", {"102flowers.tgz": tarred({f"jpg/image_{i:05}.jpg": jpeg() for i in range(1, 7)})})
    with pytest.raises(data.UserError, match="drive.google.com.*cvpr2016_flowers.tar.gz into"):
        data.load("flowers", "train", 32, tmp_path)
    assert not server.asked
    captions = {f"cvpr2016_flowers/text_c10/class_{20 + i % 2:05}/image_{i:05}.txt": b"a flower\n" for i in range(1, 7)}
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers" / "cvpr2016_flowers.tar.gz").write_bytes(tarred(captions))
    assert [len(d) for d in load_with_interruptions(server, "flowers", tmp_path)] == [3, 3]
    check_resumed(server)


def test_a_folder_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "cub" / "CUB_200_2011").mkdir(parents=True)
    (tmp_path / "cub" / "text").mkdir()
    with pytest.raises(data.UserError, match="cub is not laid out as cub should be.*images.txt"):
        data.load("cub", "train", 32, tmp_path)


def test_wrong_checksum_is_refused(server, tmp_path):
    server.files = {"a.zip": b"not what was published"}
    with pytest.raises(data.UserError, match="has not the published md5"):
        data.download(server.url + "a.zip", tmp_path / "a.zip", md5="0" * 32)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip.bad"]   # kept: it may have been put there by hand


def test_missing_page_says_where_to_put_the_file(server, tmp_path):
    with pytest.raises(data.UserError, match="answered 404.*put the file at"):
        data.download(server.url + "b.zip", tmp_path / "b.zip")


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside.txt", "jpg/../../outside.txt"])
def test_archives_never_write_outside(tmp_path, name):
    home = tmp_path / "home"
    home.mkdir()
    for archive, make in (("a.tgz", tarred), ("a.zip", zipped)):
        (home / archive).write_bytes(make({name: b"x", "jpg/a.jpg": b"y"}))
        data.extract(home / archive, home, "jpg")
        assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix in (".txt", ".jpg")] == ["a.jpg"]
        (home / "jpg" / "a.jpg").unlink()
        (home / "jpg").rmdir()


def test_damaged_archives_are_named_and_leave_nothing(tmp_path):
    """Cut short, and with one bit turned at 40 places: refused, or unpacked whole; never in part."""
    rng = np.random.default_rng(0)
    files = {f"jpg/{i}.jpg": rng.bytes(3000) for i in range(5)}
    for name, make in (("a.tgz", tarred), ("a.zip", zipped)):
        whole, refused = make(files), 0
        for k in range(41):
            damaged = bytearray(whole[:9000] if k == 40 else whole)
            damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
            (tmp_path / name).write_bytes(damaged)
            try:
                data.extract(tmp_path / name, tmp_path, "jpg")
            except data.UserError as error:
                assert "remove it and run" in str(error)
                refused += 1
                assert not (tmp_path / "jpg").exists()
            else:
                import shutil
                got = {f"jpg/{p.name}": p.read_bytes() for p in (tmp_path / "jpg").iterdir()}
                assert name == "a.zip" and len(got) <= 5 or got == files
                shutil.rmtree(tmp_path / "jpg")
        assert refused > 30
