"""How well a threshold on one modality finds the simulated lesions: pixel AUPRC on the slices that have one.

    python bench/lesion_contrast.py [--cache data]     # the 160 patients of the quickstart, at 32 pixels

Chance is the share of lesion pixels among those of the brain.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.hae_v2.data import SPLITS, SliceDataset
from examples.hae_v2.recipe import HAE
from examples.hae_v2.simulate import MODALITIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("data"), help="prepared data, made if missing")
    root = HAE.presets["quickstart"].prepared(None, parser.parse_args().cache)
    splits = [SliceDataset(root, split) for split in SPLITS]
    images = np.concatenate([split.images[split.labels == 1] for split in splits]).astype(np.float32)
    masks = np.concatenate([split.masks[split.labels == 1] for split in splits])
    brain = (images > 0).any(axis=1)
    print(f"{len(images)} slices with a lesion; chance {masks[brain].mean():.3f}")
    for channel, name in enumerate(MODALITIES):
        score = average_precision_score(masks[brain], images[:, channel][brain])
        print(f"{name}: AUPRC {score:.3f}")


if __name__ == "__main__":
    main()
