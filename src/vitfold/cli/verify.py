"""`vitfold verify`: whether a bundle is on this machine what it was where it was made."""

from __future__ import annotations

from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.terminal import heading, note, out, print_json, quiet_stdout, steps


@command()
def verify(
    bundle: options.BundlePath,
    engine: options.Engine = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Check a bundle's files and graph, and compare its outputs on seeded inputs with the reference once more."""
    from vitfold.pipeline.checking import check_bundle

    with steps("verify") as say, quiet_stdout():
        say("files, graph, outputs")
        checked = check_bundle(bundle, engine=engine, threads=threads)
    if json:
        print_json(checked.to_dict())
        return
    heading(checked.bundle.name, " is intact")
    made = checked.bundle.manifest.verified
    lines = [
        ("files", f"{checked.bundle.size_bytes / 1e6:.1f} MB as the digest {checked.bundle.digest} says"),
        ("graph", f"runs on {checked.engine}; finite outputs on seeded inputs"),
    ]
    if checked.verified is not None:
        lines.append(("outputs", f"within {checked.verified.median:.1e} of the reference, computed anew"))
    lines.append(("at making", f"within {made['median_relative_error']:.1e}, on {made['engine']}"))
    for name, shown in lines:
        out.print(f"  {name:10} {shown}", soft_wrap=True)
    if checked.reason is not None:
        note(f"outputs were not compared: {checked.reason}")
