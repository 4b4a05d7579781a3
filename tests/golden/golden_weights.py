"""Weights and inputs of the golden figures.

The .npz files beside this one hold what the authors' networks computed in float64 on a CPU. `fill`
gave every parameter of those networks its value. A test fills a network of this project in the
same way and compares its results with the figures. README.md lists the files.
"""
import zlib

import numpy as np
import torch


def fill(prefix, shapes, seed=0):
    """Return weights of the released network `prefix`, {name: float64 tensor}.

    shapes: {name: shape} of its parameters and buffers, named as released. Each value depends on
    the prefix, the name, the shape and the seed only. Counters of batch norm are left out.
    """
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        key = f"{seed}:{prefix}.{name}"
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        value = rng.standard_normal(tuple(shape))

        if len(shape) > 1:
            fan_in = np.prod(shape[1:])
            value = value / np.sqrt(fan_in)
        else:
            value = 0.1 * value

        # A variance is positive.
        if name.endswith("running_var"):
            value = 1 + np.abs(value)

        # DF-GAN: the weight of a residual in D. A value near 0 would hide the residual.
        if "gamma" in name.split(".")[-1]:
            value = 0.5 + value

        # DF-GAN: the bias of an affine layer's factor, 1 as in the authors' initialisation.
        if "fc_gamma" in name and name.endswith("linear2.bias"):
            value = 1 + value

        weights[name] = torch.from_numpy(np.asarray(value))
    return weights


def stackgan_inputs():
    """Return the inputs of the figures in stackgan.npz, {name: float32 array}, a batch of 3.

    They are random numbers of one generator, so the order of the lines matters. img64 and img256
    stand for images in [-1, 1].
    """
    rng = np.random.default_rng(2)
    inputs = {}
    inputs["text"] = rng.standard_normal((3, 1024))
    inputs["noise"] = rng.standard_normal((3, 100))
    inputs["eps"] = rng.standard_normal((3, 128))
    inputs["img64"] = np.tanh(rng.standard_normal((3, 3, 64, 64)))
    inputs["img256"] = np.tanh(rng.standard_normal((3, 3, 256, 256)))
    return {name: value.astype(np.float32) for name, value in inputs.items()}
