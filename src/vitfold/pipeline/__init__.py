"""From a model to a verified bundle: plan, calibrate, emit, verify, compare, write."""

from vitfold.pipeline.calibration import (
    calibrate_plan,
    constraints_of,
    find_registers,
    keep_float,
    rank_sites,
    recorded_images,
    split_images,
)
from vitfold.pipeline.compensating import (
    all_for_compensation,
    compensate_plan,
    divide_for_compensation,
    recorded_division,
)
from vitfold.pipeline.forecasting import LengthForecast, forecast_lengths
from vitfold.pipeline.latency import measure_latency, on_this_machine, roughly_calibrated
from vitfold.pipeline.lengths import LengthTime, check_lengths, measure_lengths
from vitfold.pipeline.plan import Plan, bundle_work, count_costs, fusible_widths, optimize, read_recipe
from vitfold.pipeline.pruning import block_costs, pruning_losses, solve_prune
from vitfold.pipeline.racing import Race, fastest, float_plan, race, race_merging
from vitfold.pipeline.solving import (
    LIKE,
    ON_GPUS,
    USUAL_BATCH,
    Solution,
    check_forecast,
    measure_merging,
    solve_measured,
    solve_merge,
)
from vitfold.pipeline.verifying import run_reference
from vitfold.pipeline.writing import FIDELITY_IMAGES, save

__all__ = [
    "FIDELITY_IMAGES",
    "LIKE",
    "ON_GPUS",
    "USUAL_BATCH",
    "LengthForecast",
    "LengthTime",
    "Plan",
    "Race",
    "Solution",
    "all_for_compensation",
    "block_costs",
    "bundle_work",
    "calibrate_plan",
    "check_forecast",
    "check_lengths",
    "compensate_plan",
    "constraints_of",
    "count_costs",
    "divide_for_compensation",
    "fastest",
    "find_registers",
    "float_plan",
    "forecast_lengths",
    "fusible_widths",
    "keep_float",
    "measure_latency",
    "measure_lengths",
    "measure_merging",
    "on_this_machine",
    "optimize",
    "pruning_losses",
    "race",
    "race_merging",
    "rank_sites",
    "read_recipe",
    "recorded_division",
    "recorded_images",
    "roughly_calibrated",
    "run_reference",
    "save",
    "solve_measured",
    "solve_merge",
    "solve_prune",
    "split_images",
]
