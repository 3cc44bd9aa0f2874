"""Tests of hybrid_mixer.py against NumPy, closed forms and the paper's own counts."""

import ast
import colorsys
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import hybrid_mixer as hm

HERE = pathlib.Path(__file__).resolve().parent
SCRIPT = HERE / "hybrid_mixer.py"
RESULTS = HERE / "results"
SMALL = {"hidden_dim": 16, "num_blocks": 2, "tokens_mlp_dim": 8, "channels_mlp_dim": 16}
TINY = [f"--{name}={size}" for name, size in SMALL.items()]
TRAIN = "import pathlib, sys, test_hybrid_mixer as t; t.run_small(pathlib.Path(sys.argv[1]))"
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")  # As the script does: it is faster.


@pytest.fixture(autouse=True)
def seeded():
    """Chance is the same in every run of a test, and numbers are of full precision."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")


def start_python(*arguments, backend="tensorflow", cwd=HERE, **variables):
    """Starts Python in a fresh process, its output to be had as text."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "KERAS_BACKEND": backend, **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, cwd=cwd, **pipes)


def run_python(*arguments, **options):
    """Runs Python in a fresh process, which has to succeed; returns what it printed."""
    with start_python(*arguments, **options) as process:
        printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return printed


def settings_with(**changes):
    return {**hm.DEFAULTS, "dataset": "shapes", "model": "mixer", "seed": 0, **changes}


def losses(folder):
    """Returns `{file name: history without times}` of all results in `folder`."""
    read = {path.name: json.loads(path.read_text())["history"] for path in folder.glob("*.json")}
    return {n: {k: v for k, v in h.items() if "seconds" not in k} for n, h in read.items()}


def to_numpy(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def count_parameters(model):
    return sum(np.asarray(weight).size for weight in model.trainable_weights)


@pytest.fixture
def main(tmp_path):
    """Returns a function that does what the command line does, in this process."""
    if "epochs" not in flags.FLAGS:
        hm.define_flags()

    def main(*arguments):
        with flagsaver.flagsaver():
            hm.main(flags.FLAGS(["x", "--dataset=shapes", f"--output_dir={tmp_path}", *arguments]))

    return main


# --------------------------------------------------------------------- NumPy implementation
def np_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def np_layer_norm(x, gamma, beta):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta


def np_stem(x, weights, linear=False, residual=False):
    depthwise, pointwise = next(weights), next(weights)
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = [(i, j) for i in range(3) for j in range(3)]
    y = sum(padded[:, i : i + height, j : j + width] * depthwise[i, j, :, 0] for i, j in places)
    y = y @ pointwise[0, 0]
    if not linear:
        gamma, beta, mean, variance = (next(weights) for _ in range(4))
        y = np_gelu((y - mean) / np.sqrt(variance + 1e-5) * gamma + beta)
    return residual * x + y


def np_block(x, weights):
    gamma, beta, w1, b1, w2, b2 = (next(weights) for _ in range(6))
    y = np_layer_norm(x, gamma, beta)
    u = x + np.stack([(np_gelu(z.T @ w1 + b1) @ w2 + b2).T for z in y])
    gamma, beta, w3, b3, w4, b4 = (next(weights) for _ in range(6))
    return u + np_gelu(np_layer_norm(u, gamma, beta) @ w3 + b3) @ w4 + b4


# Behind which of eight blocks a model has convolutions; 0 is before the first.
PLACES = {
    "mixer": [],
    "hybrid": [0],
    "hybrid_late": [1],
    "hybrid_norm": [0],
    "hybrid_norm_late": [1],
    "hybrid_residual": [0],
    "interleaved": [0, 2, 4, 6, 8],
    "interleaved_no_stem": [2, 4, 6, 8],
    "interleaved_residual": [0, 2, 4, 6, 8],
    "interleaved_4": [0, 4, 8],
    "interleaved_3": [0, 3, 6],
    "interleaved_1": [0, 1, 2, 3, 4, 5, 6, 7, 8],
}
LINEAR = ("hybrid", "hybrid_late")


def np_model(name, images, weights, patch, blocks, order=slice(None)):
    weights = iter(weights)
    kernel, bias = next(weights), next(weights)
    batch, height, width, _ = images.shape
    rows, columns = height // patch, width // patch
    x = np.empty((batch, rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            cut = images[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            x[:, i, j] = cut.reshape(batch, -1) @ kernel.reshape(-1, kernel.shape[-1]) + bias
    x = x.reshape(batch, rows * columns, -1)[:, order]
    for i in range(blocks + 1):
        if i > 0:
            x = np_block(x.reshape(batch, rows * columns, -1), weights)
        if i in PLACES[name]:
            residual = name == "hybrid_residual" or name == "interleaved_residual" and i > 0
            x = x.reshape(batch, rows, columns, -1)
            x = np_stem(x, weights, linear=name in LINEAR, residual=residual)
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


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_stem_equals_numpy(linear, residual):
    layer = hm.ConvStem(linear, residual)
    layer.build((None, 5, 7, 6))
    weights = random_weights(layer)
    assert len(weights) == (2 if linear else 6)
    x = np.random.default_rng(1).normal(size=(3, 5, 7, 6))
    expected = np_stem(x, iter(weights), linear, residual)
    np.testing.assert_allclose(to_numpy(layer(x, training=False)), expected, atol=1e-4)
    if not linear:  # In training, the batch's own mean and variance count; a tenth of them stays.
        y = np_stem(x, iter(weights), linear=True)
        batch = [y.mean((0, 1, 2)), y.var((0, 1, 2))]
        expected = np_stem(x, iter([*weights[:4], *batch]), residual=residual)
        np.testing.assert_allclose(to_numpy(layer(x, training=True)), expected, atol=1e-4)
        moved = 0.9 * np.array(weights[4:]) + 0.1 * np.array(batch)
        np.testing.assert_allclose(layer.get_weights()[4:], moved, atol=1e-5)


def test_block_equals_numpy():
    layer = hm.MixerBlock(5, 11)
    layer.build((None, 12, 6))
    weights = random_weights(layer)
    x = np.random.default_rng(1).normal(size=(3, 12, 6))
    np.testing.assert_allclose(to_numpy(layer(x)), np_block(x, iter(weights)), atol=1e-4)


@pytest.mark.parametrize("name", PLACES)
def test_model_equals_numpy_with_the_weights_in_order(name):
    model = hm.build_model(name, (8, 12, 3), 7, 4, 6, 8, 5, 9)
    weights = random_weights(model)
    images = np.random.default_rng(1).normal(size=(3, 8, 12, 3))
    logits = to_numpy(model(images, training=False))
    assert logits.dtype == "float32" and set(PLACES) == set(hm.MODELS)
    np.testing.assert_allclose(logits, np_model(name, images, weights, 4, 8), atol=1e-4)


def test_the_texts_stem_and_the_patch_embedding_are_one_linear_map():
    model = hm.build_model("hybrid", (32, 32, 3), hidden_dim=6, num_blocks=1)
    kernel, bias, depthwise, pointwise = random_weights(model)[:4]
    folded = np.empty((12, 12, 3, 6))
    for i, j in np.ndindex(3, 3):  # Each of nine patches by its own weight of each channel.
        part = (kernel * depthwise[i, j, :, 0]) @ pointwise[0, 0]
        folded[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = part
    constant = bias * depthwise.sum((0, 1))[:, 0] @ pointwise[0, 0]
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype("float32")
    stem = keras.Model(model.inputs, model.get_layer("stem").output)
    tokens = to_numpy(stem(images))
    for i, j in np.ndindex(6, 6):  # Those that don't meet the border.
        around = images[:, 4 * i : 4 * i + 12, 4 * j : 4 * j + 12].reshape(2, -1)
        expected = around @ folded.reshape(-1, 6) + constant
        np.testing.assert_allclose(tokens[:, i + 1, j + 1], expected, rtol=1e-5, atol=1e-4)


def test_mixer_cannot_tell_that_patches_are_shuffled_but_convolutions_can(tmp_path):
    sizes = {"image_shape": (8, 12, 3), "hidden_dim": 6, "num_blocks": 2, "tokens_mlp_dim": 5}
    order = np.random.default_rng(7).permutation(6)
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 12, 3)).astype("uint8")
    mixer, shuffled = (hm.build_model("mixer", **sizes, shuffle_patches=i) for i in (0, 7))
    weights = random_weights(mixer)
    for block in (2, 14):  # Weights of places, in the order of the places: kernel, kernel, bias.
        for i, places in ((2, (order,)), (4, (slice(None), order)), (5, (order,))):
            weights[block + i] = weights[block + i][places]
    shuffled.set_weights(weights)
    np.testing.assert_allclose(shuffled(images / 255), mixer(images / 255), atol=1e-4)

    network = hm.build_model("interleaved", **sizes, shuffle_patches=7)
    weights = random_weights(network)
    trainer, classifier = hm.add_preprocessing(network, images)
    classifier.save(tmp_path / "model.keras")
    normal = (images - images.mean((0, 1, 2))) / images.std((0, 1, 2))
    expected = np_model("interleaved", normal, weights, 4, 2, order)
    assert np.abs(expected - np_model("interleaved", normal, weights, 4, 2)).max() > 0.02
    for model in (trainer, keras.saving.load_model(tmp_path / "model.keras")):
        np.testing.assert_allclose(model.predict(images, verbose=0), expected, atol=1e-3)


# ------------------------------------------------------------------------ sizes and weights
@pytest.mark.parametrize("name", PLACES)
def test_parameters_are_the_papers(name):
    model, convolutions = hm.build_model(name), len(PLACES[name])
    # The paper's 17,536 weights, and 256 of batch normalisation where there is one.
    expected = 605_834 + convolutions * (17_536 if name in LINEAR else 17_792)
    assert count_parameters(model) == expected
    assert model.output_shape == (None, 10)


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
    "layer, partial, shape",
    [
        (functools.partial(hm.ConvStem, residual=True), (None, None, None, 8), (2, 4, 6, 8)),
        (functools.partial(hm.ConvStem, linear=True), (None, None, None, 8), (2, 4, 6, 8)),
        (functools.partial(hm.MixerBlock, 5, 7, 0.3), (None, 24, 8), (2, 24, 8)),
    ],
)
def test_layers_build_alone_in_any_precision_and_round_trip(layer, partial, shape):
    built = layer(dtype="mixed_bfloat16")
    built.build(partial)
    count = len(built.weights)
    output = built(np.ones(shape), training=True)
    assert len(built.weights) == count > 0
    assert {w.dtype for w in built.weights} == {"float32"}
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    assert tuple(output.shape) == shape == built.compute_output_shape(shape)
    again = type(built).from_config(built.get_config())
    assert again.get_config() == built.get_config()
    again.build(shape)
    again.set_weights(built.get_weights())
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    assert keras.ops.convert_to_numpy(keras.ops.all(built(x) == again(x)))


@pytest.mark.parametrize(
    "layer, shape",
    [*((hm.ConvStem(), shape) for shape in ((None, 64, 8), (None, 8, 8, None))),
     *((hm.MixerBlock(4, 4), x) for x in ((None, None, 8), (None, 16, None), (8, 4, 4, 8)))],
)  # fmt: skip
def test_wrong_shapes_are_refused_with_what_was_received(layer, shape):
    with pytest.raises(ValueError, match=f"Received: input_shape={re.escape(str(shape))}"):
        layer.build(shape)


def test_what_cannot_be_built_is_named():
    for wrong in ({"tokens_mlp_dim": 0}, {"channels_mlp_dim": 2.0}, {"dropout": 1.0}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"`{name}` must be.*Received: {name}={value}"):
            hm.MixerBlock(**{"tokens_mlp_dim": 4, "channels_mlp_dim": 4, **wrong})
    with pytest.raises(hm.UserError, match="`model` must be one of mixer.*Received: model=vit"):
        hm.build_model("vit")
    with pytest.raises(hm.UserError, match="32x30 pixels.*--patch_size.*Received: 4"):
        hm.build_model(image_shape=(32, 30, 3))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    "make, shape", [(hm.ConvStem, (5, 7, 4)), (functools.partial(hm.MixerBlock, 3, 5), (6, 4))]
)
def test_a_frozen_layer_learns_neither_weights_nor_statistics(make, shape, loaded, tmp_path):
    inputs, layer = keras.Input(shape), make(trainable=False, name="layer")
    model = keras.Model(inputs, layer(inputs))
    if loaded:
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(2, 3, (8, *shape)).astype("float32")
    np.testing.assert_array_equal(model(x, training=True), model(x))
    weights = model.get_weights()
    for trainable in (False, True):
        model.get_layer("layer").trainable = trainable
        model.compile("adam", "mse")
        model.fit(x, x + 1, verbose=0)
        same = [np.array_equal(old, new) for old, new in zip(weights, model.get_weights())]
        assert same == [not trainable] * len(weights)


@pytest.mark.parametrize("mlp", ["token", "channel"])
def test_an_mlp_drops_after_each_of_its_dense_layers(mlp):
    block = hm.MixerBlock(30, 30, dropout=0.5)
    block.build((None, 30, 30))
    for weight in block.trainable_weights:
        weight.assign(np.zeros(weight.shape))
    getattr(block, f"{mlp}_hidden").bias.assign(np.ones(30))
    getattr(block, f"{mlp}_output").kernel.assign(np.eye(30))
    y = np.asarray(block(np.zeros((50, 30, 30)), training=True))
    np.testing.assert_allclose(np.unique(y), [0, 4 * np_gelu(1.0)], rtol=1e-5)  # Doubled twice.
    assert (y == 0).mean() == pytest.approx(0.75, abs=0.02)


# --------------------------------------------------------------------- copied, saved, loaded
STANDALONE = """
import keras
from keras import layers, ops

{source}

import numpy as np
x = np.random.default_rng(0).normal(size=(64, 3, 5, 8)).astype("float32")
y = x.mean((1, 2))[:, :2]
compiled = {{"jax": (True,), "torch": (False,)}}.get(keras.backend.backend(), (False, True))
for precision, jit in ((p, j) for p in ("float32", "mixed_bfloat16") for j in compiled):
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_dtype_policy(precision)
    stem, block = ConvStem(), MixerBlock(6, 10, dropout=0.2)
    stem.build((None, 3, 5, 8))
    block.build((None, 15, 8))
    inputs = keras.Input((3, 5, 8))
    tokens = block(layers.Reshape((15, 8))(stem(inputs)))
    outputs = layers.Dense(2, dtype="float32")(layers.Flatten()(tokens))
    model = keras.Model(inputs, outputs)
    model.compile("adam", "mse", jit_compile=jit)
    history = model.fit(x, y, epochs=15, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0], (precision, jit, history)
    model.save("copied.keras")
    again = keras.saving.load_model("copied.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
print(keras.backend.backend(), keras.__version__)
"""


def write_copied_layers(folder):
    """Writes a script with copies of both layers, which trains, saves and loads them."""
    text = SCRIPT.read_text()
    parts = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name in ("ConvStem", "MixerBlock"):
            first = min(d.lineno for d in node.decorator_list) - 1
            parts.append("\n".join(text.splitlines()[first : node.end_lineno]))
    path = pathlib.Path(folder) / "copied.py"
    path.write_text(STANDALONE.format(source="\n\n\n".join(parts)))
    return path


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_layers_run_copied_into_a_file_of_their_own(tmp_path, backend):
    """`.ci/run` runs the same file with older versions of Keras."""
    pytest.importorskip(backend)
    path = write_copied_layers(tmp_path)
    assert run_python(path, backend=backend, cwd=tmp_path).split()[-2] == backend


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_layers_equal_numpy_on_other_backends_too(backend):
    pytest.importorskip(backend)
    code = (
        "import sys; sys.path.insert(0, '.'); import test_hybrid_mixer as t;"
        "t.test_stem_equals_numpy(False, True); t.test_stem_equals_numpy(True, False);"
        "t.test_block_equals_numpy();"
        "t.test_model_equals_numpy_with_the_weights_in_order('interleaved')"
    )
    run_python("-c", code, backend=backend)


def test_a_users_keras_json_changes_no_result(tmp_path, whole):
    config = {"floatx": "float64", "image_data_format": "channels_first", "epsilon": 1e-7}
    (home := tmp_path / "home").mkdir()
    (home / "keras.json").write_text(json.dumps({**config, "backend": "tensorflow"}))
    run_python("-c", TRAIN, tmp_path, KERAS_HOME=str(home))
    assert losses(tmp_path) == losses(whole[0])


def test_what_torch_has_trained_is_as_accurate_elsewhere(tmp_path):
    pytest.importorskip("torch")
    run_python("-c", TRAIN, tmp_path, backend="torch")
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["backend"].startswith("torch ") and len(result["history"]["train_loss"]) == 4
    images, labels = hm.draw_shapes(200, 40)[1]
    logits = keras.saving.load_model(path.with_suffix(".keras")).predict(images, verbose=0)
    assert (logits.argmax(1) == labels).mean() == pytest.approx(result["final_test_accuracy"])


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_saved_model_loads_in_a_fresh_process_and_takes_pixels(tmp_path, backend):
    images = np.random.default_rng(0).integers(0, 256, (1500, 8, 12, 3)).astype("uint8")
    network = hm.build_model("interleaved", (8, 12, 3), 4, 4, 16, 2, 5, 9)
    weights = random_weights(network)
    trainer, classifier = hm.add_preprocessing(network, images)
    classifier.save(tmp_path / "model.keras")
    pixels = images.astype("float64")
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    expected = np_model("interleaved", (pixels - mean) / std, weights, 4, 2)
    np.testing.assert_allclose(trainer.predict(images, verbose=0), expected, atol=1e-3)
    assert np.abs(np.asarray(trainer(images, training=True)) - expected).max() > 1e-2
    np.save(tmp_path / "images.npy", images)
    code = (  # Importing the script sets, defines and prints nothing.
        "import os, sys, keras; os.environ.pop('TF_CPU_ALLOCATOR_USE_BFC');"
        "before = {**os.environ}; import hybrid_mixer; assert before == os.environ;"
        "assert 'tensorflow_datasets' not in sys.modules;"
        "from absl import flags; assert 'epochs' not in flags.FLAGS;"
        "import numpy as np; folder = sys.argv[1];"
        "model = keras.saving.load_model(folder + '/model.keras', safe_mode=True);"
        "logits = model.predict(np.load(folder + '/images.npy'), verbose=0);"
        "np.save(folder + '/logits.npy', logits)"
    )
    assert run_python("-c", code, tmp_path, backend=backend) == ""
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-3)


# -------------------------------------------------------------------------------------- data
def augmentation(shape, kind):
    """Returns the layer of that type from the training model of images of that shape."""
    images = np.random.default_rng(0).integers(0, 256, (9, *shape)).astype("uint8")
    network = keras.Sequential([keras.Input(shape), keras.layers.Flatten()])
    trainer, _ = hm.add_preprocessing(network, images)
    (layer,) = (layer for layer in trainer.layers if isinstance(layer, kind))
    return layer


def test_shift_is_up_to_four_whole_pixels_each_image_by_itself():
    layer = augmentation((32, 48, 3), keras.layers.RandomTranslation)
    x = np.zeros((9000, 32, 48, 3), "float32")
    x[:, 10, 20] = 255
    shifted = np.asarray(layer(x, training=True))
    images, rows, columns, _ = np.nonzero(shifted)
    assert len(images) == 3 * 9000 and set(shifted[shifted > 0]) == {255}
    for shift in (rows[::3] - 10, columns[::3] - 20):
        values, counts = np.unique(shift, return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert counts.min() > 850 and counts.max() < 1150
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.05
    assert not np.asarray(layer(np.full((50, 32, 48, 3), 9.0), training=True)).all()


def test_colour_jitter_equals_its_four_steps_pixel_by_pixel(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (8, 5, 6, 3)).astype("float32")
    factors = np.array([*itertools.product((0.9, 1.1), repeat=3)]).T  # Some pixels are clipped.
    turns = np.linspace(-0.02, 0.02, 8)
    drawn = [factors.reshape(3, 8, 1, 1, 1), turns.reshape(8, 1, 1, 1)]
    uniform = mock.Mock(side_effect=[values.astype("float32") for values in drawn])
    monkeypatch.setattr(keras.random, "uniform", uniform)
    seen, luma = to_numpy(hm.ColorJitter()(images, training=True)), [0.299, 0.587, 0.114]
    for x, y, (brightness, contrast, saturation), turn in zip(images, seen, factors.T, turns):
        x = np.clip(brightness * x, 0, 255)
        x = np.clip((x @ luma).mean() * (1 - contrast) + contrast * x, 0, 255)
        x = np.clip((x @ luma)[..., None] * (1 - saturation) + saturation * x, 0, 255)
        for pixel, jittered in zip(x.reshape(-1, 3) / 255, y.reshape(-1, 3) / 255):
            hue, *rest = colorsys.rgb_to_hsv(*pixel)
            expected = colorsys.hsv_to_rgb((hue + turn) % 1, *rest)
            np.testing.assert_allclose(jittered, expected, atol=2e-5)
    asked = [(tuple(map(int, shape)), *limits) for (shape, *limits), _ in uniform.call_args_list]
    assert asked == [((3, 8, 1, 1, 1), 0.9, 1.1), ((8, 1, 1, 1), -0.02, 0.02)]


def test_erasing_takes_a_box_from_one_image_in_ten():
    layer = augmentation((32, 32, 3), keras.layers.RandomErasing)
    y = np.asarray(layer(np.ones((10000, 32, 32, 3), "float32"), training=True))
    erased = (y == 0).all(-1)
    which = erased.any((1, 2))
    assert 0.085 < which.mean() < 0.115
    area = erased[which].mean((1, 2))
    assert 0.01 < area.min() < 0.06 and 0.27 < area.max() < 0.36


def test_boxes_have_the_mean_colour_but_what_shift_and_turn_uncover_is_black():
    images = np.random.default_rng(0).integers(50, 206, (99, 16, 16, 3)).astype("uint8")
    network = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Reshape((16, 16, 3))])
    trainer, _ = hm.add_preprocessing(network, images)
    white = np.full((1000, 16, 16, 3), 255, "uint8")
    seen = to_numpy(trainer(white, training=True))
    boxes = (seen == 0).all(-1).any((1, 2))  # Normalised, the mean is zero.
    assert 0.06 < boxes.mean() < 0.14
    black = -images.mean((0, 1, 2)) / images.std((0, 1, 2))
    np.testing.assert_allclose(seen.min((0, 1, 2)), black, rtol=1e-4)


def test_shapes_are_the_same_each_time_balanced_and_of_the_promised_form():
    (x, y), (x_test, y_test), names = hm.draw_shapes(200, 100, seed=3)
    np.testing.assert_array_equal(x, hm.draw_shapes(200, 100, seed=3)[0][0])
    assert (hm.draw_shapes(200, 100, seed=4)[0][0] != x).any()
    assert x.shape == (200, 32, 32, 3) and x.dtype == "uint8" and len(x_test) == 100
    assert np.bincount(np.concatenate([y, y_test])).tolist() == [30] * 10
    forms = set()  # Of the pixels that have a picture's most frequent colour.
    for picture, label in zip(x, y):
        colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
        places = np.argwhere((picture == colours[counts.argmax()]).all(-1))
        forms.add((label, (places - places.min(0)).tobytes()))
    assert len(forms) == len({form for _, form in forms}) == len(set(names)) == 10


@functools.cache
def load_prepared(name):
    """Loads a data set if that takes no network; if it does, skips the test."""
    if not tfds.builder(name).is_prepared():
        pytest.skip(f"{name} is not prepared for tensorflow-datasets")
    return hm.load_data(name)


@pytest.mark.parametrize(
    "name, classes, mean, first",  # Means of the train split as other projects state them.
    [("cifar10", 10, (0.4914, 0.4822, 0.4465), "airplane"),
     ("cifar100", 100, (0.5071, 0.4865, 0.4409), "apple")],
)  # fmt: skip
def test_real_cifar_is_what_it_should_be(name, classes, mean, first):
    (x, y), (x_test, y_test), names = load_prepared(name)
    assert x.shape == (50_000, 32, 32, 3) and x_test.shape == (10_000, 32, 32, 3)
    assert x.dtype == x_test.dtype == "uint8"
    assert len(names) == classes and names[0] == first
    assert np.bincount(y).tolist() == [50_000 // classes] * classes
    assert np.bincount(y_test).tolist() == [10_000 // classes] * classes
    np.testing.assert_allclose(x.mean((0, 1, 2)) / 255, mean, atol=2e-4)


def test_unreachable_data_says_what_to_do(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(time, "sleep", mock.Mock())
    for name in ("mnist", "mnits", "no/such folder", "mnist:9.9.9"):
        told = f"{name!r} is unavailable .*: fix that, or take --dataset shapes.* ./pets"
        with pytest.raises(hm.UserError, match=told):
            hm.load_data(name, str(tmp_path))


def test_what_is_unavailable_is_told_before_any_training(main, monkeypatch, tmp_path):
    monkeypatch.setattr(hm, "train", mock.Mock())
    fake_run(tmp_path, "hybrid", 0, 0.5, dataset="data of a finished run")
    with pytest.raises(SystemExit, match="'mnits' is unavailable"):
        main("--dataset=data of a finished run,shapes,mnits")
    assert not hm.train.called
    main("--dataset=data of a finished run,shapes")
    assert hm.train.call_count == 1


class Tiles(tfds.core.GeneratorBasedBuilder):
    """Dark and bright tiles."""

    VERSION = tfds.core.Version("1.0.0")
    shape, dtype, counts = (8, 12, 1), np.uint8, {"train": 60, "validation": 9, "test": 20}

    def _info(self):
        names = {"image": tfds.features.Image(shape=self.shape, dtype=self.dtype)}
        names["label"] = tfds.features.ClassLabel(names=["dark", "bright"])
        features, keys = tfds.features.FeaturesDict(names), ("image", "label")
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=keys)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.counts}

    def _generate_examples(self, split):
        for i in range(self.counts[split]):
            yield i, {"image": np.full((8, 12, 1), 40 + 170 * (i % 2), "uint8"), "label": i % 2}


class TilesOfSeveralSizes(Tiles):
    shape = (None, None, 1)


class TilesWithoutTest(Tiles):
    counts = {"train": 60}


class TilesWithoutPairs(Tiles):
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=super()._info().features)


def test_other_data_sets_of_tfds_load_and_train_also_grey_ones(tmp_path):
    data = hm.load_data("tiles", str(tmp_path / "data"))
    (x, y), (x_test, y_test), names = data
    assert x.shape == (60, 8, 12, 1) and len(x_test) == 20 and names == ["dark", "bright"]
    np.testing.assert_array_equal(x[:, 0, 0, 0] > 100, y == 1)
    changes = {"num_blocks": 1, "batch_size": 16, "epochs": 8, "precision": "mixed_float16"}
    settings = {"dataset": "tiles/8x12", "model": "hybrid", "seed": 0, **changes}
    assert hm.train(settings, data, tmp_path)["final_test_accuracy"] == 1.0
    name = "tiles_8x12-hybrid-epochs_8-batch_size_16-num_blocks_1-precision_mixed_float16-seed0"
    assert (tmp_path / f"{name}.json").exists()
    assert hm.build_model(**SMALL).output.dtype == "float32"  # Or large logits would overflow.


@pytest.mark.parametrize("name", ["tiles_of_several_sizes", "tiles_without_test", "shapes"])
def test_a_last_share_of_train_can_be_held_out_from_any_data_set(name, tmp_path):
    sizes = {"image_size": 5, "validation_split": 0.09}  # Of 60 images 5.4: that makes 6.
    (x, y), (x_test, y_test), _ = hm.load_data(name, str(tmp_path), **sizes)
    if name != "shapes":  # Scaled, tiles stay as dark or bright as they are.
        assert x.shape == (54, 5, 5, 3) and x_test.shape == (6, 5, 5, 3)
        for images, labels in ((x, y), (x_test, y_test)):
            np.testing.assert_array_equal(images[:, 2, 2, 0], 40 + 170 * labels)
    else:
        assert x.shape == (4550, 5, 5, 3) and x_test.shape == (450, 5, 5, 3)
        np.testing.assert_array_equal(np.concatenate([y, y_test]), hm.draw_shapes()[0][1])


def test_data_that_does_not_serve_is_refused_before_a_download(tmp_path):
    with pytest.raises(hm.UserError, match="'tiles_without_pairs' is un.*it has no pairs of an"):
        hm.load_data("tiles_without_pairs", str(tmp_path))
    with pytest.raises(hm.UserError, match="several sizes, so give an --image_size"):
        hm.load_data("tiles_of_several_sizes", str(tmp_path))
    assert not list(tmp_path.glob("*/*"))


def test_a_picture_is_fitted_upright_on_white_cut_to_a_square_and_smoothed():
    pixels = np.zeros((20, 40, 4), "uint8")
    pixels[:, 10:20] = [255, 0, 0, 255]  # What is opaque is red and, cut, the left half.
    fitted = hm.fit_picture(Image.fromarray(pixels), 10)
    assert fitted.shape == (10, 10, 3) and fitted.dtype == "uint8"
    assert (fitted[:, 1:4] == [255, 0, 0]).all() and (fitted[:, 6:] == 255).all()
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 3  # Upside down.
    np.testing.assert_array_equal(hm.fit_picture(turned, 10), fitted[::-1, ::-1])
    stripes = Image.fromarray(np.tile(np.array([0, 255], "uint8"), (64, 32)))
    assert np.ptp(hm.fit_picture(stripes, 8)[2:-2, 2:-2].astype(int) - 128) < 20
    with pytest.raises(ValueError, match="8 bits"):
        hm.fit_picture(Image.fromarray(np.full((8, 8), 999, "uint16")), 4)


def put_pictures(folder, kinds=("blue", "red"), splits=("train", "test"), count=8):
    """Puts pictures of several sizes and formats into `folder/SPLIT/KIND/`."""
    rng = np.random.default_rng(len(folder.parent.name))
    endings = itertools.cycle(["jpg", "PNG", "webp", "gif", "bmp", "tiff", "jpeg"])
    for split, kind, i in itertools.product(splits, kinds, range(count)):
        path = folder / split / kind / f"{i:02}.{next(endings)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = rng.integers(0, 100, (*rng.integers(9, 50, 2), 3))
        picture[..., 2 if kind == "blue" else 0] += 150
        Image.fromarray(picture.astype("uint8")).save(path)
    return folder


def test_a_folder_of_pictures_trains_whatever_its_name(main, tmp_path):
    pictures = put_pictures(tmp_path / "a" / ".my $pets|")
    (pictures / "train" / ".ipynb_checkpoints").mkdir()  # Neither a class
    (pictures / "train" / ".ipynb_checkpoints" / "01.png").write_text("")
    (pictures / "train" / "red" / "._01.jpg").write_text("")  # nor a picture is hidden.
    (pictures / "train" / "red" / "notes.txt").write_text("no picture")
    command = [f"--dataset={pictures}", "--image_size=8", "--epochs=20", "--batch_size=8", *TINY]
    main(*command)
    (path,) = tmp_path.glob("_my__pets__*-hybrid-epochs_20-*image_size_8-seed0.json")
    result = json.loads(path.read_text())
    assert result["class_names"] == ["blue", "red"] and result["final_test_accuracy"] == 1.0
    made = {*command, "--seed=0", "--model=hybrid"}
    assert set(shlex.split(result["command"])[2:]) == made
    rows = (tmp_path / "table.md").read_text().splitlines()[:3]
    assert [row.count("|") for row in rows] == [4] * 3
    (x, y), (x_test, _), _ = hm.load_data(str(pictures), None, 8)
    assert x.shape == (16, 8, 8, 3) and len(x_test) == 16 and x.dtype == "uint8"
    np.testing.assert_array_equal(x[..., 0].mean((1, 2)) > x[..., 2].mean((1, 2)), y == 1)
    held_out = hm.load_data(str(pictures), None, 8, 0.25)[1][1]
    assert len(held_out) == 4 and set(held_out) == {0, 1}


def test_folders_are_told_apart_by_their_pictures(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = mock.Mock()
    monkeypatch.setattr(hm, "train", train)
    monkeypatch.setattr(hm, "report", mock.Mock())
    for folder in ("a/pets", "bb/pets", "./shapes"):
        put_pictures(tmp_path / folder)
    main("--dataset=a/pets,bb/pets,./shapes,shapes", "--image_size=8", "--model=mixer")
    names = [call.args[0]["dataset"] for call in train.call_args_list]
    assert len(set(names)) == 4 and names[-1] == "shapes"
    assert [re.sub("_[0-9a-f]{8}$", "", name) for name in names[:3]] == ["pets", "pets", "shapes"]
    assert len(train.call_args_list[2].args[1][2]) == 2  # The folder's classes.
    (tmp_path / "a" / "pets" / "train" / "red" / "00.PNG").unlink()
    main("--dataset=a/pets", "--image_size=8", "--model=mixer")
    assert train.call_args.args[0]["dataset"] not in names  # Neither are its pictures.


def test_what_is_wrong_with_a_folder_is_told_by_name(tmp_path):
    pictures = put_pictures(tmp_path / "pets")

    def told(image_size=8):
        with pytest.raises(hm.UserError) as caught:
            hm.load_data(str(pictures), None, image_size)
        return str(caught.value)

    assert "several sizes: give an --image_size" in told(0)
    broken = [pictures / "test" / "red" / name for name in ("01.png", "02.webp")]
    content = [*pictures.glob("test/red/*.webp")][0].read_bytes()
    for path, damage in zip(broken, (b"", content[:40])):
        path.write_bytes(damage)
    assert "Fix or delete" in told() and all(str(path) in told() for path in broken)
    for path in broken:
        path.unlink()
    put_pictures(pictures, ["cow"], ["test"])  # A class that train/ lacks,
    assert re.search(f"{pictures}/test needs pictures.* Wrong: cow.", told())
    put_pictures(pictures, ["cow", "dog"], ["train"])  # one that test/ lacks,
    (pictures / "train" / "empty").mkdir()
    assert re.search(f"{pictures}/train needs pictures.* Wrong: empty.", told())
    (pictures / "train" / "empty").rmdir()
    assert re.search(f"{pictures}/test needs pictures.* Wrong: dog.", told())
    (pictures / "test").rename(pictures / "Test")
    assert "--validation_split" in told()
    assert len(hm.load_data(str(pictures), None, 8, 0.25)[1][0]) == 8
    single = put_pictures(tmp_path / "single", ["cat"])
    with pytest.raises(hm.UserError, match="single/train needs two folders"):
        hm.load_data(str(single), None, 8)


def test_images_labels_and_settings_that_do_not_serve_are_told(tmp_path):
    images, labels = np.zeros((6, 8, 8, 3), "uint8"), np.arange(6) % 2
    good = images, labels
    for wrong in ((images[:, :4], labels), (images / 255, labels), (images, labels - 1),
                  (images, labels + 1), (images, np.eye(2)[labels])):  # fmt: skip
        with pytest.raises(hm.UserError, match="test split must be uint8.* labels from 0"):
            hm.train(settings_with(**SMALL), (good, wrong, ["x", "y"]), tmp_path)
    with pytest.raises(hm.UserError, match="Settings are those of --help, not dropuot, epoch"):
        hm.train(settings_with(epoch=1, dropuot=0), (good, good, ["x", "y"]), tmp_path)
    assert not [*tmp_path.iterdir()]


# ---------------------------------------------------------------------------------- training
@pytest.mark.parametrize("schedule, half_period", [("cosine", 4 * 25), ("published", 30)])
def test_learning_rate_follows_its_closed_form(schedule, half_period):
    settings = settings_with(schedule=schedule, epochs=4, batch_size=2, **SMALL)
    optimizer = hm.make_models(settings, np.zeros((49, 8, 8, 3), "uint8"), 4)[1].optimizer
    for step in range(200):
        optimizer.iterations.assign(step)
        expected = 3e-3 * np.cos(np.pi * step / (2 * half_period)) ** 2
        np.testing.assert_allclose(optimizer.learning_rate, expected, atol=1e-8)


@pytest.mark.parametrize("gradient", [0.0, 1e-7])
def test_a_step_of_adamw_decays_every_weight(gradient):
    settings = settings_with(model="interleaved", learning_rate=0.1, weight_decay=0.5, **SMALL)
    images = np.zeros((24, 8, 8, 3), "uint8")
    network, trainer, _ = hm.make_models(settings, images, 4)
    random_weights(network)
    weights = network.trainable_weights
    before = [np.asarray(weight) for weight in weights]
    trainer.optimizer.apply([np.full(weight.shape, gradient, "float32") for weight in weights])
    scaled = math.sqrt(0.001) * gradient  # At the first step, of the second moment's average.
    step = 0.1 * scaled / (scaled + 1e-8)
    for weight, old in zip(weights, before):
        expected = old * 0.95 - step
        np.testing.assert_allclose(np.asarray(weight), expected, 1e-5, 1e-6, err_msg=weight.path)


def run_small(folder, **changes):
    """Trains a small model on few shapes in this process; returns the result."""
    folder.mkdir(exist_ok=True)
    settings = settings_with(model="interleaved", seed=3, epochs=4, batch_size=64, **SMALL)
    return hm.train({**settings, **changes}, hm.draw_shapes(200, 40), folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing has stopped, what `fit` and what `evaluate` were given.

    With the arguments of `fit` come the states of all generators of random numbers.
    """
    folder, calls, fit = tmp_path_factory.mktemp("whole"), [], keras.Model.fit
    evaluate = mock.patch.object(
        keras.Model, "evaluate", autospec=True, side_effect=keras.Model.evaluate
    )

    def spy(self, x, **options):
        states = [v for v in self.non_trainable_variables if v.name == "seed_generator_state"]
        calls.append((x, options, np.array([to_numpy(state) for state in states])))
        return fit(self, x, **options)

    with mock.patch.object(keras.Model, "fit", spy), evaluate as tested:
        run_small(folder)
    return folder, calls, [call.kwargs["x"] for call in tested.call_args_list]


def test_each_epoch_is_one_fit_over_all_images_in_an_order_of_its_own(whole):
    ((x, y), test, _), (_, calls, tests) = hm.draw_shapes(200, 40), whole
    assert [options["initial_epoch"] for _, options, _ in calls] == [0, 1, 2, 3]
    for i, (dataset, options, _) in enumerate(calls):
        order = np.random.default_rng([3, i]).permutation(200)
        assert check_batches(dataset, x[order], y[order]) == [64, 64, 64, 8]
        assert options["shuffle"] is False and options["epochs"] == 4
    assert [check_batches(dataset, *test) for dataset in tests] == [[40]] * 4


def test_chance_starts_anew_each_epoch_from_seed_and_epoch_alone(whole):
    for i, (_, _, states) in enumerate(whole[1]):
        # Five layers of augmentation and two blocks' dropout have one each.
        expected = np.random.default_rng([3, i, 1]).integers(2**32, size=(7, 2), dtype="uint32")
        np.testing.assert_array_equal(states, expected)


def check_batches(dataset, images, labels):
    """Asserts that these are a data set's images and labels; returns its batches' sizes."""
    batches = list(dataset)
    np.testing.assert_array_equal(np.concatenate([part for part, _ in batches]), images)
    np.testing.assert_array_equal(np.concatenate([part for _, part in batches]), labels)
    assert dataset.options().autotune.enabled is False
    return [len(part) for _, part in batches]


def test_a_result_says_what_was_reached(whole):
    (path,) = whole[0].glob("*.json")
    result = json.loads(path.read_text())
    history = result["history"]
    assert {len(values) for values in history.values()} == {4}
    assert result["final_test_accuracy"] == history["test_accuracy"][-1]
    assert result["backend"].startswith("tensorflow") and result["device"] in result["processor"]
    assert result["keras"] == keras.__version__ and result["python"] in sys.version
    assert all(0 < t < u for t, u in zip(history["train_seconds"], history["seconds"]))
    assert set(result["predict_ms"]) == {"1", "128"} and min(result["predict_ms"].values()) > 0
    assert set(shlex.split(result["command"])) == {
        "python", "hybrid_mixer.py", "--dataset=shapes", "--seed=3", "--model=interleaved",
        "--epochs=4", "--batch_size=64", *TINY}  # fmt: skip
    model = keras.saving.load_model(path.with_suffix(".keras"))
    assert not model.compiled and result["parameters"] == count_parameters(model)
    _, (images, labels), _ = hm.draw_shapes(200, 40)
    logits = model.predict(images, verbose=0).astype("float64")
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    loss = -logits[np.arange(40), labels].mean()
    assert loss == pytest.approx(history["test_loss"][-1], rel=1e-4)


@pytest.fixture(scope="module")
def whole_on_jax(tmp_path_factory):
    """The folder of a run on JAX that nothing has stopped."""
    pytest.importorskip("jax")
    folder = tmp_path_factory.mktemp("jax")
    run_python("-c", TRAIN, folder, backend="jax")
    return folder


def wait_for(condition, process):
    while not condition() and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_killed_run_ends_as_one_that_was_never_stopped(backend, tmp_path, request):
    jax = backend == "jax"
    folder = request.getfixturevalue("whole_on_jax") if jax else request.getfixturevalue("whole")[0]
    process = start_python("-c", TRAIN, tmp_path, backend=backend)
    wait_for(lambda: list(tmp_path.glob(".shapes*.npz")), process)
    process.kill()
    process.communicate()
    assert not list(tmp_path.glob("*.json")), "the run ended before it could be killed"
    printed = run_python("-c", TRAIN, tmp_path, backend=backend)
    assert re.search(" [1-4] epochs done before", printed)
    assert losses(tmp_path) == losses(folder)


def test_several_devices_share_batches_and_change_no_history(whole_on_jax, tmp_path):
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run_python("-c", TRAIN, tmp_path, backend="jax", **devices)
    (path,) = tmp_path.glob("*.json")
    results = [json.loads(file.read_text()) for file in (whole_on_jax / path.name, path)]
    assert [result["devices"] for result in results] == [1, 4]
    for key in ("train_loss", "test_loss"):
        one, four = (result["history"][key] for result in results)
        np.testing.assert_allclose(one, four, rtol=1e-4)


@pytest.mark.parametrize("damage", ["half", "another model's", "of other images"])
def test_a_checkpoint_that_does_not_fit_is_an_error_and_left_alone(damage, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(keras.Model, "save", mock.Mock(side_effect=KeyboardInterrupt))
        run_small(tmp_path, epochs=1)
    (checkpoint,) = tmp_path.glob(".shapes*.npz")
    if damage == "half":
        checkpoint.write_bytes(checkpoint.read_bytes()[:999])
    elif damage == "another model's":
        monkeypatch.setitem(hm.MODELS, "interleaved", {})
    else:
        monkeypatch.setattr(hm, "fingerprint", lambda data: "another")
    content = checkpoint.read_bytes()
    with pytest.raises(hm.UserError, match="npz doesn't fit this model or these images"):
        run_small(tmp_path, epochs=1)
    assert checkpoint.read_bytes() == content


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(hm.UserError, match="try a smaller --learning_rate"):
        run_small(tmp_path, learning_rate=1e30)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- commands
@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder with results of a small sweep on `shapes`, and what the command printed."""
    folder = tmp_path_factory.mktemp("swept")
    command = ["--dataset=shapes", "--model=mixer,hybrid", "--seed=0,4294967295", "--epochs=2"]
    return folder, command, run_python(SCRIPT, *command, f"--output_dir={folder}", *TINY)


def test_sweep_writes_results_models_plots_and_table(swept):
    folder, _, printed = swept
    end = "epochs_2-hidden_dim_16-num_blocks_2-tokens_mlp_dim_8-channels_mlp_dim_16-seed"
    names = {f"shapes-{m}-{end}{s}" for m in ("mixer", "hybrid") for s in (0, 4294967295)}
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}{ending}" for name in names for ending in (".json", ".keras")),
        "accuracies.png", "shapes_curves.png", "shapes_blocks.png", "table.md"}  # fmt: skip
    assert (folder / "table.md").read_text() in printed
    assert ("NO GPU FOUND" in printed) == (" CPU cores, Keras " in printed)
    assert "parameters, 0 epochs done before" in printed and "Epoch 2/2" in printed
    assert "\b" not in printed and len(printed.splitlines()) < 50  # A file takes no moving bar.


def test_a_notebook_can_run_the_script_twice(tmp_path):
    code = """
import runpy, sys
for seed in (["--seed=7"], []):  # The second run must not keep the first one's flags.
    try:
        sys.argv[1:] = ["--dataset=shapes", "--epochs=1", *seed, *sys.argv[-5:]]
        runpy.run_path("hybrid_mixer.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
"""
    run_python("-c", code, f"--output_dir={tmp_path}", *TINY)
    assert sorted(path.stem[-1] for path in tmp_path.glob("*.json")) == ["0", "7"]


def test_a_run_alone_equals_the_run_in_a_sweep_and_a_done_run_is_not_repeated(
    swept, main, tmp_path, capsys
):
    folder, command, _ = swept
    main("--model=hybrid", "--epochs=2", *TINY)
    assert losses(tmp_path).items() <= losses(folder).items() and losses(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    main(*command, f"--output_dir={folder}", *TINY)
    assert capsys.readouterr().out.count("is done already") == 4
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("*.json")} == before


def test_the_same_command_may_run_twice_at_once(tmp_path):
    arguments = "--dataset=shapes", "--epochs=2", f"--output_dir={tmp_path}", *TINY
    both = [start_python(SCRIPT, *arguments) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=600)[1] is not None and process.returncode == 0
    assert len(losses(tmp_path)) == 1 and not list(tmp_path.glob(".*"))


def test_control_c_stops_soon_and_says_how_to_go_on(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore it.
    arguments = "--dataset=shapes", "--epochs=200", f"--output_dir={tmp_path}", *TINY
    process, told = start_python(SCRIPT, *arguments), None
    wait_for(lambda: list(tmp_path.glob(".shapes*.npz")), process)
    for _ in range(3):  # The first was lost once, in many runs: one presses again.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, told = process.communicate(timeout=20)
            break
    assert process.returncode == 1 and "Traceback" not in told, told
    assert told.splitlines()[-1].endswith("goes on after the last whole epoch.")


def test_a_notebooks_plotting_does_not_matter(tmp_path):
    if importlib.util.find_spec("matplotlib_inline"):
        pytest.skip("its backend is installed")
    fake_run(tmp_path, "mixer", 0, 0.5)
    backend = "module://matplotlib_inline.backend_inline"
    run_python(SCRIPT, "--plot", f"--output_dir={tmp_path}", MPLBACKEND=backend)
    assert (tmp_path / "accuracies.png").exists()


def test_what_the_user_can_fix_is_one_sentence_but_a_bug_is_shown(main, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=f"no result in {tmp_path}/runs"):
        main("--output_dir=~/runs", "--plot")
    with pytest.raises(SystemExit, match="'shapes' is no flag"):
        main("shapes")
    for folder in ("/dev/null/folder", "/proc"):  # Neither can be written to.
        with pytest.raises(SystemExit, match=f"{folder}.*: give another --output_dir"):
            main(f"--output_dir={folder}")
    for error in (ValueError("a bug"), OSError("Input/output error")):
        monkeypatch.setattr(hm, "build_model", mock.Mock(side_effect=error))
        with pytest.raises(type(error), match=str(error)):
            main()


@pytest.mark.parametrize(
    "name, value",
    [("model", "hybrid,vit"), ("model", ""), ("dataset", ""), ("dataset", "nosuchdata"),
     ("seed", "0,x"), ("seed", "4294967296"), ("learning_rate", "nan"), ("patch_size", "33"),
     ("validation_split", "1"), ("shuffle_patches", "-1")],
)  # fmt: skip
def test_bad_flags_are_named_and_nothing_is_written(name, value, main, tmp_path):
    with pytest.raises((flags.Error, SystemExit)) as caught:
        main(f"--{name}={value}")
    told = str(caught.value)
    assert name in told.replace("Data set", "dataset"), told
    assert len(told.splitlines()) <= 2 and told != "0"
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- results
def fake_run(folder, model, seed, accuracy, **changes):
    settings = settings_with(**{"dataset": "cifar10", **changes}, model=model, seed=seed)
    curve = np.linspace(0, 1, settings["epochs"])
    history = {"train_loss": [*2 - curve], "test_loss": [*2.1 - curve]}
    history["test_accuracy"] = [*curve * accuracy]
    run = {"settings": settings, "parameters": 1234567, "history": history,
           "device": "abacus", "backend": "beads"}  # fmt: skip
    (folder / f"{hm.run_name(settings)}.json").write_text(json.dumps(run))
    return folder / f"{hm.run_name(settings)}.json", run


@pytest.mark.filterwarnings("error")
def test_table_pairs_seeds_and_keeps_settings_apart(tmp_path, capsys):
    for model, seed, accuracy in (
        ("mixer", 0, 0.70), ("mixer", 1, 0.74), ("hybrid", 1, 0.80), ("hybrid", 0, 0.78),
        ("hybrid", 2, 0.88),
    ):  # fmt: skip
        fake_run(tmp_path, model, seed, accuracy)
    fake_run(tmp_path, "mixer", 0, 0.11, epochs=2)
    fake_run(tmp_path, "mixer", 0, 0.76, schedule="published")
    fake_run(tmp_path, "mixer", 0, 0.5, dataset="cifar100")
    path, run = fake_run(tmp_path, "interleaved", 0, 0.6, dataset="cifar100")
    path.write_text(json.dumps({**run, "parameters": 7654321}))
    fake_run(tmp_path, "mixer", 9, 0.9)[0].rename(tmp_path / ".partial-1-mixer-seed9.json")
    (tmp_path / "cifar10-hybrid-seed0.keras").write_bytes(b"a newer version's")
    table = hm.report(tmp_path)
    told = f"Left out of the plot of blocks: {tmp_path}/cifar10-hybrid-seed0.keras ("
    assert told in capsys.readouterr().err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    # Standard deviations by hand: of 70, 74 and of 80, 78, 88; the gains are 8 and 6.
    assert rows[0] == ["model", "parameters", "cifar10, %", "cifar100, %", "paper, %"]
    assert rows[2:7] == [
        ["mixer", "1,234,567", "72.00 ± 2.83", "50.00", "76.71 / 48.20"],
        ["mixer-epochs_2", "1,234,567", "11.00", "", ""],
        ["mixer-schedule_published", "1,234,567", "76.00", "", "76.71"],
        ["hybrid", "1,234,567", "82.00 ± 5.29 (+7.00)", "", ""],
        ["interleaved", "7,654,321", "", "60.00 (+10.00)", "55.03"],
    ]
    assert (tmp_path / "table.md").read_text() == table
    assert "cifar10: abacus, beads; seed 0, 1, 2." in table
    fake_run(tmp_path, "interleaved", 1, 0.75, shuffle_patches=1)  # `mixer` can't tell.
    assert "| interleaved-shuffle_patches_1 | 1,234,567 | 75.00 (+1.00) |" in hm.report(tmp_path)


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test saves."""
    made = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path: made.append(self))
    return made


def test_curves_are_means_that_can_be_told_apart(figures, tmp_path):
    for model in ("mixer", "hybrid", "hybrid_norm", "hybrid_norm_late", "interleaved"):
        for seed, accuracy in enumerate((0.60, 0.62, 0.88)):
            fake_run(tmp_path, model, seed, accuracy)
    hm.report(tmp_path)
    loss, accuracy = figures[0].axes
    assert figures[0].get_suptitle() == "CIFAR-10, seed 0, 1, 2"
    assert [line.get_ydata()[-1] for line in accuracy.lines] == pytest.approx([70] * 5)
    assert len({line.get_color() for line in accuracy.lines}) == 5
    assert [text.get_text() for text in accuracy.texts] == [" 70.0"] * 5
    places = np.sort([text.get_position()[1] for text in accuracy.texts])
    assert min(np.diff(places)) > np.ptp(accuracy.get_ylim()) / 30
    assert places.mean() == pytest.approx(70)  # Moved up as well as down.
    for i, line in enumerate(loss.lines):  # Train loss, pale, then test loss of each model.
        assert line.get_ydata()[-1] == pytest.approx((1, 1.1)[i % 2])


def test_accuracies_show_each_seed_and_the_gain_over_mixer(figures, tmp_path):
    for model, values in (("mixer", (0.70, 0.74)), ("interleaved", (0.80, 0.86))):
        for seed, accuracy in enumerate(values):
            fake_run(tmp_path, model, seed, accuracy)
    hm.report(tmp_path)
    (axis,) = figures[-1].axes
    dots = [line.get_xdata().tolist() for line in axis.lines]
    expected = [[70, 74], [76.71], [80, 86], [82.27]]
    assert [pytest.approx(values) for values in expected] == dots
    mixer, bar = axis.patches
    assert mixer.get_width() == 0 and (bar.get_x(), bar.get_width()) == pytest.approx((83, -11))
    assert [text.get_text() for text in axis.texts] == ["72.0", "83.0"]
    labels = [label.get_text().split("\n")[0] for label in axis.get_yticklabels()]
    assert labels == ["mixer", "interleaved"] and axis.yaxis_inverted()


def test_blocks_are_mapped_by_offset(tmp_path):
    """A token MLP that moves each patch one up and two to the right, in a grid of 4 x 6."""
    network = hm.build_model("mixer", (16, 24, 3), num_blocks=1, tokens_mlp_dim=24)
    weights = np.zeros((4, 6, 4, 6))
    for y, x in np.ndindex(4, 6):
        if y >= 1 and x + 2 < 6:
            weights[y, x, y - 1, x + 2] = -5
    block = network.get_layer("block_1")
    block.token_hidden.kernel.assign(np.eye(24))
    block.token_output.kernel.assign(weights.reshape(24, 24))
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 24, 3)).astype("uint8")
    hm.add_preprocessing(network, images)[1].save(tmp_path / "model.keras")
    expected = np.zeros((5, 7))  # Offsets from -2 to 2 and from -3 to 3.
    expected[2 + 1, 3 - 2] = 5  # Each reads the patch one below and two to the left.
    np.testing.assert_array_equal(hm.map_blocks(tmp_path / "model.keras")["block_1"], expected)


def test_the_authors_curves_have_the_papers_table_as_their_best_epochs():
    curves = json.loads((RESULTS / "published" / "authors.json").read_text())
    assert "github.com/GeorgeKanazi/HybridMixer" in curves.pop("source")
    assert len(curves) == 4
    for name, curve in curves.items():
        assert len(curve["train_loss"]) == len(curve["test_accuracy"]) == 30
        assert float(hm.PAPER[tuple(name.split("/"))]) == max(curve["test_accuracy"])


FOLDERS = sorted({path.parent for path in RESULTS.glob("*/*-seed*.json")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_tables_agree_with_the_results(folder, tmp_path):
    for path in folder.glob("*-seed*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert hm.report(tmp_path) == (folder / "table.md").read_text()
    runs = hm.load_results(folder)
    for run in runs:  # Files are called what the script would call them.
        assert hm.run_name({**hm.DEFAULTS, **run["settings"]}) == run["path"].stem
        assert set(run["settings"]) <= {*hm.DEFAULTS, *hm.RUN}
        assert "command" not in run or f"--model={run['model']}" in shlex.split(run["command"])
        same = hm.select(runs, row=run["row"], dataset=run["dataset"])
        assert len({other["hardware"] for other in same}) == 1  # No row mixes hardware.
    drawn, committed = ({path.name for path in f.glob("*.png")} for f in (tmp_path, folder))
    committed = {name for name in committed if "blocks" not in name}  # No models are copied,
    assert drawn == committed - {"cifar10_authors.png"}  # and this is an older script's.


def gains(folder, dataset, row, other="mixer"):
    """Returns the gains of a row's runs over those of another row with the same seeds."""
    runs = hm.load_results(RESULTS / folder)
    runs, base = (
        {run["seed"]: run["accuracy"] for run in hm.select(runs, dataset=dataset, row=name)}
        for name in (row, other)
    )
    return [accuracy - base[seed] for seed, accuracy in runs.items()]


def interval(values):
    """Returns mean, start and end of the 95 % interval of a paired t-test of three pairs."""
    assert len(values) == 3
    quantile = 0.95 / math.sqrt(2 * 0.975 * 0.025)  # Student's, for 2 degrees of freedom.
    reach = quantile * np.std(values, ddof=1) / math.sqrt(3)
    return np.mean(values) + np.array([0, -reach, reach])


COMPARED = {  # In each folder a model, and after the slash the one beside it.
    "table1": "hybrid/mixer hybrid_norm/mixer hybrid_norm_late/mixer interleaved/mixer "
    "interleaved_3/mixer hybrid_norm_late/hybrid_norm hybrid_norm_late/hybrid "
    "interleaved_3/interleaved",
    "control": "interleaved-shuffle_patches_1/mixer",
}


def make_intervals():
    """Returns the table of differences in results/README.md."""
    lines = ["| results | model | beside | cifar10 | cifar100 |", "| --- | --- | --- | --- | --- |"]
    for folder, pairs in COMPARED.items():
        for row, other in (pair.split("/") for pair in pairs.split()):
            parts = [gains(folder, dataset, row, other) for dataset in ("cifar10", "cifar100")]
            cells = ["{:+.2f} ({:.2f} to {:.2f})".format(*interval(x)) if x else "" for x in parts]
            lines.append(f"| {folder} | {row} | {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def make_costs():
    """Returns the table of speeds in results/README.md: medians, and their range, of the seeds."""
    lines = ["| model | training, images/s | predicting 1 image, ms | predicting 128, ms |"]
    lines.append("| --- | --- | --- | --- |")
    runs = hm.load_results(RESULTS / "speed")
    for model in ("mixer", "hybrid", "interleaved_3", "interleaved"):
        part = hm.select(runs, model=model)
        costs = [[r["train_images_per_second"], *r["predict_ms"].values()] for r in part]
        cells = [f"{np.median(x):.3g} ({min(x):.3g} to {max(x):.3g})" for x in zip(*costs)]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_readmes_tables_and_headline_numbers_are_those_of_the_results():
    readme, doubts = (path.read_text() for path in (HERE / "README.md", RESULTS / "README.md"))
    for table in (make_intervals(), make_costs()):
        assert table in doubts, table
    for folder in FOLDERS:
        table = (folder / "table.md").read_text().split("\n\n")[0]
        assert table in (readme if folder.name in ("table1", "demo") else doubts), table
    bullets = re.findall(r"^- (?:.+\n)(?:  .+\n)*", readme, re.MULTILINE)
    headlines = (("table1", "hybrid", "mixer"), ("table1", "interleaved", "mixer"),
                 ("table1", "hybrid_norm_late", "hybrid_norm"),
                 ("control", "mixer", "interleaved-shuffle_patches_1"))  # fmt: skip
    for bullet, (folder, row, other) in zip(bullets, headlines):
        (number,) = re.findall(r"[-+]?\d+\.\d+", bullet)
        assert float(number) == round(np.mean(gains(folder, "cifar10", row, other)), 2)


def test_readmes_snippets_run(tmp_path):
    """Runs the Python in README.md, the last part on a wide grey picture."""
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 1))
    keras.utils.save_img(tmp_path / "picture.png", picture, scale=False)
    (tmp_path / "results").symlink_to(RESULTS)
    (tmp_path / "hybrid_mixer.py").symlink_to(SCRIPT)
    (tmp_path / "IPython").mkdir()  # A notebook's.
    (tmp_path / "IPython" / "__init__.py").write_text("version_info = (9, 0)\n")
    (tmp_path / "IPython" / "display.py").write_text("Image = Markdown = str\ndisplay = print\n")
    readme = (HERE / "README.md").read_text()
    network, predict, test, notebook = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    result = json.loads((RESULTS / "table1" / "cifar100-interleaved-seed0.json").read_text())

    def run(*parts):
        (tmp_path / "snippets.py").write_text("".join(parts))
        return run_python(tmp_path / "snippets.py", cwd=tmp_path)

    assert run(network, "model.export('exported')\n", predict).split()[-1] in result["class_names"]
    assert re.search(r"\| interleaved-epochs_1-num_blocks_2 \| .* \|", run(notebook))
    load_prepared("cifar100")  # Skips the rest where it isn't.
    assert f"{result['final_test_accuracy']:.3f}" in run(predict, test)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("table1/*.keras")), ids=lambda p: p.stem)
def test_committed_models_load_and_match_their_results(path):
    model = keras.saving.load_model(path)
    result = json.loads(path.with_suffix(".json").read_text())
    assert count_parameters(model) == result["parameters"]
    _, (x, y), _ = load_prepared(result["settings"]["dataset"])
    accuracy = (model.predict(x, batch_size=500, verbose=0).argmax(1) == y).mean()
    assert accuracy == pytest.approx(result["final_test_accuracy"], abs=5e-4)
