"""The models in weights/: small, drawn with by the plain command, their samples follow the caption and differ from one another."""
import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, call

SHIPPED = sorted((ROOT / "weights").glob("*.pt"))
# what the middle of a picture is, from its mean colour (red, green, blue)
pink = lambda r, g, b: r > g + 15 and b > g
COLOURS = {"pink flower": pink, "this flower has petals that are pink": pink,
           "this flower has petals that are yellow": lambda r, g, b: min(r, g) > b + 30,
           "this flower has petals that are purple": lambda r, g, b: b > g + 15 and r > g,
           "this flower has petals that are white": lambda r, g, b: min(r, g, b) > 90 and max(r, g, b) - min(r, g, b) < 60}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_fresh_clone_draws_what_is_said(path, tmp_path):
    assert path.stat().st_size <= 16e6
    done = call(ROOT / f"{path.stem}.py", "--device", "cpu", "--sample", *COLOURS, cwd=tmp_path)
    assert done.returncode == 0 and f"this is weights/{path.name}" in done.stdout, done.stderr
    grid = np.asarray(Image.open(tmp_path / done.stdout.split()[-1])).astype(float)
    side = (grid.shape[1] - 2) // 8 - 2
    cells = grid[2:, 2:].reshape(-1, side + 2, 8, side + 2, 3).swapaxes(1, 2)[:, :, :side, :side]
    for row, (caption, right) in zip(cells if len(cells) == len(COLOURS) else cells[1::2], COLOURS.items()):       # Stage II below I
        middle = row[:, side // 4:-side // 4, side // 4:-side // 4].mean((1, 2))        # (8, 3)
        assert sum(right(*colour) for colour in middle) >= 6, (caption, middle.round())
        other = np.abs(row[:, None] - row[None]).mean((2, 3, 4))
        assert other[np.triu_indices(8, 1)].min() > 10, f"two samples of {caption!r} are nearly one"
