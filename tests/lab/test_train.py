"""The training loop itself, in this process."""

import math
from dataclasses import replace

import pytest
import torch

from looksam.lab.config import DataConfig, make_generator
from looksam.lab.data import load_dataset
from looksam.lab.defaults import resolve_device
from looksam.lab.train import Trainer, train_run

from .runs import SMALL, comparable, weights


@pytest.mark.parametrize(
    ("method", "passes"), [("sgd", 10), ("sam", 20), ("sam-5", 12), ("looksam-3", 14), ("esam-2", 15)]
)
def test_passes_are_counted(method, passes):
    records = train_run(replace(SMALL, method=method, width=0.25)).records
    first, second = records
    assert (first.steps, second.steps) == (10, 10)
    assert first.passes == passes
    # the phase goes on over epochs: 20 steps with k = 3 hold 7 sharp ones, 4 of them in the first epoch
    assert first.passes + second.passes == {"sgd": 20, "sam": 40, "sam-5": 24, "looksam-3": 27, "esam-2": 30}[method]


def test_same_seed_same_run_other_seed_other_run():
    config = replace(SMALL, method="looksam-5", augment="randaugment", mixup=0.2, width=0.25)
    first, second = train_run(config), train_run(config)
    assert torch.equal(weights(first), weights(second))
    assert list(map(comparable, first.records)) == list(map(comparable, second.records))
    assert not torch.equal(weights(first), weights(train_run(replace(config, seed=1))))


def test_learning_rate_follows_the_schedule():
    config = replace(SMALL, width=0.25, epochs=4, schedule="linear", warmup=1.0, lr=0.1)
    rates = [record.lr for record in train_run(config).records]
    # at the first step of each epoch, 10 steps each: 10 of warm-up, then 30 down to 0
    assert rates == pytest.approx([0.1 / 11, 0.1, 0.1 * 20 / 30, 0.1 * 10 / 30])


def test_it_learns_and_reports_what_evaluate_sees():
    trainer = train_run(replace(SMALL, epochs=5, data=DataConfig()))
    last = trainer.records[-1]
    assert last.test_accuracy > 0.9
    assert trainer.evaluate() == (last.test_loss, last.test_accuracy)
    logits = trainer.model.eval()((trainer.test_x.float() / 255 - trainer.mean) / trainer.std)
    assert last.test_accuracy == pytest.approx(float((logits.argmax(1) == trainer.test_y).float().mean()))
    assert trainer.records[0].train_loss > last.train_loss


@pytest.mark.parametrize("method", ["sgd", "sam", "looksam-3"])
def test_running_statistics_move_once_a_step(method):
    trainer = train_run(replace(SMALL, method=method, width=0.25))
    counts = [int(b) for name, b in trainer.model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [20, 20, 20]


def test_times_are_parts_of_each_other():
    for record in train_run(replace(SMALL, method="sam")).records:
        assert 0 < record.optimizer_seconds < record.seconds < 60


@pytest.mark.parametrize("amp", [None, "fp16"])
@pytest.mark.parametrize("method", ["sgd", "sam", "lamb"])
def test_clipping_limits_the_first_update(method, amp, perceptron):
    moved = []
    for clip in (None, 1e-4):
        config = replace(
            SMALL, method=method, momentum=0.0, weight_decay=0.0, lr=1.0, clip=clip, epochs=1, schedule="constant",
            amp=amp,
        )  # fmt: skip
        data = load_dataset(DataConfig(train_size=20), 0)
        trainer = Trainer(config, data)
        before = weights(trainer)
        trainer.train_epoch()
        moved.append(float((weights(trainer) - before).norm()))
    if method == "lamb":  # Adam's direction does not depend on the gradient's scale, but for eps
        assert moved[1] < moved[0]
    else:
        assert moved[1] == pytest.approx(1e-4, rel=1e-2)
        assert moved[0] > 1e-2


def test_divergence_ends_the_run_and_is_recorded():
    result = train_run(replace(SMALL, lr=1e30, epochs=5, schedule="constant"))
    assert [r.diverged for r in result.records] == [False] * (len(result.records) - 1) + [True]
    assert len(result.records) < 5
    last = result.records[-1]
    assert last.train_loss is None or math.isfinite(last.train_loss)


def test_impossible_batch_size_and_device():
    with pytest.raises(ValueError, match="--batch-size 300 exceeds the 200 training images"):
        train_run(replace(SMALL, batch_size=300))
    with pytest.raises(ValueError, match=r"1 process\(es\) x 3 micro-batch\(es\).*choose a multiple of 3"):
        train_run(replace(SMALL, accumulate=3))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda"):
            resolve_device("cuda")
    assert resolve_device("cpu").type == "cpu"


def test_random_streams_of_a_seed_differ():
    orders = {
        (seed, stream): tuple(torch.randperm(50, generator=make_generator(seed, stream)).tolist())
        for seed in (0, 1)
        for stream in ("batches", "label-noise")
    }
    assert len(set(orders.values())) == 4


def test_the_radius_warms_up_and_a_continued_run_keeps_its_peak(perceptron):
    config = replace(SMALL, method="sam", epochs=3, rho_warmup=2, options=(("rho", 0.3),))
    radii = []

    def watch(trainer):
        forward_backward = trainer.forward_backward

        def seen(epoch, pieces):
            radii.append(trainer.optimizer.param_groups[0]["rho"])
            return forward_backward(epoch, pieces)

        trainer.forward_backward = seen
        return trainer

    data = load_dataset(config.data, config.seed)
    first = watch(Trainer(config, data))
    first.train_epoch()
    second = watch(Trainer(config, data))
    second.load_state_dict(first.state_dict())
    second.train_epoch()
    second.train_epoch()
    per_step = radii[::2]  # 10 steps an epoch, two passes each
    assert per_step == pytest.approx([0.3 * min(1, (step + 1) / 21) for step in range(30)])
