"""The forms of data that are accepted, and what is done with them: no other room knows what they look like."""

from .batches import Batches, as_batches, batches_of
from .forms import as_data, as_pair, check_row_order, count, holds_tensors, is_data, is_rows, take, with_any_targets
from .shards import Shard
from .sources import check_form
from .steps import own_steps

__all__ = [
    "Batches",
    "Shard",
    "as_batches",
    "as_data",
    "as_pair",
    "batches_of",
    "check_form",
    "check_row_order",
    "count",
    "holds_tensors",
    "is_data",
    "is_rows",
    "own_steps",
    "take",
    "with_any_targets",
]
