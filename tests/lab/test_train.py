"""The training loop itself, in this process."""

import math
from dataclasses import replace

import pytest
import torch

from looksam.lab.config import DataConfig, TrainConfig, make_generator
from looksam.lab.data import load_dataset
from looksam.lab.train import Trainer, resolve_device, train_run

SMALL = TrainConfig("sgd", epochs=2, data=DataConfig(train_size=200), batch_size=20, threads=1)


@pytest.fixture(autouse=True)
def threads():
    """The runs set torch's thread count; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def comparable(record):
    """A record without its times."""
    return replace(record, seconds=0.0, optimizer_seconds=0.0)


@pytest.mark.parametrize(("method", "passes"), [("sgd", 10), ("sam", 20), ("sam-5", 12), ("looksam-3", 14)])
def test_passes_are_counted(method, passes):
    records = train_run(replace(SMALL, method=method)).records
    first, second = records
    assert (first.steps, second.steps) == (10, 10)
    assert first.passes == passes
    # the phase goes on over epochs: 20 steps with k = 3 hold 7 sharp ones, 4 of them in the first epoch
    assert first.passes + second.passes == {"sgd": 20, "sam": 40, "sam-5": 24, "looksam-3": 27}[method]


def test_same_seed_same_run_other_seed_other_run():
    config = replace(SMALL, method="looksam-5", augment="randaugment", mixup=0.2)
    first, second = train_run(config), train_run(config)
    assert torch.equal(weights(first.trainer), weights(second.trainer))
    assert list(map(comparable, first.records)) == list(map(comparable, second.records))
    assert not torch.equal(weights(first.trainer), weights(train_run(replace(config, seed=1)).trainer))


def test_learning_rate_follows_the_schedule():
    config = replace(SMALL, epochs=4, schedule="linear", warmup=1.0, lr=0.1)
    rates = [record.lr for record in train_run(config).records]
    # at the first step of each epoch, 10 steps each: 10 of warm-up, then 30 down to 0
    assert rates == pytest.approx([0.1 / 11, 0.1, 0.1 * 20 / 30, 0.1 * 10 / 30])


def test_state_dict_continues_a_run_exactly():
    config = replace(SMALL, method="looksam-3", augment="basic", mixup=0.1)
    whole = train_run(config)
    data = load_dataset(config.data, config.seed)
    first = Trainer(config, data)
    first.train_epoch()
    continued = Trainer(config, data)
    continued.load_state_dict(first.state_dict())
    record = continued.train_epoch()
    assert comparable(record) == comparable(whole.records[1])
    assert torch.equal(weights(continued), weights(whole.trainer))


def test_it_learns_and_reports_what_evaluate_sees():
    result = train_run(replace(SMALL, epochs=5, data=DataConfig()))
    last = result.records[-1]
    assert last.test_accuracy > 0.9
    assert result.trainer.evaluate() == (last.test_loss, last.test_accuracy)
    logits = result.trainer.model.eval()(
        (result.trainer.test_x.float() / 255 - result.trainer.mean) / result.trainer.std
    )
    assert last.test_accuracy == pytest.approx(float((logits.argmax(1) == result.trainer.test_y).float().mean()))
    assert result.records[0].train_loss > last.train_loss


def test_times_are_parts_of_each_other():
    for record in train_run(replace(SMALL, method="sam")).records:
        assert 0 < record.optimizer_seconds < record.seconds < 60


@pytest.mark.parametrize("method", ["sgd", "sam", "lamb"])
def test_clipping_limits_the_first_update(method):
    moved = []
    for clip in (None, 1e-4):
        config = replace(
            SMALL, method=method, momentum=0.0, weight_decay=0.0, lr=1.0, clip=clip, epochs=1, schedule="constant"
        )
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
