"""The texts of a Triton model repository: its configuration, its README and its client.

Source: Triton Inference Server, docs/user_guide/model_configuration.md and model_config.proto.
"""

from __future__ import annotations

import json
import pprint
from dataclasses import dataclass
from string import Template

from vitfold.model import Preprocess

# The server, and the container of the same month, whose TensorRT is the server's.
SERVER = "nvcr.io/nvidia/tritonserver:25.10-py3"
BUILDER = "nvcr.io/nvidia/tensorrt:25.10-py3"
LABELS = "labels.txt"
QUEUE_DELAY_MICROSECONDS = 1000
WRITTEN = "A model for Triton Inference Server, written by `vitfold export`."
"""How the README of every exported model begins, by which one is recognized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One model as Triton sees it; shapes are those of one image, without the batch."""

    name: str
    backend: str
    platform: str
    input_name: str
    input_type: str
    input_shape: tuple[int, ...]
    output_name: str
    output_type: str
    output_shape: tuple[int, ...]
    labelled: bool
    optimum: int
    max_batch: int
    instances: int
    threads: int | None
    on_gpu: bool
    preprocess: Preprocess
    classifies: bool
    trtexec: str | None


def config_text(served: Served) -> str:
    """Return config.pbtxt: a ModelConfig in protobuf's text format."""
    kind = "KIND_GPU" if served.on_gpu else "KIND_CPU"
    warm = "\n".join(_warm_up(served, batch) for batch in _sizes(served, 1))
    return f"""\
name: {_quoted(served.name)}
backend: {_quoted(served.backend)}
platform: {_quoted(served.platform)}
max_batch_size: {served.max_batch}
input [
  {{
    name: {_quoted(served.input_name)}
    data_type: {served.input_type}
    dims: {list(served.input_shape)}
  }}
]
output [
  {{
    name: {_quoted(served.output_name)}
    data_type: {served.output_type}
    dims: {list(served.output_shape)}{_labels(served)}
  }}
]
dynamic_batching {{
  preferred_batch_size: {_sizes(served, served.optimum)}
  max_queue_delay_microseconds: {QUEUE_DELAY_MICROSECONDS}
}}
instance_group [
  {{
    count: {served.instances}
    kind: {kind}
  }}
]
{_threads(served)}{warm}
"""


def _threads(served: Served) -> str:
    """Return the threads of each instance on a CPU, where there are several: else each would take all cores."""
    if served.on_gpu or served.threads is None:
        return ""
    return "".join(
        f"""\
parameters {{
  key: "{key}"
  value {{ string_value: "{value}" }}
}}
"""
        for key, value in (("intra_op_thread_count", served.threads), ("inter_op_thread_count", 1))
    )


def _sizes(served: Served, *more: int) -> list[int]:
    return sorted({*more, served.max_batch})


def _labels(served: Served) -> str:
    return f"\n    label_filename: {_quoted(LABELS)}" if served.labelled else ""


def _warm_up(served: Served, batch: int) -> str:
    return f"""\
model_warmup {{
  name: "batch of {batch}"
  batch_size: {batch}
  inputs {{
    key: {_quoted(served.input_name)}
    value {{
      data_type: {served.input_type}
      dims: {list(served.input_shape)}
      random_data: true
    }}
  }}
}}"""


def _quoted(text: str) -> str:
    """Return a string of protobuf's text format, whose escapes are JSON's for what a name may hold."""
    return json.dumps(text, ensure_ascii=True)


def readme_text(served: Served) -> str:
    """Return README.md: how to start the server, and what a client has to do."""
    gpus = " --gpus all" if served.on_gpu else ""
    shape = " x ".join(map(str, served.input_shape))
    output = " x ".join(map(str, served.output_shape))
    return f"""\
# {served.name}

{WRITTEN} Backend: {served.backend}. This folder is one model
of a repository; the commands below run in the folder that holds it.
{_build_section(served)}
## Start

```console
docker run --rm{gpus} -p 8000:8000 -p 8001:8001 -p 8002:8002 -v "$PWD":/models \\
  {SERVER} tritonserver --model-repository=/models
curl -sf localhost:8000/v2/models/{served.name}/ready && echo ready
```

Triton gathers requests into batches of up to {served.max_batch}, waiting at most {QUEUE_DELAY_MICROSECONDS} us,
and runs {served.instances} instance{"s" if served.instances > 1 else ""} of the model.{_cores(served)}

## Ask

```console
pip install vitfold 'tritonclient[http]'
python {served.name}/client.py photo.jpg another.jpg
```

Input `{served.input_name}`: {served.input_type}, batch x {shape}.
Output `{served.output_name}`: {served.output_type}, batch x {output}.

`client.py` prepares images by vitfold's own code. A client in another language has to do just this:

{_steps(served.preprocess)}
"""


def _cores(served: Served) -> str:
    if served.on_gpu:
        return ""
    if served.threads is None:
        return "\nIt computes with all cores."
    each = f"{served.threads} thread" + ("s" if served.threads > 1 else "")
    return f" Each computes with {each};\non a machine with other cores, set `intra_op_thread_count` in config.pbtxt."


def _build_section(served: Served) -> str:
    if served.trtexec is None:
        return ""
    return f"""
## Build the engine

A TensorRT engine runs only on the kind of GPU, and with the version of TensorRT, that built it. So build it on the
machine that serves, with the TensorRT of the container that serves:

```console
docker run --rm --gpus all -v "$PWD/{served.name}/1":/work -w /work {BUILDER} \\
  {served.trtexec}
```

The line holds for TensorRT 10 and 11; 11 needs no `--stronglyTyped`, which is its default, and ignores it.
"""


def _steps(preprocess: Preprocess) -> str:
    down, across = preprocess.crop_size
    offset = "(H - h) // 2" if preprocess.crop_offset == "floor" else "round((H - h) / 2), half to even"
    steps = (
        "Decode to RGB, 8 bits; drop transparency.",
        *_resize_steps(preprocess),
        f"Crop the center to {down} x {across} (height x width); the offset of either side is {offset}.",
        "Divide by 255, as float32.",
        f"Per channel, subtract the mean {list(preprocess.mean)} and divide by {list(preprocess.std)}.",
        "Put channels first: 3 x height x width.",
    )
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def _resize_steps(preprocess: Preprocess) -> tuple[str, ...]:
    height, width = preprocess.resize_size
    sizes = {
        "shortest": f"Resize so that the short side has {height} pixels; the long one has int({height} * long / short)",
        "cover": f"Resize to the smallest size of the same aspect that covers {height} x {width}, rounded",
        "exact": f"Resize to {height} x {width} (height x width), whatever the aspect",
    }
    if preprocess.resize == "none":
        return ()
    return (f"{sizes[preprocess.resize]}; filter: Pillow's {preprocess.interpolation}.",)


def client_text(served: Served) -> str:
    """Return client.py: reads images, asks the server, prints classes, or the first numbers of an embedding."""
    return _CLIENT.substitute(
        name=served.name,
        input_name=json.dumps(served.input_name),
        output_name=json.dumps(served.output_name),
        max_batch=served.max_batch,
        classifies=served.classifies,
        preprocess=pprint.pformat(served.preprocess.to_dict(), sort_dicts=False, width=100),
    )


_CLIENT = Template('''\
"""Ask the model $name of a Triton server about images.

    pip install vitfold 'tritonclient[http]'
    python client.py [--url localhost:8000] [--top 5] IMAGE...
"""

import argparse

import numpy as np
import tritonclient.http as triton

from vitfold.decoding import prepared
from vitfold.model import preprocess_from_dict

MODEL = "$name"
INPUT, OUTPUT = $input_name, $output_name
MAX_BATCH = $max_batch
CLASSIFIES = $classifies
PREPROCESS = preprocess_from_dict(
$preprocess
)


def ask(client, images, top):
    """Return the server's answers: classes as b"score:index:label", best first, or embeddings."""
    pixels = np.stack([prepared(image, PREPROCESS) for image in images])
    tensor = triton.InferInput(INPUT, list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels)
    wanted = triton.InferRequestedOutput(OUTPUT, class_count=top if CLASSIFIES else 0)
    return client.infer(MODEL, [tensor], outputs=[wanted]).as_numpy(OUTPUT)


def main():
    """Print one line per image and class."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("images", nargs="+")
    options = parser.parse_args()
    client = triton.InferenceServerClient(url=options.url)
    for start in range(0, len(options.images), MAX_BATCH):
        group = options.images[start : start + MAX_BATCH]
        for image, answer in zip(group, ask(client, group, options.top)):
            if CLASSIFIES:
                for entry in np.atleast_1d(answer):
                    score, index, *label = entry.decode().split(":", 2)
                    print(f"{image}  {float(score):8.3f}  {label[0] if label else index}")
            else:
                print(image, *answer.reshape(-1)[:6], "...")


if __name__ == "__main__":
    main()
''')
