"""``--amp`` and ``--accumulate``."""

from dataclasses import replace

import pytest
import torch

from looksam.lab.data import load_dataset
from looksam.lab.train import Trainer, train_run

from .runs import SMALL, weights

METHODS = ["sgd", "lamb", "sam", "looksam-3"]


def make(**changes):
    config = replace(SMALL, **changes)
    return Trainer(config, load_dataset(config.data, config.seed))


class Double(Trainer):
    """The same run in float64."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.model.double()

    def batch(self, indices, images=None):
        return [(x.double(), targets.double()) for x, targets in super().batch(indices, images)]

    def evaluate(self):
        return 0.0, 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("amp", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), (None, torch.float32)])
def test_training_and_evaluation_run_in_the_precision_asked_for(method, amp, dtype, perceptron):
    trainer = make(method=method, amp=amp, epochs=4, lr=0.05)
    seen = set()
    trainer.model.register_forward_hook(lambda model, args, logits: seen.add((model.training, logits.dtype)))
    records = [trainer.train_epoch() for _ in range(4)]
    assert seen == {(True, dtype), (False, dtype)}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert records[-1].test_accuracy > 0.6
    assert records[-1].train_loss < 0.7 * records[0].train_loss  # unscaled: comparable with a run without amp
    scale = trainer.precision.scaler.get_scale()
    assert scale == (2.0**16 if amp == "fp16" else 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_overflows_is_skipped_and_lowers_the_scale(method, perceptron):
    trainer = make(method=method, amp="fp16", batch_size=200, epochs=1)
    trainer.precision.scaler.load_state_dict(trainer.precision.scaler.state_dict() | {"scale": 2.0**100})
    before = weights(trainer)
    trainer.train_epoch()
    assert torch.equal(weights(trainer), before)
    assert trainer.precision.scaler.get_scale() == 2.0**99


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_add_up_to_the_batch(method, perceptron):
    """Beside a run in float64, accumulating errs by no more than twice what the whole batch does."""
    changes = {"method": method, "augment": "basic", "mixup": 0.2}
    whole, parts = (make(**changes, accumulate=n) for n in (1, 4))
    exact = Double(whole.config, load_dataset(whole.config.data, 0))
    records = [trainer.train_epoch() for trainer in (whole, parts, exact)]
    error, allowed = ((weights(t) - weights(exact)).norm() for t in (parts, whole))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * weights(exact).norm()
    assert records[0].passes == records[1].passes  # of the whole batch each
    assert records[1].train_loss == pytest.approx(records[2].train_loss, rel=1e-5)


def test_micro_batches_are_that_small():
    trainer = make(accumulate=4, width=0.25, epochs=1)
    sizes = []
    trainer.model.register_forward_pre_hook(lambda model, x: sizes.append(len(x[0])))
    trainer.train_epoch()
    assert sizes == [5] * 40 + [797]  # the last is the test


def test_a_whole_run_with_everything(perceptron):
    config = replace(SMALL, method="looksam-3", amp="bf16", accumulate=2, clip=1.0, mixup=0.2, augment="randaugment")
    assert [r.passes for r in train_run(config).records] == [14, 13]
