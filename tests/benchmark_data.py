"""Speed and memory of data.Batches against a plain DataLoader that opens each picture with PIL, in one run.

    python tests/benchmark_data.py --data flowers --root ../shared/data

Both give batches of 64 pairs (picture, picture of another class), randomly cropped and mirrored, (64, 3, 64, 64) floats
in [-1, 1]. The plain one is the usual way: two worker processes; open, convert, resize, crop, flip, to tensor, normalise."""
import argparse
import os
import random
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data


class Plain(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.paths, self.labels = [str(p.path) for p in dataset.pictures], dataset.classes.tolist()
        self.look = v2.Compose([v2.Resize(76), v2.RandomCrop(64), v2.RandomHorizontalFlip(), v2.ToImage(),
                                v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self):
        return len(self.paths)

    def open(self, i):
        with Image.open(self.paths[i]) as image:
            return self.look(image.convert("RGB"))

    def __getitem__(self, i):
        j = i
        while self.labels[j] == self.labels[i]:
            j = random.randrange(len(self))
        return self.open(i), self.open(j)


def resident():
    """This process now, and its children at their peak, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--data", default="flowers")
    p.add_argument("--root", default="../shared/data")
    p.add_argument("--rounds", type=int, default=7)
    a = p.parse_args()
    before = resident()[0]
    start = time.perf_counter()
    dataset = data.load(a.data, "train", 64, a.root)
    ready = time.perf_counter() - start
    ours, step = data.Batches(dataset, 64), 0
    ours(0)
    mine, theirs = [], []
    for _ in range(a.rounds):                                      # in turn, so that both meet the same machine
        start = time.perf_counter()
        for step in range(step, step + 100):
            ours(step)
        mine.append(128 * 100 / (time.perf_counter() - start))
        memory = resident()[0] - before
        loader = iter(torch.utils.data.DataLoader(Plain(dataset), 64, shuffle=True, num_workers=2, drop_last=True))
        next(loader)
        start = time.perf_counter()
        for _ in range(20):
            next(loader)
        theirs.append(128 * 20 / (time.perf_counter() - start))
        del loader
    mine, theirs = (statistics.median(times) for times in (mine, theirs))
    store = dataset.images.numel() / 2**20
    print(f"{a.data}: {len(dataset)} pictures, store {store:.0f} MB, ready in {ready:.1f} s")
    print(f"data.Batches          {mine:8.0f} images/s, {memory:.0f} MB resident (mapped pages of the store included)")
    print(f"PIL DataLoader        {theirs:8.0f} images/s with 2 workers, {resident()[1]:.0f} MB resident in the larger worker")
    print(f"ratio                 {mine / theirs:8.1f}  (medians of {a.rounds} rounds)")


if __name__ == "__main__":
    main()
