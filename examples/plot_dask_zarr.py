"""
Scores by two processes, into Zarr
==================================

A matrix of scores that no memory need hold: test rows come as a Dask array, each block of them is scored by a process
of its own, and goes to a Zarr array on disk.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
from dask.distributed import Client, LocalCluster
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from skinvert import HessianInverter, InfluenceFunction


def main():
    pixels, digits = load_digits(return_X_y=True)
    order = np.argsort(digits, kind="stable")
    pixels, digits = pixels[order] / 16, digits[order]
    train, test = np.arange(0, len(digits), 2), np.arange(1, len(digits), 2)
    clf = LogisticRegression(C=0.1, max_iter=500).fit(pixels[train], digits[train])
    influence = InfluenceFunction(HessianInverter("direct")).fit(clf, (pixels[train], digits[train]))

    # %%
    # What was fitted goes to each process once; blocks of 100 test rows follow.
    X, y = da.from_array(pixels[test], chunks=(100, -1)), da.from_array(digits[test], chunks=100)
    with (
        TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        influence.transform((X, y)).to_zarr(f"{folder}/scores.zarr")
        scores = da.from_zarr(f"{folder}/scores.zarr")
        print(f"{scores.shape[0]} × {scores.shape[1]} scores in {scores.npartitions} blocks on disk")
        effects = scores.compute()
    few = influence.transform((pixels[test[:5]], digits[test[:5]]))
    print(f"as in memory to {abs(effects[:5] - few).max() / abs(few).max():.0e}")

    # %%
    # Rows of a digit help their own, and harm those that they look like.
    pairs = [[effects[digits[test] == i][:, digits[train] == j].mean() for j in range(10)] for i in range(10)]
    strongest = np.abs(pairs).max()
    figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
    shown = axes.imshow(pairs, cmap="RdBu", vmin=-strongest, vmax=strongest)
    axes.set(xlabel="training digit removed", ylabel="test digit", xticks=range(10), yticks=range(10))
    axes.set_title("Mean change of the loss: blue, the digit helps")
    figure.colorbar(shown, ax=axes)
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    figure.savefig(output / "dask_zarr.png")
    print(f"The picture is in {output / 'dask_zarr.png'}")


# Processes that are spawned import this file.
if __name__ == "__main__":
    main()
