"""Images in a folder, a folder for each class: a vision transformer reads handwritten digits from files.

The digits of scikit-learn are written as pictures, read by `image_folder`, and learned by `Trainer` and
`classification`. `digits.py` reads the same digits by a loop of its own, which also distorts them.

Takes 40 seconds of processor time on an Intel Xeon with AVX-512.
Run it with `python examples/digit_folder.py`; `--help` lists the options. Needs attnax[examples,images].
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from attnax import VisionTransformerConfig
from attnax.training import Batches, OptimizerConfig, Trainer, classification, image_folder


def write_digits(folder: Path) -> None:
    """Writes folder/train/DIGIT/NUMBER.png, and each fifth digit to folder/test."""
    digits = load_digits()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("test" if number % 5 == 0 else "train") / str(digit) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(path)


def draw_hardest(images: np.ndarray, labels: np.ndarray, logits: np.ndarray, path: Path, count: int = 10) -> None:
    """Draws the images (number, 8, 8, 1) whose digit the model finds least likely."""
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    hardest = np.argsort(log_probs[np.arange(len(labels)), labels])[:count]
    figure = Figure(figsize=(count, 1.4), layout="constrained")
    for panel, row in zip(figure.subplots(1, count), hardest, strict=True):
        panel.set_title(f"{labels[row]} read as {log_probs[row].argmax()}", fontsize="small")
        panel.imshow(images[row, ..., 0], cmap="gray")
        panel.set_axis_off()
    figure.savefig(path, dpi=120)


def main(
    steps: int = 600,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    d_model: int = 64,
    num_layers: int = 2,
    seed: int = 0,
    out: Path = Path("digit-folder.png"),
) -> float:
    """Trains on four fifths of the digits, draws the hardest of the others, and returns the share that is read right.

    Args:
        steps: updates of the parameters.
        batch_size: images in an update.
        learning_rate: the peak.
        d_model: width of the model, a multiple of 4.
        num_layers: depth of the model.
        seed: of the parameters, the order of the images and dropout.
        out: path of the picture.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder))
        train, test = (image_folder(Path(folder, part), 8, channels=1) for part in ("train", "test"))
        print(
            f"{len(train)} images to learn from, {len(test)} held out; classes {', '.join(train.classes)}", flush=True
        )
        config = VisionTransformerConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_classes=len(train.classes),
            d_model=d_model,
            num_heads=4,
            num_layers=num_layers,
            d_ff=2 * d_model,
            dropout_rate=0.1,
            pos_emb_type="sinusoidal",
        )
        optimizer = OptimizerConfig(steps=steps, learning_rate=learning_rate)
        trainer = Trainer(config, classification(), optimizer, ema=0.99, seed=seed)
        state, read = trainer.init(), []
        with Batches(train, batch_size=batch_size, seed=seed).start() as batches:
            for step in range(1, steps + 1):
                state, metrics = trainer.step(state, next(batches))
                read.append(metrics.aux["accuracy"])
                if step % 50 == 0 or step == steps:
                    print(f"step {step:4}  accuracy {np.mean(read[-50:]):.3f}", flush=True)
        rows = [test[index] for index in range(len(test))]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    accuracy = trainer.evaluate(state.ema, [batch]).aux["accuracy"]
    images = batch["images"].astype(np.float32) / 255  # as `classification` scales them
    draw_hardest(images, batch["labels"], jax.jit(trainer.merge(state.ema))(images), out)
    print(f"test accuracy {accuracy:.4f}, of the average of the parameters")
    return accuracy


if __name__ == "__main__":
    tyro.cli(main)
