"""MLP-Mixer with small convolutions on CIFAR, in one Keras file.

Reproduces Kanazi, Mnaa and Eisa, "Improving MLP-Mixer Performance on Small Image Datasets Using
Locality-Aware Modifications". An MLP-Mixer isn't told which patches are neighbours; here
convolutions, 3x3 depthwise and then 1x1, mix neighbours before or after its blocks.

    python hybrid_mixer.py --dataset cifar100 --model hybrid

trains for 30 epochs and writes result, model, plots and table to results/ (see README.md). What
the authors' code trained is `--model interleaved`, and `hybrid` its first convolution alone.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import platform
import random
import re
import shlex
import sys
import time
import zipfile
from typing import NamedTuple

import numpy as np
from absl import app, flags, logging

if __name__ == "__main__":  # TensorFlow reads both as it starts.
    os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")  # On a CPU up to 1.4 times as fast.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # Hides information, not warnings.

import keras
from keras import layers, ops


# ------------------------------------------------------------------------------------ layers
@keras.saving.register_keras_serializable(package="hybrid_mixer")
class ConvStem(layers.Layer):
    """Depthwise separable convolution that mixes each patch with its neighbours.

    `gelu(batch_norm(pointwise(depthwise(x))))`: 3x3 and 1x1, both without bias, their kernels at
    first uniform in +-1/sqrt(fan_in); batch norm with momentum 0.9 and epsilon 1e-5; the exact
    GELU. The paper's text has only the two convolutions, its authors' code all of it.

    Args:
        linear: bool, whether to leave out batch norm and GELU. Defaults to `False`.
        residual: bool, whether to add the input to the output. Defaults to `False`.

    Call arguments:
        inputs: grid of patches, a float tensor.
        training: bool, whether batch norm uses the batch's own mean and variance.

    Input shape: `(batch, height, width, channels)`; height and width may be `None`, channels are
        fixed when the layer is built.
    Output shape: that of the input.
    Raises: `ValueError` for other shapes.
    Reference: Kanazi, Mnaa and Eisa, section 3.1.

    >>> ConvStem()(keras.Input((8, 6, 128))).shape
    (None, 8, 6, 128)
    """

    def __init__(self, linear=False, residual=False, **kwargs):
        super().__init__(**kwargs)
        self.linear = linear
        self.residual = residual

    def build(self, input_shape):
        if len(input_shape) != 4 or not hasattr(input_shape[-1], "__index__"):
            wanted = "(batch, height, width, channels), channels known"
            raise ValueError(f"ConvStem takes {wanted}. Received: input_shape={input_shape}")
        channels = int(input_shape[-1])
        self.input_spec = layers.InputSpec(ndim=4, axes={-1: channels})
        spatial = keras.initializers.RandomUniform(-1 / 3, 1 / 3)  # 9 values in: 1/sqrt(9).
        across = keras.initializers.RandomUniform(-(channels**-0.5), channels**-0.5)
        # What a frozen stem is made of has to be frozen too, also when it is loaded.
        common = {"dtype": self.dtype_policy, "trainable": self.trainable}
        kernels = {"data_format": "channels_last", "use_bias": False, **common}
        self.depthwise = layers.DepthwiseConv2D(
            3, padding="same", depthwise_initializer=spatial, name="depthwise", **kernels
        )
        self.pointwise = layers.Conv2D(
            channels, 1, kernel_initializer=across, name="pointwise", **kernels
        )
        self.depthwise.build(input_shape)
        self.pointwise.build(input_shape)
        if not self.linear:
            self.norm = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name="norm", **common)
            self.norm.build(input_shape)

    def call(self, inputs, training=None):
        inputs = ops.cast(inputs, self.compute_dtype)
        x = self.pointwise(self.depthwise(inputs))
        if not self.linear:
            x = ops.gelu(self.norm(x, training=training), approximate=False)
        x = ops.cast(x, self.compute_dtype)  # A policy map may give a part another dtype.
        return inputs + x if self.residual else x

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "linear": self.linear, "residual": self.residual}


@keras.saving.register_keras_serializable(package="hybrid_mixer")
class MixerBlock(layers.Layer):
    """One block of the MLP-Mixer: an MLP across tokens (patches), then one across channels.

    `u = x + transpose(mlp(transpose(norm(x))))`, `y = u + mlp(norm(u))`; each MLP is dense, exact
    GELU, dropout, dense, dropout, and the two layer norms (epsilon 1e-5) share nothing. Weights
    and biases of dense layers are at first uniform in +-1/sqrt(fan_in).

    Args:
        tokens_mlp_dim: int, hidden width of the MLP across tokens.
        channels_mlp_dim: int, hidden width of the MLP across channels.
        dropout: float from 0 to below 1, chance of an activation to be zeroed in training.
            Defaults to `0.0`.
        seed: int or `None`, what dropout's random numbers start from. Defaults to `None`: another
            start each time, unless `keras.utils.set_random_seed` was called.

    Call arguments:
        inputs: tokens, a float tensor.
        training: bool, whether dropout acts.

    Input shape: `(batch, tokens, channels)`; tokens and channels are fixed when it is built.
    Output shape: that of the input.
    Raises: `ValueError` for other shapes, and for invalid sizes, rates and seeds.
    Reference: Tolstikhin et al., 2021; Kanazi, Mnaa and Eisa, equations 1 and 2.

    >>> MixerBlock(tokens_mlp_dim=64, channels_mlp_dim=256)(keras.Input((48, 128))).shape
    (None, 48, 128)
    """

    def __init__(self, tokens_mlp_dim, channels_mlp_dim, dropout=0.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        sizes = {"tokens_mlp_dim": tokens_mlp_dim, "channels_mlp_dim": channels_mlp_dim}
        for name, size in sizes.items():
            if not hasattr(size, "__index__") or size < 1:  # NumPy's integers have it too.
                raise ValueError(f"`{name}` must be a whole number from 1. Received: {name}={size}")
        if not hasattr(dropout, "__float__") or not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be from 0 to below 1. Received: dropout={dropout}")
        if seed is not None and not hasattr(seed, "__index__"):
            raise ValueError(f"`seed` must be a whole number or None. Received: seed={seed}")
        self.tokens_mlp_dim, self.channels_mlp_dim = int(tokens_mlp_dim), int(channels_mlp_dim)
        self._dropout = float(dropout)  # Read-only, since `build` gives it to a layer.
        self.seed = seed if seed is None else int(seed)

    @property
    def dropout(self):
        return self._dropout

    def build(self, input_shape):
        if len(input_shape) != 3 or not all(hasattr(n, "__index__") for n in input_shape[1:]):
            wanted = "(batch, tokens, channels), both known, so flatten a grid with Reshape"
            raise ValueError(f"MixerBlock takes {wanted}. Received: input_shape={input_shape}")
        tokens, channels = map(int, input_shape[1:])  # `Dense` refuses NumPy's integers.
        self.input_spec = layers.InputSpec(shape=(None, tokens, channels))
        # What a frozen block is made of has to be frozen too, also when it is loaded.
        common = {"dtype": self.dtype_policy, "trainable": self.trainable}

        def norm(name):
            layer = layers.LayerNormalization(epsilon=1e-5, name=name, **common)
            layer.build(input_shape)
            return layer

        def dense(name, fan_in, units, activation=None):
            keys, bound = ("kernel_initializer", "bias_initializer"), fan_in**-0.5
            uniform = {key: keras.initializers.RandomUniform(-bound, bound) for key in keys}
            layer = layers.Dense(units, activation, name=name, **uniform, **common)
            layer.build((None, None, fan_in))
            return layer

        self.token_norm = norm("token_norm")
        self.token_hidden = dense("token_hidden", tokens, self.tokens_mlp_dim, "gelu")  # Exact.
        self.token_output = dense("token_output", self.tokens_mlp_dim, tokens)
        self.channel_norm = norm("channel_norm")
        self.channel_hidden = dense("channel_hidden", channels, self.channels_mlp_dim, "gelu")
        self.channel_output = dense("channel_output", self.channels_mlp_dim, channels)
        # Each call draws a new mask, so that one layer serves all four places.
        self.drop = layers.Dropout(self.dropout, seed=self.seed, **common)

    def call(self, inputs, training=None):
        inputs = ops.cast(inputs, self.compute_dtype)
        x = ops.transpose(self.token_norm(inputs), (0, 2, 1))
        x = self._mlp(x, self.token_hidden, self.token_output, training)
        inputs = inputs + ops.transpose(x, (0, 2, 1))
        x = self.channel_norm(inputs)
        return inputs + self._mlp(x, self.channel_hidden, self.channel_output, training)

    def _mlp(self, x, hidden, output, training):
        if not self.dropout:  # Without a `Dropout`, `keras.RematScope` works on JAX.
            x = output(hidden(x))
        else:
            x = self.drop(hidden(x), training=training)
            x = self.drop(output(x), training=training)
        return ops.cast(x, self.compute_dtype)  # A policy map may give a part another dtype.

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        names = ("tokens_mlp_dim", "channels_mlp_dim", "dropout", "seed")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


# ------------------------------------------------------------------------------------ models
class UserError(ValueError):
    """One sentence for whoever gave the command: what is wrong and what to do."""


CHANNELS_LAST = {"data_format": "channels_last"}  # Whatever a user's keras.json says.


class Design(NamedTuple):
    """What a model has beside patch embedding, Mixer blocks and head."""

    text: str  # What it is, for the table.
    stem: dict | None = None  # Arguments of a `ConvStem` after patch embedding; None: no stem.
    conv_every: int | None = None  # A `ConvStem` follows every so many blocks; None: never.
    last_conv: float = math.inf  # No `ConvStem` follows a block after this one.
    residual: bool = False  # Whether those after blocks are added to their input.


MODELS = {
    "mixer": Design("no convolution: the paper's baseline"),
    "hybrid": Design("a stem with batch norm and GELU", stem={}),
    "hybrid_linear": Design(
        "a stem as in the paper's text: convolutions alone", stem={"linear": True}
    ),
    "hybrid_residual": Design("a residual stem: added to its input", stem={"residual": True}),
    "hybrid_late": Design("one convolution, after block 1", conv_every=1, last_conv=1),
    "interleaved": Design(
        "a stem, a convolution after every 2nd block: the paper's code", stem={}, conv_every=2
    ),
    "interleaved_no_stem": Design("one convolution after every 2nd block, no stem", conv_every=2),
    "interleaved_residual": Design(
        "interleaved, but residual after blocks", stem={}, conv_every=2, residual=True
    ),
    "interleaved_4": Design("a stem, a convolution after every 4th block", stem={}, conv_every=4),
    "interleaved_3": Design("a stem, a convolution after every 3rd block", stem={}, conv_every=3),
    "interleaved_1": Design("a stem, a convolution after every block", stem={}, conv_every=1),
}


def build_model(
    model="hybrid", image_shape=(32, 32, 3), num_classes=10, patch_size=4, hidden_dim=128,
    num_blocks=8, tokens_mlp_dim=64, channels_mlp_dim=256, dropout=0.15,
):  # fmt: skip
    """Builds one of the `MODELS`: by default with one stem, where the paper's text puts it.

    Args:
        model: str, a key of `MODELS`.
        image_shape: `(height, width, channels)`, height and width multiples of `patch_size`.
        num_classes, patch_size (pixels), hidden_dim (channels of a token), num_blocks: int.
        tokens_mlp_dim, channels_mlp_dim, dropout: of each `MixerBlock`.

    Returns a Functional `keras.Model` from normalised images `(batch, height, width, channels)` to
    float32 logits `(batch, num_classes)`. Raises `ValueError` for what can't be built.
    """
    if model not in MODELS:
        raise UserError(f"`model` must be one of {', '.join(MODELS)}. Received: model={model}")
    sizes = [("num_classes", num_classes), ("patch_size", patch_size), ("hidden_dim", hidden_dim),
             ("num_blocks", num_blocks), *(("image_shape", n) for n in image_shape)]  # fmt: skip
    for name, size in sizes:
        if not hasattr(size, "__index__") or size < 1:
            raise UserError(f"`{name}` must be a whole number from 1. Received: {name}={size}")
    # Keras refuses NumPy's integers for some of these.
    num_classes, patch_size, hidden_dim, num_blocks, *image_shape = (int(size) for _, size in sizes)
    height, width, channels = image_shape
    if height % patch_size or width % patch_size:
        raise UserError(f"{height}x{width} pixels aren't whole patches: give a --patch_size that "
                        f"divides both. Received: {patch_size}")  # fmt: skip
    design = MODELS[model]
    grid = (height // patch_size, width // patch_size, hidden_dim)
    tokens = (grid[0] * grid[1], hidden_dim)

    def uniform(fan_in):  # in +-1/sqrt(fan_in), as in the layers
        names, bound = ("kernel_initializer", "bias_initializer"), fan_in**-0.5
        return {name: keras.initializers.RandomUniform(-bound, bound) for name in names}

    images = keras.Input(image_shape, dtype="float32", name="images")
    embed = {**uniform(patch_size**2 * channels), **CHANNELS_LAST, "name": "patch_embedding"}
    x = layers.Conv2D(hidden_dim, patch_size, patch_size, **embed)(images)
    if design.stem is not None:
        x = ConvStem(**design.stem, name="stem")(x)
    x = layers.Reshape(tokens)(x)
    for i in range(1, num_blocks + 1):
        # Drawn without dropout too, or later layers' first weights would depend on `dropout`.
        block = {"dropout": dropout, "seed": random.randint(1, 10**9), "name": f"block_{i}"}
        x = MixerBlock(tokens_mlp_dim, channels_mlp_dim, **block)(x)
        if design.conv_every and i % design.conv_every == 0 and i <= design.last_conv:
            x = ConvStem(residual=design.residual, name=f"conv_{i}")(layers.Reshape(grid)(x))
            x = layers.Reshape(tokens)(x)
    x = layers.LayerNormalization(epsilon=1e-5, name="norm")(x)
    x = layers.GlobalAveragePooling1D(**CHANNELS_LAST, name="mean_of_tokens")(x)
    head = layers.Dense(num_classes, **uniform(hidden_dim), dtype="float32", name="head")
    return keras.Model(images, head(x), name=model)


# -------------------------------------------------------------------------------------- data
@functools.lru_cache(maxsize=1)  # The next run of a sweep finds its data.
def load_data(name, data_dir=None, image_size=0, validation_split=0.0):
    """Loads `shapes`, a folder of pictures or a data set of tensorflow-datasets.

    Args:
        name: str, `shapes`, a folder with `train/CLASS/*.jpg` in it, or a name that tfds knows.
        data_dir: str or `None`, where tensorflow-datasets keeps its files.
        image_size: int, pixels of both sides to scale images to; 0: leave them as they are.
        validation_split: float, last share of the train images to test on instead; 0: none.

    Returns `((x_train, y_train), (x_test, y_test), class_names)`: uint8 images `(n, height, width,
    channels)`, int labels `(n,)`, a list of strings; for the same arguments as in the last call,
    the same objects. Raises `UserError` if they can't be loaded.
    """
    if name == "shapes":
        *splits, class_names = draw_shapes()
        if image_size:
            splits = [(scale(images, image_size).numpy(), labels) for images, labels in splits]
    else:
        builder = find_builder(name, data_dir, image_size)
        class_names = builder.info.features[builder.info.supervised_keys[1]].names
        sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
        second = next((split for split in ("test", "validation") if sizes.get(split)), None)
        if not sizes.get("train") or not (second or validation_split):
            raise UserError(
                f"Data set {name!r} needs images to train on and a test or validation split (or a "
                f"--validation_split of train). Received: {', '.join(sizes) or 'no split'}"
            )
        wanted = ["train"] if validation_split else ["train", second]
        splits = [read_split(builder, split, image_size) for split in wanted]
    if validation_split:
        images, labels = splits[0]
        cut = len(images) - math.ceil(validation_split * len(images))
        splits = [(images[:cut], labels[:cut]), (images[cut:], labels[cut:])]
    return *splits, class_names


def import_tensorflow():
    """Returns TensorFlow; beside another backend it only reads files and leaves GPUs alone."""
    import tensorflow as tf

    if keras.backend.backend() != "tensorflow":
        with contextlib.suppress(RuntimeError):  # A user's code has started it already.
            tf.config.set_visible_devices([], "GPU")
    return tf


def find_folder(name):
    """Returns the path of a folder with splits of pictures in it, or `None` if it's none."""
    folder = pathlib.Path(name).expanduser().resolve()
    splits = (folder / split for split in ("train", "test", "validation"))
    return folder if any(split.is_dir() for split in splits) else None


def list_pictures(folder, pattern):
    """Returns the files in a folder that `tfds.ImageFolder` takes for pictures."""
    return [f for f in folder.glob(pattern) if f.suffix.lower() in (".jpg", ".jpeg", ".png")]


def find_builder(name, data_dir, image_size):
    """Returns the `tfds.core.DatasetBuilder` of images and labels; its files are there."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    import_tensorflow()
    told, folder = f"Data set {name!r} can't be had", find_folder(name)
    try:
        builder = tfds.ImageFolder(str(folder)) if folder else tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError, ImportError) as error:
        raise UserError(f"{told}: no folder of this name has train/ in it, and tensorflow-datasets "
                        f"says: {first_line(error)}") from error  # fmt: skip
    keys = [key for key in builder.info.supervised_keys or () if isinstance(key, str)]
    kinds = [builder.info.features[key] for key in keys]
    if [type(kind) for kind in kinds] != [tfds.features.Image, tfds.features.ClassLabel]:
        raise UserError(f"{told}: it has no pairs of one image and one label.")
    if kinds[0].np_dtype != np.uint8:
        raise UserError(f"{told}: its images don't have 8 bits a channel.")
    if None in kinds[0].shape[:2] and not image_size:
        raise UserError(f"{told}: its images may have several sizes. Give an --image_size.")
    if folder:
        for class_name in kinds[1].names:
            if not list_pictures(folder / "train" / class_name, "*"):
                raise UserError(f"{folder / 'train' / class_name} has no .jpg or .png: add some "
                                "or delete the folder.")  # fmt: skip
        return builder
    downloader.MAX_RETRIES = 0  # Its ten retries take minutes, and no public option says so.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # What a download can fail of has no class in common.
        raise UserError(
            f"{told} ({first_line(error)}): mend that, give a --data_dir where it is prepared, or "
            "take --dataset shapes, which needs no download."
        ) from error
    return builder


def read_split(builder, split, image_size):
    """Returns a split's images, scaled one by one if a size is given, and labels."""
    tf = import_tensorflow()
    dataset = builder.as_dataset(split, as_supervised=True)
    if image_size:
        dataset = dataset.map(lambda x, label: (scale(x, image_size), label), tf.data.AUTOTUNE)
    try:
        batches = list(dataset.batch(1000).as_numpy_iterator())
    except tf.errors.OpError as error:
        files = list_pictures(pathlib.Path(builder.data_dir, split), "*/*")  # If it is a folder.
        broken = next((file for file in files if not is_picture(file)), builder.data_dir)
        raise UserError(f"{broken} can't be read: mend or delete it.") from error
    images, labels = (np.concatenate(part) for part in zip(*batches))
    return images, labels


def is_picture(path):
    """Tells whether TensorFlow can decode a file as a single picture."""
    tf = import_tensorflow()
    try:
        return tf.io.decode_image(tf.io.read_file(str(path))).shape.rank == 3
    except tf.errors.OpError:
        return False


def scale(images, size):
    """Scales images to `size` pixels a side, bilinearly and, where that is smaller, smoothed."""
    tf = import_tensorflow()
    images = tf.image.resize(images, (size, size), antialias=True)
    return tf.saturate_cast(tf.round(images), "uint8")


def draw_shapes(num_train=5000, num_test=1000, seed=0):
    """Draws ten kinds of bright shape, 11 pixels wide, somewhere in busy 32x32 colour pictures.

    Neither colour nor place tells the classes apart, and a flip or a small turn changes none.
    Returns what `load_data` returns, always the same for the same arguments.
    """
    y, x = np.mgrid[-5:6, -5:6]
    box, radius = np.maximum(abs(x), abs(y)), np.hypot(x, y)
    shapes = {
        "disk": radius < 5.4,
        "ring": (radius < 5.4) & (radius > 2.9),
        "square": box <= 5,
        "frame": box > 2,
        "plus": np.minimum(abs(x), abs(y)) <= 1,
        "saltire": np.minimum(abs(x - y), abs(x + y)) <= 1,
        "triangle": 2 * abs(x) <= y + 5,
        "rows": y % 4 < 2,
        "columns": x % 4 < 2,
        "checks": (x // 3 + y // 3) % 2 == 0,
    }
    names, masks = list(shapes), list(shapes.values())
    rng = np.random.default_rng(seed)
    ramp = np.stack([np.linspace(1, 0, 32), np.linspace(0, 1, 32)])  # Blends the corners' colours.
    labels = rng.permutation(np.arange(num_train + num_test) % len(names))
    images = np.empty((len(labels), 32, 32, 3), "uint8")
    for image, label in zip(images, labels):
        picture = np.einsum("ay,bx,abc->yxc", ramp, ramp, rng.uniform(20, 130, (2, 2, 3)))
        picture += rng.normal(0, 8, picture.shape)
        for top, left in rng.integers(0, 27, (3, 2)):  # Short strokes distract.
            height, width = rng.permutation([2, rng.integers(3, 7)])
            picture[top : top + height, left : left + width] = rng.uniform(0, 255, 3)
        top, left = rng.integers(0, 22, 2)
        picture[top : top + 11, left : left + 11][masks[label]] = rng.uniform(160, 255, 3)
        image[:] = np.clip(picture, 0, 255)
    return (images[:num_train], labels[:num_train]), (images[num_train:], labels[num_train:]), names


class ColorJitter(layers.Layer):
    """Changes the colours of each image `(batch, height, width, 3)`, pixels 0-255, in training.

    As torchvision does, unlike Keras's layers: brightness, contrast and saturation by factors
    within `1 +- strength`, then hue by up to `hue` of the full circle.
    """

    def __init__(self, strength=0.1, hue=0.02, **kwargs):
        super().__init__(**kwargs)
        self.strength, self.hue = strength, hue
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, x, training=None):
        if not training:
            return x
        each, seed = (ops.shape(x)[0], 1, 1, 1), self.seed_generator
        draw = functools.partial(keras.random.uniform, dtype=self.compute_dtype, seed=seed)
        factors = draw((3, *each), 1 - self.strength, 1 + self.strength)
        turns = draw(each, -self.hue, self.hue)
        x = ops.clip(x * factors[0], 0, 255)
        mean = ops.mean(self._grey(x), axis=(1, 2), keepdims=True)
        x = ops.clip(mean + factors[1] * (x - mean), 0, 255)
        grey = self._grey(x)
        x = ops.clip(grey + factors[2] * (x - grey), 0, 255)
        hsv = ops.image.rgb_to_hsv(x / 255, **CHANNELS_LAST)  # Right only for pixels in 0-1.
        hsv = ops.concatenate([(hsv[..., :1] + turns) % 1, hsv[..., 1:]], axis=-1)
        return 255 * ops.image.hsv_to_rgb(hsv, **CHANNELS_LAST)

    def _grey(self, x):
        return 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]


def add_preprocessing(network, train_images):
    """Puts normalisation by the train images' mean and deviation in front of a network.

    Returns `(trainer, classifier)`, the model to `fit` and the one to save. Both share all weights
    and go from pixels 0-255 `(batch, height, width, channels)` to logits. Only `trainer` augments,
    and only in training: it flips, shifts by up to 4 pixels, turns by up to 15 degrees, changes
    colours and, in one image of ten, covers a box with the mean colour.
    """
    height, width, channels = shape = train_images.shape[1:]
    mean = train_images.mean((0, 1, 2))
    # One image at a time, because all images as floats may not fit in memory.
    squares = sum(np.square(x, dtype="uint16").sum((0, 1), "uint64") for x in train_images)
    variance = squares / train_images[..., 0].size - mean**2
    # As lists, since PyTorch can't put NumPy's float64 on an Apple GPU.
    moments = {"mean": mean.tolist(), "variance": variance.tolist()}
    normalize = layers.Normalization(**moments, dtype="float32")
    # Keras draws the probability from a range: only (0.1, 0.1) means one image of ten.
    common = {**CHANNELS_LAST, "dtype": "float32"}
    erase = layers.RandomErasing((0.1, 0.1), (0.02, 0.33), fill_value=0.0, **common)
    nearest = {"fill_mode": "constant", "interpolation": "nearest", **common}
    augmentation = [
        layers.RandomFlip("horizontal", **common),
        # A shift within +-4.5 is rounded to whole pixels: -4 to 4 all have the same chance.
        layers.RandomTranslation(4.5 / height, 4.5 / width, **nearest),
        layers.RandomRotation(15 / 360, **nearest),
        *([ColorJitter(dtype="float32")] if channels == 3 else []),
    ]
    for layer in augmentation:
        layer.supports_jit = True  # Keras doubts it of shift and turn, but JAX compiles them.
    pixels = keras.Input(shape, dtype="float32", name="pixels")
    classifier = keras.Model(pixels, network(normalize(pixels)), name=network.name)
    x = raw_pixels = keras.Input(shape, dtype="uint8", name="pixels")
    for layer in [*augmentation, normalize, erase]:
        x = layer(x)
    return keras.Model(raw_pixels, network(x)), classifier


# ---------------------------------------------------------------------------------- training
class Cosine(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate `peak * (1 + cos(pi * step / half_period)) / 2`, steps counted from 0."""

    def __init__(self, peak, half_period):
        self.peak, self.half_period = peak, half_period

    def __call__(self, step):
        step = ops.cast(step, "float32")
        return self.peak * (1 + ops.cos(math.pi * step / self.half_period)) / 2


def make_models(settings, train_images, num_classes):
    """Returns `(network, trainer, classifier)` as `settings` say, the trainer ready for `fit`."""
    sizes = ("patch_size", "hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
    sizes = {name: settings[name] for name in (*sizes, "dropout")}
    network = build_model(settings["model"], train_images.shape[1:], num_classes, **sizes)
    trainer, classifier = add_preprocessing(network, train_images)
    steps = math.ceil(len(train_images) / settings["batch_size"])  # An epoch's.
    # The authors' cosine was to fall over 30 epochs, but falls over 30 batches, then rises again.
    half_period = 30 if settings["schedule"] == "published" else settings["epochs"] * steps
    rate = Cosine(settings["learning_rate"], half_period)
    trainer.compile(
        keras.optimizers.AdamW(rate, settings["weight_decay"], epsilon=1e-8),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # As the string "accuracy" it would make TensorFlow trace the first step twice.
        metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")],
        jit_compile=keras.backend.backend() == "jax",  # TensorFlow's graph is faster on a CPU.
    )
    trainer.optimizer.build(trainer.trainable_variables)  # Before a checkpoint is loaded.
    return network, trainer, classifier


def check_data(name, images, labels, num_classes):
    """Raises `UserError` unless a split's images and labels are what `train` takes."""
    if images.ndim != 4 or images.dtype != "uint8" or min(images.shape[1:3]) < 5:
        wanted = "uint8, (n, height, width, channels), of 5 pixels or more"
        got = f"{images.dtype}, {images.shape}"
        raise UserError(f"Images of the {name} split must be {wanted}. Received: {got}")
    if labels.size != len(images):
        raise UserError(f"Labels of the {name} split must be one for each image, not one-hot. "
                        f"Received: {labels.shape} for {len(images)} images")  # fmt: skip
    if wrong := {*np.unique(labels).tolist()} - {*range(num_classes)}:
        raise UserError(f"Labels of the {name} split must be from 0 to {num_classes - 1}. "
                        f"Received: {min(wrong)}")  # fmt: skip


def feed(images, labels, batch_size):
    """Returns the arguments for `fit` and `evaluate` that read a split in batches, in order."""
    if keras.backend.backend() != "tensorflow":
        return {"x": images, "y": labels, "batch_size": batch_size}
    import tensorflow as tf

    with tf.device("CPU:0"):  # Or all images would also go to a GPU's memory.
        dataset = tf.data.Dataset.from_tensor_slices((images, labels))
    options = tf.data.Options()
    # Autotuning, which Keras's own feed of arrays has on, can hold up an epoch's end by a minute.
    options.autotune.enabled = False
    return {"x": dataset.batch(batch_size).prefetch(1).with_options(options)}


def train(settings, data, folder, source=None):
    """Trains a model, from its last checkpoint on if there is one, and writes result and model.

    An epoch depends on seed, epoch and checkpoint alone, so a stopped run ends like any other. For
    all of Keras, `train` clears the session and sets seed, float type and dtype policy.

    Args:
        settings: dict of `dataset`, `model`, `seed` and those `SETTINGS` that aren't the defaults.
        data: tuple, as from `load_data`.
        folder: str or path, where result, model and checkpoint go.
        source: str, what `--dataset` was if not the data set's name.

    Returns what is in the JSON file. Raises `UserError` for images and labels that don't serve, for
    unknown settings, and if the loss is no longer finite.
    """
    (x_train, y_train), (x_test, y_test), class_names = data
    check_data("train", x_train, y_train, len(class_names))
    check_data("test", x_test, y_test, len(class_names))
    if unknown := settings.keys() - {*RUN, *DEFAULTS}:
        known = ", ".join([*RUN, *DEFAULTS])
        raise UserError(f"Settings must be of: {known}. Received: {', '.join(sorted(unknown))}")
    settings = {name: settings[name] for name in RUN} | DEFAULTS | settings
    seed, epochs, folder = settings["seed"], settings["epochs"], pathlib.Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.clear_session()
    keras.config.set_floatx("float32")  # Keras's augmentation works in no other.
    keras.config.set_dtype_policy(settings["precision"])
    keras.utils.set_random_seed(seed)
    network, trainer, classifier = make_models(settings, x_train, len(class_names))
    # One call of `fit` makes one epoch, and yet prints "Epoch 5/30".
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: setattr(trainer, "stop_training", True)
    )
    test = feed(x_test, y_test, 500)
    name = run_name(settings)
    checkpoint = folder / f".{name}.npz"
    parameters = sum(math.prod(weight.shape) for weight in network.trainable_weights)
    history = load_checkpoint(checkpoint, trainer) if checkpoint.exists() else {}
    done = len(history.get("seconds", []))
    print(f"{name}: {parameters:,} parameters, {done} epochs done before")
    for epoch in range(done, epochs):
        begun = time.perf_counter()
        order = np.random.default_rng([seed, epoch]).permutation(len(x_train))
        # So chance in augmentation and dropout is the same in a run that was stopped.
        rng = np.random.default_rng([seed, epoch, 1])
        for variable in trainer.non_trainable_variables:
            if variable.name == "seed_generator_state":
                variable.assign(rng.integers(2**32, size=2, dtype="uint32"))
        batches = feed(x_train[order], y_train[order], settings["batch_size"])
        logs = trainer.fit(
            **batches, shuffle=False, initial_epoch=epoch, epochs=epochs, callbacks=[stop]
        ).history
        trained = time.perf_counter()
        tested = trainer.evaluate(**test, verbose=0, return_dict=True)
        print(f"test accuracy {tested['accuracy']:.4f}, test loss {tested['loss']:.4f}", flush=True)
        row = {"train_loss": logs["loss"], "train_accuracy": logs["accuracy"],
               "test_loss": [tested["loss"]], "test_accuracy": [tested["accuracy"]],
               "train_seconds": [trained - begun],
               "seconds": [time.perf_counter() - begun]}  # fmt: skip
        if not np.isfinite(list(row.values())).all():
            raise UserError("The loss is no longer finite: try a smaller --learning_rate.")
        history = {key: history.get(key, []) + value for key, value in row.items()}
        state = [ops.convert_to_numpy(v) for v in trainer.weights + trainer.optimizer.variables]
        buffer = io.BytesIO()  # On a full disk, older NumPys would leave a half-closed file behind.
        np.savez(buffer, *state, history=json.dumps(history))
        write_atomically(checkpoint, lambda path: path.write_bytes(buffer.getvalue()))
    result = {
        "command": make_command(settings, source), "settings": settings,
        "class_names": class_names, "parameters": parameters,
        "final_test_accuracy": history["test_accuracy"][-1],
        "best_test_accuracy_selected_on_test": max(history["test_accuracy"]),
        "seconds_per_epoch": float(np.median(history["seconds"])),
        "train_images_per_second": len(x_train) / float(np.median(history["train_seconds"])),
        "predict_ms": {str(size): time_prediction(trainer, x_test[:1], size) for size in (1, 128)},
        **describe_machine(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "history": history,
    }  # fmt: skip
    # NumPy's numbers become Python's.
    text = json.dumps(result, indent=1, default=lambda x: x.tolist()) + "\n"
    write_atomically(folder / f"{name}.keras", classifier.save)
    write_atomically(folder / f"{name}.json", lambda path: path.write_text(text))
    checkpoint.unlink()
    return result


def time_prediction(trainer, image, batch_size, rounds=20):
    """Returns the median milliseconds in which a compiled model predicts a batch of images."""
    images, seconds = np.repeat(image, batch_size, axis=0), []
    for _ in range(rounds + 2):  # Two to warm up.
        begun = time.perf_counter()
        trainer.predict_on_batch(images)
        seconds.append(time.perf_counter() - begun)
    return 1000 * float(np.median(seconds[2:]))


def list_changes(settings, sign=" "):
    """Returns the settings that aren't the defaults, as strings."""
    return [f"{k}{sign}{v}" for k, v in settings.items() if k not in RUN and v != DEFAULTS.get(k)]


def run_name(settings):
    """Returns what a run's files are called: data set, model, what isn't default, seed."""
    parts = [settings["dataset"], settings["model"], *list_changes(settings)]
    name = re.sub("[/: ]", "_", "-".join(parts))
    if len(name.encode()) > 200:  # A file's name has at most 255 bytes.
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name.encode()[:180].decode(errors='ignore')}-{digest}"
    return f"{name}-seed{settings['seed']}"


def make_command(settings, source=None):
    """Returns the command that makes a run of these settings."""
    run = {**{key: settings[key] for key in RUN}, "dataset": source or settings["dataset"]}
    given = [*(f"{key}={value}" for key, value in run.items()), *list_changes(settings, "=")]
    return shlex.join(["python", "hybrid_mixer.py", *(f"--{flag}" for flag in given)])


def load_checkpoint(path, model):
    """Loads what `train` has saved there into `model`; returns the history."""
    try:
        with np.load(path) as file:
            for i, variable in enumerate(model.weights + model.optimizer.variables):
                variable.assign(file[f"arr_{i}"])
            return json.loads(file["history"].item())
    except (ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} doesn't fit this model: delete it to start anew.") from error


def write_atomically(path, write):
    """Calls `write` with a name beside `path`, then moves what it wrote to `path`."""
    partial = path.with_name(f".partial-{path.name}")
    write(partial)
    os.replace(partial, path)


def first_line(error):
    """Returns the first line of an error's text, or its name where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def describe_machine():
    """Returns the names of device, backend and versions, a dict of strings."""
    backend, info = keras.backend.backend(), pathlib.Path("/proc/cpuinfo")
    library = sys.modules[backend]
    cpu = re.search("model name\t: (.*)", info.read_text() if info.exists() else "")
    cpu = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} CPU cores"
    if backend == "torch":
        kind = ops.zeros(1).device.type  # Keras picks it: cpu, cuda, mps (an Apple GPU) or xpu.
        name = library.cuda.get_device_name() if kind == "cuda" else kind
    elif backend == "jax":
        first = library.devices()[0]
        kind, name = first.platform, first.device_kind
    else:
        gpus = library.config.get_visible_devices("GPU")
        details = library.config.experimental.get_device_details(gpus[0]) if gpus else {}
        kind, name = "gpu" if gpus else "cpu", details.get("device_name", "GPU")
    device = cpu if kind == "cpu" else name
    names = ("keras", "numpy", "tensorflow_datasets")  # The last is `None` where it read nothing.
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in names}
    backend += f" {library.__version__}"
    return {"device": device, "processor": cpu, "backend": backend,
            "python": platform.python_version(), **versions}  # fmt: skip


def is_cpu(device):
    """Tells whether a device, as `describe_machine` names it, is a CPU."""
    return device.endswith("CPU cores")


# ------------------------------------------------------------------------- results and plots
# The paper's accuracy at its best epochs, in %; what it calls hybrid is our `interleaved`.
PAPER = {
    ("cifar10", "mixer"): "76.71", ("cifar10", "interleaved"): "82.27",
    ("cifar100", "mixer"): "48.20", ("cifar100", "interleaved"): "55.03",
}  # fmt: skip
# Variants, such as `hybrid_late`, have the colour of what they vary.
COLORS = {"mixer": "#0072B2", "hybrid": "#E69F00", "interleaved": "#009E73"}
CURVES = ("train_loss", "test_loss", "test_accuracy")


def read_or_skip(read, path):
    """Returns `read(path)`; if the file isn't ours or no longer fits, says so instead."""
    try:
        return read(path)
    except Exception as error:  # Whatever a foreign or damaged file makes its reader raise.
        told = f"{type(error).__name__}: {first_line(error)}"
        print(f"Left out of table and plots: {path} ({told})", file=sys.stderr)


def read_run(path):
    """Returns a result with its settings, curves as arrays, accuracy in % and its conditions.

    Conditions are the epochs, the settings that aren't the defaults and the hardware.
    """
    run = {"model_file": path.with_suffix(".keras"), **json.loads(path.read_text())}
    run |= DEFAULTS | run["settings"]
    run |= {key: np.array(run["history"][key], float) for key in CURVES}
    if {run[key].shape for key in CURVES} != {(run["epochs"],)}:
        raise ValueError("its curves aren't as long as its epochs")
    run["test_accuracy"] = 100 * run["test_accuracy"]
    run |= {"accuracy": run["test_accuracy"][-1], "parameters": f"{run['parameters']:,}"}
    changes = list_changes({**run["settings"], "epochs": DEFAULTS["epochs"]})
    device = "CPU" if is_cpu(run["device"]) else run["device"]  # CPUs of any make.
    run["hardware"] = f"{device}, {run['backend']}"
    epochs = f"{run['epochs']} epoch{'s' * (run['epochs'] > 1)}"
    run["conditions"] = [epochs, *changes, run["hardware"]]
    order = ([*MODELS].index(run["model"]), run["conditions"], int(run["seed"]))
    return {**run, "order": (str(run["dataset"]), *order)}


def load_results(folder):
    """Returns all results in a folder, ordered by data set, model, conditions and seed."""
    runs = [read_or_skip(read_run, path) for path in sorted(folder.glob("[!.]*-seed*.json"))]
    return sorted(filter(None, runs), key=lambda run: run["order"])


def group_runs(runs):
    """Returns the conditions that all runs share, and `{name: its runs}`.

    A name is a model and what isn't shared, such as "mixer" or "mixer, patch_size 2".
    """
    shared = [text for text in runs[0]["conditions"] if all(text in r["conditions"] for r in runs)]
    groups = {}
    for run in runs:
        own = [text for text in run["conditions"] if text not in shared]
        groups.setdefault(", ".join([run["model"], *own]), []).append(run)
    return shared, groups


def mean_std(values, sign=""):
    """Formats values as their mean, with the standard deviation where there are several."""
    mean = f"{np.mean(values):{sign}.2f}" if values else ""
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def make_cell(name, groups):
    """Returns a row's accuracy on a data set; its gains over `mixer` are paired by seed."""
    runs = groups.get(name, [])
    if not runs:
        return ""
    model, settings = runs[0]["model"], runs[0]["settings"]
    mixers = groups.get(name.replace(model, "mixer", 1), []) if model != "mixer" else []
    base = {run["seed"]: run["accuracy"] for run in mixers}
    gains = [run["accuracy"] - base[run["seed"]] for run in runs if run["seed"] in base]
    cell = f"{mean_std([run['accuracy'] for run in runs])} (n = {len(runs)})"
    cell += f", gain {mean_std(gains, '+')}" if gains else ""
    paper = PAPER.get((settings["dataset"], model))
    # The paper's text names no schedule, so its numbers stand beside runs with either.
    other = list_changes({**settings, "schedule": "cosine"})
    return cell + (f", paper {paper}" if paper and not other else "")


def make_table(groups):
    """Returns a table of `{data set: {name: runs}}`: a row a name, a column a data set."""
    names = {name: runs[0]["order"][1:] for part in groups.values() for name, runs in part.items()}
    head = ["model", "what it is", "parameters", *(f"{dataset}, %" for dataset in groups)]
    rows = [head, ["---"] * len(head)]
    for name in sorted(names, key=names.get):
        firsts = [part[name][0] for part in groups.values() if name in part]
        parameters = " / ".join(dict.fromkeys(run["parameters"] for run in firsts))
        cells = [make_cell(name, part) for part in groups.values()]
        rows.append([name, MODELS[firsts[0]["model"]].text, parameters, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def make_figure(width, height, title):
    """Returns a figure with a title alone; no backend that is missing can stop it."""
    try:
        from matplotlib.figure import Figure
    except ValueError:  # A notebook's MPLBACKEND names what this environment may not have.
        del os.environ["MPLBACKEND"]
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title, wrap=True)
    return figure


def draw_mean(axis, runs, key, **style):
    """Draws the mean of runs in a band of their standard deviation; returns its last value."""
    values = np.array([run[key] for run in runs])
    mean, std = values.mean(0), values.std(0, ddof=int(len(runs) > 1))
    epochs, color = np.arange(1, len(mean) + 1), style["color"]
    axis.plot(epochs, mean, marker=".", markevery=[-1], **style)
    axis.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    axis.grid(alpha=0.3)
    axis.locator_params("x", integer=True, min_n_ticks=1)
    return mean[-1]


def get_color(runs):
    """Returns the colour of runs of one model."""
    return COLORS[runs[0]["model"].split("_")[0]]


def plot_panels(groups, title, path):
    """Draws test accuracy over epochs, a panel for each group, the first one grey in all."""
    first, rows = next(iter(groups)), math.ceil(len(groups) / 4)
    title = f"{title}: test accuracy in %, that of {first} in grey"
    figure = make_figure(10, 2 * rows + 0.5, title)
    axes = figure.subplots(rows, 4, sharey=True, squeeze=False).ravel()
    for axis, (name, runs) in zip(axes, groups.items()):
        draw_mean(axis, groups[first], "test_accuracy", color="silver")
        end = draw_mean(axis, runs, "test_accuracy", color=get_color(runs))
        axis.set_title(f"{name}: {end:.1f}".replace(", ", "\n"), fontsize="medium")
    for axis in axes[len(groups) :]:
        axis.remove()
    figure.supxlabel("epoch")
    figure.savefig(path)


def plot_curves(groups, title, path):
    """Draws loss and accuracy over epochs: the mean of all seeds in a band of their deviation."""
    figure = make_figure(10, 4.5, title)
    loss, accuracy = figure.subplots(1, 2)
    styles = ["-", "--", "-.", ":", (0, (1, 4)), (0, (9, 3))]
    dashes = {color: itertools.cycle(styles) for color in COLORS.values()}
    for name, runs in groups.items():
        style = {"color": get_color(runs), "label": name.replace(", ", "\n")}
        style["linestyle"] = next(dashes[style["color"]])
        for key, axis, alpha in zip(CURVES, (loss, loss, accuracy), (0.4, 1, 1)):
            draw_mean(axis, runs, key, alpha=alpha, **style)
    place = math.inf
    for line in sorted(accuracy.lines, key=lambda line: -line.get_ydata()[-1]):
        epoch, value = line.get_xydata()[-1]
        place = min(value, place - np.ptp(accuracy.get_ylim()) / 25)  # So none covers another.
        accuracy.text(epoch, place, f" {value:.1f}", color=line.get_color(), va="center")
    loss.set(title="loss: test strong, train pale", xlabel="epoch", ylabel="cross-entropy")
    accuracy.set(title="test accuracy", xlabel="epoch", ylabel="%", xmargin=0.1)
    loss.legend(*accuracy.get_legend_handles_labels(), loc="best")
    figure.savefig(path)


def map_offsets(block, height, width):
    """Returns a block's mean |W1 W2| over pairs of patches, by the offset of the patch read.

    Offsets run from minus half of height and width to plus half; there are few pairs beyond.
    """
    w1, w2 = (ops.convert_to_numpy(d.kernel) for d in (block.token_hidden, block.token_output))
    weights = abs(w1 @ w2).T.reshape(height, width, height, width)  # (to y, to x, from y, from x)
    down, right = (np.arange(-(size // 2), size // 2 + 1) for size in (height, width))
    # A diagonal has all pairs of one offset: of x first, which leaves (to y, from y, pairs).
    across = [np.diagonal(weights, dx, axis1=1, axis2=3) for dx in right]
    return np.array([[np.diagonal(x, dy, 0, 1).mean() for x in across] for dy in down])


def map_blocks(path):
    """Returns `{block's name: what it reads}` of a saved model, as `map_offsets` maps it."""
    network = keras.saving.load_model(path).layers[-1]
    grid = network.get_layer("patch_embedding").output.shape[1:3]
    blocks = [layer for layer in network.layers if isinstance(layer, MixerBlock)]
    return {block.name: map_offsets(block, *grid) for block in blocks}


def plot_blocks(maps, title, path):
    """Draws what the blocks of each of `{name: map_blocks(file)}` look at: a row for each."""
    figure = make_figure(10, 1.5 * len(maps) + 0.5, title)
    axes = figure.subplots(len(maps), max(map(len, maps.values())), squeeze=False)
    for row, (name, blocks) in zip(axes, maps.items()):
        row[0].set_ylabel(name)
        for axis, (block, values) in zip(row, blocks.items()):
            axis.imshow(values / values.mean(), vmin=0.5, vmax=2.5)
            axis.set(xticks=[], yticks=[], title=block.replace("_", " "))
        for axis in row[len(blocks) :]:
            axis.remove()
    figure.savefig(path)


def report(folder):
    """Draws table and plots of all results in `folder`; returns the table."""
    folder, tables, notes = pathlib.Path(folder).expanduser(), {}, []
    runs = load_results(folder)
    if not runs:
        raise UserError(f"There is no result in {folder}: train first, or give --output_dir.")
    for dataset, part in itertools.groupby(runs, key=lambda run: run["dataset"]):
        part = list(part)
        shared, groups = group_runs(part)
        tables[dataset] = groups
        notes.append(f"{dataset}: {', '.join(shared)}.\n")
        counts = [len(group) for group in groups.values()]
        fewest, most = min(counts), max(counts)
        seeds = f"{most} seed{'s' * (most > 1)}" if fewest == most else f"{fewest} to {most} seeds"
        common = [text for text in shared if text != part[0]["hardware"]]
        title = ", ".join([dataset.replace("cifar", "CIFAR-"), *common])
        prefix = re.sub("[/:]", "_", dataset)
        plot = plot_panels if len(groups) > 6 else plot_curves  # Seven curves are a thicket.
        plot(groups, f"{title}, {seeds}", folder / f"{prefix}_curves.png")
        files = {name: group[0]["model_file"] for name, group in groups.items()}
        maps = {n: read_or_skip(map_blocks, file) for n, file in files.items() if file.exists()}
        maps = {name: blocks for name, blocks in maps.items() if blocks}
        if maps:
            plot_blocks(maps, f"Blocks of the first seed: {title}", folder / f"{prefix}_blocks.png")
    text = "\n".join([make_table(tables), *notes])
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text


# ---------------------------------------------------------------------------- flags and main
RUN = ("dataset", "seed", "model")  # With these, settings make a run.
SETTINGS = {  # Default; bounds or choices; meaning.
    "epochs": (30, (1, None), "Passes over the train split."),
    "batch_size": (128, (1, None), "Images a step."),
    "learning_rate": (3e-3, (0, 1e3), "Peak learning rate of AdamW."),
    "weight_decay": (5e-4, (0, 1e3), "AdamW's weight decay."),
    "schedule": ("cosine", ["cosine", "published"], "Learning rate over time."),
    "dropout": (0.15, (0, 0.99), "Chance of an activation to be zeroed."),
    "patch_size": (4, (1, None), "Height and width of a patch, in pixels."),
    "hidden_dim": (128, (1, None), "Channels of a token."),
    "num_blocks": (8, (1, None), "Number of Mixer blocks."),
    "tokens_mlp_dim": (64, (1, None), "Hidden width of the MLP across tokens."),
    "channels_mlp_dim": (256, (1, None), "Hidden width of the MLP across channels."),
    "precision": ("float32", ["float32", "mixed_bfloat16", "mixed_float16"], "Dtype policy."),
    "image_size": (0, (0, None), "Pixels of both sides to scale images to; 0: their own size."),
    "validation_split": (0.0, (0, 0.9), "Last share of train images to test on; 0 for none."),
}
DEFAULTS = {name: default for name, (default, _, _) in SETTINGS.items()}


def define_flags():
    """Defines the flags; only running this file as a script calls it."""
    for name, (default, limit, text) in SETTINGS.items():
        if isinstance(default, str):
            flags.DEFINE_enum(name, default, limit, text)
        else:
            define = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_float
            define(name, default, text, *limit)
            flags.register_validator(name, math.isfinite, "must be a finite number")
    lists = (  # Default; what is valid; meaning. Every combination is a run.
        ("dataset", "cifar10", bool, "cifar10, cifar100, shapes, folders or names of tfds"),
        ("model", "hybrid", MODELS.__contains__, ", ".join(MODELS)),
        ("seed", "0", lambda s: s.isdecimal() and int(s) < 2**32, "whole numbers below 2**32"),
    )
    for name, default, valid, text in lists:
        text = f"one or several, with commas between them, of: {text}"
        flags.DEFINE_list(name, default, text)
        flags.register_validator(name, lambda v, ok=valid: v and all(map(ok, v)), f"must be {text}")
    flags.DEFINE_string("data_dir", None, "Folder of tensorflow-datasets.")
    flags.DEFINE_string("output_dir", "results", "Folder of results, models, plots and table.")
    flags.DEFINE_boolean("overwrite", False, "Run what has a result already, replacing it.")
    flags.DEFINE_boolean("plot", False, "Train nothing; draw plots and table of the results.")


def sweep(values, folder):
    """Trains all combinations of data set, seed and model that have no result yet."""

    def is_done(path):
        return path.exists() and not values["overwrite"]

    runs = []
    for dataset, seed, model in itertools.product(*(values[key] for key in RUN)):
        folder_of_pictures = find_folder(dataset)
        name = folder_of_pictures.name if folder_of_pictures else dataset
        settings = {"dataset": name, "model": model, "seed": int(seed)}
        settings |= {key: values[key] for key in DEFAULTS}
        runs.append((folder / f"{run_name(settings)}.json", settings, dataset))
    wanted = [values[key] for key in ("data_dir", "image_size", "validation_split")]
    for path, _, dataset in reversed(runs):  # What can't be had is told before hours of training.
        if not is_done(path):
            load_data(dataset, *wanted)
    for path, settings, dataset in runs:
        if is_done(path):
            print(f"{path} is done already; --overwrite would run it again.")
        else:
            train(settings, load_data(dataset, *wanted), folder, dataset)


def main(argv):
    """Does what the flags say; exits with status 1 and one sentence where the user must act."""
    logging.set_verbosity(logging.WARNING)  # tensorflow-datasets logs every file that it opens.
    if hasattr(sys.stdout, "reconfigure"):  # A notebook's output isn't a terminal's,
        sys.stdout.reconfigure(errors="replace")  # which may not know the sign ±.
    values, machine = flags.FLAGS.flag_values_dict(), describe_machine()
    folder = pathlib.Path(values["output_dir"]).expanduser()
    try:
        if argv[1:]:
            raise UserError(f"{argv[1]!r} is no flag: see --help.")
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{machine['device']}, Keras {machine['keras']} on {machine['backend']}")
        if is_cpu(machine["device"]) and not values["plot"]:
            print(
                "NO GPU FOUND: a CPU does for --dataset shapes, but CIFAR takes hours. An NVIDIA "
                'GPU, on Linux, needs pip install "tensorflow[and-cuda]" (or JAX for GPUs).'
            )
        if not values["plot"]:
            sweep(values, folder)
        print(report(folder), flush=True)
    except UserError as error:
        sys.exit(f"hybrid_mixer.py: {error}")
    except BrokenPipeError:
        # As it ends, Python writes what is left to standard output: now to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit("hybrid_mixer.py: nobody reads its output; the same command goes on from here.")
    except OSError as error:  # Of writing results: it names the file and what is wrong with it.
        sys.exit(f"hybrid_mixer.py: {error}: mend that or give another --output_dir.")
    except KeyboardInterrupt:
        sys.exit("\nhybrid_mixer.py: stopped; the same command goes on after the last whole epoch.")


if __name__ == "__main__":
    if "epochs" in flags.FLAGS:  # A notebook's second %run of this file.
        flags.FLAGS.unparse_flags()
    else:
        define_flags()
    app.run(main)
