"""Rows that are read in chunks: the same as whole rows where all is carried, in constant memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.generate.restore import one_device
from spectral_pod.models import chunks
from spectral_pod.objectives import Classification, LabelledPositions
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.shapes import PAD
from spectral_pod.train import step
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import abstract_state
from tests.models.drawn import drawn_params

LENGTH, CHUNK, CLASSES = 96, 24, 5
GPT = {"name": "spectral_gpt", "positions": "none"}
# Models of which chunks carry all that positions see.
EXACT = {
    "delta": GPT | {"pattern": ("delta",), "memory.short_conv": 3},
    "gated delta and S5": GPT | {"pattern": ("gated_delta", "s5")},
    "hyena": GPT | {"pattern": ("hyena",)},
    "hyena of order one": GPT | {"pattern": ("hyena",), "hyena.order": 1, "hyena.short_conv": 1},
    "frequency": GPT | {"pattern": ("delta",), "channel_mixer": "frequency"},
    "encoder": {"pattern": ("delta",), "patch.kernel": 11},
    "encoder, mean": {"pattern": ("delta",), "patch.stride": 1, "pooling": "mean"},
    "tagger": {"pattern": ("delta",), "patch.stride": 1, "pooling": "none"},
    "n-grams": {"pattern": ("delta",), "patch.ngrams": (2, 9), "patch.ngram_rows": 100},
}


def config_of(chunk, **overrides):
    config = default()
    small = {
        "dtype": "float32", "num_layers": 2, "hidden_dim": 8, "embed_dim": 4, "unroll": 1,
        "memory.head_dim": 4, "memory.method": "recurrent", "s5.state_dim": 4, "s5.blocks": 2,
        "truncate_gradients": False, "chunk": chunk,
    }  # fmt: skip
    config.update_from_flattened_dict({f"model.{k}": v for k, v in (small | overrides).items()})
    config.data.seq_len = LENGTH
    return config


@functools.cache
def make(name):
    """(a model of whole rows, the same of chunks, parameters)."""
    # The filters of whole rows reach no further than those of chunks.
    whole = models.build(config_of(0, **EXACT[name]), seq_len=CHUNK, num_classes=CLASSES)
    of_chunks = models.build(config_of(CHUNK, **EXACT[name]), num_classes=CLASSES)
    return whole, of_chunks, drawn_params(whole)


def batch_of(by_position):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (3, LENGTH)).astype(np.int32)
    tokens[1, 50:] = PAD
    tokens[2] = PAD
    shape = tokens.shape if by_position else (3,)
    labels = rng.integers(0, CLASSES, shape).astype(np.int32)
    valid = tokens != PAD if by_position else np.array([True, True, False])
    return {k: jnp.asarray(x) for k, x in
            {"tokens": tokens, "labels": labels, "valid": valid}.items()}  # fmt: skip


@functools.cache
def compared(name):
    """Losses of all labels and the gradients of their sum, by whole rows and by chunks."""
    whole, of_chunks, params = make(name)
    by_position = whole.causal or whole.config.pooling == "none"
    objective, batch = LabelledPositions if by_position else Classification, batch_of(by_position)

    @functools.partial(jax.jit, static_argnums=0)
    def results(model, params):
        def loss(params):
            outputs, _, _ = step.forward(params, batch, model, objective)
            losses = jnp.where(batch["valid"], outputs["loss"], 0.0)
            return jnp.sum(losses), losses

        return jax.grad(loss, has_aux=True)(params)

    return [results(model, params) for model in (whole, of_chunks)]


@pytest.mark.parametrize("name", EXACT)
def test_chunks_give_the_losses_and_gradients_of_whole_rows(name):
    (grads, losses), (grads_of_chunks, losses_of_chunks) = compared(name)
    np.testing.assert_allclose(losses_of_chunks, losses, atol=1e-4)
    assert np.abs(losses).max() > 0.1
    for a, b in zip(jax.tree.leaves(grads_of_chunks), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("name", ["delta", "encoder", "tagger"])
def test_logits_of_rows_of_any_length(name):
    whole, of_chunks, params = make(name)
    params = jax.tree.map(jnp.asarray, params)
    tokens = batch_of(by_position=False)["tokens"]
    for length in (12, 52, LENGTH):
        rows = tokens[:, :length]
        want = whole.apply({"params": params}, rows, rows != PAD)
        got = chunks.logits(of_chunks, {"params": params}, rows, rows != PAD)
        if want.ndim == 3:  # elsewhere they mean nothing
            got, want = (x[np.asarray(rows != PAD)] for x in (got, want))
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_truncated_gradients_end_at_the_start_of_a_chunk():
    """A gradient with respect to the embedded bytes, of the loss of the last chunk alone."""
    for truncated in (True, False):
        config = config_of(CHUNK, **EXACT["delta"], truncate_gradients=truncated)
        model, (_, _, params) = models.build(config, num_classes=CLASSES), make("delta")
        # Byte b stands in chunk b only, so its row of the table has the gradient of that chunk.
        tokens = jnp.asarray(np.arange(LENGTH)[None] // CHUNK, jnp.int32)

        def loss(params, model=model, tokens=tokens):
            rows = {"tokens": tokens, "mask": tokens != PAD}
            logits, _ = chunks.read(model, {"params": params}, rows, lambda logits, _: logits)
            return jnp.sum(jnp.sin(logits[-1]))

        rows = jax.jit(jax.grad(loss))(params)["embedding"]["embedding"]
        reached = np.abs(rows[: LENGTH // CHUNK]).max(axis=1) > 1e-6
        np.testing.assert_array_equal(reached, [not truncated] * 3 + [True])


@pytest.mark.parametrize(("pattern", "reached"), [("spectral", [1]), ("spectral+delta", [1, 2, 3])])
def test_chunks_see_each_other_through_what_is_carried_only(pattern, reached):
    """A spectral filter sees its own chunk, a memory the chunks before as well."""
    bytes_alone = {"patch.stride": 1, "patch.kernel": 1, "pooling": "none"}
    config = config_of(CHUNK, pattern=(pattern,), **bytes_alone)
    model = models.build(config, num_classes=CLASSES)
    params = jax.tree.map(jnp.asarray, drawn_params(model))

    @jax.jit
    def logits(tokens):
        rows = {"tokens": tokens, "mask": tokens != PAD}
        return chunks.read(model, {"params": params}, rows, lambda logits, _: logits)[0]

    tokens = np.random.default_rng(0).integers(0, 256, (1, LENGTH)).astype(np.int32)
    other = tokens.copy()
    other[0, CHUNK + 3] ^= 1
    moved_SBMC = np.abs(np.asarray(logits(tokens)) - np.asarray(logits(other)))
    np.testing.assert_array_equal(np.flatnonzero(moved_SBMC.max(axis=(1, 2, 3)) > 1e-6), reached)


@pytest.mark.parametrize("name", ["hyena", "tagger"])
def test_gradients_taken_chunk_by_chunk_are_those_of_all_chunks(name):
    """The training step takes them so; `read` keeps all chunks, and stops their gradients."""
    config = config_of(CHUNK, **EXACT[name] | {"truncate_gradients": True})
    model, (_, _, params) = models.build(config, num_classes=CLASSES), make(name)
    batch = batch_of(by_position=True)

    def loss_of(outputs, valid):
        return jnp.sum(jnp.where(valid, outputs["loss"], 0.0))

    @jax.jit
    def both(params):
        def loss(params):
            outputs, _, _ = step.forward(params, batch, model, LabelledPositions)
            return loss_of(outputs, batch["valid"])

        def loss_of_chunk(logits, sown, part):
            outputs = LabelledPositions.outputs(logits, part["labels"], part["valid"])
            return loss_of(outputs, part["valid"]), outputs["loss"]

        rows = batch | {"mask": batch["tokens"] != PAD}
        key = jax.random.key(0)
        grads, _ = chunks.truncated_gradients(model, params, rows, loss_of_chunk, key=key)
        return jax.grad(loss)(params), grads

    want, got = (jax.tree.leaves(grads) for grads in both(params))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("name", ["hyena", "encoder"])
def test_the_memory_of_a_step_does_not_grow_with_the_number_of_chunks(name):
    config = config_of(64, **EXACT[name] | {"truncate_gradients": True})
    objective = LabelledPositions if name == "hyena" else Classification
    mesh, sizes = one_device(), []
    for num_chunks in (4, 64):
        length = config.data.seq_len = 64 * num_chunks
        model = models.build(config, num_classes=CLASSES)
        optimizer = make_optimizer(config, model, mesh)
        abstract = abstract_state(model, optimizer.tx, mesh)
        batch = step.abstract_batch(4, length, mesh, by_position=objective.by_position)
        with on_mesh(mesh):
            jitted = step.jit_train_step(model, optimizer, objective, config, mesh, abstract)
            compiled = jitted.lower(abstract, batch).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    more = 4 * 64 * 60  # positions
    # The states that are carried, and some numbers of each byte; one activation alone takes 32.
    assert sizes[1] - sizes[0] < 30 * more
