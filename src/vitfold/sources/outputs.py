"""Which outputs a model gives: its own, what its head reads, its tokens, the tokens behind blocks in between."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from vitfold.errors import ProgramError, SourceError
from vitfold.model import GraphEnd, GraphSpec, Model, ViTSpec, param_shapes
from vitfold.model.spec import HIDDEN, hidden_layer, hidden_state
from vitfold.program import Program, program_from_dict
from vitfold.program.program import Ref
from vitfold.program.queries import blocks_of, makers, params_read, readers
from vitfold.transforms.dead import without_dead_nodes

NAMES = {"logits": "logits", "embedding": "image_embeds", "tokens": "last_hidden_state"}
"""Words of users, and the names that these outputs have in graphs."""
_LAYERS = "layers:"
WORDS = f"{', '.join(NAMES)}, {_LAYERS}3,6"


def parse_outputs(text: str) -> tuple[str, ...]:
    """Read a list such as "logits,tokens,layers:3,6,9"; numbers behind `layers:` belong to it.

    Returns:
        Names of outputs: logits, image_embeds, last_hidden_state, hidden_states.L, and others as they are.

    Raises:
        SourceError: if a layer is no number.
    """
    names: list[str] = []
    layers = False
    for given in (one.strip() for one in text.split(",") if one.strip()):
        word = given.removeprefix(_LAYERS).strip()
        layers = given.startswith(_LAYERS) or (layers and word.isdigit())
        if layers and not word.isdigit():
            raise SourceError(f"{given} names no block; write {_LAYERS}3,6 for those behind 3 and 6 blocks")
        names.append(hidden_state(int(word)) if layers else NAMES.get(word, word))
    if not names:
        raise SourceError(f"no outputs are named; write a list of {WORDS}")
    return tuple(dict.fromkeys(names))


def asked_of_program(names: Sequence[str]) -> bool:
    """Whether every name is one that any transformer has, and none is that of an output of somebody's graph."""
    return all(name in NAMES.values() or name.startswith(HIDDEN) for name in names)


def with_outputs(model: Model, names: Sequence[str]) -> Model:
    """Return the model with these outputs; what nothing needs for them is left out.

    Outputs of a graph by their own names and logits come first, then the embedding, tokens, tokens behind blocks; of
    the latter alone the deepest comes first. The first one is what is compared and classified.

    Raises:
        SourceError: if the model has no such output.
    """
    ordered = sorted(dict.fromkeys(names), key=_place_of)
    if hidden_layer(ordered[0]) is not None:
        ordered.insert(0, ordered.pop())
    if isinstance(model.spec, GraphSpec):
        return _of_graph(model, model.spec, ordered)
    return _of_vit(model, model.spec, ordered)


def _place_of(name: str) -> tuple[int, int]:
    layer = hidden_layer(name)
    order = {"image_embeds": 1, "last_hidden_state": 2}
    return (order.get(name, 0), 0) if layer is None else (3, layer)


def _of_vit(model: Model, spec: ViTSpec, names: Sequence[str]) -> Model:
    first, *others = names
    known = [
        spec.output,
        *(() if spec.pool == "none" else NAMES.values()),
        *map(hidden_state, range(1, spec.num_layers + 1)),
    ]
    for name in names:
        if name not in known or (name == "logits" and spec.output != "logits"):
            raise _unknown(name, [one for one in known if one != "logits" or spec.output == "logits"])
    if first != spec.output:
        spec = _ending_in(spec, first)
    spec = replace(spec, also=tuple(others))
    required, optional = param_shapes(spec)
    params = {name: array for name, array in model.params.items() if name in required or name in optional}
    return replace(model, spec=spec, params=params, labels=model.labels if spec.output == "logits" else None)


def _ending_in(spec: ViTSpec, first: str) -> ViTSpec:
    """The architecture up to an output, without what stands behind it."""
    headless = replace(spec, also=(), outputs=0, head_activation="none", output="image_embeds", problem="single_label")
    if first == "image_embeds":
        return headless
    layer = hidden_layer(first)
    return replace(
        headless,
        pool="none",
        pool_norm=False,
        pool_prefix=False,
        map_heads=0,
        map_mlp_width=0,
        output=first,
        num_layers=layer or spec.num_layers,
        final_norm=spec.final_norm and layer is None,
    )


def _unknown(name: str, known: Sequence[str]) -> SourceError:
    shown = [word for word, own in NAMES.items() if own in known]
    shown += [one for one in known if one not in NAMES.values() and not one.startswith(HIDDEN)]
    layers = sum(one.startswith(HIDDEN) for one in known)
    more = f", and {_LAYERS}1 to {layers}" if layers else ""
    return SourceError(f"this model has no output {name!r}; it has {', '.join(shown)}{more}")


def _of_graph(model: Model, spec: GraphSpec, names: Sequence[str]) -> Model:
    program = program_from_dict(json.loads(spec.program))
    ends = {end.name: end for end in spec.outputs_of}
    first = spec.outputs_of[0]
    batch = first.shape[0] if first.shape else "batch"
    refs: dict[str, Ref] = {}
    for name in names:
        if name in ends:
            refs[name] = program.outputs[name]
            continue
        ref = _place(program, spec, name)
        if ref is None:
            layers = [hidden_state(layer) for layer in range(1, spec.num_layers + 1)]
            known = [one for one in (*NAMES.values(), *layers) if _place(program, spec, one) is not None]
            raise _unknown(name, [*(end.name for end in spec.outputs_of), *known])
        own = first.name if ref == program.outputs[first.name] else name
        refs[own] = ref
        ends.setdefault(own, GraphEnd(name=own, dtype="float32", shape=(batch, *program.shapes[ref][1:])))
    shown = without_dead_nodes(Program(inputs=program.inputs, nodes=program.nodes, outputs=refs))
    read = params_read(shown)
    params = {name: array for name, array in model.params.items() if name in read}
    kept = next(iter(refs)) == first.name
    sites = {node.site for node in shown.nodes}
    spec = replace(
        spec,
        program=json.dumps(shown.to_dict(), separators=(",", ":")),
        shapes=tuple((name, shape) for name, shape in spec.shapes if name in params),
        outputs_of=tuple(ends[name] for name in refs),
        num_layers=blocks_of(shown),
        head=spec.head if kept else "features",
        foreign=tuple((site, why) for site, why in spec.foreign if site in sites),
    )
    return replace(model, spec=spec, params=params, labels=model.labels if kept else None)


def _place(program: Program, spec: GraphSpec, name: str) -> Ref | None:
    """The value of a program that a name stands for, None if there is none."""
    layer, first = hidden_layer(name), program.outputs[spec.output]
    if layer is not None:
        return _behind(program, layer - 1) if 1 <= layer <= spec.num_layers else None
    if name == "logits":
        return first if spec.head != "features" else None
    if name == "image_embeds" and spec.head == "features":
        return None if spec.dense else first
    if name == "image_embeds":
        maker = makers(program).get(first)
        feature = None if maker is None or maker.op != "linear" else maker.source
        return feature if feature is not None and len(program.shapes[feature]) == 2 else None
    if name != "last_hidden_state" or not spec.num_layers:
        return None
    last = _behind(program, spec.num_layers - 1)
    norms = [node for node in readers(program)[last] if node.op in ("layer_norm", "rms_norm")]
    return norms[0].outputs[0] if norms else last


def _behind(program: Program, block: int) -> Ref:
    """What a block hands on: the result of its last node."""
    nodes = [node for node in program.nodes if node.block == block]
    if not nodes:
        raise ProgramError(f"there is no block {block}")
    return nodes[-1].outputs[0]
