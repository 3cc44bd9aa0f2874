"""MLP-Mixer with a convolution stem on CIFAR, in one Keras file.

Reproduces Kanazi, Mnaa and Eisa, "Improving MLP-Mixer Performance on Small Image Datasets Using
Locality-Aware Modifications". To an MLP-Mixer its patches are an unordered set; a 3x3 depthwise
and a 1x1 convolution after patch embedding show each patch its neighbours.

    python hybrid_mixer.py --dataset cifar100 --model hybrid

trains 30 epochs and writes results/cifar100-hybrid-seed0.json, the model beside it, plots and
results/table.md. README.md says what that reaches, in what time and on what hardware.
"""

import contextlib
import functools
import gc
import inspect
import itertools
import json
import math
import os
import pathlib
import platform
import sys
import tempfile
import textwrap
import threading
import time
import timeit
import zlib

import numpy as np
from absl import app, flags, logging

# TensorFlow writes start-up lines straight to file descriptor 2, whatever its log level is.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_stderr = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
try:
    import keras
    from keras import layers, ops
finally:
    os.dup2(_stderr, 2)


# ------------------------------------------------------------------------------------ layers
@keras.saving.register_keras_serializable(package="hybrid_mixer")
class ConvStem(layers.Layer):
    """Depthwise separable convolution that shows each patch its neighbours.

    `gelu(batch_norm(pointwise(depthwise(x))))`, both convolutions without bias: 17,536 weights
    for 128 channels. The paper's text has these two alone, its authors' code all four.

    Args:
        kernel_size: int, height and width of the depthwise filters. Defaults to `3`.

    Input and output shape: `(batch, height, width, channels)`, channels known.
    Reference: Kanazi, Mnaa and Eisa, section 3.1.

    >>> ConvStem()(keras.ops.ones((2, 8, 6, 128))).shape
    (2, 8, 6, 128)
    """

    def __init__(self, kernel_size=3, **kwargs):
        super().__init__(**kwargs)
        if not isinstance(kernel_size, int) or kernel_size < 1:
            raise ValueError(f"`kernel_size` must be a positive int. Received: {kernel_size!r}")
        self.kernel_size = kernel_size

    def build(self, input_shape):
        if len(input_shape) != 4 or input_shape[-1] is None:
            wanted = "(batch, height, width, channels), channels known"
            raise ValueError(f"ConvStem takes {wanted}. Received: input_shape={input_shape}")
        size, channels = self.kernel_size, input_shape[-1]
        # Kernels start uniform in +-1/sqrt(fan_in); a depthwise filter sees one channel.
        spatial = keras.initializers.RandomUniform(-1 / size, 1 / size)
        across = keras.initializers.RandomUniform(-(channels**-0.5), channels**-0.5)
        common = {"dtype": self.dtype_policy}
        conv = {"use_bias": False, "data_format": "channels_last", **common}
        self.depthwise = layers.DepthwiseConv2D(
            size, padding="same", depthwise_initializer=spatial, **conv
        )
        self.pointwise = layers.Conv2D(channels, 1, kernel_initializer=across, **conv)
        self.norm = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, **common)
        for layer in (self.depthwise, self.pointwise, self.norm):
            layer.build(input_shape)

    def call(self, inputs, training=None):
        x = self.pointwise(self.depthwise(inputs))
        return ops.gelu(self.norm(x, training=training), approximate=False)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "kernel_size": self.kernel_size}


@keras.saving.register_keras_serializable(package="hybrid_mixer")
class MixerBlock(layers.Layer):
    """One block of the MLP-Mixer: an MLP across tokens, then an MLP across channels.

    `u = x + transpose(mlp(transpose(norm(x))))`, `y = u + mlp(norm(u))`; each MLP is dense, exact
    GELU, dropout, dense, dropout, and the two layer norms (epsilon 1e-5) share nothing.

    Args:
        tokens_mlp_dim, channels_mlp_dim: int, hidden widths of the two MLPs.
        dropout: float in `[0, 1)`, chance of an activation to be zeroed in training.

    Input and output shape: `(batch, tokens, channels)`, tokens and channels known.
    Reference: Tolstikhin et al., 2021; Kanazi, Mnaa and Eisa, equations 1 and 2.

    >>> MixerBlock(tokens_mlp_dim=64, channels_mlp_dim=256)(keras.ops.ones((2, 48, 128))).shape
    (2, 48, 128)
    """

    def __init__(self, tokens_mlp_dim, channels_mlp_dim, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        for name, size in (("tokens", tokens_mlp_dim), ("channels", channels_mlp_dim)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"`{name}_mlp_dim` must be a positive int. Received: {size!r}")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be a number in [0, 1). Received: {dropout!r}")
        self.tokens_mlp_dim = tokens_mlp_dim
        self.channels_mlp_dim = channels_mlp_dim
        self.dropout = dropout
        self.seed_generator = keras.random.SeedGenerator()

    def build(self, input_shape):
        if len(input_shape) != 3 or None in tuple(input_shape)[1:]:
            wanted = "(batch, tokens, channels), tokens and channels known"
            raise ValueError(f"MixerBlock takes {wanted}. Received: input_shape={input_shape}")

        def norm():
            layer = layers.LayerNormalization(epsilon=1e-5, dtype=self.dtype_policy)
            layer.build(input_shape)
            return layer

        def dense(size, units):  # Kernel and bias start uniform in +-1/sqrt(fan_in).
            bound = size**-0.5
            uniform = [keras.initializers.RandomUniform(-bound, bound) for _ in range(2)]
            layer = layers.Dense(units, None, True, *uniform, dtype=self.dtype_policy)
            layer.build((None, None, size))
            return layer

        _, tokens, channels = input_shape
        self.token_norm = norm()
        self.token_hidden = dense(tokens, self.tokens_mlp_dim)
        self.token_output = dense(self.tokens_mlp_dim, tokens)
        self.channel_norm = norm()
        self.channel_hidden = dense(channels, self.channels_mlp_dim)
        self.channel_output = dense(self.channels_mlp_dim, channels)

    def call(self, inputs, training=None):
        x = ops.transpose(self.token_norm(inputs), (0, 2, 1))
        x = self._mlp(x, self.token_hidden, self.token_output, training)
        inputs = inputs + ops.transpose(x, (0, 2, 1))
        x = self.channel_norm(inputs)
        return inputs + self._mlp(x, self.channel_hidden, self.channel_output, training)

    def _mlp(self, x, hidden, output, training):
        x = hidden(x) * 0.5**0.5
        x = x * (0.5**0.5 * (1 + ops.erf(x)))  # The exact GELU, in the fewest passes.
        return self._dropout(output(self._dropout(x, training)), training)

    def _dropout(self, x, training):
        if not training or self.dropout == 0:
            return x
        # One random byte decides on one element, since random numbers are what dropout costs
        # on a CPU; a threshold between two bytes is rounded at random, so the rate is exact.
        *shape, size = ops.shape(x)
        shape = (*shape, -(-size // 4))
        words = keras.random.randint(shape, -(2**31), 2**31 - 1, seed=self.seed_generator)
        draws = ops.view(words, "uint8")[..., :size]
        rounding = keras.random.uniform((), dtype="float32", seed=self.seed_generator)
        threshold = ops.minimum(ops.floor(256 * self.dropout + rounding), 255)
        keep = ops.cast(draws >= ops.cast(threshold, "uint8"), x.dtype)
        return x * (keep * (1 / (1 - self.dropout)))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        names = ("tokens_mlp_dim", "channels_mlp_dim", "dropout")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


# ------------------------------------------------------------------------------------ models
# All that the models differ in: is there a stem after patch embedding, and after every how many
# Mixer blocks does another convolution of the same kind stand (0: after none).
MODELS = {
    "mixer": (False, 0), "hybrid": (True, 0), "interleaved": (True, 2),
    "interleaved_4": (True, 4), "interleaved_3": (True, 3), "interleaved_1": (True, 1),
}  # fmt: skip


def build_model(
    model="hybrid", image_shape=(32, 32, 3), num_classes=10, patch_size=4, hidden_dim=128,
    num_blocks=8, tokens_mlp_dim=64, channels_mlp_dim=256, dropout=0.15,
    kernel_size=3, conv_residual=False,
):  # fmt: skip
    """Builds an MLP-Mixer, with the paper's convolution stem or without.

    Args:
        model: `"mixer"` (the baseline), `"hybrid"` (the stem once, as in the paper's text) or
            `"interleaved"` (also after every 2nd block, as in its authors' code); beyond the paper
            `"interleaved_4"`, `"interleaved_3"`, `"interleaved_1"` (after every 4th, 3rd, 1st).
        image_shape: `(height, width, channels)`, height and width multiples of `patch_size`.
        num_classes, patch_size (pixels), hidden_dim (channels of a token), num_blocks: int.
        tokens_mlp_dim, channels_mlp_dim, dropout: of each `MixerBlock`.
        kernel_size: int, of each `ConvStem`.
        conv_residual: bool, whether the convolutions between blocks add to their input instead of
            replacing it.

    Returns a Functional `keras.Model` from normalised images `(batch, height, width, channels)` to
    float32 logits `(batch, num_classes)`, its weights in the order of the data's way. Raises
    `ValueError` if `model` is unknown or a size doesn't fit.
    """
    if model not in MODELS:
        raise ValueError(f"`model` must be one of {', '.join(MODELS)}. Received: {model!r}")
    for size in (*image_shape, num_classes, patch_size, hidden_dim, num_blocks):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"Sizes must be positive ints. Received: {size!r}")
    height, width, channels = image_shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"Height and width must be multiples of `patch_size` {patch_size}. "
                         f"Received: image_shape={image_shape}")  # fmt: skip
    has_stem, conv_every = MODELS[model]
    grid = (height // patch_size, width // patch_size, hidden_dim)
    to_grid, to_tokens = layers.Reshape(grid), layers.Reshape((grid[0] * grid[1], hidden_dim))

    def uniform(fan_in):  # in +-1/sqrt(fan_in), as in the layers
        names, bound = ("kernel_initializer", "bias_initializer"), fan_in**-0.5
        return {name: keras.initializers.RandomUniform(-bound, bound) for name in names}

    images = keras.Input(image_shape, name="images")
    x = layers.Conv2D(
        hidden_dim, patch_size, strides=patch_size, data_format="channels_last",
        **uniform(patch_size**2 * channels), name="patch_embedding",
    )(images)  # fmt: skip
    if has_stem:
        x = ConvStem(kernel_size, name="stem")(x)
    x = to_tokens(x)
    for i in range(1, num_blocks + 1):
        x = MixerBlock(tokens_mlp_dim, channels_mlp_dim, dropout, name=f"block_{i}")(x)
        if conv_every and i % conv_every == 0:
            y = to_tokens(ConvStem(kernel_size, name=f"conv_{i}")(to_grid(x)))
            x = layers.Add()([x, y]) if conv_residual else y
    x = layers.LayerNormalization(epsilon=1e-5, name="norm")(x)
    x = layers.GlobalAveragePooling1D(data_format="channels_last", name="mean_of_tokens")(x)
    head = layers.Dense(num_classes, **uniform(hidden_dim), dtype="float32", name="head")
    return keras.Model(images, head(x), name=model)


# -------------------------------------------------------------------------------------- data
class UserError(ValueError):
    """One sentence for whoever gave the command: what is wrong and what to do."""


def load_data(name, data_dir=None, image_size=0):
    """Loads an image-classification data set, into memory if it has less than `IN_MEMORY` bytes.

    Args:
        name: `"cifar10"`, `"cifar100"`, `"shapes"` (see `draw_shapes`) or another data set of
            tensorflow-datasets with labelled images, grey or in colour.
        data_dir: folder of tensorflow-datasets; `None` for its default.
        image_size: height and width in pixels that images are resized to; 0 leaves them.

    Returns `((x_train, y_train), (x_test, y_test), class_names)`: uint8 images `(n, height, width,
    channels)`, int labels `(n,)`, a list of strings; where memory doesn't hold them, a `Stream` in
    place of the images and `None` of the labels. Raises `UserError` if it can't.
    """
    if name == "shapes":
        if image_size not in (0, 32):
            raise UserError("The shapes are drawn 32 pixels wide: leave out --image_size.")
        return draw_shapes()
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    if keras.backend.backend() != "tensorflow":
        tf.config.set_visible_devices([], "GPU")  # Reading files, it would take all GPU memory.
    downloader.MAX_RETRIES = 0  # Its ten retries take minutes to say that a host is down.
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=config)
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"Data set {name!r} can't be had ({reason}): run the same command again once name and "
            "network are right, give --data_dir a folder where it is prepared, or use "
            "--dataset shapes, which needs no download."
        ) from error
    info, kinds = builder.info, [tfds.features.Image, tfds.features.ClassLabel]
    features = [info.features[key] for key in info.supervised_keys or ()]
    if [type(f) for f in features] != kinds:
        raise UserError(f"Data set {name!r} isn't of labelled images: try another.")
    if None in features[0].shape and not image_size:
        raise UserError(f"Data set {name!r} has images of several sizes: give an --image_size.")
    streams = {
        split: Stream(builder, split, image_size)
        for split in ("train", "test", "validation")
        if split in info.splits and info.splits[split].num_examples
    }
    # Some data sets keep the labels of their test split to themselves.
    splits = [split for split, stream in streams.items() if stream.labelled]
    if "train" not in splits or len(splits) < 2:
        raise UserError(f"Data set {name!r} lacks train or test images with labels: try another.")
    chosen = [streams[split] for split in splits[:2]]
    if sum(math.prod(stream.shape) for stream in chosen) > IN_MEMORY:
        return *((stream, None) for stream in chosen), features[1].names
    train, test = (next(stream.open(len(stream))) for stream in chosen)
    if min(train[1].min(), test[1].min()) < 0:
        raise UserError(f"Data set {name!r} has images without a label: try another.")
    return train, test, features[1].names


def hold_out(data, share):
    """Returns data without its test images: the last share of the train images takes their place.

    Args:
        data: what `load_data` returns.
        share: float in `(0, 1)`, of the train images.

    Raises `UserError` where the images aren't in memory.
    """
    (images, labels), _, class_names = data
    if isinstance(images, Stream):
        raise UserError("Only images that memory holds can be held out: drop --validation_split.")
    cut = len(images) - math.ceil(share * len(images))
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:]), class_names


IN_MEMORY = 2**32  # Larger data sets are read from their files in every epoch.


class Stream:
    """A split of tensorflow-datasets that is read through tf.data; has an array's length and shape.

    Args:
        builder: the `tfds.core.DatasetBuilder`, prepared.
        split: name of the split.
        image_size: height and width in pixels that images are resized to; 0 leaves them.
    """

    def __init__(self, builder, split, image_size):
        self.builder, self.split, self.image_size = builder, split, image_size
        self.lock, self.opened = threading.Lock(), None
        images, labels = next(self.open(1))
        self.labelled = labels[0] >= 0
        self.shape = (builder.info.splits[split].num_examples, *images.shape[1:])

    def __len__(self):
        return self.shape[0]

    def open(self, batch_size, seed=None):
        """Returns an iterator over batches, always in the same order for the same seed."""
        import tensorflow as tf
        import tensorflow_datasets as tfds

        def resize(image, label):
            image = tf.image.resize(image, [self.image_size] * 2, antialias=True)
            return tf.cast(tf.round(image), "uint8"), label

        config = tfds.ReadConfig(shuffle_seed=seed, try_autocache=False)
        config.options.deterministic = True
        data = self.builder.as_dataset(
            self.split, as_supervised=True, shuffle_files=seed is not None, read_config=config
        )
        if self.image_size:
            data = data.map(resize, num_parallel_calls=tf.data.AUTOTUNE)
        if seed is not None:
            data = data.shuffle(max(1, IN_MEMORY // 16 // math.prod(self.shape[1:])), seed)
        return data.batch(batch_size).prefetch(1).as_numpy_iterator()

    def read(self, index, batch_size, seed):
        """Returns one batch; cheap only nearly in order, as the threads of `fit` ask for them."""
        with self.lock:
            passed = self.opened == (batch_size, seed) and self.position > index
            if self.opened != (batch_size, seed) or passed and index not in self.ready:
                self.opened, self.position, self.ready = (batch_size, seed), 0, {}
                self.iterator = self.open(batch_size, seed)
            while self.position <= index:
                self.ready[self.position] = next(self.iterator)
                self.position += 1
            return self.ready.pop(index)


def draw_shapes(num_train=5000, num_test=1000, seed=0):
    """Draws ten kinds of bright shape, 11 pixels wide, somewhere in busy 32x32 colour pictures.

    Neither colour nor place tells the classes apart, and a flip or a small turn changes none.
    Returns what `load_data` returns, always the same for the same arguments.
    """
    names = "disk ring square frame plus saltire triangle rows columns checks".split()
    y, x = np.mgrid[-5:6, -5:6]
    box, radius = np.maximum(abs(x), abs(y)), np.hypot(x, y)
    shapes = [
        radius < 5.4, (radius < 5.4) & (radius > 2.9), box <= 5, box > 2,
        np.minimum(abs(x), abs(y)) <= 1, np.minimum(abs(x - y), abs(x + y)) <= 1,
        2 * abs(x) <= y + 5, y % 4 < 2, x % 4 < 2, (x // 3 + y // 3) % 2 == 0,
    ]  # fmt: skip
    rng = np.random.default_rng(seed)
    ramp = np.stack([np.linspace(1, 0, 32), np.linspace(0, 1, 32)])
    labels = rng.permutation(np.arange(num_train + num_test) % len(names))
    images = np.empty((len(labels), 32, 32, 3), "uint8")
    for image, label in zip(images, labels):
        picture = np.einsum("ay,bx,abc->yxc", ramp, ramp, rng.uniform(20, 130, (2, 2, 3)))
        picture += rng.normal(0, 8, picture.shape)
        for top, left in rng.integers(0, 27, (3, 2)):  # Short strokes distract.
            height, width = rng.permutation([2, rng.integers(3, 7)])
            picture[top : top + height, left : left + width] = rng.uniform(0, 255, 3)
        top, left = rng.integers(0, 22, 2)
        picture[top : top + 11, left : left + 11][shapes[label]] = rng.uniform(160, 255, 3)
        image[:] = np.clip(picture, 0, 255)
    train, test = np.s_[:num_train], np.s_[num_train:]
    return (images[train], labels[train]), (images[test], labels[test]), names


class ColorJitter(layers.Layer):
    """Changes the colours of each image `(batch, height, width, 3)`, pixels 0-255, in training.

    As torchvision defines them (Keras's own layers differ): brightness times, contrast around
    the mean grey and saturation around each pixel's grey by a factor within `1 +- strength`, then
    hue turned by up to `hue` of the full circle.
    """

    def __init__(self, strength=0.1, hue=0.02, **kwargs):
        super().__init__(**kwargs)
        self.strength, self.hue = strength, hue
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, images, training=None):
        if not training:
            return images
        each, seed = (ops.shape(images)[0], 1, 1, 1), self.seed_generator
        factors = keras.random.uniform((3, *each), 1 - self.strength, 1 + self.strength, seed=seed)
        x = ops.clip(images * factors[0], 0, 255)
        mean = ops.mean(self._grey(x), axis=(1, 2), keepdims=True)
        x = ops.clip(mean + factors[1] * (x - mean), 0, 255)
        grey = self._grey(x)
        x = ops.clip(grey + factors[2] * (x - grey), 0, 255)
        hsv = ops.image.rgb_to_hsv(x / 255)  # Right only for pixels in 0-1.
        hue = (hsv[..., :1] + keras.random.uniform(each, -self.hue, self.hue, seed=seed)) % 1
        return 255 * ops.image.hsv_to_rgb(ops.concatenate([hue, hsv[..., 1:]], axis=-1))

    def _grey(self, x):
        return 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]


def add_preprocessing(network, train_images):
    """Puts normalisation by the train images' mean and deviation in front of a network.

    Returns `(trainer, classifier)`, models from pixels 0-255 `(batch, height, width, channels)`
    to logits that share all weights. Only `trainer` augments, and only in training: flip, shift
    by up to 4 pixels, turn by up to 15 degrees, colours, in one image of ten a box of mean colour.
    """
    height, width, channels = shape = train_images.shape[1:]
    mean = train_images.mean((0, 1, 2))
    variance = np.square(train_images, dtype="uint16").mean((0, 1, 2)) - mean**2
    normalize = layers.Normalization(mean=mean, variance=variance, dtype="float32")
    # Keras draws the probability from a range: only (0.1, 0.1) means one image of ten.
    erase = layers.RandomErasing((0.1, 0.1), (0.02, 0.33), fill_value=0.0, dtype="float32")
    nearest = {"fill_mode": "constant", "interpolation": "nearest", "dtype": "float32"}
    augmentation = [
        layers.RandomFlip("horizontal", dtype="float32"),
        # Rounded to whole pixels, +-4.5 gives each shift from -4 to 4 the same chance.
        layers.RandomTranslation(4.5 / height, 4.5 / width, **nearest),
        layers.RandomRotation(15 / 360, **nearest),
        *([ColorJitter(dtype="float32")] if channels == 3 else []),
    ]
    for layer in augmentation:  # Keras says that two of them can't be compiled; on JAX they can,
        layer.supports_jit = keras.backend.backend() == "jax"  # else it runs each operation alone.
    pixels = keras.Input(shape, name="pixels")
    classifier = keras.Model(pixels, network(normalize(pixels)), name=network.name)
    x = pixels = keras.Input(shape, dtype="uint8", name="pixels")
    for layer in [*augmentation, normalize, erase]:
        x = layer(x)
    return keras.Model(pixels, network(x)), classifier


# ---------------------------------------------------------------------------------- training
class Batches(keras.utils.PyDataset):
    """Batches of images and labels, in an order that only seed and epoch decide.

    Of several processes, each gets its part of every batch. `soften(images, labels, rng)`, where
    given, returns what takes their place.
    """

    def __init__(self, images, labels, batch_size, seed=None, soften=None):
        # On TensorFlow, one worker means tf.data with automatic tuning, which can hang for as long
        # as an epoch at its end; on JAX, two would repeat batches of the epoch before.
        super().__init__(workers=2 if keras.backend.backend() == "tensorflow" else 1)
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.order, self.stream_seed = np.arange(len(images)), None
        self.soften, self.epoch = soften, 0

    def shuffle(self, epoch):
        self.epoch = epoch
        rng = np.random.default_rng([self.seed, epoch])
        self.order, self.stream_seed = rng.permutation(len(self.images)), int(rng.integers(2**31))

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, index):
        if isinstance(self.images, Stream):
            images, labels = self.images.read(index, self.batch_size, self.stream_seed)
        else:
            part = self.order[index * self.batch_size : (index + 1) * self.batch_size]
            images, labels = self.images[part], self.labels[part]
        if self.soften:
            rng = np.random.default_rng([self.seed or 0, self.epoch, 2, index])
            images, labels = self.soften(images, labels, rng)
        number, count = find_process()
        mine = slice(len(labels) * number // count, len(labels) * (number + 1) // count)
        return images[mine], labels[mine]


SOFT = ("label_smoothing", "mixup", "cutmix")


def needs_soft_labels(settings):
    """Tells whether train labels are shares of several classes, not the number of one."""
    return any(settings[name] for name in SOFT)


def soften(images, labels, rng, num_classes, label_smoothing=0, mixup=0, cutmix=0):
    """Makes labels soft, and mixes each image of a batch with the one before it.

    Args:
        images, labels: arrays `(batch, height, width, channels)` and `(batch,)`.
        rng: `np.random.Generator`.
        label_smoothing: float, the share of each label that all classes have in common.
        mixup, cutmix: float, shares come from a beta distribution with this for both parameters,
            one for a batch; 0 for never. Where both are given, chance picks one for each batch.

    Returns images of the same kind and labels `(batch, num_classes)` that sum up to 1.
    Reference: Zhang et al., 2018 (MixUp); Yun et al., 2019 (CutMix).
    """
    hard = labels[:, None] == np.arange(num_classes)
    labels = (1 - label_smoothing) * hard.astype("float32") + label_smoothing / num_classes
    if not mixup and not cutmix:
        return images, labels
    others, (height, width) = np.roll(images, 1, axis=0), images.shape[1:3]
    takes_mixup = rng.random() * (bool(mixup) + bool(cutmix)) < bool(mixup)
    share = rng.beta(*[mixup if takes_mixup else cutmix] * 2)
    if takes_mixup:
        images = np.round(share * images + (1 - share) * others).astype(images.dtype)
    else:  # A box around any pixel, cut off where the image ends.
        middle, half = rng.random(2), np.sqrt(1 - share) / 2
        edges = np.clip([middle - half, middle + half], 0, 1) * (height, width)
        (top, left), (bottom, right) = np.round(edges).astype(int)
        images = images.copy()
        images[:, top:bottom, left:right] = others[:, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return images, np.float32(share) * labels + np.float32(1 - share) * np.roll(labels, 1, axis=0)


def make_softeners(settings, num_classes):
    """Returns `soften` for train and test batches as `settings` say, or `None` for both."""
    if not needs_soft_labels(settings):
        return None, None
    chosen = {name: settings[name] for name in SOFT}
    return [functools.partial(soften, num_classes=num_classes, **kw) for kw in (chosen, {})]


class Cosine(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate `peak * (1 + cos(pi * step / half_period)) / 2`, steps counted from 0.

    It is multiplied by `(step + 1) / warmup_steps` until this is 1.
    """

    def __init__(self, peak, half_period, warmup_steps=0):
        self.peak, self.half_period, self.warmup_steps = peak, half_period, warmup_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rate = self.peak * (1 + ops.cos(math.pi * step / self.half_period)) / 2
        if self.warmup_steps:
            rate = rate * ops.minimum((step + 1) / self.warmup_steps, 1)
        return rate


class EpochState(keras.callbacks.Callback):
    """Makes an epoch depend on nothing but the state before it, and saves the state after it.

    Seed and epoch set the order and all seed generators anew; weights, optimizer and history go
    into one file, moved into place when whole: a stopped run goes on as if it never had been.
    """

    def __init__(self, batches, path):
        super().__init__()
        self.batches, self.path, self.history = batches, path, {}

    def restore(self, model):
        """Loads the saved state, if there is one, into `model`; returns the epochs done."""
        if not self.path.exists():
            return 0
        with np.load(self.path) as file:
            for i, variable in enumerate(model.weights + model.optimizer.variables):
                variable.assign(file[f"arr_{i}"])
            self.history = json.loads(file["history"].item())
        return len(self.history["seconds"])

    def save(self, path):
        variables = self.model.weights + self.model.optimizer.variables
        values = map(ops.convert_to_numpy, variables)
        np.savez(path, *values, history=json.dumps(self.history))

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.shuffle(epoch)
        rng = np.random.default_rng([self.batches.seed, epoch, 1])
        for variable in self.model.non_trainable_variables:
            if variable.name == "seed_generator_state":
                variable.assign(rng.integers(2**32, size=2, dtype="uint32"))
        self.begun = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            raise UserError("The loss is no longer finite: try a smaller --learning_rate.")

    on_test_batch_end = on_train_batch_end

    def on_test_begin(self, logs=None):
        self.train_seconds = time.perf_counter() - self.begun

    def on_epoch_end(self, epoch, logs=None):
        row = {
            "train_loss": logs["loss"], "train_accuracy": logs["accuracy"],
            "test_loss": logs["val_loss"], "test_accuracy": logs["val_accuracy"],
            "train_seconds": self.train_seconds, "seconds": time.perf_counter() - self.begun,
        }  # fmt: skip
        for name, value in row.items():
            self.history.setdefault(name, []).append(float(value))
        write_atomically(self.path, self.save)


def write_atomically(path, write):
    """Calls `write` with a name beside `path`, then moves what it wrote to `path`.

    Of several processes, only the first one writes.
    """
    if find_process()[0] > 0:
        return
    partial = path.with_name(f".partial-{path.name}")
    write(partial)
    os.replace(partial, path)


def run_name(settings):
    """Returns what the names of a run's files begin with."""
    return "{dataset}-{model}-seed{seed}".format(**settings).replace("/", "_")


def unusual(settings):
    """Returns the settings that aren't the defaults, as a string."""
    return ", ".join(f"{k} {settings[k]}" for k, v in DEFAULTS.items() if settings[k] != v)


def checksum(text):
    """Returns a short name for a text that is too long for the name of a file."""
    return f"{zlib.crc32(text.encode()):08x}"


def compile_models(settings, train_images, num_classes):
    """Returns `(network, trainer, classifier)` as `settings` say, the trainer ready for `fit`."""
    num_images = len(train_images)
    if isinstance(train_images, Stream):  # Some give mean and deviation well enough.
        train_images = next(train_images.open(1000, seed=0))[0]
    sizes = {k: settings[k] for k in inspect.signature(build_model).parameters if k in settings}
    try:
        network = build_model(image_shape=train_images.shape[1:], num_classes=num_classes, **sizes)
    except ValueError as error:
        raise UserError(str(error)) from error
    trainer, classifier = add_preprocessing(network, train_images)
    compile_model(trainer, settings, num_images)
    return network, trainer, classifier


def compile_model(model, settings, num_images):
    """Makes a model ready for training as `settings` say, with all variables that this takes."""
    steps_per_epoch = math.ceil(num_images / settings["batch_size"])
    # The authors' cosine was to fall over 30 epochs, but they counted batches for epochs.
    published = settings["schedule"] == "published"
    half_period = 30 if published else settings["epochs"] * steps_per_epoch
    warmup_steps = settings["warmup_epochs"] * steps_per_epoch
    optimizer = keras.optimizers.AdamW(
        Cosine(settings["learning_rate"], half_period, warmup_steps),
        weight_decay=settings["weight_decay"], epsilon=1e-8,
        use_ema=settings["ema"] > 0, ema_momentum=settings["ema"],
    )  # fmt: skip
    if settings["decay_of"] == "kernels":
        others = [weight for weight in model.trainable_weights if len(weight.shape) < 2]
        optimizer.exclude_from_weight_decay(var_list=others)
    kind = "" if needs_soft_labels(settings) else "Sparse"
    model.compile(
        optimizer,
        getattr(keras.losses, kind + "CategoricalCrossentropy")(from_logits=True),
        # Named as "accuracy", it would make its variables in the first step, and TensorFlow
        # traces a step that makes variables twice.
        metrics=[getattr(keras.metrics, kind + "CategoricalAccuracy")("accuracy")],
        jit_compile=keras.backend.backend() == "jax",  # TensorFlow's graph is faster on a CPU.
    )
    model.optimizer.build(model.trainable_variables)


def join_processes():
    """Joins the processes on several machines that Keras's own environment variables describe."""
    several = any(name.startswith("KERAS_DISTRIBUTION_") for name in os.environ)
    if keras.backend.backend() != "jax" and (several or "TF_CONFIG" in os.environ):
        raise UserError(
            "TF_CONFIG or KERAS_DISTRIBUTION_* is set, but Keras trains on several machines with "
            "JAX alone: unset it, or set KERAS_BACKEND=jax."
        )
    try:
        if several:
            keras.distribution.initialize()
    except Exception as error:
        raise UserError(
            f"The machines can't be joined ({error}): start them within five minutes of each "
            "other, as README.md says."
        ) from error


def find_process():
    """Returns the number of this process and how many there are, `(0, 1)` on one machine."""
    jax = sys.modules["jax"] if keras.backend.backend() == "jax" else None
    return (jax.process_index(), jax.process_count()) if jax else (0, 1)


def check_processes_agree(*values):
    """Raises UserError unless all processes give the same values."""
    if find_process()[1] > 1:
        from jax.experimental import multihost_utils

        number = np.array([zlib.crc32(repr(values).encode())])
        if len(set(multihost_utils.process_allgather(number).flat)) > 1:
            raise UserError("The machines were given different commands or folders: give all of "
                            "them the same, with an --output_dir that they share.")  # fmt: skip


def use_all_devices(batch_sizes):
    """Returns a context in which Keras makes models that spread each batch over all devices.

    JAX splits a batch evenly or not at all: as many devices of each machine serve as divide all
    the sizes.
    """
    devices, count = keras.distribution.list_devices(), find_process()[1]
    if len(devices) > 1 and keras.backend.backend() == "tensorflow":
        return sys.modules["tensorflow"].distribute.MirroredStrategy(devices).scope()
    each = len(devices) // count
    even = [n for n in range(1, each + 1) if not any(size % (n * count) for size in batch_sizes)]
    if not even:
        raise UserError(f"{count} machines can't split batches of {batch_sizes} images evenly: "
                        "use fewer, or another --batch_size.")  # fmt: skip
    if even[-1] * count > 1:
        devices = [device for i, device in enumerate(devices) if i % each < even[-1]]
        spread = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
        keras.distribution.set_distribution(spread)
    return contextlib.nullcontext()


def train(settings, data, folder):
    """Trains one model, going on where an earlier run with the same settings was stopped.

    Args:
        settings: dict of `dataset`, `model`, `seed` (one each) and all `SETTINGS`.
        data: what `load_data` returns.
        folder: `pathlib.Path` of the folder for result, model and checkpoint.

    Returns what the JSON file has, a dict. Raises `UserError` if sizes don't fit or the loss is no
    longer finite.
    """
    (x_train, y_train), test, class_names = data
    keras.utils.clear_session()
    keras.config.set_dtype_policy(settings["precision"])
    keras.utils.set_random_seed(settings["seed"])
    size = settings["batch_size"]
    with use_all_devices([size, len(x_train) % size, 500, len(test[0]) % 500]) as strategy:
        network, trainer, classifier = compile_models(settings, x_train, len(class_names))
    stems = [layer for layer in network.layers if isinstance(layer, ConvStem)]
    for stem in stems if strategy else []:  # Statistics of the whole batch, as on one device.
        stem.norm.synchronized = True
    softeners, is_first = make_softeners(settings, len(class_names)), find_process()[0] == 0
    batches = Batches(x_train, y_train, size, settings["seed"], softeners[0])
    averages = [keras.callbacks.SwapEMAWeights()] if settings["ema"] else []
    name, changed = run_name(settings), unusual(settings)  # Both name the checkpoint, so that
    state = EpochState(batches, folder / f".{name}-{checksum(changed)}.npz")  # none misleads.
    check_processes_agree(settings, state.path.exists() and zlib.crc32(state.path.read_bytes()))
    try:
        done = state.restore(trainer)
    except Exception as error:
        aside = state.path.with_name(state.path.name.lstrip(".") + ".damaged")
        if is_first:
            state.path.replace(aside)
        check_processes_agree("The damaged checkpoint is out of the way.")
        print(f"A damaged checkpoint is now {aside}, its run starts anew: {error}", file=sys.stderr)
        return train(settings, data, folder)
    parameters = f"{count_parameters(network):,} trainable parameters"
    print(f"{name.replace('-', ', ')}: {parameters}, {done} epochs done before")
    trainer.fit(
        batches, validation_data=Batches(*test, 500, soften=softeners[1]),
        callbacks=[state, *averages], initial_epoch=done, epochs=settings["epochs"],
        verbose="auto" if is_first else 0,
        shuffle=False,  # Else by a state that nothing saves.
    )  # fmt: skip
    result = {
        "settings": settings, "class_names": class_names,
        "parameters": count_parameters(network), "parameters_conv_stems": count_parameters(*stems),
        **summarize(state.history, len(x_train)), **describe_machine(), "history": state.history,
    }  # fmt: skip
    print(f"Test accuracy after the last epoch: {100 * result['final_test_accuracy']:.2f} %")
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / f"{name}.keras", classifier.save)
    write_atomically(folder / f"{name}.json", lambda path: path.write_text(text))
    if is_first:
        state.path.unlink()
    return result


def count_parameters(*parts):
    """Returns the number of trainable parameters in models or layers."""
    return sum(math.prod(weight.shape) for part in parts for weight in part.trainable_weights)


def summarize(history, num_images):
    """Returns what a finished run has reached: accuracies as fractions, times in seconds."""
    best = int(np.argmax(history["test_accuracy"]))
    seconds, train_seconds = (history[k][1:] or history[k] for k in ("seconds", "train_seconds"))
    return {
        "final_test_accuracy": history["test_accuracy"][-1],
        "final_test_loss": history["test_loss"][-1],
        "best_test_accuracy_selected_on_test": history["test_accuracy"][best],
        "best_epoch_selected_on_test": best + 1,
        "seconds_first_epoch": history["seconds"][0],
        "seconds_per_epoch": float(np.median(seconds)),
        "train_images_per_second": num_images / float(np.median(train_seconds)),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def count_gpus():
    """Returns the number of GPUs that the backend sees."""
    return sum("gpu" in name.lower() for name in keras.distribution.list_devices())


def describe_machine():
    """Returns the names of device, backend and versions, a dict of strings."""
    backend = keras.backend.backend()
    library = sys.modules[backend]
    gpus = count_gpus()
    try:
        name = pathlib.Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    if gpus and backend == "jax":
        name = library.devices()[0].device_kind
    elif gpus:
        gpu = library.config.list_physical_devices("GPU")[0]
        name = library.config.experimental.get_device_details(gpu).get("device_name", "GPU")
    count = find_process()[1]
    name = f"{gpus} x {name}" if gpus else f"{name}, {os.cpu_count()} CPU cores"
    return {
        "device": f"{count} machines: {name}" if count > 1 else name,
        "backend": f"{backend} {library.__version__}", "keras": keras.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


# ------------------------------------------------------------------------- results and plots
# Test accuracy in the paper's Table 1, in percent (one run, its best epoch on the test split);
# its text describes one hybrid, its authors' code trains another.
PAPER = {
    ("cifar10", "mixer"): "76.71", ("cifar100", "mixer"): "48.20",
    ("cifar10", "hybrid"): "82.27 (text)", ("cifar100", "hybrid"): "55.03 (text)",
    ("cifar10", "interleaved"): "82.27 (code)", ("cifar100", "interleaved"): "55.03 (code)",
}  # fmt: skip
COLORS = "tab:blue", "tab:red", "tab:green", "tab:olive", "tab:cyan", "tab:pink"
STYLES = dict(zip(MODELS, zip(COLORS, ("--", "-", "-.", "-.", "-.", "-."))))
MORE_STYLES = list(itertools.product(("tab:orange", "tab:purple", "tab:brown", "black"), "-:"))


def load_groups(folder):
    """Reads all results in `folder`: `{(data set, unusual settings, model): {seed: result}}`."""
    groups, names = {}, list(MODELS)
    for path in sorted(folder.glob("*-seed*.json")):
        try:
            run = json.loads(path.read_text())
            settings = run["settings"] = {**DEFAULTS, **run["settings"]}
            run["accuracy"] = 100 * run["final_test_accuracy"]
            key = (settings["dataset"], unusual(settings), names.index(settings["model"]))
            groups.setdefault(key, {})[settings["seed"]] = run
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"Left out of table and plots: {path} ({error!r})", file=sys.stderr)
    return {(*key[:2], names[key[2]]): groups[key] for key in sorted(groups)}


def mean_std(values, sign=""):
    """Formats values as their mean, with the standard deviation where there are several."""
    mean = f"{np.mean(values):{sign}.2f}" if values else ""
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def format_gain(groups, key):
    """Formats the points of accuracy gained over `mixer` by the seeds that both have run."""
    base = groups.get((*key[:2], "mixer"), {}) if key[2] != "mixer" else {}
    both = sorted(groups[key].keys() & base.keys())
    return mean_std([groups[key][s]["accuracy"] - base[s]["accuracy"] for s in both], "+")


def make_table(groups):
    """Returns a Markdown table with a row for each group."""
    head = (
        "data set|model|settings|parameters|test accuracy, %|gain over mixer, points|seeds|best "
        "epoch's, selected on test, %|paper, %|seconds an epoch|hardware|backend"
    ).split("|")
    rows = [head]
    for key, seeds in groups.items():
        (dataset, changed, model), runs = key, list(seeds.values())
        # The paper trains 30 epochs on the whole train split.
        alike = all(runs[0]["settings"][k] == DEFAULTS[k] for k in ("epochs", "validation_split"))
        rows.append([
            dataset, model, changed or "defaults", f"{runs[0]['parameters']:,}",
            mean_std([run["accuracy"] for run in runs]), format_gain(groups, key),
            ", ".join(map(str, sorted(seeds))),
            mean_std([100 * run["best_test_accuracy_selected_on_test"] for run in runs]),
            PAPER.get((dataset, model), "") if alike else "",
            f"{np.median([run['seconds_per_epoch'] for run in runs]):.3g}",
            *("; ".join(sorted({run[k] for run in runs})) for k in ("device", "backend")),
        ])  # fmt: skip
    return format_table(rows)


def format_table(rows):
    """Returns rows of strings as Markdown, the first of them as the head."""
    lines = [" | ".join(row) for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "".join(f"| {line} |\n" for line in lines)


def choose_styles(groups):
    """Returns `{key: (colour, line)}`: those of the group's model, others where they are taken."""
    styles, more = {}, itertools.cycle(MORE_STYLES)
    for key in groups:
        own = STYLES[key[2]]
        styles[key] = next(more) if own in styles.values() else own
    return styles


def plot_curves(groups, names, authors, path):
    """Draws two histories of each group; several seeds as mean +- deviation, authors as dots."""
    from matplotlib.figure import Figure

    labels = {key: textwrap.fill(f"{key[2]} {key[1]}", 100) for key in groups}
    num_lines = "\n".join(labels.values()).count("\n") + 1
    figure = Figure(figsize=(10, 4 + 0.2 * num_lines), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2, sharey=names[1] == "test_loss"), names):
        for key, (color, line) in choose_styles(groups).items():
            (dataset, _, model), seeds = key, groups[key]
            values = np.array([run["history"][name] for run in seeds.values()])
            mean, std = values.mean(0), values.std(0, ddof=int(len(values) > 1))
            epochs = np.arange(1, len(mean) + 1)
            axis.plot(epochs, mean, line, color=color, label=labels[key])
            axis.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
            theirs = authors.get(f"{dataset}/{model}", {}).get(name, [])
            axis.plot(range(1, len(theirs) + 1), theirs, ".", color=color,
                      label=f"{model}, the authors" if theirs else None)  # fmt: skip
        unit = "cross-entropy" if name.endswith("loss") else "fraction of the images"
        axis.set(title=f"{dataset}, {name.replace('_', ' ')}", xlabel="epoch", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path, dpi=120)


def plot_accuracy(groups, path):
    """Draws each group's final test accuracy as a bar, the gain over `mixer` above it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 + 1.2 * len(groups), 6), layout="constrained")
    axis, gains = figure.subplots(), {key: format_gain(groups, key) for key in groups}
    for key, seeds in groups.items():
        dataset, changed, model = key
        values = [run["accuracy"] for run in seeds.values()]
        std = np.std(values, ddof=int(len(values) > 1))
        name = "\n".join([dataset, model, *changed.split(", ")])
        bar = axis.bar(name, np.mean(values), yerr=std, color=STYLES[model][0])
        axis.bar_label(bar, [gains[key]], padding=4)
    title = "Points gained over mixer above the bars" if any(gains.values()) else ""
    axis.set(title=title, ylabel="final test accuracy, %")
    axis.margins(y=0.12)
    axis.tick_params(labelsize="small")
    figure.savefig(path, dpi=120)


def report(folder):
    """Draws table and plots of all results in `folder`; returns the table.

    Curves in `authors.json` there, if it exists, are drawn beside those of the same model.
    """
    groups, known = load_groups(folder), folder / "authors.json"
    authors = json.loads(known.read_text()) if known.exists() else {}
    if not groups:
        raise UserError(f"There is no result in {folder}: train first, or give --output_dir.")
    for name in dict.fromkeys(dataset for dataset, _, _ in groups):
        part = {key: seeds for key, seeds in groups.items() if key[0] == name}
        for kind, curves in (("loss", {}), ("accuracy", authors)):
            path = folder / f"{name.replace('/', '_')}_{kind}.png"
            plot = functools.partial(plot_curves, part, ("train_loss", f"test_{kind}"), curves)
            write_atomically(path, plot)
    write_atomically(folder / "accuracy.png", functools.partial(plot_accuracy, groups))
    table = make_table(groups)
    write_atomically(folder / "table.md", lambda path: path.write_text(table))
    return table


# --------------------------------------------------------------------------------- benchmark
def count_macs(network):
    """Returns the multiply-accumulates that a network of `build_model` spends on one image."""
    macs = 0
    for layer in network.layers:
        *places, channels = layer.output.shape[1:]
        kernels = [math.prod(w.shape) for w in layer.trainable_weights if len(w.shape) > 1]
        # A weight serves once at each place, in the MLP across tokens once for each channel.
        uses = [channels] * 2 * isinstance(layer, MixerBlock) + [math.prod(places)] * 2
        macs += sum(map(math.prod, zip(kernels, uses)))
    return macs


def time_fit(model, batches):
    """Returns the seconds that each step of `fit` took, all but the first four."""
    marks = []
    watch = keras.callbacks.LambdaCallback(  # Reading the loss waits for the step.
        on_train_batch_end=lambda _, logs: marks.append(0 * logs["loss"] + time.perf_counter())
    )
    model.fit(batches, verbose=0, shuffle=False, callbacks=[watch])
    return np.diff(marks[3:])


def time_products(settings, num_tokens):
    """Returns the seconds that the dense layers' matrix products of a step take by themselves."""
    size, channels = settings["batch_size"], settings["hidden_dim"]
    tokens_mlp = (size * channels, num_tokens, settings["tokens_mlp_dim"])
    channels_mlp = (size * num_tokens, channels, settings["channels_mlp_dim"])
    dtype, products = settings["precision"].removeprefix("mixed_"), []
    for n, a, b in (tokens_mlp, channels_mlp):  # Forwards and backwards, each twice in a block.
        for shape in ((n, a, b), (n, b, a), (a, n, b)):
            products.append((ops.ones(shape[:2], dtype), ops.ones(shape[1:], dtype)))

    def multiply():
        for product in [ops.matmul(*factors) for factors in products]:
            float(product[0, 0])  # Waits for it.

    seconds = timeit.repeat(multiply, number=1, repeat=8)
    return 2 * settings["num_blocks"] * np.array(seconds)


def make_measures(settings, data):
    """Returns a model's facts, and its measures: functions that return the seconds of each call."""
    (images, labels), _, class_names = data
    network, trainer, classifier = compile_models(settings, images, len(class_names))
    compile_model(network, settings, len(images))
    size = settings["batch_size"]
    if isinstance(images, Stream):
        images, labels = next(images.open(12 * size))
    images, labels = (np.resize(x, (12 * size, *x.shape[1:])) for x in (images, labels))
    train_soften, test_soften = make_softeners(settings, len(class_names))
    ready = Batches(images.astype("float32") / 255, labels, size, soften=test_soften)

    def time_inference(count, times):
        call = functools.partial(classifier.predict_on_batch, images[:count])
        return timeit.repeat(call, number=1, repeat=times)

    facts = {"parameters": count_parameters(network), "macs_per_image": count_macs(network)}
    return facts, {
        "training": lambda: time_fit(trainer, Batches(images, labels, size, soften=train_soften)),
        "step_without_input": lambda: time_fit(network, ready),
        "inference_of_batch": lambda: time_inference(size, 5),
        "inference_of_one": lambda: time_inference(1, 20),
    }


def measure_scaling(settings, data):
    """Returns `{flag: [[factor, seconds of a step], ...]}` for half and double the default size."""

    def time_step(settings):
        _, measures = make_measures(settings, data)
        return float(np.median(measures["step_without_input"]()))

    default, scaling = time_step(settings), {}
    for flag, factor in itertools.product(("num_blocks", "hidden_dim", "patch_size"), (0.5, 1, 2)):
        with contextlib.suppress(UserError):  # Not every size fits the images.
            scaled = {**settings, flag: int(settings[flag] * factor)}
            seconds = default if factor == 1 else time_step(scaled)
            scaling.setdefault(flag, []).append([factor, seconds])
    return scaling


def plot_scaling(scaling, title, path):
    """Draws the seconds of a step over blocks, width and tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for (flag, points), style in zip(scaling.items(), ("o-", "s--", "^-.")):
        factors, seconds = np.array(points).T
        if flag == "patch_size":
            flag, factors = "number of tokens", factors**-2.0
        axis.plot(factors, seconds, style, label=flag)
    axis.set(xlabel="times the default", ylabel="seconds a step", title=title)
    axis.set(xlim=(0, None), ylim=(0, None))
    axis.legend()
    figure.savefig(path, dpi=120)


def peak_memory():
    """Returns the most bytes that this process has held: of its GPU, or without one of memory."""
    library = sys.modules[keras.backend.backend()]
    if not count_gpus():
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if keras.backend.backend() == "jax":
        return library.devices()[0].memory_stats()["peak_bytes_in_use"]
    return library.config.experimental.get_memory_info("GPU:0")["peak"]


def summarize_rounds(rounds, name):
    """Returns what a model's measures came to, in milliseconds and as ratios to `mixer`."""
    row = {}
    for key in rounds[0][name]:
        seconds, base = (np.array([r[n][key] for r in rounds]) for n in (name, "mixer"))
        row[f"{key}_ms"] = 1000 * float(np.median(seconds))
        row[f"{key}_ms_95th_percentile"] = 1000 * float(np.percentile(seconds, 95))
        ratios = np.median(seconds, axis=1) / np.median(base, axis=1)
        row[f"{key}_over_mixer"] = float(np.median(ratios))
    return row


def make_speed_table(result):
    """Returns a Markdown table with a column for each model that `benchmark` has measured."""
    models, formats = result["models"].values(), {"parameters": ",", "macs_per_image": ","}
    formats["test_accuracy_percent"] = ".2f"
    rows = [["", *result["models"]]]
    for key in dict.fromkeys(itertools.chain(*models)):
        texts = [format(row[key], formats.get(key, ",.3g")) if key in row else "" for row in models]
        rows.append([key.replace("_", " "), *texts])
    return format_table(rows)


def benchmark(values, folder, num_rounds=10):
    """Measures the models in turn, round by round since machines drift; returns a table.

    Where `folder` has results of a model with the same settings, their test accuracy is named too.
    Writes benchmark-{device}.json and, beside it, the table and a plot of how a step scales.
    """
    settings = {**{name: values[name] for name in SETTINGS}, "dataset": values["dataset"][0]}
    keras.config.set_dtype_policy(settings["precision"])
    data = load_data(settings["dataset"], values["data_dir"], values["image_size"])
    models, rounds, products = {}, [], []
    for name in dict.fromkeys(["mixer", *values["model"]]):
        models[name] = make_measures({**settings, "model": name}, data)
    num_tokens = math.prod(data[0][0].shape[1:3]) // settings["patch_size"] ** 2
    for _ in range(1 + num_rounds):  # The first round, which compiles, isn't counted.
        products.append(time_products(settings, num_tokens))
        rounds.append({n: {key: call() for key, call in m.items()} for n, (_, m) in models.items()})
    seconds = float(np.median(products[1:]))
    result = {
        "settings": settings, **describe_machine(), "rounds": num_rounds,
        "matrix_products_ms": 1000 * seconds, "peak_memory_gigabytes": peak_memory() / 1e9,
        "models": {n: facts | summarize_rounds(rounds[1:], n) for n, (facts, _) in models.items()},
        "scaling": measure_scaling({**settings, "model": "mixer"}, data),
    }  # fmt: skip
    trained = load_groups(folder)
    for name, row in result["models"].items():
        runs = trained.get((settings["dataset"], unusual(settings), name), {}).values()
        if runs:
            row["test_accuracy_percent"] = float(np.mean([run["accuracy"] for run in runs]))
        row["training_images_per_second"] = 1000 * settings["batch_size"] / row["training_ms"]
        row["matrix_products_share_of_training"] = 1000 * seconds / row["training_ms"]
    table = make_speed_table(result)
    words = "".join(c if c.isalnum() else " " for c in result["device"].lower()).split()
    changed = [checksum(unusual(settings))] if unusual(settings) else []
    path = folder / f"{'-'.join(['benchmark', *words, *changed])}.json"
    write_atomically(path, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    write_atomically(path.with_suffix(".md"), lambda part: part.write_text(table))
    plot = functools.partial(plot_scaling, result["scaling"], f"mixer, {result['device']}")
    write_atomically(path.with_suffix(".png"), plot)
    return table


# ---------------------------------------------------------------------------- flags and main
# Default; smallest value, or both bounds, or choices; meaning. With data set, model, seed: a run.
SETTINGS = {
    "epochs": (30, 1, "Passes over the train split."),
    "batch_size": (128, 1, "Images a step."),
    "learning_rate": (3e-3, 0.0, "Peak learning rate."),
    "weight_decay": (5e-4, 0.0, "AdamW's weight decay."),
    "schedule": ("cosine", ["cosine", "published"], "Learning rate over time."),
    "dropout": (0.15, 0.0, "Chance of an activation to be zeroed, below 1."),
    "patch_size": (4, 1, "Height and width of a patch, in pixels."),
    "hidden_dim": (128, 1, "Channels of a token."),
    "num_blocks": (8, 1, "Number of Mixer blocks."),
    "tokens_mlp_dim": (64, 1, "Hidden width of the MLP across tokens."),
    "channels_mlp_dim": (256, 1, "Hidden width of the MLP across channels."),
    "precision": ("float32", ["float32", "mixed_bfloat16", "mixed_float16"], "Dtype policy."),
    "image_size": (0, 0, "Height and width that images are resized to; 0 leaves them."),
    "validation_split": (0.0, (0.0, 0.9), "Last share of train images to test on; 0 for none."),
    # Beyond the paper:
    "kernel_size": (3, 1, "Height and width of the depthwise filters."),
    "conv_residual": (False, None, "Add the convolutions between blocks to their input."),
    "warmup_epochs": (0, 0, "Epochs in which the learning rate rises."),
    "decay_of": ("all", ["all", "kernels"], "What weight decay acts on."),
    "ema": (0.0, (0.0, 0.99999), "Momentum of the moving average of weights; 0 for none."),
    "label_smoothing": (0.0, (0.0, 1.0), "Share of each train label that all classes get."),
    "mixup": (0.0, (0.0, 100.0), "MixUp's alpha; 0 for none."),
    "cutmix": (0.0, (0.0, 100.0), "CutMix's alpha; 0 for none."),
}
DEFAULTS = {name: default for name, (default, _, _) in SETTINGS.items()}
RECIPES = {  # Other defaults; a flag that is given has the last word.
    "strong": {
        "conv_residual": True, "channels_mlp_dim": 248, "dropout": 0.0, "warmup_epochs": 2,
        "decay_of": "kernels", "weight_decay": 0.05, "label_smoothing": 0.1,
    },
}  # fmt: skip
LISTS = {  # Default, what is valid, meaning; every combination is a run.
    "dataset": ("cifar10", bool, "cifar10, cifar100, shapes or names of tfds"),
    "model": ("hybrid", MODELS.__contains__, ", ".join(MODELS)),
    "seed": ("0", str.isdecimal, "whole numbers from 0 on"),
}


def define_flags():
    """Defines the flags; only running this file as a script calls it."""
    for name, (default, limit, text) in SETTINGS.items():
        if isinstance(limit, list):
            flags.DEFINE_enum(name, default, limit, text)
        elif limit is None:
            flags.DEFINE_boolean(name, default, text)
        else:
            define = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_float
            define(name, default, text, *(limit if isinstance(limit, tuple) else (limit,)))
        if isinstance(default, float):
            flags.register_validator(name, math.isfinite, "must be a finite number")
    for name, (default, valid, text) in LISTS.items():
        text = f"one or several, with commas between them, of: {text}"
        flags.DEFINE_list(name, default, text)
        flags.register_validator(name, lambda v, ok=valid: v and all(map(ok, v)), f"must be {text}")
    flags.DEFINE_enum("recipe", None, list(RECIPES), "Defaults of other flags, by name.")
    flags.DEFINE_string("data_dir", None, "Folder of tensorflow-datasets.")
    flags.DEFINE_string("output_dir", "results", "Folder of results, models, plots and table.")
    flags.DEFINE_boolean("overwrite", False, "Run what has a result already, replacing it.")
    flags.DEFINE_boolean("benchmark", False, "Train nothing; measure speed and memory.")
    flags.DEFINE_boolean("plot", False, "Train nothing; draw plots and table of the results.")


def is_done(settings, path):
    """Tells whether a run has its result in `path`; raises UserError if other settings made it."""
    if not path.exists():
        return False
    try:
        old = {**DEFAULTS, **json.loads(path.read_text())["settings"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): move it, or --overwrite it.") from error
    differ = [f"{k} {old.get(k)} there, {v} here" for k, v in settings.items() if old.get(k) != v]
    if differ:
        raise UserError(f"{path} was made with other settings ({'; '.join(differ)}): give another "
                        "--output_dir, or --overwrite to replace it.")  # fmt: skip
    print(f"{path} is done already; --overwrite would run it again.")
    return True


def sweep(values, folder):
    """Trains all combinations of data set, seed and model that have no result yet."""
    machine = describe_machine()
    warning = "" if count_gpus() else "NO GPU FOUND, this takes long: "
    print(f"{warning}{machine['device']}, Keras {machine['keras']} on {machine['backend']}")
    names = ("dataset", "seed", "model")
    runs = [
        {**dict(zip(names, run)), "seed": int(run[1]), **{name: values[name] for name in SETTINGS}}
        for run in itertools.product(*(dict.fromkeys(values[name]) for name in names))
    ]
    if not values["overwrite"]:
        runs = [run for run in runs if not is_done(run, folder / f"{run_name(run)}.json")]
    check_processes_agree(runs)
    for dataset, group in itertools.groupby(runs, lambda settings: settings["dataset"]):
        data = load_data(dataset, values["data_dir"], values["image_size"])
        if values["validation_split"]:
            data = hold_out(data, values["validation_split"])
        for settings in group:
            train(settings, data, folder)
            if find_process()[0] == 0:
                report(folder)


def main(argv):
    """Does what the flags say; exits with status 1 and one sentence where the user must act."""
    logging.set_verbosity(logging.WARNING)  # tensorflow-datasets logs every file that it opens.
    values = flags.FLAGS.flag_values_dict()
    recipe = RECIPES.get(values["recipe"], {})
    values |= {k: v for k, v in recipe.items() if not flags.FLAGS[k].present}
    folder = pathlib.Path(values["output_dir"])
    try:
        if argv[1:]:
            raise UserError(f"{argv[1]!r} is no flag: see --help.")
        join_processes()
        if not values["plot"]:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # Fails now rather than after hours.
        if values["benchmark"]:
            print(benchmark(values, folder))
            return
        if not values["plot"]:
            sweep(values, folder)
        if find_process()[0] == 0:
            print(report(folder))
        return
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error}: make room or give another --output_dir, then the same command goes on."
    except KeyboardInterrupt:
        problem = "stopped; the same command goes on after the last whole epoch."
    except Exception as error:  # Each backend has its own class for this.
        if find_process()[1] > 1:
            problem = f"stopped, as another machine has ({error}): start all of them again"
            print(f"hybrid_mixer.py: {problem}, each as before, to go on.", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)  # A regular end would wait for the others.
        if not any(sign in repr(error) for sign in ("OOM", "RESOURCE_EXHAUSTED", "MemoryError")):
            raise
        problem = "out of memory: try a smaller --batch_size or a smaller model."
    gc.collect()  # Ends TensorFlow's input threads, which can crash Python's own end.
    sys.exit(f"hybrid_mixer.py: {problem}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
