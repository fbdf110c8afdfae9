"""Tests of finetune.train.optimization against a float64 version of the original's optimizer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.spec.optimizers import OPTIMIZERS, slot_shapes
from finetune.train import optimization
from finetune.train.optimization import (
    OptimizerSettings,
    OptimizerState,
    apply_gradients,
    create_state,
    decays,
    learning_rate,
)

NAMES = ("kernel", "dense/bias", "output/LayerNorm/gamma")
SHAPES = ((2, 3), (3,), (4,))
Arrays = list[np.ndarray]

# TensorFlow's fused Adam takes 1 - beta_2 in float32, the original in float64: the second moment
# differs by 1.3e-5 of itself, an update by half of that. Updates below add up to at most 2.
ATOL = 2 * 1e-5


def original_rate(settings: OptimizerSettings, step: int) -> float:
    """`create_optimizer` of the original: linear decay to 0, linear warm-up."""
    if step < settings.num_warmup_steps:
        return settings.learning_rate * step / settings.num_warmup_steps
    share = min(step, settings.num_train_steps) / settings.num_train_steps
    return settings.learning_rate * (1 - share)


class OriginalOptimizer:
    """`AdamWeightDecayOptimizer` of the original behind its global clipping, in float64."""

    def __init__(self, settings: OptimizerSettings, weights: Arrays) -> None:
        self.settings = settings
        self.weights = [w.astype(np.float64) for w in weights]
        self.m = [np.zeros(w.shape) for w in weights]
        self.v = [np.zeros(w.shape) for w in weights]
        self.step = 0

    def apply(self, gradients: Arrays) -> None:
        s = self.settings
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients))
        rate = original_rate(s, self.step)
        for i, name in enumerate(NAMES):
            g = gradients[i].astype(np.float64) * s.clip_norm / max(norm, s.clip_norm)
            self.m[i] = s.beta_1 * self.m[i] + (1 - s.beta_1) * g
            self.v[i] = s.beta_2 * self.v[i] + (1 - s.beta_2) * g * g
            update = self.m[i] / (np.sqrt(self.v[i]) + s.epsilon)
            if name == "kernel":
                update += s.weight_decay * self.weights[i]
            self.weights[i] = self.weights[i] - rate * update
        self.step += 1


def draw(seed: int, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return [(scale * rng.normal(size=shape)).astype(np.float32) for shape in SHAPES]


def model() -> tuple[list[tf.Variable], OptimizerState]:
    variables = [tf.Variable(w, name=n) for n, w in zip(NAMES, draw(0), strict=True)]
    return variables, create_state(variables)


def slots(state: OptimizerState, name: str) -> list[tf.Variable]:
    return [slots[name] for slots in state.slots]


def constants(arrays: Arrays) -> list[tf.Tensor]:
    return [tf.constant(array) for array in arrays]


@settings(max_examples=20)
@given(
    warmup=st.integers(0, 5),
    more_steps=st.integers(1, 5),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    scales=st.lists(st.sampled_from([0.0, 1e-4, 0.1, 1.0, 100.0]), min_size=1, max_size=6),
)
def test_steps_of_the_original(
    warmup: int, more_steps: int, weight_decay: float, scales: list[float]
) -> None:
    hyperparameters = OptimizerSettings(
        0.1, warmup + more_steps, warmup, weight_decay=weight_decay, clip_norm=1.5
    )
    variables, state = model()
    reference = OriginalOptimizer(hyperparameters, draw(0))
    for step, scale in enumerate(scales):
        gradients = draw(step + 1, scale)
        rate, norm = apply_gradients(hyperparameters, state, variables, constants(gradients))
        assert float(rate) == pytest.approx(original_rate(hyperparameters, step), rel=1e-6)
        flat = np.concatenate([g.ravel() for g in gradients])
        assert float(norm) == pytest.approx(float(np.linalg.norm(flat)), rel=1e-5)
        reference.apply(gradients)
    assert int(state.step) == len(scales)
    for got, expected in zip(variables, reference.weights, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL)
    for got, expected in zip(slots(state, "adam_m"), reference.m, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
    for got, expected in zip(slots(state, "adam_v"), reference.v, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-9)


def test_compiled_steps_are_those_of_the_original() -> None:
    hyperparameters = OptimizerSettings(0.1, 10, 2, clip_norm=1.5)
    variables, state = model()

    @tf.function
    def apply(gradients: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        return apply_gradients(hyperparameters, state, variables, gradients)

    reference = OriginalOptimizer(hyperparameters, draw(0))
    for step in range(5):
        gradients = draw(step + 1)
        rate, _ = apply(constants(gradients))
        assert float(rate) == pytest.approx(original_rate(hyperparameters, step), rel=1e-6)
        reference.apply(gradients)
    for got, expected in zip(variables, reference.weights, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL)


def test_adafactor_is_that_of_transformers() -> None:
    # Values from `transformers.optimization.Adafactor` 5.23.0 with scale_parameter=False,
    # relative_step=False, clip_threshold=1.0, the same gradients, rates and decay.
    hyperparameters = OptimizerSettings(0.1, 10, clip_norm=1e9, optimizer="adafactor")
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((2, 3), (3,))]
    variables = [tf.Variable(w, name=n) for n, w in zip(("kernel", "bias"), weights, strict=True)]
    state = create_state(variables, "adafactor")
    for step in range(4):
        rng = np.random.default_rng(step + 1)
        scale = 10.0 ** (step - 2)
        gradients = [(scale * rng.normal(size=w.shape)).astype(np.float32) for w in weights]
        apply_gradients(hyperparameters, state, variables, constants(gradients))
    expected = [
        [
            [0.04559946060180664, -0.07508683204650879, 0.4928838014602661],
            [0.301592618227005, -0.5460229516029358, 0.32174742221832275],
        ],
        [1.6430901288986206, 0.7639463543891907, -0.7414364218711853],
    ]
    for got, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=0, atol=1e-6)


def test_lion_is_that_of_keras() -> None:
    import keras

    hyperparameters = OptimizerSettings(0.1, 10, weight_decay=0.3, clip_norm=1e9, optimizer="lion")
    variables = [tf.Variable(w, name=n) for n, w in zip(NAMES, draw(0), strict=True)]
    state = create_state(variables, "lion")
    theirs = [keras.Variable(w) for w in draw(0)]
    optimizer = keras.optimizers.Lion(0.1, weight_decay=0.3)
    optimizer.exclude_from_weight_decay(theirs[1:])
    for step in range(5):
        gradients = draw(step + 1, 10.0 ** (step - 2))
        rate, _ = apply_gradients(hyperparameters, state, variables, constants(gradients))
        optimizer.learning_rate = float(rate)
        optimizer.apply(constants(gradients), theirs)
    for got, expected in zip(variables, theirs, strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["lion", "adafactor"])
def test_compiled_steps_of_the_other_optimizers(optimizer: str) -> None:
    # A graph may reorder what nothing orders: a moment must not be overwritten before it is read.
    hyperparameters = OptimizerSettings(0.1, 10, 2, clip_norm=1.5, optimizer=optimizer)

    def train(compiled: bool) -> list[np.ndarray]:
        variables = [tf.Variable(w, name=n) for n, w in zip(NAMES, draw(0), strict=True)]
        state = create_state(variables, optimizer)

        def apply(gradients: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
            return apply_gradients(hyperparameters, state, variables, gradients)

        step = tf.function(apply) if compiled else apply
        for number in range(6):
            step(constants(draw(number + 1)))
        assert int(state.step) == 6
        return [v.numpy() for v in [*variables, *state.variables]]

    for got, expected in zip(train(compiled=True), train(compiled=False), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bytes_remembered_of_a_matrix(optimizer: str) -> None:
    (slots,) = create_state([tf.Variable(tf.zeros([30, 50]))], optimizer).slots
    shapes = slot_shapes(optimizer, [30, 50])
    assert {name: slot.shape.as_list() for name, slot in slots.items()} == shapes
    elements = sum(int(np.prod(shape)) for shape in shapes.values())
    assert elements == {"adamw": 3000, "lion": 1500, "adafactor": 80}[optimizer]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 2.5e-5),
        (3, 7.5e-5),
        (4, 6e-5),  # the decay counts from step 0: 1e-4 * (1 - 4 / 10)
        (9, 1e-5),
        (10, 0.0),
        (11, 0.0),
        (10**9, 0.0),
    ],
)
def test_schedule(step: int, expected: float) -> None:
    rate = learning_rate(OptimizerSettings(1e-4, 10, 4), tf.constant(step, tf.int64))
    assert rate.dtype == tf.float32
    assert float(rate) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 100_000])
def test_schedule_keeps_its_digits_to_the_end(warmup: int) -> None:
    hyperparameters = OptimizerSettings(1e-4, 10**6, warmup)
    for step in (1, 99_999, 100_000, 999_990, 999_999):
        rate = float(learning_rate(hyperparameters, tf.constant(step, tf.int64)))
        assert rate == pytest.approx(original_rate(hyperparameters, step), rel=2e-7)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    hyperparameters = OptimizerSettings(1e-4, 10)
    rates = [float(learning_rate(hyperparameters, tf.constant(s, tf.int64))) for s in (0, 5, 10)]
    assert rates == pytest.approx([1e-4, 5e-5, 0.0])


def test_schedule_of_warmup_alone() -> None:
    hyperparameters = OptimizerSettings(1e-4, 4, 4)
    rates = [float(learning_rate(hyperparameters, tf.constant(s, tf.int64))) for s in range(5)]
    assert rates == pytest.approx([0.0, 2.5e-5, 5e-5, 7.5e-5, 0.0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert/embeddings/word_embeddings", True),
        ("bert/encoder/layer_0/attention/self/query/kernel", True),
        ("cls/squad/output_weights", True),
        ("bert/embeddings/LayerNorm/gamma", False),
        ("bert/encoder/layer_0/output/LayerNorm/beta", False),
        ("bert/encoder/layer_0/attention/self/query/bias", False),
        ("cls/squad/output_bias", False),
    ],
)
def test_what_decays(name: str, expected: bool) -> None:
    assert decays(name) == expected


def test_decay_alone_moves_kernels_alone() -> None:
    variables, state = model()
    gradients = [tf.zeros(shape) for shape in SHAPES]
    apply_gradients(OptimizerSettings(0.1, 10, weight_decay=0.5), state, variables, gradients)
    kernel, bias, gamma = draw(0)
    np.testing.assert_allclose(variables[0], kernel * 0.95, rtol=1e-6)
    np.testing.assert_array_equal(variables[1], bias)
    np.testing.assert_array_equal(variables[2], gamma)


@pytest.mark.parametrize(("norm", "clipped"), [(0.5, 0.5), (1.0, 1.0), (1.5, 1.0), (1e4, 1.0)])
def test_clipping_is_by_the_norm_of_all_gradients(norm: float, clipped: float) -> None:
    variables, state = model()
    raw = draw(1)
    length = np.sqrt(sum(np.sum(g**2) for g in raw))
    gradients = [(g * norm / length).astype(np.float32) for g in raw]
    hyperparameters = OptimizerSettings(0.1, 10, beta_1=0.0)
    _, reported = apply_gradients(hyperparameters, state, variables, constants(gradients))
    assert float(reported) == pytest.approx(norm, rel=1e-6)
    # Without memory the first moment is the clipped gradient.
    for moment, gradient in zip(slots(state, "adam_m"), gradients, strict=True):
        np.testing.assert_allclose(moment, gradient * clipped / norm, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_spoils_all(bad: float) -> None:
    # As in the original, so that the loss shows it; never a step in a wrong direction.
    variables, state = model()
    gradients = draw(1)
    gradients[1][0] = bad
    _, norm = apply_gradients(OptimizerSettings(0.1, 10), state, variables, constants(gradients))
    assert not np.isfinite(float(norm))
    for variable in variables:
        assert np.isnan(variable).all()


class Paper:
    """Updates of one variable without decay, in float64, written out from the papers."""

    def __init__(self, settings: OptimizerSettings, shape: tuple[int, ...]) -> None:
        self.settings, self.step = settings, 0
        self.m, self.v = np.zeros(shape), np.zeros(shape)
        self.rows, self.columns = np.zeros(shape[:-1]), np.zeros(shape[-1:])

    def update(self, g: np.ndarray, rate: float) -> np.ndarray:
        """What is taken off the variable."""
        self.step += 1
        return rate * getattr(self, self.settings.optimizer)(g.astype(np.float64))

    def adamw(self, g: np.ndarray) -> np.ndarray:
        """Kingma and Ba 2015, algorithm 1; BERT's is the same without the corrections."""
        beta_1, beta_2, epsilon = 0.9, 0.999, 1e-6
        self.m = beta_1 * self.m + (1 - beta_1) * g
        self.v = beta_2 * self.v + (1 - beta_2) * g**2
        if not self.settings.bias_correction:
            return self.m / (np.sqrt(self.v) + epsilon)
        m_hat = self.m / (1 - beta_1**self.step)
        v_hat = self.v / (1 - beta_2**self.step)
        return m_hat / (np.sqrt(v_hat) + epsilon)

    def lion(self, g: np.ndarray) -> np.ndarray:
        """Chen et al. 2023, algorithm 2."""
        update = np.sign(0.9 * self.m + 0.1 * g)
        self.m = 0.99 * self.m + 0.01 * g
        return update

    def adafactor(self, g: np.ndarray) -> np.ndarray:
        """Shazeer and Stern 2018, algorithms 4 (matrix) and 5 (vector), decay of 7.2."""
        decay = 1 - self.step**-0.8
        square = g**2 + 1e-30
        self.v = decay * self.v + (1 - decay) * square
        self.rows = decay * self.rows + (1 - decay) * square.sum(-1)
        self.columns = decay * self.columns + (1 - decay) * square.sum(0)
        v = self.v if g.ndim == 1 else np.outer(self.rows, self.columns) / self.rows.sum()
        update = g / np.sqrt(v)
        return update / max(1.0, np.sqrt(np.mean(update**2)))


# Reached: 4.5e-7 of the largest update. Without bias correction TensorFlow's Adam is as far off as
# its 1 - beta_2 in float32 is from 0.001, 1.3e-5, of which the root halves it.
UPDATES = {
    "as published": (OptimizerSettings(0.1, 10**9, clip_norm=1e9, bias_correction=True), 1e-6),
    "BERT's": (OptimizerSettings(0.1, 10**9, clip_norm=1e9), 8e-6),
    "lion": (OptimizerSettings(0.1, 10**9, clip_norm=1e9, optimizer="lion"), 1e-6),
    "adafactor": (OptimizerSettings(0.1, 10**9, clip_norm=1e9, optimizer="adafactor"), 1e-6),
}


@pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e-6, 1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("kind", UPDATES)
def test_a_hundred_updates_of_the_paper(kind: str, scale: float) -> None:
    hyperparameters, tolerance = UPDATES[kind]
    rng = np.random.default_rng(0)
    shapes = [(6, 5), (30,)]
    # Biases, so that nothing decays, and 0 before each step, so that no digit of an update is lost.
    variables = [tf.Variable(tf.zeros(shape), name="bias") for shape in shapes]
    state = create_state(variables, hyperparameters.optimizer)

    @tf.function
    def apply(gradients: list[tf.Tensor]) -> tf.Tensor:
        for variable in variables:
            variable.assign(tf.zeros(variable.shape))
        return apply_gradients(hyperparameters, state, variables, gradients)[0]

    papers = [Paper(hyperparameters, shape) for shape in shapes]
    for step in range(100):
        gradients = [(scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes]
        for gradient in gradients:
            gradient[0] = 0  # as that of words that no text has
            if step > 4:
                gradient[1] = 0  # as that of a word that is not seen again
        rate = float(apply(constants(gradients)))
        for variable, gradient, paper in zip(variables, gradients, papers, strict=True):
            expected = -paper.update(gradient, rate)
            got = variable.numpy()
            np.testing.assert_array_equal(got[0], 0)
            np.testing.assert_allclose(
                got, expected, rtol=0, atol=tolerance * np.abs(expected).max()
            )


@pytest.mark.parametrize("gradient", [1e-9, 1e-7, 1e-6, 1e-5, 1e-3, 1.0])
def test_first_update_of_adam_as_published(gradient: float) -> None:
    """All of the rate but for epsilon, which at its own size halves the update."""
    weight = tf.Variable(tf.zeros([1]), name="bias")
    settings = OptimizerSettings(0.1, 10, bias_correction=True)
    apply_gradients(settings, create_state([weight]), [weight], [tf.constant([gradient])])
    assert float(weight[0]) == pytest.approx(-0.1 * gradient / (gradient + 1e-6), rel=1e-6)


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 10**5, 10**7])
def test_corrections_lose_no_digits(step: int) -> None:
    for beta in (0.9, 0.999):
        found = float(optimization._one_minus_power(beta, tf.constant(float(step))))
        assert found == pytest.approx(1 - float(np.float32(beta)) ** step, rel=2e-7)
    assert float(optimization._one_minus_power(0.0, tf.constant(float(step)))) == 1


def test_state_begins_at_zero() -> None:
    variables, state = model()
    assert state.step.dtype == tf.int64
    assert int(state.step) == 0
    for moments in (slots(state, "adam_m"), slots(state, "adam_v")):
        assert [m.shape for m in moments] == [v.shape for v in variables]
        assert not any(np.any(m) for m in moments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_steps": 0}, "0 training steps; use more examples"),
        ({"num_warmup_steps": -1}, "-1 warm-up steps"),
        ({"num_warmup_steps": 11}, "11 warm-up steps of 10 steps"),
        ({"learning_rate": -1.0}, "learning rate -1.0"),
        ({"learning_rate": float("nan")}, "learning rate nan"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'; use one of adamw, lion, adafactor"),
        ({"optimizer": "lion", "bias_correction": True}, "lion has no bias correction"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(OptimizerSettings(1e-4, 10), **change)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_reads_slots_on_the_host_runs_there(optimizer: str) -> None:
    weight = tf.Variable(tf.ones((2, 3)))
    state = create_state([weight], optimizer, placement="host")
    settings = OptimizerSettings(1e-3, 10, optimizer=optimizer)

    @tf.function
    def update(gradient: tf.Tensor) -> None:
        apply_gradients(settings, state, [weight], [gradient])

    graph = update.get_concrete_function(tf.TensorSpec((2, 3))).graph
    handles = {id(slot.handle) for slot in state.variables}
    inner = {internal.name for external, internal in graph.captures if id(external) in handles}
    moments = [op for op in graph.get_operations() if inner & {t.name for t in op.inputs}]
    assert moments
    reached = set(moments)
    for op in graph.get_operations():
        if reached & {tensor.op for tensor in op.inputs} and op.type != "AssignAddVariableOp":
            reached.add(op)
    sized = [op for op in reached if any(t.shape.rank for t in op.outputs)]
    assert all(op.device.endswith("CPU:0") for op in [*moments, *sized])


@pytest.mark.parametrize("broken", [*range(len(NAMES)), None])
def test_weights_that_may_have_changed_belong_to_a_step_that_is_counted(
    broken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error, as when memory runs out, the step tells whether the weights are whole."""
    weights = [tf.Variable(tf.ones(shape), name=n) for n, shape in zip(NAMES, SHAPES, strict=True)]
    state = create_state(weights)
    adam, calls, updating = optimization._adam, [], broken is not None

    def failing(*arguments: object) -> list[tf.Operation]:
        calls.append(arguments)
        if len(calls) - 1 == broken:
            raise RuntimeError
        return adam(*arguments)  # type: ignore[arg-type]

    monkeypatch.setitem(optimization._OPTIMIZERS, "adamw", failing)
    if broken is None:
        # Before the update: the norm of all gradients.
        monkeypatch.setattr(tf.nn, "l2_loss", lambda gradient: failing())
        broken = 0
    with pytest.raises(RuntimeError):
        apply_gradients(
            OptimizerSettings(0.1, 10), state, weights, [tf.ones(shape) for shape in SHAPES]
        )
    changed = any((variable.numpy() != 1).any() for variable in weights)
    assert int(state.step.numpy()) == updating
    assert not changed or updating


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_a_graph_too_the_step_is_counted_before_anything_changes(
    optimizer: str, placement: str
) -> None:
    """Operations run in any order that their inputs and control inputs allow."""
    weights = [tf.Variable(tf.ones(shape), name=n) for n, shape in zip(NAMES, SHAPES, strict=True)]
    state = create_state(weights, optimizer, placement=placement)

    @tf.function
    def update(gradients: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        settings = OptimizerSettings(0.1, 10, optimizer=optimizer)
        return apply_gradients(settings, state, weights, gradients)

    graph = update.get_concrete_function([tf.ones(shape) for shape in SHAPES]).graph
    captured = {inner.name: outer for outer, inner in graph.captures}

    def resource(operation: tf.Operation) -> tf.Tensor | None:
        return captured.get(operation.inputs[0].name) if operation.inputs else None

    def before(operation: tf.Operation) -> set[str]:
        seen: set[str] = set()
        left = [operation]
        while left:
            one = left.pop()
            for earlier in (*(x.op for x in one.inputs), *one.control_inputs):
                if earlier.name not in seen:
                    seen.add(earlier.name)
                    left.append(earlier)
        return seen

    changes = [
        operation
        for operation in graph.get_operations()
        if operation.type.startswith(("Assign", "ResourceApply"))
    ]
    (counted,) = [one for one in changes if resource(one) is state.step.handle]
    (norm,) = [one for one in graph.get_operations() if one.type == "Sqrt" and "AddN" in {
        x.op.type for x in one.inputs[0].op.inputs}]  # fmt: skip
    assert norm.name in before(counted)
    cleared = {id(state.change.handle)} if state.change is not None else set()
    others = [one for one in changes if one is not counted and id(resource(one)) not in cleared]
    assert len(others) >= 2 * len(weights) if optimizer != "adamw" else len(weights)
    for one in others:
        assert counted.name in before(one), one.name
