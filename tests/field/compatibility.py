"""What works with what: the rows of docs/compatibility.md, each with the test that shows it.

``python -m tests.field.compatibility`` writes the tables into the page; a test holds them against each other.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.field.classes import CANNOT, NEEDS_CLOSURE, PACKAGES, SHARPNESS, WRAPS, all_classes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
YES, LIMITED, REFUSED = "works", "limited", "refused"


class Row(NamedTuple):
    subject: str
    verdict: str
    sentence: str
    test: str


TABLES: dict[str, tuple[Row, ...]] = {
    "around a step": (
        Row("moments set to zero, deleted, doubled", YES, "the next step reads what is there", "test_item_01_relora"),
        Row(
            "`opt.state.clear()`, a new dictionary, an entry deleted",
            YES,
            "what is missing begins anew, as in a new optimizer; the rest stays",
            "test_item_01_each_single_entry_deleted",
        ),
        Row(
            "state moved to the host and back, or into one flat buffer",
            YES,
            "the tensors that are in `opt.state` are read and written",
            "test_item_01_state_changed_between_steps",
        ),
        Row(
            "`opt.param_groups = [...]`, parameters added, removed or moved in place",
            YES,
            "the choice of a layer filter stays with its parameter",
            "test_item_01_groups_changed_between_steps",
        ),
        Row("all of it between the passes of one step", YES, "", "test_item_01_state_changed_within_a_step"),
        Row(
            "one parameter twice in a group",
            YES,
            "torch warns; perturbed once and restored bit for bit",
            "test_item_07_the_same_parameter_twice",
        ),
    ),
    "weights": (
        Row(
            "`p.data = ...` in `forward`: max-norm layers, weight clipping",
            YES,
            "what the parameter is now is perturbed, restored and updated",
            "test_item_02_weights_moved_in_a_pass",
        ),
        Row("spectral, weight and orthogonal norm", YES, "both kinds, hooks and parametrizations", "MODELS"),
        Row(
            "`p.data = ...` in hooks, `set_`, `share_memory`, `.to(...)`",
            YES,
            "between steps and between passes",
            "test_item_02_weights_moved_around_a_pass",
        ),
        Row("lazy modules", YES, "the optimizer may be made before the first forward", "test_item_02_lazy_parameters"),
        Row(
            "float16 and bfloat16 parameters",
            YES,
            "with float32 masters over fused bases, which follow what others write",
            "test_item_02_masters_of_weights_that_move",
        ),
        Row(
            "frozen parameters of any kind: integer, boolean, float8, quantized, meta, sparse, complex",
            YES,
            "never read",
            "test_item_11_frozen_parameters_of_every_kind",
        ),
        Row("sparse or complex parameters that train", REFUSED, "", "test_item_11_one_that_trains_is_refused"),
        Row(
            "gradients that are views of larger buffers, or expanded",
            YES,
            "copied where the next backward would overwrite them",
            "test_item_10_gradients_that_are_views",
        ),
    ),
    "schedulers": (
        Row(
            "every scheduler of `torch.optim.lr_scheduler`, and `SWALR`",
            YES,
            "over fused and wrapped bases, on the optimizer or on `opt.base_optimizer`",
            "test_item_03_a_scheduler",
        ),
        Row(
            "OneCycleLR and CyclicLR with momentum or betas",
            YES,
            "the keys that they write into the groups are no arguments of the base",
            "test_item_03_checkpoint_after_a_scheduler",
        ),
        Row(
            "checkpoints of plain SGD, AdamW, RMSprop that a scheduler had touched",
            YES,
            "",
            "test_item_03_checkpoint_of_the_plain_class_that_a_scheduler_had_touched",
        ),
        Row("timm's schedulers", YES, "", "test_item_03_timms_scheduler"),
    ),
    "bases": (
        Row(
            "any class whose `step` needs no closure",
            YES,
            "it sees its own groups and state alone, through `opt.base_optimizer`; no name can collide",
            "test_item_04_a_class_that_uses_every_name_of_ours",
        ),
        Row(
            "arguments that both have, as `rho`, `k`, `alpha`",
            YES,
            "`base_rho=` and so on are the class's",
            "test_item_04_arguments_of_our_names",
        ),
        Row(
            "a class with a `max_grad_norm` of its own",
            YES,
            "the argument is the class's",
            "test_item_05_a_class_with_a_limit_of_its_own",
        ),
        Row(
            "classes with `train()` and `eval()`, as schedule-free ones",
            YES,
            "call `opt.base_optimizer.train()` and `.eval()`",
            "test_item_04_a_class_under_a_variant",
        ),
    ),
    "trainers": (
        Row(
            "Lightning, automatic optimization",
            YES,
            "see [Trainers](trainers.md)",
            "test_contract_30_lightning_equals_the_loop",
        ),
        Row("Lightning, manual optimization", YES, "both call styles", "test_field_06_lightnings_manual_optimization"),
        Row(
            "Lightning with `accumulate_grad_batches`",
            LIMITED,
            "wrong there for every SAM; accumulate inside the closure",
            "test_contract_30_lightning_accumulation_is_what_the_documentation_warns_of",
        ),
        Row("Accelerate", YES, "`step(closure)` passes through", "test_contract_31_accelerate_equals_the_loop"),
        Row("Hugging Face Trainer", YES, "with a subclass of ten lines", "test_contract_32_trainer_equals_the_loop"),
        Row("timm", YES, "through its registry", "test_contract_32_timm_registry"),
        Row(
            "GradScaler",
            YES,
            "`scaler.step(opt, closure)`; an overflow in any pass leaves everything as it was",
            "test_contract_22_overflow_changes_nothing_and_halves_the_scale",
        ),
    ),
    "processes": (
        Row(
            "DistributedDataParallel", YES, "all ranks stay equal, bit for bit", "test_contract_33_replicas_stay_equal"
        ),
        Row("FSDP2, `fully_shard`", YES, "equal to the unsharded run", "test_contract_36_shards_equal_the_whole"),
        Row(
            "FSDP1, `FullyShardedDataParallel`",
            REFUSED,
            "its shards have no norm of the whole; use `fully_shard`",
            "test_field_08_fsdp1_is_refused",
        ),
        Row(
            "`ZeroRedundancyOptimizer`",
            REFUSED,
            "it gives each rank a part of the parameters; use `fully_shard` or plain DDP",
            "test_field_08_zero_redundancy_optimizer_is_refused",
        ),
        Row(
            "`torch.distributed.checkpoint`",
            YES,
            "sharded and full, and from shards to one process",
            "test_contract_37_optimizer_state_dict_round_trip",
        ),
    ),
    "compilers": (
        Row(
            "`torch.compile` of the model",
            YES,
            "not compiled again because of the perturbation",
            "test_contract_38_no_recompilation",
        ),
        Row(
            "CUDA graphs", YES, "two graphs, one for each kind of step", "test_contract_38_two_graphs_replay_the_steps"
        ),
        Row(
            "FakeTensorMode and meta tensors that train",
            YES,
            "the reference backend runs",
            "test_field_12_a_fake_optimizer_steps",
        ),
    ),
    "checkpoints": (
        Row("`deepcopy` and `pickle`", YES, "model and optimizer together", "test_contract_12_copies_keep_everything"),
        Row("resuming at every step of the cycle", YES, "bit for bit", "test_contract_13_resume_at_every_phase"),
        Row(
            "resuming under a GradScaler",
            YES,
            "bit for bit, in both call styles",
            "test_field_14_resuming_under_a_scaler_is_bitwise",
        ),
        Row(
            "`load_state_dict`, then `state_dict`",
            YES,
            "gives back what was saved",
            "test_field_15_state_dict_after_loading_is_what_was_saved",
        ),
        Row(
            "a wrapped class, and what it saves by a `state_dict` of its own",
            YES,
            "restored as if the class were used alone",
            "test_item_04_resuming_with_a_class",
        ),
    ),
}
"""Table -> rows."""


def table(rows: tuple[Row, ...]) -> str:
    lines = ["| what | | how |", "|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.subject} | {row.verdict} | {row.sentence} |")
    return "\n".join(lines)


def packages() -> str:
    """How many classes of each package are tested, and those that cannot be."""
    counts = Counter(c.name.rsplit(".", 1)[0] for c in all_classes() if c.name not in CANNOT)
    lines = ["| package | classes | not as a base |", "|---|---:|---|"]
    for module in PACKAGES:
        cannot = [f"`{name.rsplit('.', 1)[1]}`" for name in sorted(CANNOT) if name.startswith(module + ".")]
        lines.append(f"| `{module}` | {counts[module]} | {', '.join(cannot) or 'none'} |")
    return "\n".join(lines)


def reasons() -> str:
    """Those that cannot be, by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in CANNOT.items():
        by_reason.setdefault(reason, []).append(f"`{name.rsplit('.', 1)[1]}`")
    order = sorted(by_reason, key=lambda reason: reason not in (NEEDS_CLOSURE, WRAPS, SHARPNESS))
    return "\n".join(f"* {', '.join(dict.fromkeys(by_reason[reason]))}: {reason}." for reason in order)


def pieces() -> dict[str, str]:
    """What stands between the marks of the page, by the name of the mark."""
    return {**{name: table(rows) for name, rows in TABLES.items()}, "classes": packages(), "reasons": reasons()}


def filled(text: str) -> str:
    """The page with everything between its marks made anew."""
    for name, piece in pieces().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{piece}\n\n{end}{rest.split(end, 1)[1]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
