"""MLP-Mixer with small convolutions on CIFAR, in one Keras file.

Reproduces Kanazi, Mnaa and Eisa, "Improving MLP-Mixer Performance on Small Image Datasets Using
Locality-Aware Modifications". An MLP-Mixer isn't told which patches are neighbours; here
convolutions, 3x3 depthwise and then 1x1, mix neighbours before or after its blocks.

    python hybrid_mixer.py --dataset cifar100 --model hybrid

trains for 30 epochs and writes result, model, plots and table to results/ (see README.md). The
paper's text describes `hybrid`; what its authors' code trained is `--model interleaved`.
"""

import concurrent.futures
import contextlib
import functools
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
import tempfile
import textwrap
import time
import timeit
import zlib

import numpy as np
from absl import app, flags, logging

if __name__ == "__main__":  # TensorFlow and Keras read these as they start.
    os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")  # On a CPU up to 1.4 times as fast.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # Fewer messages.
    if "IPython" not in sys.modules:  # A notebook's backend may be missing here.
        os.environ["MPLBACKEND"] = "agg"

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

    Input and output shape: `(batch, height, width, channels)`; height and width may be `None`.
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
        if len(input_shape) != 4 or not isinstance(input_shape[-1], int):
            wanted = "(batch, height, width, channels), channels known"
            raise ValueError(f"ConvStem takes {wanted}. Received: input_shape={input_shape}")
        channels = input_shape[-1]
        self.input_spec = layers.InputSpec(ndim=4, axes={-1: channels})
        spatial = keras.initializers.RandomUniform(-1 / 3, 1 / 3)  # 9 values in: 1/sqrt(9).
        across = keras.initializers.RandomUniform(-(channels**-0.5), channels**-0.5)
        # What a frozen stem is made of has to be frozen too, also when it is loaded.
        common = {"dtype": self.dtype_policy, "trainable": self.trainable}
        conv = {"data_format": "channels_last", "use_bias": False, **common}
        self.depthwise = layers.DepthwiseConv2D(
            3, padding="same", depthwise_initializer=spatial, name="depthwise", **conv
        )
        conv["kernel_initializer"] = across
        self.pointwise = layers.Conv2D(channels, 1, name="pointwise", **conv)
        self.depthwise.build(input_shape)
        self.pointwise.build(input_shape)
        if not self.linear:
            self.norm = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name="norm", **common)
            self.norm.build(input_shape)

    def call(self, inputs, training=None):
        x = self.pointwise(self.depthwise(inputs))
        if not self.linear:
            x = ops.gelu(self.norm(x, training=training), approximate=False)
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

    Input and output shape: `(batch, tokens, channels)`, fixed when the layer is built.
    Raises: `ValueError` for other shapes, and for invalid sizes and rates.
    Reference: Tolstikhin et al., 2021; Kanazi, Mnaa and Eisa, equations 1 and 2.

    >>> MixerBlock(tokens_mlp_dim=64, channels_mlp_dim=256)(keras.Input((48, 128))).shape
    (None, 48, 128)
    """

    def __init__(self, tokens_mlp_dim, channels_mlp_dim, dropout=0.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        sizes = {"tokens_mlp_dim": tokens_mlp_dim, "channels_mlp_dim": channels_mlp_dim}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"`{name}` must be a whole number from 1. Received: {name}={size}")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be from 0 to below 1. Received: dropout={dropout}")
        self.tokens_mlp_dim = tokens_mlp_dim
        self.channels_mlp_dim = channels_mlp_dim
        self.dropout = dropout
        self.seed = seed

    def build(self, input_shape):
        if len(input_shape) != 3 or not all(isinstance(size, int) for size in input_shape[1:]):
            wanted = "(batch, tokens, channels), both known, so flatten a grid with Reshape"
            raise ValueError(f"MixerBlock takes {wanted}. Received: input_shape={input_shape}")
        _, tokens, channels = input_shape
        self.input_spec = layers.InputSpec(shape=(None, tokens, channels))
        # What a frozen block is made of has to be frozen too, also when it is loaded.
        common = {"dtype": self.dtype_policy, "trainable": self.trainable}

        def dense(name, fan_in, units, activation=None):
            keys, bound = ("kernel_initializer", "bias_initializer"), fan_in**-0.5
            uniform = {key: keras.initializers.RandomUniform(-bound, bound) for key in keys}
            layer = layers.Dense(units, activation, name=name, **uniform, **common)
            layer.build((None, None, fan_in))
            return layer

        self.token_norm = layers.LayerNormalization(epsilon=1e-5, name="token_norm", **common)
        self.token_norm.build(input_shape)
        self.token_hidden = dense("token_hidden", tokens, self.tokens_mlp_dim, "gelu")  # Exact.
        self.token_output = dense("token_output", self.tokens_mlp_dim, tokens)
        self.channel_norm = layers.LayerNormalization(epsilon=1e-5, name="channel_norm", **common)
        self.channel_norm.build(input_shape)
        self.channel_hidden = dense("channel_hidden", channels, self.channels_mlp_dim, "gelu")
        self.channel_output = dense("channel_output", self.channels_mlp_dim, channels)
        # Each call draws a new mask, so one layer serves all four places.
        self.drop = layers.Dropout(self.dropout, seed=self.seed, **common)

    def call(self, inputs, training=None):
        def mlp(x, hidden, output):
            x = self.drop(hidden(x), training=training)
            return self.drop(output(x), training=training)

        x = ops.transpose(self.token_norm(inputs), (0, 2, 1))
        x = mlp(x, self.token_hidden, self.token_output)
        u = inputs + ops.transpose(x, (0, 2, 1))
        return u + mlp(self.channel_norm(u), self.channel_hidden, self.channel_output)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        names = ("tokens_mlp_dim", "channels_mlp_dim", "dropout", "seed")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


# ------------------------------------------------------------------------------------ models
class UserError(ValueError):
    """One sentence for whoever gave the command: what is wrong and what to do."""


CHANNELS_LAST = {"data_format": "channels_last"}  # Whatever a user's keras.json says.

# Where a model has convolutions: place 0 is before block 1, place 2 after block 2; places after the
# last block don't count. Beside each place stand the arguments of its `ConvStem`. A line of your
# own is a model of your own.
MODELS = {
    "mixer": {},  # The paper's baseline.
    "hybrid": {0: {"linear": True}},  # The paper's text.
    "hybrid_late": {1: {"linear": True}},
    "hybrid_norm": {0: {}},  # The text's place, with batch norm and GELU as in the authors' code.
    "hybrid_norm_late": {1: {}},
    "hybrid_residual": {0: {"residual": True}},
    "interleaved": {place: {} for place in range(0, 100, 2)},  # The authors' code.
    "interleaved_no_stem": {place: {} for place in range(2, 100, 2)},
    "interleaved_residual": {place: {"residual": place > 0} for place in range(0, 100, 2)},
    "interleaved_4": {place: {} for place in range(0, 100, 4)},
    "interleaved_3": {place: {} for place in range(0, 100, 3)},  # The paper's future work.
    "interleaved_1": {place: {} for place in range(100)},
}


def build_model(
    model="hybrid", image_shape=(32, 32, 3), num_classes=10, patch_size=4, hidden_dim=128,
    num_blocks=8, tokens_mlp_dim=64, channels_mlp_dim=256, dropout=0.15, shuffle_patches=0,
):  # fmt: skip
    """Builds one of the `MODELS`: by default the one that the paper's text describes.

    Args:
        model: str, a key of `MODELS`.
        image_shape: `(height, width, channels)`, height and width multiples of `patch_size`.
        num_classes, patch_size (pixels), hidden_dim (channels of a token), num_blocks: int.
        tokens_mlp_dim, channels_mlp_dim, dropout: of each `MixerBlock`.
        shuffle_patches: int, seed of one fixed order of the patches for all images; 0: their own.

    Returns a Functional `keras.Model` from normalised images `(batch, height, width, channels)` to
    float32 logits `(batch, num_classes)`. Raises `UserError` for an unknown model, and for images
    that aren't whole patches.
    """
    if model not in MODELS:
        raise UserError(f"`model` must be one of {', '.join(MODELS)}. Received: model={model}")
    height, width, channels = image_shape
    if height % patch_size or width % patch_size:
        raise UserError(f"{height}x{width} pixels aren't whole patches: give a --patch_size that "
                        f"divides both. Received: {patch_size}")  # fmt: skip
    grid = (height // patch_size, width // patch_size, hidden_dim)
    tokens = (grid[0] * grid[1], hidden_dim)

    def uniform(fan_in):  # in +-1/sqrt(fan_in), as in the layers
        names, bound = ("kernel_initializer", "bias_initializer"), fan_in**-0.5
        return {name: keras.initializers.RandomUniform(-bound, bound) for name in names}

    images = keras.Input(image_shape, dtype="float32", name="images")
    embed = {**uniform(patch_size**2 * channels), **CHANNELS_LAST, "name": "patch_embedding"}
    x = layers.Conv2D(hidden_dim, patch_size, patch_size, **embed)(images)
    x = layers.Reshape(tokens)(x)
    if shuffle_patches:
        x = ops.take(x, np.random.default_rng(shuffle_patches).permutation(tokens[0]), axis=1)
    for i in range(num_blocks + 1):
        if i > 0:
            # Drawn even if dropout is 0, so that first weights don't depend on it.
            block = {"dropout": dropout, "seed": random.randint(1, 10**9), "name": f"block_{i}"}
            x = MixerBlock(tokens_mlp_dim, channels_mlp_dim, **block)(x)
        if i in MODELS[model]:
            stem = ConvStem(**MODELS[model][i], name=f"conv_{i}" if i else "stem")
            x = layers.Reshape(tokens)(stem(layers.Reshape(grid)(x)))
    x = layers.LayerNormalization(epsilon=1e-5, name="norm")(x)
    x = layers.GlobalAveragePooling1D(**CHANNELS_LAST, name="mean_of_tokens")(x)
    head = layers.Dense(num_classes, **uniform(hidden_dim), dtype="float32", name="head")
    return keras.Model(images, head(x), name=model)


# -------------------------------------------------------------------------------------- data
def load_data(name, data_dir=None, image_size=0, validation_split=0.0):
    """Loads `shapes`, a folder of pictures or a data set of tensorflow-datasets.

    Args:
        name: str, `shapes`, a folder with `train/CLASS/` and `test/CLASS/` in it (its name needs a
            slash, as in `./pets`), or a name that tfds knows.
        data_dir: str or `None`, where tensorflow-datasets keeps its files.
        image_size: int, pixels of both sides to fit images to; 0: leave them as they are.
        validation_split: float, last share of the train images to test on instead; 0: none.

    Returns `((x_train, y_train), (x_test, y_test), class_names)`: uint8 images `(n, height, width,
    channels)`, int labels `(n,)`, a list of strings. Raises `UserError` if they can't be loaded.
    """
    count = 1 if validation_split else 2  # How many splits are read.
    if name == "shapes":
        *splits, class_names = draw_shapes()
        if image_size:
            splits = [fit_pairs(zip(*split), image_size) for split in splits]
    elif folder := find_folder(name):
        splits, class_names = read_folder(folder, count, image_size)
    else:
        splits, class_names = read_tfds(name, count, data_dir, image_size)
    if validation_split:
        images, labels = splits[0]
        cut = len(images) - math.ceil(validation_split * len(images))
        splits = [(images[:cut], labels[:cut]), (images[cut:], labels[cut:])]
    return *splits, class_names


def find_folder(name):
    """Returns the path if `name` has a slash in it and is a folder, else `None`."""
    path = pathlib.Path(name).expanduser()
    return path.resolve() if "/" in name.replace(os.sep, "/") and path.is_dir() else None


def fit_picture(picture, size):
    """Returns a Pillow image as uint8 `(size, size, 3)`: upright, on white, cut to a square.

    Raises `ValueError` for more than 8 bits a channel, which Pillow would turn white.
    """
    from PIL import Image, ImageOps

    if picture.mode[0] in "IF":
        raise ValueError("a picture must have 8 bits a channel")
    picture = ImageOps.exif_transpose(picture).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(ImageOps.fit(picture.convert("RGB"), (size, size)))


def fit_pairs(pairs, size):
    """Returns images, fitted to `size`, and labels of pairs `(array, label)`."""
    to_picture = functools.partial(keras.utils.array_to_img, scale=False, **CHANNELS_LAST)
    fitted = [(fit_picture(to_picture(image), size), label) for image, label in pairs]
    return tuple(map(np.array, zip(*fitted)))


def read_folder(folder, count, size):
    """Returns `[(images, labels), ...]` and class names of a folder's pictures, cut to `size`."""
    from PIL import Image

    def read(path):
        with contextlib.suppress(Exception), Image.open(path) as picture:
            return fit_picture(picture, size)

    if not size:
        raise UserError(f"Pictures in {folder} may have several sizes: give an --image_size.")
    second = "test" if (folder / "test").is_dir() else "validation"
    # What is hidden, its name starting with a dot, is neither a class nor a picture.
    names = sorted(path.name for path in (folder / "train").glob("[!.]*") if path.is_dir())
    if len(names) < 2:
        raise UserError(f"{folder / 'train'} needs two folders of pictures or more, one a class.")
    data, endings = [], Image.registered_extensions()
    for split in (folder / "train", folder / second)[:count]:
        files = sorted(f for f in split.glob("[!.]*/[!.]*") if f.suffix.lower() in endings)
        if wrong := {*names} ^ {file.parent.name for file in files}:
            raise UserError(f"{split} needs pictures of the classes that train/ has (or give a "
                            f"--validation_split). Wrong: {', '.join(sorted(wrong))}.")  # fmt: skip
        random.Random(0).shuffle(files)  # So that a last share of them has all classes.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            images = list(pool.map(read, files))
        if broken := [str(file) for file, image in zip(files, images) if image is None]:
            raise UserError(f"Fix or delete what is no 8-bit picture: {', '.join(broken)}.")
        data.append((np.stack(images), np.array([names.index(f.parent.name) for f in files])))
    return data, names


def read_tfds(name, count, data_dir, size):
    """Returns `[(images, labels), ...]` and class names of a data set of tensorflow-datasets."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    if keras.backend.backend() != "tensorflow":  # Then it reads files, and leaves GPUs alone.
        with contextlib.suppress(RuntimeError):  # A user's code has started it already.
            tf.config.set_visible_devices([], "GPU")
    print(f"Preparing {name}, a download unless it is there", flush=True)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        keys = [key for key in builder.info.supervised_keys or () if isinstance(key, str)]
        kinds = [builder.info.features[key] for key in keys]
        if [type(kind).__name__ for kind in kinds] != ["Image", "ClassLabel"]:
            raise ValueError("it has no pairs of an image and a label")
        if None in kinds[0].shape[:2] and not size:
            raise ValueError("its images may have several sizes, so give an --image_size")
        builder.download_and_prepare()
        second = "test" if "test" in builder.info.splits else "validation"
        splits, batch_size = ["train", second][:count], None if size else -1  # -1: all at once.
        data = builder.as_dataset(splits, as_supervised=True, batch_size=batch_size)
        data = [fit_pairs(part, size) if size else part for part in tfds.as_numpy(data)]
        return data, kinds[1].names
    except Exception as error:  # A download or a damaged file can raise any.
        told = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"Data set {name!r} is unavailable ({told}): fix that, or take --dataset "
                        "shapes, or a folder with a slash: ./pets.") from error  # fmt: skip


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
    from 0.9 to 1.1, then hue by up to 0.02 of the full circle.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, x, training=None):
        if not training:
            return x
        each, seed = (ops.shape(x)[0], 1, 1, 1), self.seed_generator
        draw = functools.partial(keras.random.uniform, dtype=self.compute_dtype, seed=seed)
        factors, turns = draw((3, *each), 0.9, 1.1), draw(each, -0.02, 0.02)
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
    # Lists, since PyTorch can't put NumPy's float64 on an Apple GPU.
    normalize = layers.Normalization(-1, mean.tolist(), variance.tolist(), dtype="float32")
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
def make_models(settings, train_images, num_classes):
    """Returns `(network, trainer, classifier)` as `settings` say, the trainer ready for `fit`."""
    sizes = ("patch_size", "hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
    sizes = {name: settings[name] for name in (*sizes, "dropout", "shuffle_patches")}
    network = build_model(settings["model"], train_images.shape[1:], num_classes, **sizes)
    trainer, classifier = add_preprocessing(network, train_images)
    steps = math.ceil(len(train_images) / settings["batch_size"])  # An epoch's.
    # The authors' cosine was to fall over 30 epochs, but falls over 30 batches, then rises again.
    half_period = 30 if settings["schedule"] == "published" else settings["epochs"] * steps

    def rate():  # Keras calls it at each step; steps count from 0.
        step = ops.cast(optimizer.iterations, "float32")
        return settings["learning_rate"] * (1 + ops.cos(math.pi * step / half_period)) / 2

    optimizer = keras.optimizers.AdamW(rate, settings["weight_decay"], epsilon=1e-8)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # As the string "accuracy" it would make TensorFlow trace the first step twice.
    accuracy = keras.metrics.SparseCategoricalAccuracy("accuracy")
    compiled = keras.backend.backend() == "jax"  # TensorFlow's graph is faster on a CPU.
    trainer.compile(optimizer, loss, metrics=[accuracy], jit_compile=compiled)
    trainer.optimizer.build(trainer.trainable_variables)  # Before a checkpoint is loaded.
    return network, trainer, classifier


def check_data(splits, num_classes):
    """Raises `UserError` unless the splits' images and labels are what `train` takes."""
    for name, (images, labels) in zip(("train", "test"), splits):
        good = images.ndim == 4 and images.dtype == "uint8" and min(images.shape[1:3]) >= 5
        known = labels.shape == (len(images),) and np.isin(labels, range(num_classes)).all()
        if not good or not known or num_classes < 2:
            raise UserError(f"The {name} split must be uint8 images (n, height, width, channels) "
                            "from 5x5 pixels, and labels from 0, of two classes or more. Received: "
                            f"{images.dtype}, {images.shape}; {labels.shape}")  # fmt: skip


def fingerprint(data):
    """Returns eight hexadecimal digits that differ where images, labels or classes do."""
    parts = [np.ascontiguousarray(part) for split in data[:2] for part in split]
    parts.append("/".join(data[2]).encode())
    return f"{functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0):08x}"


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
    check_data(data[:2], len(class_names))
    if unknown := settings.keys() - {*RUN, *DEFAULTS}:
        raise UserError(f"Settings are those of --help, not {', '.join(sorted(unknown))}.")
    settings = {name: settings[name] for name in RUN} | DEFAULTS | settings
    seed, epochs, batch_size = (settings[key] for key in ("seed", "epochs", "batch_size"))
    folder = pathlib.Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.clear_session()
    devices = keras.distribution.list_devices() if keras.backend.backend() == "jax" else [None]
    # Each device takes the same share of each batch, also of the last and smaller one.
    test_batch = 400  # Up to 16 devices can share it.
    count = math.gcd(len(devices), batch_size, test_batch, len(x_train), len(x_test))
    if count > 1:
        shared = keras.distribution.DataParallel(devices=devices[:count])
        keras.distribution.set_distribution(shared)
    keras.config.set_floatx("float32")  # Keras's augmentation works in no other.
    keras.config.set_dtype_policy(settings["precision"])
    keras.utils.set_random_seed(seed)
    network, trainer, classifier = make_models(settings, x_train, len(class_names))
    # One call of `fit` makes one epoch, and yet prints "Epoch 5/30".
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: setattr(trainer, "stop_training", True)
    )
    # A file takes a line for each epoch, a terminal or a notebook the bar.
    verbose = 2 if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty() else 1
    common = {"shuffle": False, "epochs": epochs, "callbacks": [stop], "verbose": verbose}
    test = feed(x_test, y_test, test_batch)
    name, mark = run_name(settings), fingerprint(data)
    checkpoint = folder / f".{name}.npz"
    parameters = sum(math.prod(weight.shape) for weight in network.trainable_weights)
    history = load_checkpoint(checkpoint, trainer, mark)
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
        batches = feed(x_train[order], y_train[order], batch_size)
        logs = trainer.fit(**batches, initial_epoch=epoch, **common).history
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
        known = {"mark": mark, "history": json.dumps(history)}
        write_atomically(checkpoint, lambda path: np.savez(path, *state, **known))
    result = {
        "command": make_command(settings | {"dataset": source or settings["dataset"]}),
        "settings": settings, "class_names": class_names, "parameters": parameters,
        "final_test_accuracy": history["test_accuracy"][-1],
        "best_test_accuracy_selected_on_test": max(history["test_accuracy"]),
        "seconds_per_epoch": float(np.median(history["seconds"])),
        "train_images_per_second": len(x_train) / float(np.median(history["train_seconds"])),
        "predict_ms": {str(size): time_prediction(trainer, x_test[:1], size) for size in (1, 128)},
        "devices": count, **describe_machine(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "history": history,
    }  # fmt: skip
    text = json.dumps(result, indent=1, default=lambda x: x.tolist()) + "\n"  # NumPy's values.
    write_atomically(folder / f"{name}.keras", classifier.save)
    write_atomically(folder / f"{name}.json", lambda path: path.write_text(text))
    checkpoint.unlink(missing_ok=True)  # The same run, started twice, may have ended before.
    keras.distribution.set_distribution(None)  # Or loaded models refuse what can't be shared.
    return result


def time_prediction(trainer, image, batch_size, rounds=20):
    """Returns the median milliseconds in which a compiled model predicts a batch of images."""
    images = np.repeat(image, batch_size, axis=0)
    seconds = timeit.repeat(lambda: trainer.predict_on_batch(images), number=1, repeat=rounds + 2)
    return 1000 * float(np.median(seconds[2:]))  # Two to warm up.


def row_name(settings):
    """Returns what a run's row in tables is called: model and what isn't default."""
    changes = [f"{key}_{settings[key]}" for key in DEFAULTS if settings[key] != DEFAULTS[key]]
    return "-".join([settings["model"], *changes])


def run_name(settings):
    """Returns what a run's files are called: data set, row, seed, as files and plots can bear."""
    name = f"{settings['dataset']}-{row_name(settings)}-seed{settings['seed']}"
    return re.sub(r"^\.|[^\w.-]", "_", name)


def make_command(settings):
    """Returns the command that makes a run of these settings."""
    given = [f"--{key}={value}" for key, value in settings.items() if value != DEFAULTS.get(key)]
    return shlex.join(["python", "hybrid_mixer.py", *given])


def load_checkpoint(path, model, mark):
    """Loads a checkpoint of `train`, if there is one, into a model; returns the history."""
    try:
        with np.load(path) as file:
            if file["mark"].item() != mark:
                raise ValueError("of other data")
            for i, variable in enumerate(model.weights + model.optimizer.variables):
                variable.assign(file[f"arr_{i}"])
            return json.loads(file["history"].item())
    except FileNotFoundError:
        return {}
    except Exception as error:  # A file that doesn't fit can raise any.
        raise UserError(f"{path} doesn't fit this model or these images: delete it.") from error


def write_atomically(path, write):
    """Calls `write` with a name beside `path`, then moves what it wrote to `path`."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    write(partial)
    os.replace(partial, path)


def describe_machine():
    """Returns device, backend and versions as a dict."""
    backend, info = keras.backend.backend(), pathlib.Path("/proc/cpuinfo")
    library = sys.modules[backend]
    cpu = re.search("model name\t: (.*)", info.read_text() if info.exists() else "")
    cpu = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} CPU cores"
    if backend == "tensorflow":
        config = library.config
        details = map(config.experimental.get_device_details, config.get_visible_devices("GPU"))
        names = [gpu.get("device_name", "GPU") for gpu in details]
    elif backend == "jax":
        names = [device.device_kind for device in library.devices() if device.platform != "cpu"]
    else:
        kind = ops.zeros(1).device.type  # Keras picks it: cpu, cuda, mps (an Apple GPU) or xpu.
        names = [library.cuda.get_device_name() if kind == "cuda" else kind] * (kind != "cpu")
    modules = ("keras", "numpy", "tensorflow_datasets")  # The last is `None` where it read nothing.
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in modules}
    return {"device": [*names, cpu][0], "processor": cpu, "python": platform.python_version(),
            "backend": f"{backend} {library.__version__}", **versions}  # fmt: skip


# ------------------------------------------------------------------------- results and plots
# The paper's accuracy at its best epochs, in %; what it calls hybrid is our `interleaved`.
PAPER = {
    ("cifar10", "mixer"): "76.71", ("cifar10", "interleaved"): "82.27",
    ("cifar100", "mixer"): "48.20", ("cifar100", "interleaved"): "55.03",
}  # fmt: skip
STYLES = {  # Colour and words for the plots; all others are green.
    "mixer": ("#0072B2", "no convolution"),
    "hybrid": ("#E69F00", "the paper's text: 1 convolution before block 1"),
    "hybrid_late": ("#56B4E9", "the text's convolution after block 1"),
    "hybrid_norm": ("#CC79A7", "1 with batch norm, GELU before block 1"),
    "hybrid_norm_late": ("#777777", "1 with batch norm, GELU after block 1"),
    "interleaved": ("#009E73", "the paper's code: a convolution every 2nd block"),
    "interleaved_3": ("#332288", "a convolution every 3rd block"),
}
CURVES = ("train_loss", "test_loss", "test_accuracy")


def select(runs, **wanted):
    """Returns the runs that have all these values."""
    return [run for run in runs if wanted.items() <= {key: run[key] for key in wanted}.items()]


def load_results(folder):
    """Returns all results in a folder, in the order of `MODELS`, with what table and plots need."""
    runs = []
    for path in folder.glob("[!.]*-seed*.json"):
        run = json.loads(path.read_text())
        run |= DEFAULTS | run["settings"] | {key: np.array(run["history"][key]) for key in CURVES}
        run |= {"path": path, "row": row_name(run)}
        run["dataset"] = path.stem.removesuffix(f"-{run['row']}-seed{run['seed']}")
        run["test_accuracy"] = 100 * run["test_accuracy"]
        run["accuracy"] = run["test_accuracy"][-1]
        # The paper's text names no schedule, so its numbers stand beside runs with either.
        run["paper"] = PAPER.get((run["dataset"], run["row"].replace("-schedule_published", "")))
        run["color"] = STYLES.get(run["model"], ["#009E73"])[0]
        run["hardware"] = re.sub(".* CPU cores", "CPU", f"{run['device']}, {run['backend']}")
        runs.append(run)
    runs.sort(key=lambda r: ([*MODELS, r["model"]].index(r["model"]), r["row"], r["seed"]))
    for run in runs:  # A shuffled `mixer` would be like any other.
        row = re.sub("-shuffle_patches_[0-9]+", "", run["row"].replace(run["model"], "mixer", 1))
        base = select(runs, row=row, dataset=run["dataset"], seed=run["seed"])
        run["gains"] = [run["accuracy"] - other["accuracy"] for other in base if other is not run]
    return runs


def make_table(runs):
    """Returns a table with a row a model: mean ± standard deviation (mean gain over `mixer`)."""
    datasets = sorted({run["dataset"] for run in runs})
    lines = [["model", "parameters", *(f"{dataset}, %" for dataset in datasets), "paper, %"]]
    lines.append(["---"] * len(lines[0]))
    for row in dict.fromkeys(run["row"] for run in runs):
        parts, cells = [select(runs, row=row, dataset=dataset) for dataset in datasets], []
        for part in parts:
            values = [run["accuracy"] for run in part]
            gains = [gain for run in part for gain in run["gains"]]
            cell = f"{np.mean(values):.2f}" if part else ""
            cell += f" ± {np.std(values, ddof=1):.2f}" if len(part) > 1 else ""
            cells.append(cell + (f" ({np.mean(gains):+.2f})" if gains else ""))
        firsts = [part[0] for part in parts if part]
        parameters = " / ".join(dict.fromkeys(f"{run['parameters']:,}" for run in firsts))
        paper = " / ".join(run["paper"] for run in firsts if run["paper"])
        lines.append([row, parameters, *cells, paper])
    if not any(line[-1] for line in lines[2:]):  # The paper has no numbers for them.
        lines = [line[:-1] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def make_figure(width, height, title):
    """Returns a figure with a title alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title, wrap=True)
    return figure


def plot_accuracies(runs, path):
    """Draws each run's accuracy: a row a model, a panel a data set, bars from `mixer`'s mean."""
    datasets = sorted({run["dataset"] for run in runs})
    rows = [*dict.fromkeys(run["row"] for run in runs)]
    words = [STYLES.get(row.split("-")[0], ("", ""))[1] for row in rows]
    names = [f"{textwrap.fill(row, 40)}\n{text}".strip() for row, text in zip(rows, words)]
    title = "Test accuracy, %. Dots: seeds; bars: gains over mixer; black ticks: the paper"
    height = 1.2 + 0.24 * sum(2 + name.count("\n") // 2 for name in names)
    figure = make_figure(4 + 3.5 * len(datasets), height, title)
    axes = figure.subplots(1, len(datasets), sharey=True, squeeze=False)[0]
    for (place, row), (axis, dataset) in itertools.product(enumerate(rows), zip(axes, datasets)):
        if part := select(runs, row=row, dataset=dataset):
            values, color = [run["accuracy"] for run in part], part[0]["color"]
            gains = [gain for run in part for gain in run["gains"]] or [0]
            axis.barh(place, -np.mean(gains), 0.3, np.mean(values), color=color, alpha=0.35)
            axis.plot(values, [place] * len(part), "o", color=color)
            axis.text(1.02, place, f"{np.mean(values):.1f}", va="center",
                      transform=axis.get_yaxis_transform())  # fmt: skip
            if part[0]["paper"]:
                axis.plot(float(part[0]["paper"]), place, "k|", ms=18, mew=2)
        axis.set_title(dataset.replace("cifar", "CIFAR-"), fontsize="medium")
        axis.grid(alpha=0.3, axis="x")
        axis.use_sticky_edges = False  # Or a bar's end would cut the dots at it.
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()
    figure.savefig(path)


def plot_curves(runs, title, path):
    """Draws loss and accuracy over epochs: means of seeds in bands of a standard deviation."""
    figure = make_figure(10, 4.5, title)
    loss, accuracy = figure.subplots(1, 2)
    dashes = {run["color"]: itertools.cycle(["-", "--", ":", "-."]) for run in runs}
    for row in dict.fromkeys(run["row"] for run in runs):
        part = select(runs, row=row)
        color, epochs = part[0]["color"], np.arange(1, part[0]["epochs"] + 1)
        style = {"color": color, "linestyle": next(dashes[color]), "label": row.replace("-", "\n")}
        for key, axis, alpha in zip(CURVES, (loss, loss, accuracy), (0.4, 1, 1)):
            values = np.array([run[key] for run in part])
            mean, std = values.mean(0), values.std(0, ddof=int(len(part) > 1))
            axis.plot(epochs, mean, marker=".", markevery=[-1], alpha=alpha, **style)
            axis.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    lines = sorted(accuracy.lines, key=lambda line: line.get_ydata()[-1])
    ends = np.array([line.get_ydata()[-1] for line in lines])
    steps = np.ptp(accuracy.get_ylim()) / 25 * np.arange(len(ends))  # Labels apart.
    up, down = np.maximum.accumulate(ends - steps), np.minimum.accumulate((ends - steps)[::-1])
    for line, end, place in zip(lines, ends, steps + (up + down[::-1]) / 2):
        style = {"color": line.get_color(), "va": "center"}
        accuracy.text(line.get_xdata()[-1], place, f" {end:.1f}", **style)
    loss.set(title="loss: test strong, train pale", xlabel="epoch", ylabel="cross-entropy")
    accuracy.set(title="test accuracy", xlabel="epoch", ylabel="%", xmargin=0.1)
    for axis in (loss, accuracy):
        axis.grid(alpha=0.3)
        axis.locator_params("x", integer=True, min_n_ticks=1)
    loss.legend(*accuracy.get_legend_handles_labels(), loc="best")
    figure.savefig(path)


def map_blocks(path):
    """Returns, of each block of a saved model, mean |W1 W2| by the offset of the patch read."""
    try:
        network, maps = keras.saving.load_model(path).layers[-1], {}
    except Exception as error:  # Keras 3.10 can't load what 3.15 has saved.
        print(f"Left out of the plot of blocks: {path} ({error!r})", file=sys.stderr)
        return {}
    height, width = network.get_layer("patch_embedding").output.shape[1:3]
    # Up to half of height and width; there are few pairs beyond.
    down, right = (np.arange(-(size // 2), size // 2 + 1) for size in (height, width))
    for block in (layer for layer in network.layers if isinstance(layer, MixerBlock)):
        w1, w2 = (ops.convert_to_numpy(d.kernel) for d in (block.token_hidden, block.token_output))
        weights = abs(w1 @ w2).T.reshape(height, width, height, width)  # To y, x; from y, x.
        # A diagonal has all pairs of one offset: of x first, which leaves (to y, from y, pairs).
        across = [np.diagonal(weights, dx, axis1=1, axis2=3) for dx in right]
        maps[block.name] = [[np.diagonal(x, dy, 0, 1).mean() for x in across] for dy in down]
    return maps


def plot_blocks(runs, title, path):
    """Draws what the blocks of each row's first run look at, where its model was saved."""
    files = {run["row"]: run["path"].with_suffix(".keras") for run in reversed(runs)}
    maps = {row: map_blocks(file) for row, file in reversed(files.items()) if file.exists()}
    maps = {row: blocks for row, blocks in maps.items() if blocks}
    if not maps:
        return
    figure = make_figure(10, 1.6 * len(maps) + 0.5, title)
    for part, (row, blocks) in zip(figure.subfigures(len(maps), squeeze=False).flat, maps.items()):
        part.suptitle(row, fontsize="medium")
        axes = part.subplots(1, len(blocks), squeeze=False)[0]
        for axis, (block, values) in zip(axes, blocks.items()):
            axis.imshow(values / np.mean(values), vmin=0.5, vmax=2.5)
            axis.set(xticks=[], yticks=[], xlabel=block.replace("_", " "))
    figure.savefig(path)


def report(folder):
    """Draws table and plots of all results in `folder`; returns the table."""
    folder = pathlib.Path(folder).expanduser()
    runs = load_results(folder)
    if not runs:
        raise UserError(f"There is no result in {folder}: train first, or give --output_dir.")
    text = make_table(runs)
    for dataset in sorted({run["dataset"] for run in runs}):
        part = select(runs, dataset=dataset)
        hardware = "; ".join(sorted({run["hardware"] for run in part}))
        seeds = ", ".join(map(str, sorted({run["seed"] for run in part})))
        text += f"\n{dataset}: {hardware}; seed {seeds}.\n"
        title, curves = dataset.replace("cifar", "CIFAR-"), folder / f"{dataset}_curves.png"
        curves.unlink(missing_ok=True)
        if len({run["row"] for run in part}) <= 6:  # Seven curves are a thicket.
            plot_curves(part, f"{title}, seed {seeds}", curves)
        title = f"Where blocks look: {title}, first seed"
        plot_blocks(part, title, folder / f"{dataset}_blocks.png")
    plot_accuracies(runs, folder / "accuracies.png")
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text


# ---------------------------------------------------------------------------- flags and main
RUN = {  # Default; what is valid; meaning. Every combination is a run.
    "dataset": ("cifar10", bool, "cifar10, cifar100, shapes, ./folders or names of tfds"),
    "seed": ("0", lambda seed: seed.isdecimal() and int(seed) < 2**32, "whole numbers below 2**32"),
    "model": ("hybrid", MODELS.__contains__, ", ".join(MODELS)),
}
SETTINGS = {  # Default; bounds or choices; meaning.
    "epochs": (30, (1, None), "Passes over the train split."),
    "batch_size": (128, (1, None), "Images a step."),
    "learning_rate": (3e-3, (0, 1e3), "Peak learning rate of AdamW."),
    "weight_decay": (5e-4, (0, 1e3), "AdamW's weight decay."),
    "schedule": ("cosine", ["cosine", "published"], "Learning rate: one fall, or the authors'."),
    "dropout": (0.15, (0, 0.99), "Chance of an activation to be zeroed."),
    "patch_size": (4, (1, None), "Height and width of a patch, in pixels."),
    "hidden_dim": (128, (1, None), "Channels of a token."),
    "num_blocks": (8, (1, None), "Number of Mixer blocks."),
    "tokens_mlp_dim": (64, (1, None), "Hidden width of the MLP across tokens."),
    "channels_mlp_dim": (256, (1, None), "Hidden width of the MLP across channels."),
    "precision": ("float32", ["float32", "mixed_bfloat16", "mixed_float16"], "Dtype policy."),
    "image_size": (0, (0, None), "Pixels of both sides to fit images to; 0: their own size."),
    "validation_split": (0.0, (0, 0.9), "Last share of train images to test on; 0 for none."),
    "shuffle_patches": (0, (0, None), "Seed of one order for all images' patches; 0: their own."),
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
    for name, (default, valid, text) in RUN.items():
        text = f"one or several, with commas between them, of: {text}"
        flags.DEFINE_list(name, default, text)
        flags.register_validator(name, lambda v, ok=valid: v and all(map(ok, v)), f"must be {text}")
    flags.DEFINE_string("data_dir", None, "Folder of tensorflow-datasets.")
    flags.DEFINE_string("output_dir", "results", "Folder of results, models, plots and table.")
    flags.DEFINE_boolean("plot", False, "Train nothing; draw plots and table of the results.")


def sweep(values, folder):
    """Trains all combinations of data set, seed and model that have no result yet."""
    wanted = [values[key] for key in ("data_dir", "image_size", "validation_split")]
    load = functools.cache(lambda dataset: load_data(dataset, *wanted))
    runs = {}
    for dataset, seed, model in itertools.product(*(values[key] for key in RUN)):
        pictures = find_folder(dataset)  # Folders of one name may differ in pictures.
        name = f"{pictures.name}_{fingerprint(load(dataset))}" if pictures else dataset
        settings = {"dataset": name, "model": model, "seed": int(seed)}
        settings |= {key: values[key] for key in DEFAULTS}
        path = folder / f"{run_name(settings)}.json"
        if path.exists():
            print(f"{path} is done already: delete it to train again.")
        else:
            # What is unavailable is told before hours of training.
            runs[path] = settings, load(dataset), folder, dataset
    for run in runs.values():
        train(*run)


def main(argv):
    """Does what the flags say; exits with status 1 and one sentence where the user must act."""
    logging.set_verbosity(logging.WARNING)  # tensorflow-datasets logs every file that it opens.
    values, machine = flags.FLAGS.flag_values_dict(), describe_machine()
    folder = pathlib.Path(values["output_dir"]).expanduser()
    try:
        if argv[1:]:
            raise UserError(f"{argv[1]!r} is no flag: see --help.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # Or the first epoch would be for nothing.
        except OSError as error:
            raise UserError(f"{error}: give another --output_dir.") from error
        print(f"{machine['device']}, Keras {machine['keras']} on {machine['backend']}")
        if not values["plot"]:
            if machine["device"] == machine["processor"]:
                print("NO GPU FOUND: a CPU does for --dataset shapes; for CIFAR, see README.md.")
            sweep(values, folder)
        print(report(folder), flush=True)
    except UserError as error:
        sys.exit(f"hybrid_mixer.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nhybrid_mixer.py: stopped; the same command goes on after the last whole epoch.")


if __name__ == "__main__":
    for name in [*SETTINGS, *RUN, "data_dir", "output_dir", "plot"]:
        if name in flags.FLAGS:  # A notebook's second %run of this file.
            delattr(flags.FLAGS, name)
    define_flags()
    app.run(main)
