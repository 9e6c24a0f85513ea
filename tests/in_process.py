"""Runs stages in the test's own process: the work of a Ray task for one shard, without Ray."""

from pipeline.rounds import schedule
from pipeline.rounds.inventory import Inventory


def bring_up_to_date(work, stage, shard, problems=None, force=False):
    """Compute and commit one shard of one stage unless it is fresh. Returns its entry, and whether it was computed."""
    first = sum(len(rows) for name, rows in work.shards.items() if name < shard)
    return schedule.bring_up_to_date(Inventory(work, whole=False), stage, shard, first, problems, force)
