"""gpu.py without a GPU: its checks find errors, and all of it runs on a CPU."""
import pytest
import torch

import gpu

CASE = gpu.TINY_CASES[-1]  # DF-GAN


class RecordedUpdate:
    """A stand-in for a captured graph: computes what update() computes."""

    graph = "captured"

    def __init__(self, update):
        self.update = update

    def __call__(self, *inputs):
        return self.update(*inputs)


class StaleInputs(RecordedUpdate):
    """A graph that does not see new inputs."""

    calls = 0

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= gpu.CAPTURE + 1:
            self.inputs = inputs
        return self.update(*self.inputs)


class StaleLearningRate(RecordedUpdate):
    """A graph that does not see a new learning rate."""

    def __call__(self, *inputs):
        training = self.update.__self__
        training.set_learning_rates(1)
        return self.update(*inputs)


@pytest.fixture(scope="module")
def eager():
    torch.set_num_threads(1)
    return gpu.train_steps(CASE, "cpu", False, lambda update: update)


@pytest.mark.parametrize("graph, expected", [
    (RecordedUpdate, "OK"),
    (StaleInputs, "WRONG"),
    (StaleLearningRate, "WRONG"),
    (lambda update: update, "NO GRAPH")])
def test_verdict_on_a_graph(graph, expected, eager):
    graphed = gpu.train_steps(CASE, "cpu", False, graph)
    found, noise, verdict = gpu.judge(eager, eager, graphed, bf16=False)
    assert verdict == expected
    assert noise == [0, 0, 0]
    assert any(found) == (expected == "WRONG")


def test_losses_that_are_not_finite_are_wrong(eager):
    losses = eager.losses.clone()
    losses[3, 1] = torch.nan
    broken = gpu.Trajectory(losses, eager.weights, captured=True)
    assert gpu.judge(eager, eager, broken, bf16=False)[2] == "WRONG"


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    assert "no CUDA GPU: nothing to check" in capsys.readouterr().out
    assert not (tmp_path / "gpu.txt").exists()


def test_parity_with_itself_is_written_to_the_file(monkeypatch, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    gpu.main(["--dry-run", "parity"])
    written = (tmp_path / "out" / "gpu.txt").read_text()
    assert written in capsys.readouterr().out
    rows = written.splitlines()[2:-1]
    assert [row.split()[0] for row in rows] == [case.name for case in gpu.CASES]
    assert all(row.endswith("G 0.0e+00  D 0.0e+00  OK") for row in rows)


def test_tables_of_a_dry_run(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STEPS", 14)
    monkeypatch.setattr(gpu, "TINY_CASES", [CASE])
    monkeypatch.setattr(gpu, "busy_share", lambda *_: 0.25)  # the profiler takes seconds
    gpu.main(["--dry-run", "graph", "speed"])
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    graph, *speed = [row for row in rows if row[0] == CASE.name]
    assert graph[-2:] == ["NO", "GRAPH"]
    assert len(speed) == 2
    for row in speed:
        batch, graph, images_per_second, milliseconds, busy = row[1:6]
        assert (batch, graph, busy) == ("4", "no", "25%")
        expected = 4 / (float(milliseconds) / 1e3)
        assert float(images_per_second) == pytest.approx(expected, rel=0.02, abs=1)


def test_batches_of_a_folder(capsys, tmp_path):
    gpu.write_folder(tmp_path / "photos")
    lines = []
    gpu.measure_batches(str(tmp_path / "photos"), 8, "cpu", lines.append, num_batches=2)
    assert len(list((tmp_path / "photos").glob("*.png"))) >= 40
    assert lines[0].startswith("batches: 8 images of 64 px, ")
