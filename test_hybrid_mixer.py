"""Tests of hybrid_mixer.py against NumPy, closed forms and the paper's own counts."""

import ast
import functools
import json
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from absl.testing import flagsaver
from hypothesis import given, strategies

import hybrid_mixer as hm

HERE = pathlib.Path(__file__).resolve().parent
SCRIPT = HERE / "hybrid_mixer.py"
TINY = ["--hidden_dim", "16", "--num_blocks", "2", "--tokens_mlp_dim", "8"]
TINY += ["--channels_mlp_dim", "16"]


# What one process has compiled serves the next one: half of the time of a small run.
COMPILED = tempfile.TemporaryDirectory()
JAX = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": COMPILED.name}
JAX |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(autouse=True)
def seeded():
    """Chance is the same in every run of a test."""
    keras.utils.set_random_seed(0)


def start_python(*arguments, backend="tensorflow", cwd=HERE, **variables):
    """Starts Python in a fresh process, its output to be had as text."""
    environment = {**os.environ, **JAX, "KERAS_BACKEND": backend, **variables}
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=cwd, **pipes)


def run_python(*arguments, **options):
    """Runs Python in a fresh process; returns the finished process with its output as text."""
    with start_python(*arguments, **options) as process:
        output = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def run_script(*arguments, **options):
    return run_python(SCRIPT, *arguments, **options)


def histories(folder):
    """Returns `{file name: history without times}` of all results in `folder`."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        history = json.loads(path.read_text())["history"]
        found[path.name] = {k: v for k, v in history.items() if "seconds" not in k}
    return found


def cross_entropy(model, images, labels):
    """Returns the mean loss of a model from images to logits, by NumPy."""
    logits = model.predict(images, verbose=0).astype("float64")
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return -logits[np.arange(len(labels)), labels].mean()


# --------------------------------------------------------------------- NumPy implementation


def np_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def np_layer_norm(x, gamma, beta):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta


def np_stem(x, weights):
    depthwise, pointwise, gamma, beta, mean, variance = (next(weights) for _ in range(6))
    size, (height, width) = depthwise.shape[0], x.shape[1:3]
    before, after = (size - 1) // 2, size // 2
    padded = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    y = sum(
        padded[:, i : i + height, j : j + width] * depthwise[i, j, :, 0]
        for i in range(size)
        for j in range(size)
    )
    y = y @ pointwise[0, 0]
    return np_gelu((y - mean) / np.sqrt(variance + 1e-5) * gamma + beta)


def np_block(x, weights):
    gamma, beta, w1, b1, w2, b2 = (next(weights) for _ in range(6))
    y = np_layer_norm(x, gamma, beta)
    u = x + np.stack([(np_gelu(z.T @ w1 + b1) @ w2 + b2).T for z in y])
    gamma, beta, w3, b3, w4, b4 = (next(weights) for _ in range(6))
    return u + np_gelu(np_layer_norm(u, gamma, beta) @ w3 + b3) @ w4 + b4


CONV_EVERY = {"interleaved": 2, "interleaved_4": 4, "interleaved_3": 3, "interleaved_1": 1}


def np_model(name, images, weights, patch, blocks, conv_residual=False):
    weights = iter(weights)
    kernel, bias = next(weights), next(weights)
    batch, height, width, _ = images.shape
    rows, columns = height // patch, width // patch
    x = np.empty((batch, rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            cut = images[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            x[:, i, j] = cut.reshape(batch, -1) @ kernel.reshape(-1, kernel.shape[-1]) + bias
    if name != "mixer":
        x = np_stem(x, weights)
    for i in range(blocks):
        x = np_block(x.reshape(batch, rows * columns, -1), weights)
        if name in CONV_EVERY and (i + 1) % CONV_EVERY[name] == 0:
            x = x.reshape(batch, rows, columns, -1)
            x = conv_residual * x + np_stem(x, weights)
    x = x.reshape(batch, rows * columns, -1)
    x = np_layer_norm(x, next(weights), next(weights)).mean(1)
    logits = x @ next(weights) + next(weights)
    assert next(weights, None) is None
    return logits


def random_weights(layer, seed=0):
    """Gives all weights of `layer` random values, variances positive ones; returns them."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(0.1, 0.4, weight.shape) for weight in layer.weights]
    for i, weight in enumerate(layer.weights):
        if weight.name == "moving_variance":
            values[i] = np.abs(values[i]) + 0.1
    layer.set_weights(values)
    return values


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_stem_equals_numpy(kernel_size):
    layer = hm.ConvStem(kernel_size)
    layer.build((None, 5, 7, 6))
    weights = random_weights(layer)
    x = np.random.default_rng(1).normal(size=(3, 5, 7, 6))
    expected = np_stem(x, iter(weights))
    np.testing.assert_allclose(layer(x, training=False), expected, atol=1e-4)


def test_block_equals_numpy():
    layer = hm.MixerBlock(5, 11)
    layer.build((None, 12, 6))
    weights = random_weights(layer)
    x = np.random.default_rng(1).normal(size=(3, 12, 6))
    np.testing.assert_allclose(layer(x), np_block(x, iter(weights)), atol=1e-4)


@pytest.mark.parametrize(
    "name, kernel_size, conv",
    [*((name, 3, {}) for name in ("mixer", "hybrid", *CONV_EVERY)), ("interleaved_3", 5, {}),
     ("interleaved", 2, {"conv_residual": True})],
)  # fmt: skip
def test_model_equals_numpy_with_the_weights_in_order(name, kernel_size, conv):
    model = hm.build_model(name, (16, 24, 3), 7, 4, 16, 4, 5, 9, kernel_size=kernel_size, **conv)
    weights = random_weights(model)
    images = np.random.default_rng(1).normal(size=(3, 16, 24, 3))
    logits = np.asarray(model(images, training=False))
    assert logits.dtype == "float32"
    expected = np_model(name, images, weights, 4, 4, **conv)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    depthwise = [w.shape[0] for w in model.weights if "depthwise" in w.path]
    assert set(depthwise) <= {kernel_size}
    assert len(depthwise) == (name != "mixer") + 4 // CONV_EVERY.get(name, 5)


def test_blocks_two_norms_are_two():
    layer = hm.MixerBlock(4, 8)
    layer.build((None, 6, 5))
    x = np.random.default_rng(0).normal(size=(2, 6, 5))
    before = np.asarray(layer(x))
    layer.channel_norm.set_weights([np.full(5, 3.0), np.ones(5)])
    assert np.abs(np.asarray(layer(x)) - before).max() > 1e-2
    np.testing.assert_array_equal(layer.token_norm.get_weights()[0], 1)


# ------------------------------------------------------------------------ sizes and weights


@pytest.mark.parametrize(
    "name, parameters",
    [("mixer", 605_834), ("hybrid", 623_626), ("interleaved", 694_794),
     # The paper's 17,536 weights and 256 of batch normalisation for each convolution.
     ("interleaved_4", 605_834 + 3 * 17_792), ("interleaved_3", 605_834 + 3 * 17_792),
     ("interleaved_1", 605_834 + 9 * 17_792)],
)  # fmt: skip
def test_parameters_are_the_papers(name, parameters):
    model = hm.build_model(name)
    assert hm.count_parameters(model) == parameters
    assert model.output_shape == (None, 10)


def test_stem_has_the_papers_weights():
    layer = hm.ConvStem()
    layer.build((None, 8, 8, 128))
    assert hm.count_parameters(layer.depthwise, layer.pointwise) == 17_536


def test_kernels_and_biases_start_uniform_by_fan_in():
    model = hm.build_model("interleaved")
    seen = []
    for weight in model.trainable_weights:
        value = np.asarray(weight)
        if weight.name == "kernel":
            bound = 1 / math.sqrt(9 if "depthwise" in weight.path else math.prod(value.shape[:-1]))
        if weight.name in ("kernel", "bias"):  # A layer's bias follows its kernel.
            least = 0.98 if weight.name == "kernel" else 0.75  # A bias has few values.
            assert least * bound < np.abs(value).max() <= bound, weight.path
            few = 0.05 if value.size > 1000 else 1.5 / math.sqrt(value.size)
            assert value.std() == pytest.approx(bound / math.sqrt(3), rel=few), weight.path
            seen.append(value.ravel()[:10].tobytes())
        elif weight.name == "beta":
            assert not value.any()
        else:
            assert weight.name == "gamma" and (value == 1).all()
    assert len(seen) == 2 * (2 + 4 * 8) + 2 * 5 and len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    "layer, shape, others",
    [
        (lambda **k: hm.ConvStem(5, **k), (2, 4, 6, 8), [(None, None, None, 8)]),
        (lambda **k: hm.MixerBlock(5, 7, 0.3, **k), (2, 24, 8), [(None, 24, 8)]),
    ],
)
def test_layers_build_alone_in_any_precision_and_round_trip(layer, shape, others):
    built = layer(dtype="mixed_bfloat16")
    for other in others:
        built.build(other)
    count = len(built.weights)
    output = built(np.ones(shape), training=True)
    assert len(built.weights) == count == (6 if len(shape) == 4 else 12)
    assert {w.dtype for w in built.weights} == {"float32"}
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    assert tuple(output.shape) == shape == built.compute_output_shape(shape)
    config = built.get_config()
    again = type(built).from_config(config)
    assert again.get_config() == config
    again.build(shape)
    again.set_weights(built.get_weights())
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(keras.ops.cast(built(x), "float32")),
        keras.ops.convert_to_numpy(keras.ops.cast(again(x), "float32")),
    )


@pytest.mark.parametrize(
    "layer, shape",
    [
        (hm.ConvStem(), (None, 64, 8)),
        (hm.ConvStem(), (None, 8, 8, None)),
        (hm.MixerBlock(4, 4), (None, None, 8)),
        (hm.MixerBlock(4, 4), (None, 16, None)),
        (hm.MixerBlock(4, 4), (None, 4, 4, 8)),
    ],
)
def test_wrong_shapes_are_refused_with_what_was_received(layer, shape):
    with pytest.raises(ValueError, match="Received") as caught:
        layer.build(shape)
    assert str(shape) in str(caught.value)


def test_unbuildable_models_are_refused():
    with pytest.raises(ValueError, match="multiples of `patch_size` 5"):
        hm.build_model(patch_size=5)
    with pytest.raises(ValueError, match=r"image_shape=\(32, 30, 3\)"):
        hm.build_model(image_shape=(32, 30, 3))
    with pytest.raises(ValueError, match="mixer, hybrid, interleaved.*'vit'"):
        hm.build_model("vit")
    with pytest.raises(ValueError, match="dropout.*1.0"):
        hm.build_model(dropout=1.0)


@pytest.mark.parametrize("rate", [0.15, 0.001, 0.999])
def test_dropout_keeps_the_rate_and_the_mean(rate):
    layer = hm.MixerBlock(4, 4, dropout=rate)
    x = np.ones((200, 50, 39), "float32")
    draws = [np.asarray(layer._dropout(x, True)) for _ in range(20)]
    values = np.unique(np.concatenate(draws))
    np.testing.assert_allclose(values, [0, 1 / (1 - rate)], rtol=1e-5)
    dropped = np.mean([(d == 0).mean() for d in draws])
    # Each draw's threshold is rounded by itself, hence the second term under the root.
    spread = math.sqrt(rate * (1 - rate) / (20 * x.size) + 0.25 / 256**2 / 20)
    assert abs(dropped - min(rate, 255.5 / 256)) < 5 * spread + (rate > 0.99) / 256
    if rate == 0.15:  # Neighbours, also those in one random word, know nothing of each other.
        zero = (draws[0] == 0) - (draws[0] == 0).mean()
        for shift in (1, 2, 3, 4):
            product = (zero[..., shift:] * zero[..., :-shift]).mean() / zero.var()
            assert abs(product) < 5 / math.sqrt(x.size)
        assert (draws[0] != draws[1]).mean() == pytest.approx(2 * 0.15 * 0.85, abs=0.01)
    np.testing.assert_array_equal(layer._dropout(x, False), x)


# --------------------------------------------------------------------- copied, saved, loaded

STANDALONE = """
import keras
from keras import layers, ops

{source}

import numpy as np
stem, block = ConvStem(), MixerBlock(6, 10, dropout=0.2)
stem.build((None, 3, 5, 8))
block.build((None, 15, 8))
bound = 1 / np.sqrt(8)
assert np.abs(stem.get_weights()[1]).max() <= bound < 1.2 * np.abs(stem.get_weights()[1]).max()
inputs = keras.Input((3, 5, 8))
x = layers.Reshape((15, 8))(stem(inputs))
model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(block(x))))
model.compile("adam", "mse")
x = np.random.default_rng(0).normal(size=(64, 3, 5, 8))
y = x.mean((1, 2))[:, :2]
history = model.fit(x, y, epochs=15, verbose=0).history["loss"]
assert history[-1] < 0.5 * history[0], history
print(keras.backend.backend())
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_layers_run_copied_into_a_file_of_their_own(tmp_path, backend):
    text = SCRIPT.read_text()
    parts = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name in ("ConvStem", "MixerBlock"):
            first = min(d.lineno for d in node.decorator_list) - 1
            parts.append("\n".join(text.splitlines()[first : node.end_lineno]))
    path = tmp_path / "copied.py"
    path.write_text(STANDALONE.format(source="\n\n\n".join(parts)))
    done = run_python(path, backend=backend, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == backend


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_saved_model_loads_in_a_fresh_process_and_takes_pixels(tmp_path, backend):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 12, 3)).astype("uint8")
    network = hm.build_model("interleaved", (8, 12, 3), 4, 4, 16, 2, 5, 9)
    weights = random_weights(network)
    _, classifier = hm.add_preprocessing(network, images)
    classifier.save(tmp_path / "model.keras")
    pixels = images.astype("float64")
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    expected = np_model("interleaved", (pixels - mean) / std, weights, 4, 2)
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy as np, hybrid_mixer, keras; folder = sys.argv[1];"
        "model = keras.saving.load_model(folder + '/model.keras', safe_mode=True);"
        "logits = model.predict(np.load(folder + '/images.npy'), verbose=0);"
        "np.save(folder + '/logits.npy', logits)"
    )
    done = run_python("-c", code, tmp_path, backend=backend)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-3)


def put_harm(folder, kind):
    """Writes a model of ours to `folder`, its norm replaced by what would make a file there."""
    hm.build_model(num_blocks=1).save(folder / "sound.keras")
    made = str(folder / "harm")
    harm = {"module": "subprocess", "class_name": "Popen", "registered_name": None}
    harm["config"] = {"args": ["touch", made]}
    if kind == "lambda":
        layer = keras.layers.Lambda(lambda x: open(made, "w") and x)
        harm = keras.saving.serialize_keras_object(layer)
    with zipfile.ZipFile(folder / "sound.keras") as sound:
        files = {name: sound.read(name) for name in sound.namelist()}
    config = json.loads(files["config.json"])
    (norm,) = (x for x in config["config"]["layers"] if x["class_name"] == "LayerNormalization")
    norm.update({key: harm[key] for key in ("module", "class_name", "registered_name", "config")})
    with zipfile.ZipFile(folder / "model.keras", "w") as harmful:
        for name, content in {**files, "config.json": json.dumps(config)}.items():
            harmful.writestr(name, content)


@pytest.mark.parametrize("kind", ["lambda", "class outside of Keras"])
def test_saved_models_made_to_do_harm_are_refused(kind, tmp_path):
    put_harm(tmp_path, kind)
    with pytest.raises((TypeError, ValueError), match="Lambda|could not be deserialized"):
        keras.saving.load_model(tmp_path / "model.keras")
    assert not (tmp_path / "harm").exists()
    keras.saving.load_model(tmp_path / "sound.keras")


def test_import_is_quiet_and_light():
    code = (
        "import sys, hybrid_mixer; from absl import flags;"
        "assert 'epochs' not in flags.FLAGS;"
        "assert 'tensorflow_datasets' not in sys.modules"  # Keras itself loads matplotlib.
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -------------------------------------------------------------------------------------- data


def augmentation(shape, kind):
    """Returns the layer of that type from the training model of images of that shape."""
    images = np.random.default_rng(0).integers(0, 256, (9, *shape)).astype("uint8")
    network = keras.Sequential([keras.Input(shape), keras.layers.Flatten()])
    trainer, _ = hm.add_preprocessing(network, images)
    (layer,) = (layer for layer in trainer.layers if isinstance(layer, kind))
    return layer


def test_shift_is_up_to_four_whole_pixels_each_image_by_itself():
    layer = augmentation((32, 32, 3), keras.layers.RandomTranslation)
    x = np.zeros((9000, 32, 32, 3), "float32")
    x[:, 10, 20] = 255
    shifted = np.asarray(layer(x, training=True))
    images, rows, columns, _ = np.nonzero(shifted)
    assert len(images) == 3 * 9000 and set(shifted[shifted > 0]) == {255}
    for shift in (rows[::3] - 10, columns[::3] - 20):
        values, counts = np.unique(shift, return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert counts.min() > 850 and counts.max() < 1150
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.05
    assert not np.asarray(layer(np.full((50, 32, 32, 3), 9.0), training=True)).all()


def test_rotation_is_up_to_fifteen_degrees():
    layer = augmentation((41, 41, 3), keras.layers.RandomRotation)
    x = np.zeros((2000, 41, 41, 3), "float32")
    x[:, 20, 39] = 1  # 19 pixels right of the centre
    images, rows, columns, _ = np.nonzero(np.asarray(layer(x, training=True)))
    angles = np.degrees(np.arctan2(rows - 20, columns - 20))
    assert 13 < angles.max() < 17 and -17 < angles.min() < -13
    assert abs(angles.mean()) < 0.6
    assert angles.std() == pytest.approx(30 / math.sqrt(12), abs=0.6)
    assert np.abs(np.hypot(rows - 20, columns - 20) - 19).max() < 1.5


def test_flip_is_horizontal_for_half_of_the_images():
    layer = augmentation((8, 8, 3), keras.layers.RandomFlip)
    x = np.random.default_rng(0).uniform(size=(2000, 8, 8, 3)).astype("float32")
    y = np.asarray(layer(x, training=True))
    flipped = (y == x[:, :, ::-1]).all((1, 2, 3))
    assert ((y == x).all((1, 2, 3)) | flipped).all()
    assert 0.45 < flipped.mean() < 0.55


def test_colour_jitter_scales_by_a_tenth_and_turns_the_hue_by_a_fiftieth():
    x = np.full((3000, 4, 4, 3), [120, 100, 80], "float32")  # saturation in half of the image,
    x[:, 0], x[:, 1] = 80, 120  # contrast alone in the other
    y = np.asarray(hm.ColorJitter(hue=0.0)(x, training=True), "float64")
    luma = [0.299, 0.587, 0.114]
    brightness = (y @ luma).mean((1, 2)) / (x[0] @ luma).mean()
    contrast = (y[:, 1, 0, 0] - y[:, 0, 0, 0]) / 40 / brightness
    saturation = (y[:, 3, 0, 0] - y[:, 3, 0, 2]) / 40 / brightness / contrast
    for factor in (brightness, contrast, saturation):
        assert 0.899 < factor.min() < 0.905 and 1.095 < factor.max() < 1.101
        assert factor.std() == pytest.approx(0.2 / math.sqrt(12), rel=0.05)
    factors = np.corrcoef([brightness, contrast, saturation])
    assert np.abs(factors - np.eye(3)).max() < 0.1

    red = np.full((3000, 4, 4, 3), [200, 100, 100], "float32")  # hue 0
    y = np.asarray(hm.ColorJitter(strength=0.0)(red, training=True), "float64")[:, 0, 0]
    hue = (y[:, 1] - y[:, 2]) / (y.max(1) - y.min(1)) / 6
    assert -0.0201 <= hue.min() < -0.0195 and 0.0195 < hue.max() <= 0.0201
    np.testing.assert_allclose(y.max(1), 200, atol=1e-2)
    np.testing.assert_array_equal(hm.ColorJitter()(red, training=False), red)


def test_erasing_takes_a_box_from_one_image_in_ten():
    layer = augmentation((32, 32, 3), keras.layers.RandomErasing)
    y = np.asarray(layer(np.ones((10000, 32, 32, 3), "float32"), training=True))
    erased = (y == 0).all(-1)
    which = erased.any((1, 2))
    assert 0.085 < which.mean() < 0.115
    area = erased[which].mean((1, 2))
    assert 0.01 < area.min() < 0.06 and 0.27 < area.max() < 0.36
    for box in erased[which][:100]:
        assert box.sum() == box.any(0).sum() * box.any(1).sum()
    height, width = erased[which].any(2).sum(1), erased[which].any(1).sum(1)
    assert 2 < (height / width).max() < 5.5 and 2 < (width / height).max() < 5.5
    assert np.isin(y, (0, 1)).all()


def test_nothing_is_augmented_outside_of_training():
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype("uint8")
    trainer, classifier = hm.add_preprocessing(hm.build_model(num_blocks=1), images)
    expected = classifier.predict(images, verbose=0)
    np.testing.assert_allclose(trainer.predict(images, verbose=0), expected, atol=1e-5)
    assert np.abs(np.asarray(trainer(images, training=True)) - expected).max() > 1e-2


def test_shapes_are_the_same_each_time_balanced_and_of_the_promised_form():
    (x, y), (x_test, y_test), names = hm.draw_shapes(200, 100, seed=3)
    again = hm.draw_shapes(200, 100, seed=3)
    np.testing.assert_array_equal(x, again[0][0])
    assert (hm.draw_shapes(200, 100, seed=4)[0][0] != x).any()
    assert x.shape == (200, 32, 32, 3) and x.dtype == "uint8" and len(x_test) == 100
    assert len(set(names)) == 10
    assert np.bincount(np.concatenate([y, y_test])).tolist() == [30] * 10


def prepared(name):
    """Tells whether a data set can be loaded without a network."""
    return tfds.builder(name).is_prepared()


load_data_once = functools.cache(hm.load_data)


@pytest.mark.parametrize(
    "name, classes, mean, first",
    [
        # Means of the train split as other projects state them.
        ("cifar10", 10, (0.4914, 0.4822, 0.4465), "airplane"),
        ("cifar100", 100, (0.5071, 0.4865, 0.4409), "apple"),
    ],
)
def test_real_cifar_is_what_it_should_be(name, classes, mean, first):
    if not prepared(name):
        pytest.skip(f"{name} is not prepared for tensorflow-datasets")
    (x, y), (x_test, y_test), names = load_data_once(name)
    assert x.shape == (50_000, 32, 32, 3) and x_test.shape == (10_000, 32, 32, 3)
    assert x.dtype == x_test.dtype == "uint8"
    assert len(names) == classes and names[0] == first
    assert np.bincount(y).tolist() == [50_000 // classes] * classes
    assert np.bincount(y_test).tolist() == [10_000 // classes] * classes
    np.testing.assert_allclose(x.mean((0, 1, 2)) / 255, mean, atol=2e-4)


def test_unreachable_data_ends_soon_and_says_what_to_do(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    begun = time.monotonic()
    with pytest.raises(ValueError, match="'mnist' can't be had.*--data_dir.*--dataset shapes"):
        hm.load_data("mnist", str(tmp_path))
    assert time.monotonic() - begun < 30
    with pytest.raises(ValueError, match="'mnits' can't be had.*not found"):
        hm.load_data("mnits", str(tmp_path))


class Tiles(tfds.core.GeneratorBasedBuilder):
    """Dark and bright tiles, told apart by their label; `i % 3` more tells one from the next."""

    VERSION = tfds.core.Version("1.0.0")
    shape, sizes, counts = (8, 12, 1), [(8, 12)], {"train": 60, "test": 20}

    def _info(self):
        names = {"image": tfds.features.Image(shape=self.shape)}
        names["label"] = tfds.features.ClassLabel(names=["dark", "bright"])
        features, keys = tfds.features.FeaturesDict(names), ("image", "label")
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=keys)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.counts}

    def _generate_examples(self, split):
        for i in range(self.counts[split]):
            size = (*self.sizes[i % len(self.sizes)], self.shape[-1])
            image = np.full(size, 40 + 170 * (i % 2) + i % 3, "uint8")
            yield i, {"image": image, "label": i % 2}


class TilesOfSeveralSizes(Tiles):
    shape, sizes = (None, None, 1), [(8, 12), (30, 20), (5, 5)]


class TilesToGuess(Tiles):
    counts = {"train": 60, "validation": 20, "test": 10}

    def _generate_examples(self, split):
        for i, example in super()._generate_examples(split):
            yield i, {**example, "label": -1 if split == "test" else example["label"]}


class TilesWithGaps(Tiles):
    def _generate_examples(self, split):
        for i, example in super()._generate_examples(split):
            yield i, {**example, "label": -1 if i == 7 else example["label"]}


class TilesWithoutTest(Tiles):
    counts = {"train": 60}


class TilesForMemory(Tiles):
    shape, counts = (None, None, 3), {"train": 1500, "test": 1}
    sizes = [(256, 256), (100, 300), (500, 200)]


def settings_with(**changes):
    return {**hm.DEFAULTS, "dataset": "shapes", "model": "mixer", "seed": 0, **changes}


def tiles_settings():
    small = {"num_blocks": 1, "batch_size": 16, "epochs": 8}
    return settings_with(dataset="tiles", model="hybrid", **small)


def test_other_data_sets_of_tfds_load_and_train_also_grey_ones(tmp_path):
    data = hm.load_data("tiles", str(tmp_path / "data"))
    (x, y), (x_test, y_test), names = data
    assert x.shape == (60, 8, 12, 1) and len(x_test) == 20 and names == ["dark", "bright"]
    np.testing.assert_array_equal(x[:, 0, 0, 0] > 100, y == 1)
    assert hm.train(tiles_settings(), data, tmp_path)["final_test_accuracy"] == 1.0


def test_images_of_several_sizes_are_resized_if_asked(tmp_path):
    with pytest.raises(ValueError, match="several sizes: give an --image_size"):
        hm.load_data("tiles_of_several_sizes", str(tmp_path))
    (x, y), (x_test, _), _ = hm.load_data("tiles_of_several_sizes", str(tmp_path), 16)
    assert x.shape == (60, 16, 16, 1) and x_test.shape == (20, 16, 16, 1) and x.dtype == "uint8"
    np.testing.assert_array_equal(x, np.broadcast_to(x[:, :1, :1], x.shape))
    np.testing.assert_array_equal(np.sort(x[:, 0, 0, 0]), np.sort(TILES))
    with pytest.raises(ValueError, match="leave out --image_size"):
        hm.load_data("shapes", None, 16)


def test_where_test_labels_are_kept_back_validation_serves(tmp_path):
    (_, y), (_, y_test), _ = hm.load_data("tiles_to_guess", str(tmp_path))
    assert len(y) == 60 and len(y_test) == 20 and y_test.min() == 0


@pytest.mark.parametrize(
    "name, told", [("with_gaps", "images without a label"), ("without_test", "lacks train or test")]
)
def test_data_without_labels_or_test_images_is_refused(name, told, tmp_path):
    with pytest.raises(hm.UserError, match=told):
        hm.load_data(f"tiles_{name}", str(tmp_path))


# ------------------------------------------------------------------------- data from files
TILES = [40 + 170 * (i % 2) + i % 3 for i in range(60)]


@pytest.fixture
def streamed(monkeypatch, tmp_path_factory):
    """The tiles as they are read when memory doesn't hold them."""
    monkeypatch.setattr(hm, "IN_MEMORY", 16 * 8 * 12 * 4)  # Shuffled among 4.
    return hm.load_data("tiles", str(tmp_path_factory.mktemp("tiles")))


def test_a_streamed_epoch_has_all_images_once_in_the_order_of_seed_and_epoch(streamed):
    (images, labels), _, _ = streamed
    assert labels is None and len(images) == 60 and images.shape == (60, 8, 12, 1)

    def read(batches, order=range(4)):
        found = {i: batches[i] for i in order}
        return [found[i] for i in sorted(found)]

    batches, orders = hm.Batches(images, None, 16, seed=1), []
    for epoch in (0, 1):
        batches.shuffle(epoch)
        epoch = read(batches)
        assert [len(y) for _, y in epoch] == [16, 16, 16, 12]
        x, y = (np.concatenate(part) for part in zip(*epoch))
        assert sorted(x[:, 0, 0, 0]) == sorted(TILES)
        np.testing.assert_array_equal(x[:, 0, 0, 0] > 100, y == 1)
        for order in ([0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0]):  # As threads may ask.
            for (a, _), (b, _) in zip(epoch, read(batches, order)):
                np.testing.assert_array_equal(a, b)
        orders.append(x[:, 0, 0, 0].tolist())
    assert orders[0] != orders[1]
    again = hm.Batches(images, None, 16, seed=1)
    again.shuffle(1)
    assert np.concatenate([x for x, _ in read(again)])[:, 0, 0, 0].tolist() == orders[1]


def test_a_streamed_run_learns_and_goes_on_exactly(streamed, tmp_path, monkeypatch):
    whole = hm.train(tiles_settings(), streamed, tmp_path)
    assert whole["final_test_accuracy"] == 1.0
    (tmp_path / "stopped").mkdir()

    class Stop(Exception):
        pass

    def stop(self, epoch, logs=None):
        end(self, epoch, logs)
        if epoch == 2:
            raise Stop

    end = hm.EpochState.on_epoch_end
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(hm.EpochState, "on_epoch_end", stop)
        hm.train(tiles_settings(), streamed, tmp_path / "stopped")
    hm.train(tiles_settings(), streamed, tmp_path / "stopped")
    assert histories(tmp_path / "stopped") == histories(tmp_path)


MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import hybrid_mixer as hm, test_hybrid_mixer

hm.IN_MEMORY = int(sys.argv[3])
(images, labels), _, _ = hm.load_data("tiles_for_memory", sys.argv[1], 256)
first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = 0
batches = hm.Batches(images, labels, 32, seed=0)
batches.shuffle(0)
for i in range(len(batches)):
    total += batches[i][0].size
print(total, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first))
"""


def test_streaming_takes_less_memory_than_the_data(tmp_path):
    """295 MB of images of several sizes, for a process that may keep 64 MB of data in memory."""
    hm.load_data("tiles_for_memory", str(tmp_path), 256)
    done = run_python("-c", MEMORY, tmp_path, HERE, 2**26)
    assert done.returncode == 0, done.stderr
    total, grown = map(int, done.stdout.split()[-2:])
    assert total == 1500 * 256 * 256 * 3
    assert grown < total / 3


# ---------------------------------------------------------------------------------- training


def test_learning_rates_follow_their_closed_forms():
    steps = np.arange(0, 200)
    cosine, published = hm.Cosine(3e-3, 199), hm.Cosine(3e-3, 30)
    np.testing.assert_allclose(
        [cosine(step) for step in steps], 3e-3 * np.cos(np.pi * steps / 398) ** 2, atol=1e-8
    )
    np.testing.assert_allclose(
        [published(step) for step in steps], 3e-3 * np.cos(np.pi * steps / 60) ** 2, atol=1e-8
    )
    turns = [published(step) for step in (0, 15, 30, 60)]
    np.testing.assert_allclose(turns, [3e-3, 1.5e-3, 0, 3e-3], atol=1e-9)
    warm = hm.Cosine(3e-3, 199, warmup_steps=50)
    rise = np.minimum((steps + 1) / 50, 1)
    np.testing.assert_allclose(
        [warm(step) for step in steps], rise * 3e-3 * np.cos(np.pi * steps / 398) ** 2, atol=1e-8
    )


def test_batches_shuffle_by_seed_and_epoch_alone_and_lose_nothing():
    images, labels = np.arange(10)[:, None], np.arange(10)
    batches = hm.Batches(images, labels, 4, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        batches.shuffle(epoch)
        parts = [batches[i] for i in range(len(batches))]
        assert [len(x) for x, _ in parts] == [4, 4, 2]
        orders.append(np.concatenate([y for _, y in parts]).tolist())
        assert np.concatenate([x for x, _ in parts])[:, 0].tolist() == orders[-1]
    assert sorted(orders[0]) == list(range(10))
    assert orders[0] == orders[2] != orders[1]


def constant_images(count=6, height=20, width=30):
    """Images whose pixels all have the number of the image times ten, and these numbers."""
    numbers = np.arange(count)
    pixels = np.tile(10 * numbers[:, None, None, None], (1, height, width, 3))
    return pixels.astype("uint8"), numbers


def test_label_smoothing_gives_all_classes_a_share_of_each_train_label():
    images, labels = constant_images(3)
    train, test = hm.make_softeners(settings_with(label_smoothing=0.2), 5)
    same, soft = train(images, labels, np.random.default_rng(0))
    assert same is images
    expected = [[0.84 if i == j else 0.04 for i in range(5)] for j in range(3)]
    np.testing.assert_allclose(soft, expected, atol=1e-7)
    np.testing.assert_array_equal(test(images, labels, np.random.default_rng(0))[1], np.eye(5)[:3])
    assert hm.make_softeners(settings_with(), 5) == (None, None)


def test_mixup_mixes_images_and_labels_by_one_share_of_a_beta_distribution():
    images, labels = constant_images()
    rng, shares = np.random.default_rng(0), []
    for _ in range(2000):
        mixed, soft = hm.soften(images, labels, rng, 6, mixup=0.4)
        share = soft[2, 2]
        both = share * np.eye(6) + (1 - share) * np.eye(6)[labels - 1]
        np.testing.assert_allclose(soft, both, atol=1e-6)
        assert mixed.dtype == "uint8" and (mixed == mixed[:, :1, :1, :1]).all()
        assert np.abs(mixed[:, 0, 0, 0] - both @ (10 * labels)).max() < 0.501
        shares.append(share)
    # Mean and variance of a beta distribution with both parameters 0.4, within 4 standard errors.
    assert np.mean(shares) == pytest.approx(0.5, abs=0.035)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)


def test_cutmix_pastes_a_box_and_shares_the_label_by_its_area():
    images, labels = constant_images()
    rng, boxes = np.random.default_rng(0), []
    for _ in range(500):
        mixed, soft = hm.soften(images, labels, rng, 6, label_smoothing=0.3, cutmix=1.0)
        pasted = mixed[2, :, :, 0] == 10
        assert (pasted | (mixed[2, :, :, 0] == 20)).all()
        rows, columns = pasted.any(1), pasted.any(0)
        np.testing.assert_array_equal(pasted, rows[:, None] & columns)  # It is a box.
        assert np.abs(np.diff(rows.astype(int))).sum() <= 2
        np.testing.assert_array_equal(mixed[0, :, :, 0] == 50, pasted)
        kept = 1 - pasted.mean()
        hard = kept * np.eye(6)[2] + (1 - kept) * np.eye(6)[1]
        np.testing.assert_allclose(soft[2], 0.7 * hard + 0.05, atol=1e-6)
        boxes.append(pasted)
    boxes = np.array(boxes)
    assert boxes.any(0).all() and boxes.mean((1, 2)).max() > 0.9
    # A box of share 1 - u, u uniform, around a uniform middle: of side s it keeps s - s**2 / 4 of
    # a side, so the mean area is the integral of (s - s**2 / 4)**2 over u = 1 - s**2.
    s = np.sqrt(np.linspace(0, 1, 10001))
    expected = np.mean((s - s**2 / 4) ** 2)
    error = boxes.mean((1, 2)).std() / np.sqrt(len(boxes))
    assert boxes.mean() == pytest.approx(expected, abs=4 * error)
    assert (images == constant_images()[0]).all()


def test_mixup_and_cutmix_take_turns_by_chance():
    images, labels = constant_images()
    rng = np.random.default_rng(0)
    whole = [hm.soften(images, labels, rng, 6, mixup=5.0, cutmix=1.0)[0] for _ in range(400)]
    mixups = [len(np.unique(np.setdiff1d(mixed, images))) > 0 for mixed in whole]
    assert np.mean(mixups) == pytest.approx(0.5, abs=0.1)


def test_soft_batches_depend_on_seed_epoch_and_index_alone():
    images, labels = constant_images(12)
    train, _ = hm.make_softeners(settings_with(mixup=1.0), 12)
    batches = [hm.Batches(images, labels, 4, seed, train) for seed in (1, 1, 2)]
    shares = []
    for batch in batches:
        batch.shuffle(3)
        shares.append([batch[i][1].max() for i in (2, 1, 0, 1)])
    assert shares[0] == shares[1] != shares[2] and shares[0][1] == shares[0][3]
    batches[0].shuffle(4)
    assert len({batches[0][0][1].max(), *shares[0]}) == 4


def small_network(**changes):
    """A compiled network with convolutions, norms and biases, with random weights."""
    network = hm.build_model("interleaved", (8, 8, 3), 4, 4, 6, 2, 3, 5)
    random_weights(network)
    hm.compile_model(network, settings_with(batch_size=8, epochs=3, **changes), 24)
    return network


@pytest.mark.parametrize("decay_of", ["all", "kernels"])
def test_weight_decay_acts_on_what_it_is_told_to(decay_of):
    network = small_network(decay_of=decay_of, learning_rate=0.1, weight_decay=0.5)
    weights = network.trainable_weights
    before = [np.asarray(weight) for weight in weights]
    network.optimizer.apply([np.zeros(weight.shape, "float32") for weight in weights])
    for weight, old in zip(weights, before):
        decays = decay_of == "all" or "kernel" in weight.name
        expected = old * (1 - 0.1 * 0.5) if decays else old
        np.testing.assert_allclose(np.asarray(weight), expected, rtol=1e-5, err_msg=weight.path)


def test_training_ends_with_the_moving_average_of_all_steps_weights():
    network, seen = small_network(ema=0.8, warmup_epochs=1), []

    def record(batch, logs):
        seen.append([np.asarray(weight) for weight in network.trainable_weights])

    images = np.random.default_rng(0).normal(size=(24, 8, 8, 3)).astype("float32")
    batches = hm.Batches(images, np.arange(24) % 4, 8)
    callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=record)]
    network.fit(batches, epochs=2, verbose=0, callbacks=callbacks)
    average = seen[0]
    for step in seen[1:]:
        average = [0.8 * a + 0.2 * w for a, w in zip(average, step)]
    assert len(seen) == 6
    for weight, expected in zip(network.trainable_weights, average):
        np.testing.assert_allclose(np.asarray(weight), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder with results of a small sweep on `shapes`, and what the command printed."""
    folder = tmp_path_factory.mktemp("swept")
    command = ["--dataset", "shapes", "--model", "mixer,hybrid,interleaved", "--seed", "0,1"]
    command += ["--epochs", "2", "--output_dir", folder, *TINY]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    return folder, command, done


def test_sweep_writes_results_models_plots_and_table(swept):
    folder, _, done = swept
    names = {f"shapes-{m}-seed{s}" for m in ("mixer", "hybrid", "interleaved") for s in (0, 1)}
    for ending in (".json", ".keras"):
        assert {path.stem for path in folder.glob("*" + ending)} == names
    assert sorted(p.name for p in folder.iterdir() if p.suffix not in (".json", ".keras")) == [
        "accuracy.png", "shapes_accuracy.png", "shapes_loss.png", "table.md"]  # fmt: skip
    result = json.loads((folder / "shapes-interleaved-seed1.json").read_text())
    history = result["history"]
    assert {len(values) for values in history.values()} == {2}
    assert result["final_test_accuracy"] == history["test_accuracy"][-1]
    assert result["best_test_accuracy_selected_on_test"] == max(history["test_accuracy"])
    assert history["test_accuracy"][result["best_epoch_selected_on_test"] - 1] == max(
        history["test_accuracy"]
    )
    # Twice the stem: after patch embedding and after block 2 (9 + 16 + 2 weights a channel).
    assert result["parameters_conv_stems"] == 2 * 16 * (9 + 16 + 2)
    assert result["settings"]["seed"] == 1 and result["settings"]["epochs"] == 2
    assert result["backend"].startswith("tensorflow") and result["device"]
    assert "CPU cores" not in result["device"] or "NO GPU FOUND" in done.stdout.splitlines()[0]
    assert "trainable parameters" in done.stdout
    assert "Warning" not in done.stderr
    for path in folder.glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
    model = keras.saving.load_model(folder / "shapes-interleaved-seed1.keras")
    _, (x, y), _ = hm.load_data("shapes")
    accuracy = (model.predict(x, verbose=0).argmax(1) == y).mean()
    assert accuracy == pytest.approx(result["final_test_accuracy"], abs=2e-3)
    assert not model.compiled


def test_a_run_alone_equals_the_run_in_a_sweep_and_a_done_run_is_not_repeated(
    swept, main, tmp_path, capsys
):
    folder, command, _ = swept
    alone = run_script("--dataset", "shapes", "--model", "hybrid", "--seed", "1", "--epochs", "2",
                       "--output_dir", tmp_path, *TINY)  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    first, second = (histories(folder)[f"shapes-hybrid-seed{seed}.json"] for seed in (0, 1))
    assert histories(tmp_path) == {"shapes-hybrid-seed1.json": second}
    assert first != second
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    main(*map(str, command))
    assert capsys.readouterr().out.count("is done already") == 6
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("*.json")} == before


def test_held_out_images_leave_training_and_are_what_is_tested(main, monkeypatch, tmp_path):
    train, test, names = hm.draw_shapes(200, 40)
    (x, y), (x_held, y_held), _ = hm.hold_out((train, test, names), 0.1)
    assert len(x) == 180 and len(x_held) == 20
    np.testing.assert_array_equal(np.concatenate([x, x_held]), train[0])
    np.testing.assert_array_equal(np.concatenate([y, y_held]), train[1])
    unseen = (test[0], np.full(40, -1))  # Whoever looks at the test split gets nothing right.
    monkeypatch.setattr(hm, "load_data", lambda *_: (train, unseen, names))
    main("--model=mixer", "--epochs=2", "--validation_split=0.1", *TINY)
    result = json.loads((tmp_path / "shapes-mixer-seed0.json").read_text())
    model = keras.saving.load_model(tmp_path / "shapes-mixer-seed0.keras")
    loss = cross_entropy(model, train[0][180:], train[1][180:])
    assert result["final_test_loss"] == pytest.approx(loss, rel=1e-4)
    assert result["settings"]["validation_split"] == 0.1


def test_streamed_images_cannot_be_held_out(streamed):
    with pytest.raises(hm.UserError, match="--validation_split"):
        hm.hold_out(streamed, 0.1)


def test_other_settings_are_refused_and_named(swept, main):
    folder, command, _ = swept
    before = (folder / "shapes-mixer-seed0.json").read_bytes()
    with pytest.raises(SystemExit, match="dropout 0.15 there, 0.4 here.*--overwrite"):
        main(*map(str, command), "--dropout=0.4")
    assert (folder / "shapes-mixer-seed0.json").read_bytes() == before


TRAIN = """
import json, pathlib, sys
import hybrid_mixer as hm

settings = dict(hm.DEFAULTS)
settings |= {"dataset": "shapes", "model": "interleaved", "seed": 3, "epochs": 12, "num_blocks": 2}
settings |= {"batch_size": 64, "patch_size": 8, "hidden_dim": 16, "tokens_mlp_dim": 8}
settings |= {"ema": 0.9, "label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0}
hm.train(settings, hm.draw_shapes(200, 40), pathlib.Path(sys.argv[1]))
"""


def wait_for(condition, process):
    while not condition() and process.poll() is None:
        time.sleep(0.01)


@pytest.fixture(scope="module", params=["tensorflow", "jax"])
def whole(request, tmp_path_factory):
    """The backend and the history of the run TRAIN that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_python("-c", TRAIN, folder, backend=request.param)
    assert done.returncode == 0, done.stderr
    return request.param, histories(folder)


def kill_after_an_epoch(folder, backend):
    """Starts TRAIN in `folder` and kills it once it has written a checkpoint."""
    process = start_python("-c", TRAIN, folder, backend=backend)
    wait_for(lambda: list(folder.glob(".shapes*.npz")), process)
    process.kill()
    process.wait()


def assert_goes_on(folder, whole):
    """Runs TRAIN again in `folder`: it has to end as if nothing had stopped it."""
    done = run_python("-c", TRAIN, folder, backend=whole[0])
    assert done.returncode == 0, done.stderr
    assert histories(folder) == whole[1]
    assert len(whole[1]["shapes-interleaved-seed3.json"]["test_loss"]) == 12
    assert not list(folder.glob(".shapes*"))
    # The saved model is the one that was tested, with averaged weights, on labels left as they are.
    model = keras.saving.load_model(folder / "shapes-interleaved-seed3.keras")
    _, (images, labels), _ = hm.draw_shapes(200, 40)
    loss = whole[1]["shapes-interleaved-seed3.json"]["test_loss"][-1]
    assert cross_entropy(model, images, labels) == pytest.approx(loss, rel=1e-4)
    return done


def test_a_killed_run_ends_as_one_that_was_never_stopped(whole, tmp_path):
    kill_after_an_epoch(tmp_path, whole[0])
    assert not list(tmp_path.glob("*.json")), "the run ended before it could be killed"
    done = assert_goes_on(tmp_path, whole)
    assert any(f" {n} epochs done before" in done.stdout for n in range(1, 12))
    result = json.loads((tmp_path / "shapes-interleaved-seed3.json").read_text())
    assert result["backend"].startswith(whole[0])


@pytest.mark.parametrize("kill", range(int(os.environ.get("KILLS", 1))))
def test_a_kill_at_any_moment_leaves_no_half_file_and_loses_nothing(kill, whole, tmp_path):
    """Kills at moments from the first epoch to the last file; KILLS=20 tries twenty of them."""
    if whole[0] != "tensorflow":
        pytest.skip("The files are the same on every backend")
    process = start_python("-c", TRAIN, tmp_path)
    wait_for(lambda: list(tmp_path.iterdir()), process)
    time.sleep(6 * np.random.default_rng(kill).uniform())
    process.kill()
    process.wait()
    for path in tmp_path.glob("[!.]*"):
        json.loads(path.read_text()) if path.suffix == ".json" else keras.saving.load_model(path)
    if list(tmp_path.glob("*.json")):
        assert histories(tmp_path) == whole[1]
    else:
        assert_goes_on(tmp_path, whole)


def test_a_damaged_checkpoint_is_set_aside_and_named(whole, tmp_path):
    if whole[0] != "tensorflow":
        pytest.skip("The files are the same on every backend")
    kill_after_an_epoch(tmp_path, whole[0])
    (checkpoint,) = tmp_path.glob(".shapes*.npz")
    damaged = checkpoint.read_bytes()[: checkpoint.stat().st_size // 2]
    checkpoint.write_bytes(damaged)
    done = assert_goes_on(tmp_path, whole)
    (aside,) = tmp_path.glob("*.damaged")
    assert aside.read_bytes() == damaged
    assert f"damaged checkpoint is now {aside}, its run starts anew" in done.stderr


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(tmp_path):
    command = ["--dataset", "shapes", "--epochs", "1", "--output_dir", tmp_path, *TINY]
    limited = ["bash", "-c", f"ulimit -f 20; exec {sys.executable} {SCRIPT} \"$@\"", "x"]
    done = subprocess.run([*limited, *command], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "make room or give another --output_dir" in done.stderr
    assert not list(tmp_path.glob("[!.]*"))
    assert run_script(*command).returncode == 0
    assert len(histories(tmp_path)) == 1


def test_control_c_stops_soon_and_says_how_to_go_on(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore it.
    process = start_python(SCRIPT, "--dataset", "shapes", "--output_dir", tmp_path, *TINY)
    wait_for(lambda: list(tmp_path.glob(".shapes*.npz")), process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 1 and "Traceback" not in told
    assert told.splitlines()[-1].endswith("the same command goes on after the last whole epoch.")


@pytest.mark.parametrize(
    "error", [MemoryError("1 TiB"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_too_little_memory_is_one_sentence_but_a_bug_is_shown_as_one(error, main, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hm, "train", fail)
    with pytest.raises(SystemExit, match="out of memory: try a smaller --batch_size"):
        main()
    error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        main()


DEVICES = """
import json, os, pathlib, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
import keras, hybrid_mixer as hm

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
for name in ("RandomFlip", "RandomTranslation", "RandomRotation", "RandomErasing"):
    setattr(getattr(keras.layers, name), "call", lambda self, x, training=None: x)
hm.ColorJitter.call = lambda self, x, training=None: x
settings = dict(hm.DEFAULTS)
settings |= {"dataset": "shapes", "model": "interleaved", "seed": 3, "epochs": 3, "num_blocks": 2}
settings |= {"batch_size": 64, "patch_size": 8, "hidden_dim": 16, "dropout": 0.0}
made, fit = [], keras.Model.fit


def spy(self, *args, **kwargs):
    spread = keras.distribution.distribution()
    strategy = getattr(self, "distribute_strategy", None)
    one = strategy.num_replicas_in_sync if strategy else 1
    made.append(spread.device_mesh.devices.size if spread else one)
    return fit(self, *args, **kwargs)


keras.Model.fit = spy
for devices in (keras.distribution.list_devices()[:1], keras.distribution.list_devices()):
    keras.distribution.list_devices = lambda: devices
    folder = pathlib.Path(sys.argv[1], str(len(devices)))
    folder.mkdir()
    hm.train(settings, hm.draw_shapes(200, 40), folder)
print(json.dumps(made))
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_two_devices_train_as_one_does(backend, tmp_path):
    done = run_python("-c", DEVICES, tmp_path, backend=backend)
    assert done.returncode == 0, done.stderr
    # Batches of 64, 8 and 40 can't be split evenly over the third device that JAX has here.
    assert json.loads(done.stdout.splitlines()[-1]) == [1, 2]
    one, several = (histories(folder) for folder in sorted(tmp_path.iterdir()))
    one, several = (h["shapes-interleaved-seed3.json"] for h in (one, several))
    for name in one:
        np.testing.assert_allclose(several[name], one[name], rtol=1e-4)
    assert len(set(one["train_loss"])) == 3
    keras.saving.load_model(max(tmp_path.iterdir()) / "shapes-interleaved-seed3.keras")


COMMAND = """
import hybrid_mixer as hm
from absl import app
hm.define_flags()
hm.load_data = lambda *_: hm.draw_shapes(200, 40)
app.run(hm.main)
"""


def test_two_processes_train_as_one_does_and_go_on_after_a_kill(tmp_path):
    """Two machines, as far as one can tell: two processes that meet at a port of this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:%d" % free.getsockname()[1]
    common = {"KERAS_DISTRIBUTION_JOB_ADDRESSES": address, "KERAS_DISTRIBUTION_NUM_PROCESSES": "2"}
    command = ["-c", COMMAND, *TINY, "--dataset", "shapes", "--batch_size", "50", "--epochs", "6"]

    def histories_of(name):
        return histories(tmp_path / name)["shapes-hybrid-seed0.json"]

    def start_both():
        numbers = [{**common, "KERAS_DISTRIBUTION_PROCESS_ID": str(i)} for i in (0, 1)]
        arguments = [*command, "--output_dir", tmp_path / "two"]
        return [start_python(*arguments, backend="jax", **number) for number in numbers]

    first, second = start_both()
    wait_for(lambda: list(tmp_path.glob("two/.shapes*.npz")), first)
    second.kill()
    second.communicate()
    _, told = first.communicate(timeout=150)
    assert first.returncode == 1 and "Traceback" not in told
    assert "stopped, as another machine has" in told and "start all of them again" in told
    assert not list(tmp_path.glob("two/*.json"))
    outputs = [process.communicate(timeout=300) for process in start_both()]
    assert re.search(r" [1-5] epochs done before", outputs[0][0]), outputs
    done = run_python(*command, "--output_dir", tmp_path / "one", backend="jax")
    assert done.returncode == 0, done.stderr
    one, two = histories_of("one"), histories_of("two")
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4)
    assert len(one["test_loss"]) == 6
    keras.saving.load_model(tmp_path / "two" / "shapes-hybrid-seed0.keras")
    assert not list(tmp_path.glob("*/.*"))


@pytest.mark.parametrize("name", ["TF_CONFIG", "KERAS_DISTRIBUTION_NUM_PROCESSES"])
def test_several_machines_are_refused_on_tensorflow(name, main, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit, match=f"{name[:5]}.*: unset it, or set KERAS_BACKEND=jax"):
        main()
    assert not list(tmp_path.iterdir())


def test_processes_that_cannot_meet_say_so(tmp_path):
    done = run_script("--output_dir", tmp_path, backend="jax", KERAS_DISTRIBUTION_NUM_PROCESSES="x")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "machines can't be joined" in done.stderr and "start them" in done.stderr


def test_bad_input_is_one_sentence_and_status_1(tmp_path):
    """Through the command itself: what absl refuses, what main refuses, what comes in training."""
    for arguments, words in (
        (["--dataset", "shapes", "--epochs", "0"], "--epochs"),
        (["--dataset", "shapes", "--patch_size", "5"], "`patch_size` 5"),
        (["--dataset", "shapes", "--learning_rate", "1e30"], "--learning_rate"),
    ):
        done = run_script(*arguments, "--output_dir", tmp_path, *TINY)
        assert done.returncode == 1
        assert words in done.stderr and "Traceback" not in done.stderr
        assert not list(tmp_path.iterdir())


NUMBERS = [name for name, (default, *_) in hm.SETTINGS.items() if not isinstance(default, str)]
BAD = [(name, value) for name in NUMBERS for value in ("x", "-1", "", "1e999x")]
BAD += [(name, value) for name in NUMBERS if isinstance(hm.SETTINGS[name][0], int)
        for value in ("0", "1.5", "nan")]  # fmt: skip
for name in ("image_size", "warmup_epochs", "conv_residual"):
    BAD.remove((name, "0"))  # It leaves things as they are.
BAD += [(name, value) for name in NUMBERS if isinstance(hm.SETTINGS[name][0], float)
        for value in ("nan", "inf")]  # fmt: skip
BAD += [("ema", "1"), ("label_smoothing", "1.1"), ("validation_split", "1"), ("decay_of", "biases")]
BAD += [("image_size", "64"), ("image_size", "99999999")]  # The shapes are 32 pixels wide.
BAD += [(name, value) for name in ("schedule", "precision", "model", "recipe")
        for value in ("x", "", "None")]  # fmt: skip
BAD += [("model", "hybrid,"), ("model", "hybrid,vit"), ("seed", ""), ("seed", "-1"), ("seed", "0,x")]
BAD += [("seed", "1.5"), ("dataset", ""), ("dataset", "shapes,"), ("dataset", "nosuchdata")]
BAD += [("dropout", "1"), ("dropout", "7"), ("patch_size", "33")]
BAD += [("patch_size", "5"), ("overwrite", "maybe"), ("plot", "2"), ("epoch", "1")]
BAD += [("output_dir", "/dev/null"), ("output_dir", "/dev/null/folder")]


@pytest.fixture
def main(tmp_path):
    """Returns a function that does what the command line does, in this process."""
    if "epochs" not in flags.FLAGS:
        hm.define_flags()

    def main(*arguments):
        with flagsaver.flagsaver():
            rest = flags.FLAGS(["x", "--dataset=shapes", f"--output_dir={tmp_path}", *arguments])
            hm.main(rest)

    yield main


@pytest.mark.parametrize("name, value", BAD)
def test_bad_flags_are_named_and_nothing_is_written(name, value, main, tmp_path, capsys):
    with pytest.raises((flags.Error, SystemExit)) as caught:
        main(f"--{name}={value}")
    told = str(caught.value)
    assert name in told.replace("Data set", "dataset") or value in told, told
    assert len(told.splitlines()) <= 2 and told != "0"
    assert not list(tmp_path.iterdir())


def test_a_recipe_gives_defaults_as_in_the_readme_and_flags_have_the_last_word(main, monkeypatch):
    seen = []
    monkeypatch.setattr(hm, "sweep", lambda values, _: seen.append({**values, "recipe": None}))
    monkeypatch.setattr(hm, "report", lambda _: "")
    readme = " ".join((HERE / "README.md").read_text().split())
    listed = re.search(r"`--recipe strong` stands for `(.*?)`", readme)[1].split(" ")
    main("--recipe", "strong")
    main(*listed)
    main("--recipe", "strong", "--dropout", "0.15", "--noconv_residual")
    main()
    strong, by_flags, less, default = seen
    assert strong == by_flags != default
    assert less == {**strong, "dropout": 0.15, "conv_residual": False}
    assert {name: default[name] for name in hm.SETTINGS} == hm.DEFAULTS


@pytest.mark.parametrize("num_classes", [10, 100])
def test_strong_recipe_has_at_most_700_000_parameters(num_classes):
    strong = {**hm.DEFAULTS, **hm.RECIPES["strong"]}
    width, size = strong["channels_mlp_dim"], strong["kernel_size"]
    sizes = {"channels_mlp_dim": width, "kernel_size": size, "patch_size": strong["patch_size"]}
    stem = 128 * (size**2 + 128 + 2)
    block = 2 * 64 * 64 + 64 + 64 + 2 * 128 * width + width + 128 + 4 * 128
    counted = 128 * (4 * 4 * 3 + 1) + 5 * stem + 8 * block + 2 * 128 + num_classes * (128 + 1)
    model = hm.build_model("interleaved", num_classes=num_classes, **sizes)
    assert hm.count_parameters(model) == counted <= 700_000


def test_what_is_not_a_flag_is_refused_and_so_is_an_empty_folder(main):
    with pytest.raises(SystemExit, match="'shapes' is no flag"):
        main("shapes")
    with pytest.raises(SystemExit, match="no result"):
        main("--plot")


@pytest.mark.parametrize(
    "layer, arguments, name",
    [
        *((hm.ConvStem, {"kernel_size": k}, "kernel_size") for k in (0, -3, 1.5, "3", None, (3, 3))),
        *((hm.MixerBlock, {"tokens_mlp_dim": k, "channels_mlp_dim": 4}, "tokens_mlp_dim")
          for k in (0, -1, 2.0, "4", None)),
        *((hm.MixerBlock, {"tokens_mlp_dim": 4, "channels_mlp_dim": k}, "channels_mlp_dim")
          for k in (0, -1, 2.0, "4", None)),
        *((hm.MixerBlock, {"tokens_mlp_dim": 4, "channels_mlp_dim": 4, "dropout": k}, "dropout")
          for k in (1, 1.0, -0.1, float("nan"), "0.1", None)),
        *((hm.build_model, {name: k}, "positive") for k in (0, -1, 1.5, "4", None)
          for name in ("num_classes", "patch_size", "hidden_dim", "num_blocks")),
        (hm.build_model, {"image_shape": (32, None, 3)}, "positive"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name_with_what_was_received(layer, arguments, name):
    with pytest.raises(ValueError, match=f"{name}.*Received: "):
        layer(**arguments)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=strategies.data())
def test_any_sizes_give_a_sound_model_or_a_clear_error(data):
    def draw(low, high):
        return data.draw(strategies.integers(low, high))

    height, width, channels, patch = draw(1, 20), draw(1, 20), draw(1, 4), draw(0, 7)
    classes, model = draw(1, 12), data.draw(strategies.sampled_from(list(hm.MODELS)))
    sizes = [draw(0 if data.draw(strategies.booleans()) else 1, 9) for _ in range(4)]
    try:
        network = hm.build_model(model, (height, width, channels), classes, patch, *sizes)
    except ValueError as error:
        assert "Received" in str(error)
        assert 0 in (patch, *sizes) or height % patch or width % patch
        return
    assert 0 not in (patch, *sizes) and height % patch == width % patch == 0
    images = np.random.default_rng(0).normal(size=(2, height, width, channels))
    logits = np.asarray(network(images, training=True))
    assert logits.shape == (2, classes) and np.isfinite(logits).all()


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains(tmp_path, precision):
    done = run_script("--dataset", "shapes", "--epochs", "1", "--precision", precision,
                      "--schedule", "published", "--output_dir", tmp_path, *TINY)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert histories(tmp_path)["shapes-hybrid-seed0.json"]["train_loss"][0] < 2.5


def test_short_run_on_real_cifar_learns(tmp_path):
    if not prepared("cifar10"):
        pytest.skip("cifar10 is not prepared for tensorflow-datasets")
    done = run_script("--dataset", "cifar10", "--epochs", "1", "--hidden_dim", "32",
                      "--num_blocks", "2", "--output_dir", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "cifar10-hybrid-seed0.json").read_text())
    assert result["final_test_accuracy"] > 0.25
    assert "Reusing dataset" not in done.stderr
    assert "82.27" not in (tmp_path / "table.md").read_text()  # The paper's 30 epochs.


# -------------------------------------------------------------------------------- benchmark


@pytest.mark.parametrize("name, convolutions", [("mixer", 0), ("hybrid", 1), ("interleaved", 5)])
def test_multiply_accumulates_are_those_counted_by_hand(name, convolutions):
    embedding, head = 64 * (4 * 4 * 3) * 128, 128 * 10
    token_mlp, channel_mlp = 128 * (2 * 64 * 64), 64 * (2 * 128 * 256)
    stem = 64 * (3 * 3 * 128 + 128 * 128)
    by_hand = embedding + 8 * (token_mlp + channel_mlp) + convolutions * stem + head
    assert hm.count_macs(hm.build_model(name)) == by_hand
    assert name != "mixer" or by_hand == 42_337_536


def test_multiply_accumulates_tell_tokens_from_channels():
    model = hm.build_model("interleaved", (12, 8, 1), 5, 4, 7, 2, 3, 11)  # 3 x 2 tokens of 7
    block = 7 * (6 * 3 + 3 * 6) + 6 * (7 * 11 + 11 * 7)
    stem = 6 * (3 * 3 * 7 + 7 * 7)
    assert hm.count_macs(model) == 6 * 16 * 7 + 2 * block + 2 * stem + 7 * 5


def test_rounds_are_paired_and_their_medians_taken():
    slow, fast = [0.004] * 5 + [0.4], [0.001] * 6
    rounds = [  # The second round's machine is ten times slower, for both.
        {"mixer": {"step": np.array(fast) * k}, "hybrid": {"step": np.array(slow) * k}}
        for k in (1, 10, 1)
    ]
    row = hm.summarize_rounds(rounds, "hybrid")
    assert row["step_over_mixer"] == pytest.approx(4)
    assert row["step_ms"] == pytest.approx(4)
    seconds = np.concatenate([r["hybrid"]["step"] for r in rounds])
    assert (1000 * seconds <= row["step_ms_95th_percentile"]).mean() == pytest.approx(17 / 18)


def test_benchmark_measures_every_model_against_mixer(tmp_path):
    small = ["--dataset", "shapes", "--batch_size", "32", "--output_dir", tmp_path, *TINY]
    small += ["--mixup", "0.2", "--label_smoothing", "0.1", "--warmup_epochs", "2"]
    names = ("hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
    changes = dict(zip(names, (16, 2, 8, 16)), dataset="shapes", batch_size=32)
    changes |= {"mixup": 0.2, "label_smoothing": 0.1, "warmup_epochs": 2}
    for seed, (accuracy, epochs) in enumerate([(0.75125, 30), (0.75375, 30), (0.5, 29)]):
        run = fake_run("hybrid", seed, accuracy, 0.9, **changes, epochs=epochs)
        (tmp_path / f"shapes-hybrid-seed{seed}.json").write_text(json.dumps(run))
    done = run_script("--benchmark", "--model", "hybrid", *small)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("benchmark-*.json")
    result = json.loads(path.read_text())
    assert list(result["models"]) == ["mixer", "hybrid"]
    table = path.with_suffix(".md").read_text()
    assert table in done.stdout
    # Of the runs with these settings alone, and empty where there is none.
    assert "| test accuracy percent |  | 75.25 |\n" in table
    for key, label in (("training_ms", "training ms"), ("parameters", "parameters")):
        (line,) = re.findall(rf"^\| {label} \| (.*) \|$", table, re.MULTILINE)
        for shown, row in zip(line.replace(",", "").split(" | "), result["models"].values()):
            assert float(shown) == pytest.approx(row[key], rel=5e-3)
    assert path.with_suffix(".png").stat().st_size > 10_000
    for name, row in result["models"].items():
        for measure in ("training", "step_without_input", "inference_of_batch", "inference_of_one"):
            assert 0 < row[f"{measure}_ms"] <= row[f"{measure}_ms_95th_percentile"]
            assert name != "mixer" or row[f"{measure}_over_mixer"] == 1
        assert row["training_images_per_second"] * row["training_ms"] == pytest.approx(32_000)
        share = result["matrix_products_ms"] / row["training_ms"]
        assert row["matrix_products_share_of_training"] == pytest.approx(share)
    assert {k: [x for x, _ in v] for k, v in result["scaling"].items()} == {
        name: [0.5, 1, 2] for name in ("num_blocks", "hidden_dim", "patch_size")
    }
    assert 0.1 < result["peak_memory_gigabytes"] < 100
    assert len(list(tmp_path.glob("*seed*"))) == 3


# ---------------------------------------------------------------------------------- results


def fake_run(model, seed, accuracy, best, **changes):
    settings = {"dataset": "cifar10", "model": model, "seed": seed}
    settings |= {name: default for name, (default, _, _) in hm.SETTINGS.items()} | changes
    history = {"train_loss": [2.0, 1.0], "test_loss": [2.1, 1.1], "test_accuracy": [0.1, accuracy]}
    return {"settings": settings, "parameters": 1234567, "final_test_accuracy": accuracy,
            "best_test_accuracy_selected_on_test": best, "seconds_per_epoch": 9.87,
            "device": "abacus", "backend": "beads", "history": history}  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_table_pairs_seeds_and_keeps_settings_apart(tmp_path, capsys):
    runs = [
        fake_run("mixer", 0, 0.70, 0.71), fake_run("mixer", 1, 0.74, 0.74),
        fake_run("hybrid", 1, 0.80, 0.81), fake_run("hybrid", 0, 0.78, 0.78),
        fake_run("hybrid", 2, 0.88, 0.90), fake_run("mixer", 7, 0.11, 0.11, epochs=2),
        *(fake_run(model, 7, 0.1, 0.1, epochs=2, hidden_dim=16, num_blocks=2, tokens_mlp_dim=8,
                   channels_mlp_dim=16, schedule="published") for model in hm.MODELS),
    ]  # fmt: skip
    for i, run in enumerate(runs):
        (tmp_path / f"{i}-seed0.json").write_text(json.dumps(run))
    (tmp_path / "half-seed0.json").write_text('{"settings"')
    (tmp_path / "old-seed0.json").write_text(json.dumps(fake_run("vit", 0, 0.1, 0.1)))
    table = hm.report(tmp_path)
    complaints = capsys.readouterr().err
    assert "half-seed0.json" in complaints and "old-seed0.json" in complaints
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    body = {(row[1], row[2]): row for row in rows[2:]}
    assert len(rows) == 2 + 3 + 6 and {key for key in body if "published" not in key[1]} == {
        ("mixer", "defaults"), ("hybrid", "defaults"), ("mixer", "epochs 2")}  # fmt: skip
    # Standard deviations by hand: of 70, 74 and of 80, 78, 88 and of the gains 8, 6.
    assert body["mixer", "defaults"][4:7] == ["72.00 ± 2.83", "", "0, 1"]
    assert body["hybrid", "defaults"][3:8] == [
        "1,234,567", "82.00 ± 5.29", "+7.00 ± 1.41", "0, 1, 2", "83.00 ± 6.24"]  # fmt: skip
    assert body["hybrid", "defaults"][8:] == ["82.27 (text)", "9.87", "abacus", "beads"]
    assert body["mixer", "epochs 2"][4] == "11.00"
    assert body["mixer", "epochs 2"][8] == ""  # The paper has 30.
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "accuracy.png", "cifar10_accuracy.png", "cifar10_loss.png"}  # fmt: skip
    assert (tmp_path / "table.md").read_text() == table


def test_no_two_curves_of_a_plot_look_the_same():
    keys = [("shapes", changed, m) for changed in ("", "epochs 2") for m in hm.MODELS]
    styles = hm.choose_styles(keys)
    assert len(set(styles.values())) == len(keys) == 12
    assert [styles[key] for key in keys[:6]] == list(hm.STYLES.values())


def test_the_authors_curves_have_the_papers_table_as_their_best_epochs():
    curves = json.loads((HERE / "results" / "published" / "authors.json").read_text())
    assert "github.com/GeorgeKanazi/HybridMixer" in curves.pop("source")
    assert len(curves) == 4
    for name, curve in curves.items():
        assert len(curve["train_loss"]) == len(curve["test_accuracy"]) == 30
        best = f"{100 * max(curve['test_accuracy']):.2f}"
        assert hm.PAPER[tuple(name.split("/"))].split()[0] == best


FOLDERS = sorted({path.parent for path in (HERE / "results").rglob("*-seed*.json")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_readme_and_table_agree_with_the_results(folder):
    table = hm.make_table(hm.load_groups(folder))
    assert (folder / "table.md").read_text() == table
    readme = (HERE / "README.md").read_text()
    for line in table.splitlines()[2:]:
        assert line in readme
    tables = "".join(path.read_text() for path in (HERE / "results").rglob("table.md"))
    rows = [line for line in readme.splitlines() if " CPU cores | " in line]
    assert rows and all(row in tables for row in rows)


def test_readmes_sentences_say_what_the_results_do():
    readme = " ".join((HERE / "README.md").read_text().split())
    groups, published = map(hm.load_groups, (HERE / "results", HERE / "results" / "published"))
    datasets = ("cifar10", "cifar100")  # All runs here are of seed 0.
    models = ("mixer", "hybrid", "interleaved")
    runs = [{model: groups[name, "", model][0] for model in models} for name in datasets]
    gains, losses, differences = (
        [100 * (run[a]["final_test_accuracy"] - run[b]["final_test_accuracy"]) for run in runs]
        for a, b in (("interleaved", "mixer"), ("mixer", "hybrid"), ("interleaved", "hybrid"))
    )
    for run in runs:
        mixer, hybrid = run["mixer"]["history"], run["hybrid"]["history"]
        assert hybrid["train_loss"][-1] < mixer["train_loss"][-1]
        assert hybrid["test_loss"][-1] > mixer["test_loss"][-1]
    both = ("mixer", "interleaved")
    cosine = [runs[0][model] for model in both]
    swinging = [published["cifar10", "schedule published", model][0] for model in both]
    authors = json.loads((HERE / "results" / "published" / "authors.json").read_text())
    authors = [authors[f"cifar10/{model}"] for model in both]
    ends = [100 * run["final_test_accuracy"] for run in swinging]
    schedule = [100 * run["final_test_accuracy"] - end for run, end in zip(cosine, ends)]
    theirs = [100 * curve["test_accuracy"][-1] for curve in authors]
    apart, ahead = (
        np.array(curve["train_loss"]) - run["history"]["train_loss"]
        for curve, run in zip(authors, swinging)
    )
    assert ahead.min() > 0
    cost = [(694_794 - 605_834) / gain for gain in gains]  # of the paper's parameter counts
    picked = max(
        100 * (run["best_test_accuracy_selected_on_test"] - run["final_test_accuracy"])
        for seeds in groups.values()
        for run in seeds.values()
    )
    interleaving = hm.load_groups(HERE / "results" / "interleaving")
    stem, *often = (
        interleaving["cifar10", "epochs 10", name][0]["accuracy"]
        for name in ("hybrid", "interleaved_3", "interleaved_4", "interleaved", "interleaved_1")
    )
    more = np.array(often) - stem
    assert list(more) == sorted(more, reverse=True)
    keys, recipe = ("dropout", "conv_residual", "kernel_size", "decay_of"), hm.RECIPES["strong"]
    parts = [seeds[0] for seeds in hm.load_groups(HERE / "results" / "parts").values()]
    part = {tuple(run["settings"][name] for name in keys): run["accuracy"] for run in parts}
    default, strong = part[0.15, False, 3, "all"], part[0, True, 3, "kernels"]
    assert len(part) == len(parts) == 7
    assert {**hm.DEFAULTS, **recipe, "warmup_epochs": 0, "epochs": 3, "validation_split": 0.1} in [
        {name: run["settings"][name] for name in hm.SETTINGS} for run in parts
    ]
    whole = [seeds[0] for seeds in hm.load_groups(HERE / "results" / "strong").values()]
    for run, name in zip(whole, datasets, strict=True):
        assert {**hm.DEFAULTS, **recipe, "dataset": name}.items() <= run["settings"].items()
        assert run["parameters"] <= 700_000
    reached = [run["accuracy"] for run in whole]
    paid = [new - run["interleaved"]["accuracy"] for new, run in zip(reached, runs)]
    test_loss = whole[1]["history"]["test_loss"]
    assert np.argmin(runs[1]["interleaved"]["history"]["test_loss"]) == 29
    for text in (
        f"it gains {paid[0]:.2f} points on CIFAR-10, which reaches {reached[0]:.2f} %, but no "
        f"more than {paid[1]:.2f} on CIFAR-100, at {reached[1]:.2f} %. There the test loss is "
        f"lowest after epoch {np.argmin(test_loss) + 1} and "
        f"{test_loss[-1] - min(test_loss):.2f} higher at the end",
        f"without dropout {part[0, False, 3, 'all'] - default:.2f} points are gained, by residual "
        f"convolutions {part[0.15, True, 3, 'all'] - default:.2f}, by both "
        f"{part[0, True, 3, 'all'] - default:.2f}; 5x5 filters lose "
        f"{default - part[0.15, False, 5, 'all']:.2f}, in the recipe (with "
        f"`--channels_mlp_dim 240`) {strong - part[0, True, 5, 'kernels']:.2f}, and are not "
        f"in it. The whole recipe but for its warm-up gains {strong - default:.2f}.",
        f"interleaved convolutions gain {gains[0]:.2f} points over the baseline on CIFAR-10 and "
        f"{gains[1]:.2f} on CIFAR-100",
        "the stem alone, to which its text gives the credit, loses "
        f"{losses[0]:.2f} and {losses[1]:.2f}.",
        f"costs {cost[0]:,.0f} parameters on CIFAR-10, {cost[1]:,.0f} on CIFAR-100",
        f"with which `mixer` ends {schedule[0]:.2f} and `interleaved` {schedule[1]:.2f} points "
        "higher on CIFAR-10",
        f"at {ends[0]:.2f} and {ends[1]:.2f} % after the last epoch, the authors' at "
        f"{theirs[0]:.2f} and {theirs[1]:.2f} %: interleaving gains {ends[1] - ends[0]:.2f} points "
        f"here and {theirs[1] - theirs[0]:.2f} there",
        f"train loss is at most {abs(apart).max():.3f} off in any epoch, that of `interleaved` "
        f"{ahead.min():.3f} to {ahead.max():.3f} lower",
        f"interleaved convolutions make {differences[0]:.2f} points of difference on CIFAR-10 and "
        f"{differences[1]:.2f} on CIFAR-100",
        f"that is up to {picked:.2f} points higher in the default runs",
        f"gain {more[0]:.2f} points over the stem alone after every 3rd block and {more[1]:.2f} "
        f"after every 4th, the four of the authors' code (after every 2nd) {more[2]:.2f}, eight of "
        f"them (after each) {more[3]:.2f}.",
    ):
        assert text in readme


@pytest.mark.parametrize(
    "path", sorted((HERE / "results").rglob("benchmark-*.json")), ids=lambda path: path.stem
)
def test_readme_shows_what_the_benchmark_has_measured(path):
    result = json.loads(path.read_text())
    table = hm.make_speed_table(result)
    assert path.with_suffix(".md").read_text() == table
    readme = (HERE / "README.md").read_text()
    assert table in readme
    if path.parent.name == "interleaving":  # Speed and accuracy in one table.
        for name, row in list(result["models"].items())[1:]:
            run = json.loads((path.parent / f"cifar10-{name}-seed0.json").read_text())
            assert row["test_accuracy_percent"] == pytest.approx(100 * run["final_test_accuracy"])
            assert row["parameters"] == run["parameters"]
        return
    assert f"results/{path.stem}.png" in readme
    assert result["device"] in readme and result["backend"] in readme
    assert f"{result['peak_memory_gigabytes']:.1f} GB" in readme
    assert f"{result['matrix_products_ms']:.0f} ms" in readme


def test_a_damaged_result_is_named(main, tmp_path):
    (tmp_path / "shapes-hybrid-seed0.json").write_text('{"settings": ')
    with pytest.raises(SystemExit, match="shapes-hybrid-seed0.json is damaged"):
        main()


def test_readmes_snippets_run(tmp_path):
    """Runs the Python in README.md, the last part on a wide grey picture."""
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 1))
    keras.utils.save_img(tmp_path / "picture.png", picture, scale=False)
    (tmp_path / "results").symlink_to(HERE / "results")
    (tmp_path / "hybrid_mixer.py").symlink_to(SCRIPT)
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for i, snippet in enumerate(snippets):
        path = tmp_path / f"snippet{i}.py"
        path.write_text(snippet)
        done = run_python(path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    names = json.loads((HERE / "results" / "cifar100-hybrid-seed0.json").read_text())["class_names"]
    assert done.stdout.split()[-1] in names and len(names) == 100


@pytest.mark.parametrize("path", sorted((HERE / "results").rglob("*.keras")), ids=lambda p: p.stem)
def test_committed_models_load_and_match_their_results(path):
    model = keras.saving.load_model(path)
    result = json.loads(path.with_suffix(".json").read_text())
    assert hm.count_parameters(model) == result["parameters"]
    name = result["settings"]["dataset"]
    if name != "shapes" and not prepared(name):
        pytest.skip(f"{name} is not prepared for tensorflow-datasets")
    _, (x, y), _ = load_data_once(name)
    accuracy = (model.predict(x, batch_size=500, verbose=0).argmax(1) == y).mean()
    assert accuracy == pytest.approx(result["final_test_accuracy"], abs=5e-4)
