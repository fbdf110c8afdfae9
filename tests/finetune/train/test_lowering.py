"""Steps are lowered as they are run, and without memory for the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tensorflow as tf
from tensorflow.compiler.xla.service import hlo_pb2

from finetune.model.modeling import create_variables
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.config import BertConfig, is_trained, variable_shapes
from finetune.spec.step_settings import ModelSpec, StepSettings
from finetune.train.lowering import lower_step
from finetune.train.optimization import OptimizerSettings
from finetune.train.step import make_trainer

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
)
SPEC = ModelSpec(CONFIG, "squad", 16)
OPTIMIZER = OptimizerSettings(1e-3, num_train_steps=10)


def lowered(rows: int = 4, replicas: int = 1, **settings: object) -> hlo_pb2.HloModuleProto:
    step = StepSettings(**settings)  # type: ignore[arg-type]
    module = lower_step(SPEC, OPTIMIZER, rows, step, replicas=replicas)
    return hlo_pb2.HloModuleProto.FromString(module)


def opcodes(module: hlo_pb2.HloModuleProto) -> list[str]:
    return [one.opcode for computation in module.computations for one in computation.instructions]


def test_every_changed_variable_is_updated_in_its_own_memory() -> None:
    module = lowered()
    shapes = variable_shapes(CONFIG, "squad", 2)
    trained = sum(is_trained(name, "squad") for name in shapes)
    # A trained variable with two slots each, and the number of the step.
    assert len(module.input_output_alias.entries) == 3 * trained + 1
    assert len({entry.parameter_number for entry in module.input_output_alias.entries}) == (
        3 * trained + 1
    )


@pytest.mark.parametrize(
    "policy",
    [
        "none",
        "nested",
        pytest.param("selective", marks=pytest.mark.slow),
        pytest.param("full", marks=pytest.mark.slow),
    ],
)
def test_what_is_lowered_is_what_a_run_compiles(policy: str) -> None:
    settings = StepSettings(2, parse_checkpointing(policy), xla=True)
    variables = create_variables(CONFIG, "squad")
    trainer = make_trainer(variables, SPEC, OPTIMIZER, settings)
    compiled = trainer.step.compiled  # type: ignore[attr-defined]
    batch = {
        name: tf.zeros([4, *spec.shape[1:]], spec.dtype)
        for name, spec in compiled.input_signature[0].items()
    }
    of_run = compiled.experimental_get_compiler_ir(batch)(stage="hlo_serialized")
    run = hlo_pb2.HloModuleProto.FromString(of_run)
    module = lowered(4, accumulation_steps=2, checkpointing=parse_checkpointing(policy))
    assert opcodes(module) == opcodes(run)
    assert module.input_output_alias == run.input_output_alias
    assert module.host_program_shape == run.host_program_shape


def test_replicas_add_up_their_gradients() -> None:
    module = lowered(8, replicas=4)
    sums = [
        one
        for computation in module.computations
        for one in computation.instructions
        if one.opcode == "all-reduce"
    ]
    trained = sum(is_trained(name, "squad") for name in variable_shapes(CONFIG, "squad", 2))
    assert len(sums) == trained + 1  # and the loss
    for one in sums:
        assert [list(group.replica_ids) for group in one.collective_device_list.replica_groups] == [
            [0, 1, 2, 3]
        ]
    # Each takes the whole batch, and cuts out its share.
    (ids,) = {tuple(shape.dimensions) for shape in module.host_program_shape.parameters[1:2]}
    assert ids == (8, 16)


def test_one_replica_adds_up_nothing() -> None:
    assert "all-reduce" not in opcodes(lowered())


@pytest.mark.parametrize(("rows", "count", "replicas"), [(5, 2, 1), (6, 2, 2), (3, 1, 2)])
def test_rows_that_cannot_be_cut_are_refused(rows: int, count: int, replicas: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows cannot be cut"):
        lowered(rows, replicas, accumulation_steps=count)


PROGRAM = """
import dataclasses, json, resource, sys
import tensorflow
from finetune.spec.config import preset
from finetune.spec.step_settings import ModelSpec
from finetune.train.lowering import lower_step
from finetune.train.optimization import OptimizerSettings

def most_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = most_bytes()
config = dataclasses.replace(preset("bert-tiny"), vocab_size=2_000_000)
lower_step(ModelSpec(config, "squad", 64), OptimizerSettings(1e-5, num_train_steps=10), 8)
print(json.dumps([before, most_bytes()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_the_model_takes_no_memory() -> None:
    """A model of 1 GB, with 2 GB of optimizer state."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert after - before < 500_000_000
