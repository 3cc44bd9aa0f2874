"""MLP-Mixer with a convolution stem on CIFAR, in one Keras file.

Reproduces Kanazi, Mnaa and Eisa, "Improving MLP-Mixer Performance on Small Image Datasets Using
Locality-Aware Modifications". An MLP-Mixer isn't told which patches are neighbours; here
convolutions, 3x3 depthwise and then 1x1, mix neighbours before or after its blocks.

    python hybrid_mixer.py --dataset cifar100 --model hybrid

trains for 30 epochs and writes result, model, plots and table to results/ (see README.md).
"""

import functools
import itertools
import json
import math
import os
import pathlib
import platform
import re
import sys
import time
import zipfile
from typing import NamedTuple

import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure

# TensorFlow reads both as it is imported.
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")  # Reuses memory: up to 1.4 times as fast.
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

    Input and output shape: `(batch, height, width, channels)`, channels known.
    Reference: Kanazi, Mnaa and Eisa, section 3.1.

    >>> ConvStem()(keras.Input((8, 6, 128))).shape
    (None, 8, 6, 128)
    """

    def __init__(self, linear=False, residual=False, **kwargs):
        super().__init__(**kwargs)
        self.linear = linear
        self.residual = residual

    def build(self, input_shape):
        if len(input_shape) != 4 or input_shape[-1] is None:
            wanted = "(batch, height, width, channels), channels known"
            raise ValueError(f"ConvStem takes {wanted}. Received: input_shape={input_shape}")
        channels = input_shape[-1]
        spatial = keras.initializers.RandomUniform(-1 / 3, 1 / 3)  # A filter sees 9 values.
        across = keras.initializers.RandomUniform(-(channels**-0.5), channels**-0.5)
        policy = self.dtype_policy
        common = {"data_format": "channels_last", "use_bias": False, "dtype": policy}
        self.depthwise = layers.DepthwiseConv2D(
            3, padding="same", depthwise_initializer=spatial, **common
        )
        self.pointwise = layers.Conv2D(channels, 1, kernel_initializer=across, **common)
        self.depthwise.build(input_shape)
        self.pointwise.build(input_shape)
        if not self.linear:
            self.norm = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, dtype=policy)
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
        tokens_mlp_dim, channels_mlp_dim: int, hidden widths of the two MLPs.
        dropout: float from 0 to 0.99, chance of an activation to be zeroed in training.
        seed: int or `None`, what dropout's random numbers start from.

    Input and output shape: `(batch, tokens, channels)`, tokens and channels known.
    Reference: Tolstikhin et al., 2021; Kanazi, Mnaa and Eisa, equations 1 and 2.

    >>> MixerBlock(tokens_mlp_dim=64, channels_mlp_dim=256)(keras.Input((48, 128))).shape
    (None, 48, 128)
    """

    def __init__(self, tokens_mlp_dim, channels_mlp_dim, dropout=0.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= dropout <= 0.99:
            raise ValueError(f"`dropout` must be from 0 to 0.99. Received: {dropout}")
        self.tokens_mlp_dim, self.channels_mlp_dim = tokens_mlp_dim, channels_mlp_dim
        self.dropout, self.seed = dropout, seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        if len(input_shape) != 3 or None in input_shape[1:]:
            wanted = "(batch, tokens, channels), both known, so flatten a grid with Reshape"
            raise ValueError(f"MixerBlock takes {wanted}. Received: input_shape={input_shape}")
        (_, tokens, channels), policy = input_shape, self.dtype_policy

        def norm():
            layer = layers.LayerNormalization(epsilon=1e-5, dtype=policy)
            layer.build(input_shape)
            return layer

        def dense(size, units):
            names, bound = ("kernel_initializer", "bias_initializer"), size**-0.5
            uniform = {name: keras.initializers.RandomUniform(-bound, bound) for name in names}
            layer = layers.Dense(units, **uniform, dtype=policy)
            layer.build((None, None, size))
            return layer

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
        # Random numbers are what dropout costs on a CPU, so one byte decides on each element; the
        # threshold for bytes is rounded at random, which keeps the rate exact on average.
        (*outer, size), seed = ops.shape(x), self.seed_generator
        num_words = (size + 3) // 4  # of four bytes each
        words = keras.random.randint((*outer, num_words), -(2**31), 2**31 - 1, seed=seed)
        draws = ops.view(words, "uint8")[..., :size]
        rounding = keras.random.uniform((), dtype="float32", seed=seed)
        keep = draws >= ops.cast(ops.floor(256 * self.dropout + rounding), "uint8")
        return x * (ops.cast(keep, x.dtype) * (1 / (1 - self.dropout)))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        names = ("tokens_mlp_dim", "channels_mlp_dim", "dropout", "seed")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


# ------------------------------------------------------------------------------------ models
class UserError(ValueError):
    """One sentence for whoever gave the command: what is wrong and what to do."""


class Design(NamedTuple):
    """What a model has beside patch embedding, Mixer blocks and head."""

    stem: dict | None = None  # Arguments of a `ConvStem` after patch embedding; None: no stem.
    conv_every: float = math.inf  # A `ConvStem` follows every so many blocks; inf: never.
    last_conv: float = math.inf  # The last block that one may follow.
    residual: bool = False  # Whether those after blocks are added to their input.


MODELS = {
    "mixer": Design(),  # The paper's baseline.
    "hybrid": Design(stem={}),  # One stem, where the paper's text puts it.
    "hybrid_linear": Design(stem={"linear": True}),
    "hybrid_residual": Design(stem={"residual": True}),
    "hybrid_late": Design(conv_every=1, last_conv=1),
    "interleaved": Design(stem={}, conv_every=2),  # What the authors' code trains.
    "interleaved_no_stem": Design(conv_every=2),
    "interleaved_residual": Design(stem={}, conv_every=2, residual=True),
    "interleaved_4": Design(stem={}, conv_every=4),
    "interleaved_3": Design(stem={}, conv_every=3),
    "interleaved_1": Design(stem={}, conv_every=1),
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
    float32 logits `(batch, num_classes)`. Raises `UserError` if the images can't be cut up.
    """
    height, width, channels = image_shape
    if height % patch_size or width % patch_size:
        raise UserError(f"{height}x{width} pixels aren't whole patches: give a --patch_size that "
                        f"divides both. Received: {patch_size}")  # fmt: skip
    design = MODELS[model]
    grid = (height // patch_size, width // patch_size, hidden_dim)
    to_grid, to_tokens = layers.Reshape(grid), layers.Reshape((grid[0] * grid[1], hidden_dim))

    def uniform(fan_in):  # in +-1/sqrt(fan_in), as in the layers
        names, bound = ("kernel_initializer", "bias_initializer"), fan_in**-0.5
        return {name: keras.initializers.RandomUniform(-bound, bound) for name in names}

    images = keras.Input(image_shape, name="images")
    embed = uniform(patch_size**2 * channels)
    x = layers.Conv2D(hidden_dim, patch_size, patch_size, **embed, name="patch_embedding")(images)
    if design.stem is not None:
        x = ConvStem(**design.stem, name="stem")(x)
    x = to_tokens(x)
    for i in range(1, num_blocks + 1):
        x = MixerBlock(tokens_mlp_dim, channels_mlp_dim, dropout, name=f"block_{i}")(x)
        if i % design.conv_every == 0 and i <= design.last_conv:
            x = to_tokens(ConvStem(residual=design.residual, name=f"conv_{i}")(to_grid(x)))
    x = layers.LayerNormalization(epsilon=1e-5, name="norm")(x)
    x = layers.GlobalAveragePooling1D(name="mean_of_tokens")(x)
    head = layers.Dense(num_classes, **uniform(hidden_dim), dtype="float32", name="head")
    return keras.Model(images, head(x), name=model)


# -------------------------------------------------------------------------------------- data
@functools.lru_cache(maxsize=1)
def load_data(name, data_dir=None):
    """Loads `shapes` or a data set of tensorflow-datasets with labelled images of one size.

    Returns `((x_train, y_train), (x_test, y_test), class_names)`: uint8 images `(n, height, width,
    channels)`, int labels `(n,)`, a list of strings. Raises `UserError` if these can't be had.
    """
    if name == "shapes":
        return draw_shapes()
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    if keras.backend.backend() != "tensorflow":
        tf.config.set_visible_devices([], "GPU")  # Reading files, it would take all GPU memory.
    downloader.MAX_RETRIES = 0  # Its ten retries take minutes to say that a host is down.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        pixels, label = (builder.info.features[key] for key in builder.info.supervised_keys)
        if len(pixels.shape) != 3 or None in pixels.shape:
            raise ValueError(f"no images of one size, but {pixels.shape}")
        builder.download_and_prepare(download_config=config)
        test_split = "test" if "test" in builder.info.splits else "validation"
        splits = builder.as_dataset(["train", test_split], batch_size=-1, as_supervised=True)
        return *tfds.as_numpy(splits), label.names
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"Data set {name!r} can't be had ({reason}): mend that, give a --data_dir where it is "
            "prepared, or take --dataset shapes, which needs no download."
        ) from error


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
        picture[top : top + 11, left : left + 11][shapes[label]] = rng.uniform(160, 255, 3)
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
        factors = keras.random.uniform((3, *each), 1 - self.strength, 1 + self.strength, seed=seed)
        turns = keras.random.uniform(each, -self.hue, self.hue, seed=seed)
        x = ops.clip(x * factors[0], 0, 255)
        mean = ops.mean(self._grey(x), axis=(1, 2), keepdims=True)
        x = ops.clip(mean + factors[1] * (x - mean), 0, 255)
        grey = self._grey(x)
        x = ops.clip(grey + factors[2] * (x - grey), 0, 255)
        hsv = ops.image.rgb_to_hsv(x / 255)  # Right only for pixels in 0-1.
        hsv = ops.concatenate([(hsv[..., :1] + turns) % 1, hsv[..., 1:]], axis=-1)
        return 255 * ops.image.hsv_to_rgb(hsv)

    def _grey(self, x):
        return 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]


def add_preprocessing(network, train_images):
    """Puts normalisation by the train images' mean and deviation in front of a network.

    Returns `(trainer, classifier)`, the model to `fit` and the one to save. Both share all weights
    and go from pixels 0-255 `(batch, height, width, channels)` to logits. Only `trainer` augments,
    and only in training: flip, shift by up to 4 pixels, turn by up to 15 degrees, colours, in one
    image of ten a box of mean colour.
    """
    height, width, channels = shape = train_images.shape[1:]
    mean = train_images.mean((0, 1, 2))
    squares = sum(np.square(image, dtype="uint16").sum((0, 1)) for image in train_images)
    variance = squares / train_images[..., 0].size - mean**2
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
    for layer in augmentation:
        layer.supports_jit = True  # Keras says no for two of them; on JAX, it works.
    pixels = keras.Input(shape, name="pixels")
    classifier = keras.Model(pixels, network(normalize(pixels)), name=network.name)
    x = pixels = keras.Input(shape, dtype="uint8", name="pixels")
    for layer in [*augmentation, normalize, erase]:
        x = layer(x)
    return keras.Model(pixels, network(x)), classifier


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


def train(settings, data, folder):
    """Trains a model, from its last checkpoint on if there is one, and writes result and model.

    An epoch depends on seed, epoch and checkpoint alone, so a stopped run ends like any other.

    Args: `settings`, a dict of `dataset`, `model`, `seed` (one each) and all `SETTINGS`; `data` as
    from `load_data`; `folder`, a `pathlib.Path`. Returns what is in the JSON file. Raises
    `UserError` if the loss is no longer finite.
    """
    (x_train, y_train), (x_test, y_test), class_names = data
    seed, epochs = settings["seed"], settings["epochs"]
    keras.utils.clear_session()
    keras.config.set_dtype_policy(settings["precision"])
    keras.utils.set_random_seed(seed)
    network, trainer, classifier = make_models(settings, x_train, len(class_names))
    # One call of `fit` makes one epoch, and yet prints "Epoch 5/30".
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: setattr(trainer, "stop_training", True)
    )
    name = run_name(settings)
    checkpoint = folder / f".{name}.npz"
    parameters = sum(math.prod(weight.shape) for weight in network.trainable_weights)
    history = load_checkpoint(checkpoint, trainer) if checkpoint.exists() else {}
    done = len(history.get("seconds", []))
    print(f"{name}: {parameters:,} parameters, {done} epochs done before")
    for epoch in range(done, epochs):
        begun = time.perf_counter()
        order = np.random.default_rng([seed, epoch]).permutation(len(x_train))
        rng = np.random.default_rng([seed, epoch, 1])  # Seeds augmentation and dropout.
        for variable in trainer.non_trainable_variables:
            if variable.name == "seed_generator_state":
                variable.assign(rng.integers(2**32, size=2, dtype="uint32"))
        logs = trainer.fit(
            x_train[order], y_train[order], settings["batch_size"], shuffle=False,
            validation_data=(x_test, y_test), validation_batch_size=500,
            initial_epoch=epoch, epochs=epochs, callbacks=[stop],
        ).history  # fmt: skip
        row = {"train_loss": logs["loss"], "train_accuracy": logs["accuracy"],
               "test_loss": logs["val_loss"], "test_accuracy": logs["val_accuracy"],
               "seconds": [time.perf_counter() - begun]}  # fmt: skip
        if not np.isfinite(list(row.values())).all():
            raise UserError("The loss is no longer finite: try a smaller --learning_rate.")
        history = {key: history.get(key, []) + value for key, value in row.items()}
        state = [ops.convert_to_numpy(v) for v in trainer.weights + trainer.optimizer.variables]
        write_atomically(checkpoint, lambda p: np.savez(p, *state, history=json.dumps(history)))
    result = {
        "settings": settings, "class_names": class_names, "parameters": parameters,
        "final_test_accuracy": history["test_accuracy"][-1],
        "best_test_accuracy_selected_on_test": max(history["test_accuracy"]),
        "seconds_per_epoch": float(np.median(history["seconds"])), **describe_machine(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "history": history,
    }  # fmt: skip
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(folder / f"{name}.keras", classifier.save)
    write_atomically(folder / f"{name}.json", lambda path: path.write_text(text))
    checkpoint.unlink()
    return result


def list_changes(settings):
    """Returns the settings that aren't the defaults, as strings."""
    return [f"{k} {v}" for k, v in settings.items() if k not in RUN and v != DEFAULTS.get(k)]


def run_name(settings):
    """Returns what a run's files are called: data set, model, what isn't default, seed."""
    parts = [settings["dataset"], settings["model"], *list_changes(settings)]
    return "-".join([*parts, f"seed{settings['seed']}"]).replace("/", "_").replace(" ", "_")


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


def describe_machine():
    """Returns the names of device, backend and versions, a dict of strings."""
    backend, info = keras.backend.backend(), pathlib.Path("/proc/cpuinfo")
    library = sys.modules[backend]
    if not any("gpu" in name.lower() for name in keras.distribution.list_devices()):
        cpu = re.search("model name\t: (.*)", info.read_text() if info.exists() else "")
        device = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} CPU cores"
    elif backend == "jax":
        device = library.devices()[0].device_kind
    else:
        gpus = library.config.list_physical_devices("GPU")
        device = library.config.experimental.get_device_details(gpus[0])["device_name"]
    backend += f" {library.__version__}"
    return {"device": device, "backend": backend, "keras": keras.__version__}


# ------------------------------------------------------------------------- results and plots
# The paper's accuracy at its best epochs, in %. Its text has one stem, its code is `interleaved`.
PAPER = {("cifar10", "mixer"): "76.71", ("cifar100", "mixer"): "48.20"}
PAPER |= {("cifar10", name): "82.27" for name in ("hybrid", "hybrid_linear", "interleaved")}
PAPER |= {("cifar100", name): "55.03" for name in ("hybrid", "hybrid_linear", "interleaved")}
COLORS = {"mixer": "#0072B2", "hybrid": "#E69F00", "interleaved": "#009E73"}  # Also of variants.
CURVES = ("train_loss", "test_loss", "test_accuracy")


def load_results(folder):
    """Returns all results in a folder, ordered by data set, model, conditions and seed.

    Conditions are the epochs, the settings that aren't the defaults and the hardware.
    """
    runs = []
    for path in sorted(folder.glob("[!.]*-seed*.json")):
        try:
            run = {"model_file": path.with_suffix(".keras"), **json.loads(path.read_text())}
            run |= DEFAULTS | run["settings"] | {k: np.array(run["history"][k]) for k in CURVES}
            run["test_accuracy"] = 100 * run["test_accuracy"]
            run |= {"accuracy": run["test_accuracy"][-1], "parameters": f"{run['parameters']:,}"}
            changes = list_changes({**run["settings"], "epochs": DEFAULTS["epochs"]})
            run["hardware"] = f"{run['device']}, {run['backend']}"
            run["conditions"] = [f"{run['epochs']} epochs", *changes, run["hardware"]]
            order = (run["dataset"], [*MODELS].index(run["model"]), run["conditions"], run["seed"])
            runs.append((order, run))
        except (ValueError, LookupError, TypeError) as error:
            print(f"Left out of table and plots: {path} ({error!r})", file=sys.stderr)
    return [run for _, run in sorted(runs, key=lambda pair: pair[0])]


def group_runs(runs):
    """Returns the conditions that all share, and `{model and other conditions: runs}`."""
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


def make_rows(groups):
    """Returns the cells of a row for each group; gains over `mixer` are paired by seed."""
    rows = []
    for name, runs in groups.items():
        dataset, model, settings = (runs[0][k] for k in ("dataset", "model", "settings"))
        mixers = groups.get(name.replace(model, "mixer", 1), []) if model != "mixer" else []
        base = {run["seed"]: run["accuracy"] for run in mixers}
        gains = [run["accuracy"] - base[run["seed"]] for run in runs if run["seed"] in base]
        other = list_changes({**settings, "schedule": "cosine"})  # The paper names none.
        paper = "" if other else PAPER.get((dataset, model), "")
        rows.append([
            dataset, name, runs[0]["parameters"], mean_std([run["accuracy"] for run in runs]),
            mean_std(gains, "+"), ", ".join(str(run["seed"]) for run in runs), paper,
        ])  # fmt: skip
    return rows


def plot_curves(groups, title, path):
    """Draws loss and accuracy over epochs: the mean of all seeds in a band of their deviation."""
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    dashes = {f: itertools.cycle(["-", "--", "-.", ":", (0, (1, 4)), (0, (9, 3))]) for f in COLORS}
    for name, runs in groups.items():
        family = runs[0]["model"].split("_")[0]
        color, dash, label = COLORS[family], next(dashes[family]), name.replace(", ", "\n")
        for key, axis, alpha in zip(CURVES, (loss, loss, accuracy), (0.4, 1, 1)):
            values = np.array([run[key] for run in runs])
            mean, std = values.mean(0), values.std(0, ddof=int(len(runs) > 1))
            epochs = np.arange(1, len(mean) + 1)
            axis.plot(epochs, mean, ".", markevery=[-1], ls=dash, c=color, alpha=alpha, label=label)
            axis.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    place = math.inf
    for line in sorted(accuracy.lines, key=lambda line: -line.get_ydata()[-1]):
        epoch, value = line.get_xydata()[-1]
        place = min(value, place - np.ptp(accuracy.get_ylim()) / 25)  # So none covers another.
        accuracy.text(epoch, place, f" {value:.1f}", color=line.get_color(), va="center")
    for axis in (loss, accuracy):
        axis.grid(alpha=0.3)
        axis.locator_params("x", integer=True)
    loss.set(title="loss: test strong, train pale", xlabel="epoch", ylabel="cross-entropy")
    accuracy.set(title="test accuracy", xlabel="epoch", ylabel="%", xmargin=0.1)
    loss.legend(*accuracy.get_legend_handles_labels(), loc="upper right")
    figure.suptitle(title)
    figure.savefig(path)


def map_offsets(block, height, width):
    """Returns a block's mean |W1 W2| over pairs of patches, by the offset of the patch read.

    Offsets run from minus half of height and width to plus half; larger ones have fewer pairs.
    """
    w1, w2 = (ops.convert_to_numpy(d.kernel) for d in (block.token_hidden, block.token_output))
    weights = abs(w1 @ w2).T.reshape(height, width, height, width)  # (to y, to x, from y, from x)
    down, right = (np.arange(-(size // 2), size // 2 + 1) for size in (height, width))
    across = [np.diagonal(weights, dx, axis1=1, axis2=3) for dx in right]  # (to y, from y, pairs)
    return np.array([[np.diagonal(x, dy, 0, 1).mean() for x in across] for dy in down])


def plot_blocks(models, title, path):
    """Draws what the blocks of each of `{name: saved model}` look at: a row for each."""
    rows = [[x for x in m.layers[-1].layers if isinstance(x, MixerBlock)] for m in models.values()]
    figure = Figure(figsize=(10, 1.5 * len(rows) + 0.5), dpi=120, layout="constrained")
    axes = figure.subplots(len(rows), max(map(len, rows)), squeeze=False)
    for row, blocks, (name, model) in zip(axes, rows, models.items()):
        grid = model.layers[-1].get_layer("patch_embedding").output.shape[1:3]
        row[0].set_ylabel(name)
        for axis, block in zip(row, blocks):
            values = map_offsets(block, *grid)
            axis.imshow(values / values.mean(), vmin=0.5, vmax=2.5)
            axis.set(xticks=[], yticks=[], title=block.name.replace("_", " "))
    figure.suptitle(title)
    figure.savefig(path)


def report(folder):
    """Draws table and plots of all results in `folder`; returns the table."""
    runs, notes = load_results(folder), []
    if not runs:
        raise UserError(f"There is no result in {folder}: train first, or give --output_dir.")
    head = "data set|model|parameters|test accuracy, %|gain, points|seeds|paper, %"
    rows = [head.split("|"), ["---"] * 7]
    for dataset, part in itertools.groupby(runs, key=lambda run: run["dataset"]):
        shared, groups = group_runs(part := list(part))
        rows += make_rows(groups)
        notes.append(f"{dataset}: {', '.join(shared)}.\n")
        seeds = sorted({f"{len(group)} seed{'s' * (len(group) > 1)}" for group in groups.values()})
        common = [text for text in shared if text != part[0]["hardware"]]
        title = ", ".join([dataset.replace("cifar", "CIFAR-"), *common])
        prefix = f"{folder}/{dataset.replace('/', '_')}"
        plot_curves(groups, f"{title}, {' or '.join(seeds)}", f"{prefix}_curves.png")
        files = {name: group[0]["model_file"] for name, group in groups.items()}
        models = {n: keras.saving.load_model(f) for n, f in files.items() if f.exists()}
        if models:
            plot_blocks(models, f"Blocks of the first seed: {title}", f"{prefix}_blocks.png")
    text = "\n".join(["".join(f"| {' | '.join(row)} |\n" for row in rows), *notes])
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
        ("dataset", "cifar10", bool, "cifar10, cifar100, shapes or names of tfds"),
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
    for dataset, seed, model in itertools.product(*(values[key] for key in RUN)):
        settings = {"dataset": dataset, "model": model, "seed": int(seed)}
        settings |= {key: values[key] for key in DEFAULTS}
        path = folder / f"{run_name(settings)}.json"
        if path.exists() and not values["overwrite"]:
            print(f"{path} is done already; --overwrite would run it again.")
            continue
        (images, labels), test, class_names = load_data(dataset, values["data_dir"])
        if share := values["validation_split"]:
            cut = len(images) - math.ceil(share * len(images))
            test, images, labels = (images[cut:], labels[cut:]), images[:cut], labels[:cut]
        train(settings, ((images, labels), test, class_names), folder)


def main(argv):
    """Does what the flags say; exits with status 1 and one sentence where the user must act."""
    logging.set_verbosity(logging.WARNING)  # tensorflow-datasets logs every file that it opens.
    values, machine = flags.FLAGS.flag_values_dict(), describe_machine()
    folder = pathlib.Path(values["output_dir"])
    try:
        if argv[1:]:
            raise UserError(f"{argv[1]!r} is no flag: see --help.")
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{machine['device']}, Keras {machine['keras']} on {machine['backend']}")
        if machine["device"].endswith("CPU cores") and not values["plot"]:
            print("NO GPU FOUND: on a CPU, 30 epochs of CIFAR take an hour or two. An NVIDIA GPU, "
                  'on Linux, needs pip install "tensorflow[and-cuda]".')  # fmt: skip
        if not values["plot"]:
            sweep(values, folder)
        print(report(folder))
    except UserError as error:
        sys.exit(f"hybrid_mixer.py: {error}")
    except OSError as error:  # It names the file and what is wrong with it.
        sys.exit(f"hybrid_mixer.py: {error}: mend that or give another --output_dir.")
    except KeyboardInterrupt:
        sys.exit("hybrid_mixer.py: stopped; the same command goes on after the last whole epoch.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
