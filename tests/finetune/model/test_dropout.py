"""Tests of finetune.model.dropout."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.model.dropout import DropoutKey, draw_mask, dropout

MAX_SEED = 2**63 - 1


def key_of(seed: int = 0, step: int = 0, first_row: int = 0) -> DropoutKey:
    return DropoutKey(seed, tf.constant(step, tf.int64), tf.constant(first_row, tf.int64))


def mask_of(
    shape: tuple[int, ...], key: DropoutKey, rate: float = 0.5, site: int = 0
) -> np.ndarray:
    """Which elements are kept."""
    return dropout(tf.ones(shape), rate, key, site).numpy() != 0


@given(
    rows=st.integers(1, 9),
    row_shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    cut=st.integers(0, 9),
    first=st.integers(0, 2**40),
    seed=st.integers(0, MAX_SEED),
    step=st.integers(0, 2**31),
    site=st.integers(0, 2**16 - 1),
)
def test_micro_batch_draws_its_rows_of_the_whole(
    rows: int, row_shape: list[int], cut: int, first: int, seed: int, step: int, site: int
) -> None:
    cut = min(cut, rows - 1)
    whole = mask_of((rows, *row_shape), key_of(seed, step, first), site=site)
    part = mask_of((rows - cut, *row_shape), key_of(seed, step, first + cut), site=site)
    np.testing.assert_array_equal(part, whole[cut:])


def philox(seed: int, low: int, high: int) -> list[int]:
    """One block of Philox-4x32-10, after Salmon et al. 2011, section 3.3 and table 2."""
    word = 2**32
    counter = [low % word, low // word % word, high % word, high // word % word]
    key = [seed % word, seed // word]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second // word ^ counter[1] ^ key[0],
            second % word,
            first // word ^ counter[3] ^ key[1],
            first % word,
        ]
        key = [(key[0] + 0x9E3779B9) % word, (key[1] + 0xBB67AE85) % word]
    return counter


@settings(max_examples=25)
@given(
    rows=st.integers(1, 4),
    row_shape=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    first=st.one_of(st.integers(0, 2**40), st.integers(2**32 - 20, 2**32)),
    seed=st.integers(0, MAX_SEED),
    step=st.one_of(st.integers(0, 2**40), st.integers(2**16 - 1, 2**16)),
    site=st.integers(0, 2**16 - 1),
    rate=st.one_of(st.floats(0.01, 0.99), st.sampled_from([0.1, 0.25, 0.5])),
)
def test_masks_are_the_same_whatever_draws_them(
    rows: int, row_shape: list[int], first: int, seed: int, step: int, site: int, rate: float
) -> None:
    """TensorFlow's kernels, alone and in a graph, XLA, and the generator as published."""

    def draw(step: tf.Tensor, first_row: tf.Tensor) -> tf.Tensor:
        return draw_mask(
            tf.constant(rows), row_shape, rate, DropoutKey(seed, step, first_row), site
        )

    key = tf.constant(step, tf.int64), tf.constant(first, tf.int64)
    elements = int(np.prod(row_shape))
    blocks = -(-elements // 4)
    expected = []
    for row in range(first, first + rows):
        numbers = [
            number
            for block in range(row * blocks, (row + 1) * blocks)
            for number in philox(seed, block, step * 2**16 + site)
        ]
        expected += [number % 2**23 / 2**23 >= np.float32(rate) for number in numbers[:elements]]
    for drawn in (draw, tf.function(draw), tf.function(draw, jit_compile=True)):
        np.testing.assert_array_equal(drawn(*key), np.reshape(expected, (rows, *row_shape)))


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("row_shape", [(3, 5), (8,)])
def test_micro_batch_draws_its_rows_when_compiled(xla: bool, row_shape: tuple[int, ...]) -> None:
    @tf.function(jit_compile=xla)
    def draw(x: tf.Tensor, first_row: tf.Tensor) -> tf.Tensor:
        return dropout(x, 0.5, DropoutKey(7, tf.constant(3, tf.int64), first_row), 2)

    whole = draw(tf.ones((6, *row_shape)), tf.constant(0, tf.int64)).numpy()
    assert 0 < np.count_nonzero(whole) < whole.size
    for first in range(0, 6, 2):
        part = draw(tf.ones((2, *row_shape)), tf.constant(first, tf.int64))
        np.testing.assert_array_equal(part, whole[first : first + 2])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_scale(rate: float) -> None:
    elements = 200 * 501
    dropped = dropout(tf.fill((200, 501), 3.0), rate, key_of(1, 2, 3), 4).numpy()
    kept = dropped != 0
    # Five standard deviations of a binomial share.
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / elements)
    np.testing.assert_allclose(dropped[kept], 3 / (1 - rate), rtol=1e-6)
    # Every place of a row, and every row, is dropped now and then.
    assert kept.any(axis=0).all()
    assert not kept.all(axis=0).any()
    assert kept.any(axis=1).all()
    assert not kept.all(axis=1).any()


KEYS = {
    "seed": (key_of(1), 0),
    "large seed": (key_of(2**33), 0),
    "step": (key_of(0, 1), 0),
    "large step": (key_of(0, 2**32), 0),
    "row": (key_of(0, 0, 100), 0),
    "site": (key_of(), 1),
    "last site": (key_of(), 2**16 - 1),
    "site and step": (key_of(0, 1), 1),
}


@pytest.mark.parametrize("name", KEYS)
def test_masks_are_independent(name: str) -> None:
    # 100 rows: the rows from 100 on are others.
    key, site = KEYS[name]
    one = mask_of((100, 102), key_of()).ravel()
    other = mask_of((100, 102), key, site=site).ravel()
    assert abs((one == other).mean() - 0.5) < 5 * 0.5 / np.sqrt(one.size)


def test_rows_are_independent() -> None:
    for width in (5, 8):
        mask = mask_of((2000, width), key_of(3))
        for shift in (1, 2):
            same = (mask[shift:] == mask[:-shift]).mean()
            assert abs(same - 0.5) < 5 * 0.5 / np.sqrt(mask.size)


def test_neighbouring_steps_and_sites_share_no_block() -> None:
    # The last site of a step is followed by the first of the next.
    last = mask_of((100, 102), key_of(0, 4), site=2**16 - 1)
    following = mask_of((100, 102), key_of(0, 5), site=0)
    assert (last != following).any()


def test_same_key_draws_the_same() -> None:
    np.testing.assert_array_equal(
        mask_of((7, 9), key_of(5, 6, 7), site=8), mask_of((7, 9), key_of(5, 6, 7), site=8)
    )


@pytest.mark.parametrize("row_shape", [(6,), (2, 2), (3, 3)])
def test_gradient_is_the_scaled_mask(row_shape: tuple[int, ...]) -> None:
    shape = (5, *row_shape)
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=shape).astype(np.float32))
    upstream = tf.constant(rng.normal(size=shape).astype(np.float32))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = dropout(x, 0.3, key_of(1), 0)
    kept = mask_of(shape, key_of(1), rate=0.3)
    np.testing.assert_allclose(y, np.where(kept, x / 0.7, 0), rtol=1e-6)
    gradient = tape.gradient(y, x, output_gradients=upstream)
    np.testing.assert_allclose(gradient, np.where(kept, upstream / 0.7, 0), rtol=1e-6)


def test_dropped_elements_stop_infinities() -> None:
    x = tf.fill((4, 8), float("inf"))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = dropout(x, 0.5, key_of(), 0)
    kept = mask_of((4, 8), key_of())
    np.testing.assert_array_equal(y, np.where(kept, np.inf, 0))
    np.testing.assert_array_equal(tape.gradient(y, x), np.where(kept, 2.0, 0.0))


def test_off_without_a_key_or_at_rate_zero() -> None:
    x = tf.ones((3, 4))
    assert dropout(x, 0.5, None, 0) is x
    assert dropout(x, 0.0, key_of(), 0) is x


@pytest.mark.parametrize("site", [-1, 2**16])
def test_site_out_of_range(site: int) -> None:
    with pytest.raises(ValueError, match="is outside"):
        dropout(tf.ones((2, 2)), 0.5, key_of(), site)


def test_row_of_unknown_size() -> None:
    @tf.function(input_signature=[tf.TensorSpec([2, None])])
    def draw(x: tf.Tensor) -> tf.Tensor:
        return dropout(x, 0.5, key_of(), 0)

    with pytest.raises(ValueError, match="size of a row"):
        draw(tf.ones((2, 3)))
