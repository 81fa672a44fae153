"""Rows that also say how many images come through from files to labels."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from vitfold.bench.evaluation import run_over
from vitfold.bench.timing import Protocol
from vitfold.images import ImageSet
from vitfold.pipeline import optimize
from vitfold.pipeline.sweep import plain_bundle
from vitfold.pipeline.trial import opened
from vitfold.pipeline.trials import EvalContext, Trial, measure_attempt
from vitfold.report.tables import sweep_table

TWICE = Protocol(batch=2, trials=3, warmup=1, iterations=2, decode_ahead=True)


def test_rows_of_the_reports_protocol_have_a_throughput_with_images_decoded_ahead(
    tiny_model, photos: ImageSet, tmp_path: Path
) -> None:
    model = tiny_model()
    with opened(optimize(model)) as session:
        expected = run_over(session, photos, model.preprocess)
    trying = EvalContext(
        model=model,
        calibration=photos,
        calibration_size=2,
        calibration_seed=0,
        images=photos,
        expected=expected,
        protocol=TWICE,
    )
    plain = plain_bundle(tmp_path / "float.fold", trying)
    row = measure_attempt(Trial(name="r2", r=(2, 2)), trying, tmp_path, plain)
    ahead = row["decoded_ahead"]
    assert ahead["throughput_ips"]["mean"] > 0.0 < ahead["float_ips"]["mean"]
    assert ahead["speedup"]["low"] <= ahead["speedup"]["median"] <= ahead["speedup"]["high"]
    console = Console(width=160, record=True)
    console.print(sweep_table([row]))
    assert f"{ahead['throughput_ips']['mean']:.1f} ±{ahead['throughput_ips']['std']:.1f}" in console.export_text()
