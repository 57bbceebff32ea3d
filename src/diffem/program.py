"""A posterior as a program that draws without diffem: what :func:`torch.export.load` reads, a .pt2 file.

    program = torch.export.load("posterior.pt2").module()
    x = program(y, {"mask": mask}, torch.randint(2**62, (len(y),)))     # one draw an observation, in the units of y

The keys of the items are an input, since all random numbers of a draw are a function of its key (:mod:`diffem.seeding`),
and the function is part of the program. Equal keys give equal draws, those of :meth:`Posterior.sample` with `seeds`.

A program checks nothing, and it draws items of the model's shape only. It takes as many observations as you like, unless a
network or a corruption of your own fixes their number when it is traced.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from diffem import files, seeding
from diffem.corruptions import BlackBox, Params
from diffem.data import Layout
from diffem.errors import DiffemError

if TYPE_CHECKING:
    from diffem.posterior import Posterior

EXAMPLES = 3  # observations on which a posterior is traced: one alone would fix their number
TOLERANCE = 1e-3  # the largest difference to the posterior's own draws, of their largest value


class Program(nn.Module):
    """One draw of a posterior for each observation.

    Arguments:
        posterior: The posterior.
    """

    def __init__(self, posterior: Posterior) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, y: Tensor, params: Params, seeds: Tensor) -> Tensor:
        posterior = self.posterior
        y, params = posterior.converted(y, params)
        if "mask" in params:
            y = torch.where(params["mask"], y, 0.0)
        return posterior.drawn(posterior.sampler, y, params, seeds)[0]


def export(posterior: Posterior, file: str | Path, y: Any = None, params: Any = None) -> int | None:
    """Writes a program; see :meth:`Posterior.export`."""
    file = Path(file)
    if file.suffix != ".pt2":
        raise DiffemError(f"{file}: must end in .pt2, the suffix of exported programs")
    y, params = _example(posterior) if y is None else (torch.as_tensor(y), params or {})
    y, params = y.to(posterior.device), {k: torch.as_tensor(v).to(posterior.device) for k, v in params.items()}
    seeds = seeding.item_seeds(0, 0, "user", range(len(y))).to(posterior.device)
    expected = posterior.sample(y, params, seeds=seeds)[0]  # also refuses an example that does not fit
    free, stream = {0: torch.export.Dim.AUTO}, io.BytesIO()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about its own ways
            program = torch.export.export(
                Program(posterior), (y, params, seeds), dynamic_shapes=(free, dict.fromkeys(params, free), free)
            )
            _strip(program)
            torch.export.save(program, stream)
            stream.seek(0)
            found = torch.export.load(stream).module()(y, params, seeds)
    except Exception as error:  # whatever the exporter, or code of the user's, may raise
        what = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        kind, corruption = posterior.sampler.kind, posterior.corruption.config["name"]
        raise DiffemError(f"{file}: torch.export cannot trace {kind} of {corruption}: {what}") from error
    if not (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
        raise DiffemError(f"{file}: the program does not draw what the posterior draws; it is not written")
    files.replace(file, stream.getvalue())
    size = next(node.meta["val"].shape[0] for node in program.graph.nodes if node.name == "seeds")
    return int(size) if is_concrete_int(size) else None


def _strip(program: torch.export.ExportedProgram) -> None:
    """Takes out the example and the paths of source files: a program may be given to others."""
    program.example_inputs = None
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    for graph in graphs:
        for node in graph.graph.nodes:
            node.meta = {name: node.meta[name] for name in ("val",) if name in node.meta}


def _example(posterior: Posterior) -> tuple[Tensor, Params]:
    """Observations of the corruption, in the layout of the user, with the parameters that it draws."""
    corruption = posterior.corruption
    if isinstance(corruption, BlackBox) or (corruption.noise is None and "noise" in (corruption.parameters or ())):
        raise DiffemError(
            "export: y and params: give a few observations; the corruption does not tell what they look like"
        )
    x = posterior.units.restore(torch.zeros(EXAMPLES, *posterior.shape))
    return users(posterior.layout, *corruption.observe(x, torch.Generator().manual_seed(0)))


def users(layout: Layout | None, y: Tensor, params: Params) -> tuple[Tensor, Params]:
    """Observations and their parameters, from the layout of models to that of the user."""
    if layout is None or layout.trivial:
        return y, params
    if layout.complex:
        raise DiffemError("export: y and params: give a few observations, as complex numbers")
    like = {k: v.ndim == y.ndim and layout.like_y(k, layout.to_user(v)) for k, v in params.items()}
    return layout.to_user(y), {k: layout.to_user(v) if like[k] else v for k, v in params.items()}
