"""Damaged and hostile files for every reader: each must be read, be left out or be refused in one sentence; no other error,
no file outside the folder, no code run.

    python tests/fuzz.py                                        # 500 files a reader; prints the counts
    python tests/fuzz.py --rounds 50 --seed 1 --only archive.zip checkpoint
"""
import argparse
import collections
import contextlib
import io
import json
import os
import pickle
import random
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import data  # noqa: E402
import dfgan  # noqa: E402
from conftest import tarred, zipped  # noqa: E402

WORDS = ["<end>", *(f"w{i}" for i in range(20))]


@contextlib.contextmanager
def silence():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def damaged(good, rng):
    """One of: bits turned, bytes overwritten, cut, a piece doubled or taken out, two halves exchanged, noise, nothing."""
    b, way = bytearray(good), rng.randrange(8)
    i, j = sorted(rng.randrange(len(b) + 1) for _ in range(2))
    if way in (0, 1) and b:
        for _ in range(rng.choice((1, 1, 3, 30))):
            b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
    elif way == 2:
        b[i:i + 16] = rng.choice((b"\0", b"\xff", b"-1", b"../")) * 8
    elif way == 3:
        del b[i:]
    elif way == 4:
        b[i:i] = b[i:min(j, i + 4096)]
    elif way == 5:
        del b[i:min(j, i + 4096)]
    elif way == 6:
        b = b[i:] + b[:i]
    else:
        b = bytearray(rng.randbytes(rng.choice((0, 1, 100, 5000))))
    return bytes(b)


def picture(mode="RGB", form="png", side=24):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 4), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise, "RGBA").convert(mode).save(out, form)
    return out.getvalue()


def saved(state, **how):
    out = io.BytesIO()
    torch.save(state, out, **how)
    return out.getvalue()


def toy_run():
    """A checkpoint of dfgan.py with all that a run keeps."""
    G, D, opt_g, opt_d = dfgan.make(1, 32)
    from torch.optim.swa_utils import AveragedModel
    encoder = common.Damsm(WORDS)
    args = dict(data="own", size=32, nf=1, batch_size=2, lr_g=1e-4, lr_d=4e-4, ema=0.9, output="one-way", penalty="ma", fusion="dfblock",
                seed=0, text_encoder=None, init=None, epochs=1)
    return saved({"format": common.FORMAT, "kind": "dfgan", "args": args, "step": 3, "rows": [], "total": torch.zeros(6), "random": common.random_state(),
                  "pictures": None, "text_note": "none", "text_encoder": encoder.state_dict(), "G": G.state_dict(), "D": D.state_dict(),
                  "ema": AveragedModel(G, use_buffers=True).state_dict(), "opt_g": opt_g.state_dict(), "opt_d": opt_d.state_dict()})


def folder_of(place, files):
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)


def readers():
    """name -> (a good file, read(path of a damaged one), its ending). read returns what it read, or None for "left out"."""
    encoder = common.Damsm(WORDS)
    book = pickle.dumps([[[1]], [[2]], dict(enumerate(WORDS)), {w: i for i, w in enumerate(WORDS)}], 2)

    def archive(path):
        with silence():
            data.extract(path, path.parent / "out", "jpg")
        return [p for p in (path.parent / "out" / "jpg").rglob("*") if p.is_file()]

    def decode(path):
        array = data.decode(data.Picture(path, [], 0), 16)
        assert array is None or array.shape == (3, 16, 16) and array.dtype == np.uint8
        return array

    def captions(path):
        lines = data.read_captions(path)
        assert all(line and "\0" not in line for line in lines)
        return encoder.encode(lines) if lines else None

    def checkpoint(path):                                          # as --sample reads it
        run = path.parent / "run"
        run.mkdir(exist_ok=True)
        os.replace(path, run / "last.pt")
        with silence():
            dfgan.main(["--data", "own", "--run", str(run), "--device", "cpu", "--sample", "w1 w2", "--columns", "1"])
        return 1

    def released(path):
        book_path = path.with_name("captions.pickle")
        if not book_path.exists():
            book_path.write_bytes(book)
        return common.read_encoder(path)

    def source(name, layout, target):                              # one file of an archive's layout damaged
        def read(path):
            place = path.parent / name
            folder_of(place, {**layout, target: path.read_bytes()})
            with silence():
                return [data.load(name, split, 16, path.parent, cache=path.parent / "cache") for split in ("train", "test")]
        return layout[target], read, ".x"

    coco = {f"{part}/{i}.png": picture() for part in ("train2014", "val2014") for i in range(2)}
    for part in ("train2014", "val2014"):
        coco[f"annotations/captions_{part}.json"] = json.dumps(
            {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(2)], "annotations": [{"image_id": i, "caption": "a b"} for i in range(2)]}).encode()
    birds = ("001.A/a.png", "001.A/b.png", "002.B/a.png", "002.B/b.png")
    cub = {**{f"CUB_200_2011/images/{b}": picture() for b in birds}, **{f"text_c10/{b[:-4]}.txt": b"a bird\n" for b in birds},
           "CUB_200_2011/images.txt": "".join(f"{i} {b}\n" for i, b in enumerate(birds, 1)).encode(),
           "CUB_200_2011/bounding_boxes.txt": "".join(f"{i} 2.0 2.0 15.0 12.0\n" for i in range(1, 5)).encode()}

    def store(ending):                                             # what a run left beside the pictures
        def read(path):
            place = path.parent / "own"
            folder_of(place, {f"{i}.png": picture() for i in range(3)} | {f"{i}.txt": b"w1\n" for i in range(3)})
            cache = path.parent / "cache"
            with silence():
                dataset = data.load(str(place), "train", 16, cache=cache)
                sentences = common.embeddings(encoder, dataset)
                victim = next(cache.glob(f"*{ending}"))
                victim.write_bytes(damaged(victim.read_bytes(), random.Random(path.read_bytes())))
                dataset = data.load(str(place), "train", 16, cache=cache)
                again = common.embeddings(encoder, dataset)
            assert len(dataset) == 3 and dataset.images.shape == (3, 3, 19, 19) and again.shape == sentences.shape
            return dataset
        return b"seed", read, ".x"

    image = lambda form, mode="RGB": (picture(mode, form), decode, f".{form}")
    inside = {f"jpg/{i}.jpg": picture(form="jpeg") for i in range(3)}
    return {
        "archive.tgz": (tarred(inside), archive, ".tgz"), "archive.zip": (zipped(inside), archive, ".zip"),
        "jpeg": image("jpeg"), "cmyk jpeg": image("jpeg", "CMYK"), "png": image("png"), "palette png": image("png", "P"),
        "16-bit png": (deep(), decode, ".png"), "gif": image("gif", "P"), "webp": image("webp"),
        "bmp": image("bmp"), "tiff": image("tiff"),
        "captions": ("a red flower\nund noch eine Blüte 花 🌸\n".encode() * 5, captions, ".txt"),
        "coco json": source("coco", coco, "annotations/captions_train2014.json"),
        "cub boxes": source("cub", cub, "CUB_200_2011/bounding_boxes.txt"), "cub images": source("cub", cub, "CUB_200_2011/images.txt"),
        "checkpoint": (toy_run(), checkpoint, ".pt"),
        "encoder.pt": (saved({"kind": "text encoder", "note": "n", "encoder": encoder.state_dict()}), common.read_encoder, ".pt"),
        "released encoder": (saved({k: v for k, v in encoder.state_dict().items() if k != "_extra_state"}, _use_new_zipfile_serialization=False),
                             released, ".pth"),
        "pickle": (book, common.read_pickle, ".pickle"),
        "store .u8": store(".u8"), "store .json": store(".json"), "sentences": store(".pt"),
    }


def deep():
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, (24, 24), np.uint16)).save(out, "png")
    return out.getvalue()


class Code:
    """A pickle of this would leave a mark."""
    def __reduce__(self):
        return (open, (MARK, "w"))


MARK = str(Path(tempfile.gettempdir()) / f"fuzz-ran-{os.getpid()}")


def evil(name, good, ending):
    """Files made to do harm, for the kinds that could."""
    if ending in (".pt", ".pth", ".pickle"):
        yield pickle.dumps([Code()], 2)
        yield pickle.dumps({"kind": "dfgan", "text_encoder": Code()}, 2)
        yield saved({"kind": "dfgan", "args": Code()})
    if ending == ".pt":
        yield saved({"kind": "dfgan"})
        yield saved([1, 2])
        yield saved({"format": 99, "kind": "dfgan"})
    if ending == ".pickle":
        yield b"cos\nsystem\n(S'touch " + MARK.encode() + b"'\ntR."
    if ending in (".tgz", ".zip"):
        make = tarred if ending == ".tgz" else zipped
        for path in ("../x.jpg", "/tmp/fuzz/x.jpg", "jpg/../../x.jpg", "jpg/" + "d/" * 400 + "x.jpg", "jpg/\0.jpg", "jpg/" + "n" * 300):
            yield make({path: b"x", "jpg/a.jpg": b"y"})
        yield make({"jpg/a.jpg": bytes(300_000_000)})              # a bomb
    if ending == ".tgz":
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w:gz") as t:
                link = tarfile.TarInfo("jpg/link")
                link.type, link.linkname = kind, "../../.."
                t.addfile(link)
                through = tarfile.TarInfo("jpg/link/x.jpg")
                t.addfile(through, io.BytesIO())
                t.addfile(tarfile.TarInfo("jpg/a.jpg"), io.BytesIO())
            yield out.getvalue()
    if name == "png":
        out = io.BytesIO()
        Image.new("1", (30000, 30000)).save(out, "png")            # 900 million pixels in 100 kB
        yield out.getvalue()
    if name == "captions":
        yield "a".encode() * 5_000_000
        yield "\u202eright to left \u2066\0\n\0\n".encode()
        yield b"\xff\xfe\x00\xd8" * 100


def fuzz(name, rounds, seed, place):
    """Counter of "read", "left out" and "refused" for rounds damaged files and the evil ones of a reader."""
    rng, counts = random.Random(f"{seed} {name}"), collections.Counter()
    good, read, ending = readers()[name]
    for i, content in enumerate([good, *evil(name, good, ending), *(damaged(good, rng) for _ in range(rounds))]):
        with tempfile.TemporaryDirectory(dir=place) as box:
            box = Path(box)
            folder = box / "in" / "er"                             # so that "../../x" would still land in the box
            folder.mkdir(parents=True)
            path = folder / f"file{ending}"
            path.write_bytes(content)
            before = os.getcwd()
            os.chdir(folder)
            try:
                counts["left out" if read(path) is None else "read"] += 1
                assert i or counts["read"] == 1, f"{name}: the good file was not read"
            except data.UserError as error:
                assert i and str(error) and "\n" not in str(error), f"{name}: {error}"
                counts["refused"] += 1
            except BaseException:
                (place / "culprit").write_bytes(content)
                print(f"{name}: round {i}, kept as {place / 'culprit'}", file=sys.stderr)
                raise
            finally:
                os.chdir(before)
            outside = [p for p in box.rglob("*") if p.is_file() and folder not in p.parents]
            links = [p for p in box.rglob("*") if p.is_symlink()]
            assert not outside and not links and not Path("/tmp/fuzz").exists(), f"{name}, round {i}: wrote {outside + links}"
            assert not Path(MARK).exists(), f"{name}, round {i}: code ran"
    return counts


NAMES = list(readers())


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--rounds", type=int, default=500)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    a = p.parse_args()
    place = Path(tempfile.mkdtemp())
    for name in a.only:
        counts = fuzz(name, a.rounds, a.seed, place)
        print(f"{name:18} {counts['read']:5} read {counts['left out']:5} left out {counts['refused']:5} refused", flush=True)


if __name__ == "__main__":
    main()
