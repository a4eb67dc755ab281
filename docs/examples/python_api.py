"""Cells of python_api.md: train on handwritten digits, then predict and embed images with the model."""

# %% [markdown]
# # Train, load, predict and embed from Python
#
# This page shows [python_api.py](python_api.py), a Python file with notebook cells, and its output. The file needs no
# data: training writes the data set `digits` to a new folder. The tests run it and compare its output with this page.
#
# ## Train
#
# The configuration is a file, as for `dl2pa train`, or a dict. The run's log goes to standard error.

# %%
from pathlib import Path

import numpy as np

import dl2pa

config = {
    "data": {
        "dataset": "digits",
        "root": "digits",
        "image_size": 32,
        "loader": "resident",
        "crop": "pad",
        "pad": 2,
        "flip": 0,
        "mean": [0.305, 0.305, 0.305],
        "std": [0.37, 0.37, 0.37],
    },
    "model": {"backbone": "resnet8", "embedding_dim": 6, "widths": [8, 16, 32]},
    "method": {
        "loss": "cross_entropy",
        "scale": 14,
        "match": {"early_steps": 10, "early_epochs": 1, "last_epoch": 1},
    },
    "optim": {"name": "adamw", "lr": 0.003},
    "launch": {"device": "cpu", "nproc": 1, "threads": 1},
    "tracking": {"enabled": False},
}
result = dl2pa.train(config, run_dir="runs/digits", train={"epochs": 4, "batch_size": 24})
print(f"{result.state} after {result.elapsed_s:.0f} s: top-1 {result.last['top1']:.1f} %")

# %% [markdown]
# Repeating the call changes nothing, because the run is finished. A run that was stopped or killed resumes.
#
# ## Predict
#
# Images are files, Pillow images, or uint8 arrays or tensors [H, W, 3] or [N, H, W, 3]. They are prepared as in the
# run's evaluation.

# %%
classifier = dl2pa.load(result.run_dir, device="cpu")
print(classifier)

files = sorted(Path("digits/val").rglob("*.jpeg"))
predictions = classifier.predict(files)
right = [name == file.parent.name for name, file in zip(predictions.names, files, strict=True)]
print(f"probabilities {predictions.probabilities.shape}, {100 * np.mean(right):.1f} % of the names are right")
for guess in predictions.top(1)[0]:
    print(f"{files[0]}: class {guess.name} with probability {guess.probability:.2f}")

# %% [markdown]
# ## Embed
#
# Embeddings and class vectors are unit vectors, so their products are cosines. The class vector of a class is the
# prototype that training has assigned to it.

# %%
embeddings = classifier.embed(files)
cosines = embeddings @ classifier.class_vectors.T
print(f"embeddings {embeddings.shape}, class vectors {classifier.class_vectors.shape}")
for digit in "037":
    mean = np.mean([c for c, file in zip(cosines, files, strict=True) if file.parent.name == digit], axis=0)
    nearest = [f"{classifier.classes[i]} ({mean[i]:.2f})" for i in np.argsort(-mean)[:2]]
    print(f"images of {digit}: nearest prototype {nearest[0]}, then {nearest[1]}")

# %% [markdown]
# Embeddings also compare images with each other:

# %%
similarities = embeddings @ embeddings.T
np.fill_diagonal(similarities, -1)
same = [files[i].parent.name == files[j].parent.name for i, j in enumerate(similarities.argmax(axis=1))]
print(f"{100 * np.mean(same):.1f} % of the images have a nearest neighbor of the same class")
