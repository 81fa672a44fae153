"""The texts of folders for Docker, KServe, BentoML and Ray Serve; each maps names of files to what they hold.

Source: KServe, v1beta1 InferenceService with a custom container; BentoML 1.4, `bentoml.service` and bentofile.yaml;
Ray Serve 2, `serve.deployment` and its config file.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from string import Template

REQUIREMENTS = "requirements.txt"
WRITTEN = "# A server of one model, written by `vitfold export`."
"""The first line of a file of every folder, by which it is recognized."""
_MOST_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What servers have to know: the model's name, its bundle in the folder, and the threads of each instance."""

    name: str
    bundle: str
    size_bytes: int
    threads: int | None
    instances: int


def docker(deployment: Deployment) -> dict[str, str]:
    """Return a Dockerfile that needs no compiler and runs `vitfold serve`."""
    command = ["python", "-m", "vitfold", "serve", deployment.bundle, "--host", "0.0.0.0", "--port", "8000"]
    command += [] if deployment.threads is None else ["--threads", str(deployment.threads)]
    probe = "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=5)"
    return {
        "Dockerfile": f"""\
{WRITTEN}
#   docker build -t {deployment.name} .
#   docker run --rm -p 8000:8000 {deployment.name}
FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim
COPY {REQUIREMENTS} /tmp/
RUN pip install --no-cache-dir --only-binary :all: -r /tmp/{REQUIREMENTS} && useradd --uid 1000 --create-home server
USER 1000
WORKDIR /home/server
COPY vitfold vitfold
COPY {deployment.bundle} {deployment.bundle}
EXPOSE 8000
HEALTHCHECK CMD {json.dumps(["python", "-c", probe])}
CMD {json.dumps(command)}
"""
    }


def kserve(deployment: Deployment) -> dict[str, str]:
    """Return the Dockerfile, and an InferenceService that runs its image with as many cores as it has threads."""
    memory_mib = 1024 + 3 * deployment.size_bytes // 2**20
    cores = deployment.threads or 1
    return docker(deployment) | {
        "inferenceservice.yaml": f"""\
{WRITTEN}
#   docker build -t REGISTRY/{deployment.name} . && docker push REGISTRY/{deployment.name}
#   kubectl apply -f inferenceservice.yaml          # after `image` names that registry
# It speaks the Open Inference Protocol, version 2.
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {deployment.name}
spec:
  predictor:
    minReplicas: {deployment.instances}
    maxReplicas: {deployment.instances}
    containers:
      - name: kserve-container
        image: {deployment.name}:latest
        args: {json.dumps(_arguments(deployment, cores))}
        command: ["python", "-m", "vitfold"]
        ports:
          - containerPort: 8000
            protocol: TCP
        readinessProbe:
          httpGet:
            path: /v2/health/ready
            port: 8000
        resources:
          requests: {{cpu: "{cores}", memory: {memory_mib}Mi}}
          limits: {{cpu: "{cores}", memory: {memory_mib}Mi}}
        securityContext:
          runAsNonRoot: true
          runAsUser: 1000
          allowPrivilegeEscalation: false
"""
    }


def _arguments(deployment: Deployment, cores: int) -> list[str]:
    return ["serve", deployment.bundle, "--host", "0.0.0.0", "--port", "8000", "--threads", str(cores)]


def bento(deployment: Deployment) -> dict[str, str]:
    """Return a service of BentoML: one worker for each instance."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {
        "service.py": _text(_BENTO, deployment),
        "bentofile.yaml": f"""\
{WRITTEN}
#   bentoml serve service:Model            # here
#   bentoml build && bentoml containerize {deployment.name}:latest
service: "service:Model"
name: {deployment.name}
include:
  - "service.py"
  - "vitfold/**"
  - "{deployment.bundle}/**"
python:
  requirements_txt: {REQUIREMENTS}
  pack_git_packages: false
docker:
  python_version: "{python}"
""",
    }


def ray_serve(deployment: Deployment) -> dict[str, str]:
    """Return an application of Ray Serve: one replica for each instance, with as many CPUs as threads."""
    return {
        "app.py": _text(_RAY, deployment),
        "serve.yaml": f"""\
{WRITTEN}
#   serve run serve.yaml                   # in this folder, which lies at the same path on every node
http_options:
  host: 127.0.0.1
  port: 8000
applications:
  - name: {deployment.name}
    route_prefix: /
    import_path: app:app
    deployments:
      - name: Model
        num_replicas: {deployment.instances}
        max_ongoing_requests: 64
        ray_actor_options:
          num_cpus: {deployment.threads or 1}
""",
    }


def _text(template: str, deployment: Deployment) -> str:
    return Template(template).substitute(
        written=WRITTEN,
        name=deployment.name,
        bundle=deployment.bundle,
        threads=deployment.threads or 1,
        instances=deployment.instances,
        most=_MOST_BYTES,
    )


_BENTO = '''\
$written
"""POST /predict with a file `image`: what `vitfold predict --json` says of it."""

from pathlib import Path
from typing import Annotated, Any

import bentoml
from bentoml.exceptions import InvalidArgument
from bentoml.validators import ContentType

from vitfold.errors import ImageError
from vitfold.serve.predictor import open_predictor
from vitfold.serve.rows import answer


@bentoml.service(name="$name", workers=$instances, threads=4, resources={"cpu": "$threads"}, traffic={"timeout": 10})
class Model:
    def __init__(self) -> None:
        self.vit = open_predictor(Path(__file__).with_name("$bundle"), threads=$threads)

    @bentoml.api
    def predict(self, image: Annotated[Path, ContentType("image/*")], top: int = 5) -> dict[str, Any]:
        if image.stat().st_size > $most:
            raise InvalidArgument("the picture has more than $most bytes")
        try:
            return answer(self.vit(image.read_bytes())[0], top, 0.5)
        except ImageError as error:
            raise InvalidArgument(str(error)) from None
'''

_RAY = '''\
$written
"""POST the bytes of a picture: what `vitfold predict --json` says of it."""

import asyncio
from pathlib import Path

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from vitfold.errors import ImageError
from vitfold.serve.predictor import open_predictor
from vitfold.serve.rows import answer


@serve.deployment
class Model:
    def __init__(self) -> None:
        self.vit = open_predictor(Path(__file__).with_name("$bundle"), threads=$threads)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.002)
    async def predicted(self, images: list[bytes]) -> list[object]:
        return await asyncio.to_thread(lambda: list(self.vit.stream(images, skip_bad=True)))

    async def __call__(self, request: Request) -> JSONResponse:
        held = bytearray()
        async for part in request.stream():
            held += part
            if len(held) > $most:
                return JSONResponse({"error": "the body has more than $most bytes"}, status_code=413)
        found = await self.predicted(bytes(held))
        if isinstance(found, ImageError):
            return JSONResponse({"error": str(found)}, status_code=400)
        return JSONResponse(answer(found, 5, 0.5))


app = Model.bind()
'''
