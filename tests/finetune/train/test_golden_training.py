"""The original implementation's numbers on a tiny model: logits, losses, weights after 4 steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.model.modeling import create_variables
from finetune.model.weights import load_weights
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.config import INPUT_NAMES, from_json_file
from finetune.spec.step_settings import PLAIN_STEP, ModelSpec, StepSettings
from finetune.train.inference import make_predictor
from finetune.train.optimization import OptimizerSettings
from finetune.train.step import Trainer, make_trainer

SEQ_LEN = 24
SETTINGS = OptimizerSettings(1e-2, 10, 2)


@pytest.fixture(scope="module")
def folder(shared_dir: Path) -> Path:
    return shared_dir / "golden" / "tiny_bert"


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "golden.npz", allow_pickle=False) as file:
        return dict(file)


def load(
    folder: Path, golden: dict[str, np.ndarray], settings: StepSettings = PLAIN_STEP
) -> Trainer:
    config = from_json_file(folder / "bert_config.json")
    variables = create_variables(config, "classifier", num_labels=3)
    report = load_weights(variables, folder / "bert_model.ckpt")
    assert report.initialised == ("output_weights", "output_bias")
    variables["output_weights"].assign(golden["init/output_weights"])
    variables["output_bias"].assign(golden["init/output_bias"])
    trainer = make_trainer(variables, ModelSpec(config, "classifier", SEQ_LEN), SETTINGS, settings)
    # The original's graph does not order reading the step for the schedule and incrementing it;
    # in the run that made these numbers the increment came first, so its steps are 1 to 4.
    trainer.state.step.assign(1)
    return trainer


def batch_of(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    batch = {name: golden[name].astype(np.int32) for name in INPUT_NAMES}
    batch["label_ids"] = golden["labels"].astype(np.int32)
    batch["weights"] = np.ones(len(golden["labels"]), np.float32)
    return batch


def test_logits(folder: Path, golden: dict[str, np.ndarray]) -> None:
    trainer = load(folder, golden)
    config = from_json_file(folder / "bert_config.json")
    predict = make_predictor(trainer.variables, ModelSpec(config, "classifier", SEQ_LEN))
    np.testing.assert_allclose(predict(batch_of(golden)), golden["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("checkpointing", "accumulation_steps"),
    [
        ("none", 1), ("none", 3), ("full", 1), ("full:1", 3),
        # The same update by another way, which `test_exactness.py` compares too.
        pytest.param("full", 3, marks=pytest.mark.slow),
        pytest.param("full:1", 1, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_four_compiled_steps(
    folder: Path, golden: dict[str, np.ndarray], accumulation_steps: int, checkpointing: str
) -> None:
    settings = StepSettings(accumulation_steps, parse_checkpointing(checkpointing))
    trainer = load(folder, golden, settings)
    batch = batch_of(golden)
    losses = [float(trainer.step(batch).loss) for _ in range(4)]
    # At a learning rate of 1e-2 rounding grows tenfold a step. The fourth loss is 1.4e-4 from the
    # original's; the same four steps in float64 are as far from it, and within 1e-6 of ours.
    np.testing.assert_allclose(losses[:3], golden["losses"][:3], rtol=2e-5)
    np.testing.assert_allclose(losses[3], golden["losses"][3], rtol=2e-4)
    for name, variable in trainer.variables.items():
        np.testing.assert_allclose(
            variable, golden[f"after4/{name}"], rtol=0, atol=3e-4, err_msg=name
        )
    np.testing.assert_allclose(float(trainer.step(batch).loss), golden["losses"][4], rtol=1e-4)
