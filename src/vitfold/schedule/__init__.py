"""Which block merges how many tokens: from what a user writes to one integer per block.

How many tokens a block may lose at most is `recipe`'s arithmetic; choosing the schedule by cost or by accuracy
builds on this.
"""

from vitfold.schedule.parsing import describe_r, resolve_r

__all__ = ["describe_r", "resolve_r"]
