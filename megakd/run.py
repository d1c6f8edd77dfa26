"""What the stages of a run share on one rank: the recipe, this process' place, grids, tokenizer, rows and models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.batch import Batch, Kind, Step
from megakd.check import tokenizer_of
from megakd.config import Recipe, Role
from megakd.data.dataset import read_rows
from megakd.data.readers import PreferenceRow
from megakd.data.tokenizers import Tokenizer
from megakd.hf.exporter import ExportTarget, export_model
from megakd.hf.families import Architecture
from megakd.hf.importer import load_head
from megakd.layout import Layout
from megakd.mcore.graphs import CudaRecorder, replay_forward
from megakd.mcore.grid import Grid, make_grid
from megakd.mcore.model import Model, build_model, freeze
from megakd.mcore.runtime import World
from megakd.teacher.online import OnlineTeacher

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Run:
    """A run on this rank. Grids are made once for each layout and kept."""

    recipe: Recipe
    world: World

    def __post_init__(self):
        self._grids: dict[Layout, Grid] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's one tokenizer, which all its models share."""
        return tokenizer_of(self.recipe)

    @cached_property
    def train_rows(self) -> list[PreferenceRow]:
        """The training rows of this run."""
        return read_rows(self.recipe.data.train, self.recipe.data.train_rows, self.recipe.seed, self.recipe.data.answer)

    @cached_property
    def eval_rows(self) -> list[PreferenceRow]:
        """The held-out rows of this run."""
        return read_rows(self.recipe.data.eval, self.recipe.data.eval_rows, self.recipe.seed, self.recipe.data.answer)

    @cached_property
    def _recorder(self) -> CudaRecorder:
        """One for all models that are replayed: they share the memory in which they run."""
        return CudaRecorder()

    @property
    def is_root(self) -> bool:
        """Whether this rank writes and shows what is written and shown once."""
        return self.world.rank == 0

    def folder(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.recipe.output / "stages" / stage

    def layout(self, role: str, *, trained: bool = False) -> Layout:
        """A role's layout over this run's world, where it is trained or where it only runs forward."""
        parallel = self.recipe.role(role).cut(trained=trained)
        return Layout(self.world.size, parallel.tensor, parallel.pipeline, parallel.context)

    def grid(self, role: str, *, trained: bool = False) -> Grid:
        """The process groups of `layout`. Collective over the world at the first call for a layout."""
        layout = self.layout(role, trained=trained)
        if layout not in self._grids:
            self._grids[layout] = make_grid(layout, self.world.timeout)
        return self._grids[layout]

    def load_model(self, role: str, model: str, use: Literal["forward", "training", "copy"] = "forward") -> Model:
        """A model in a role's layout, filled from its directory: to run it forward, to train it, or only to write it
        elsewhere, which FP8 must not round."""
        path, precision = self.recipe.path_of_model(model), self.recipe.precision
        settings: Role = self.recipe.role(role)
        trained = use == "training"
        if use == "copy":
            precision = precision.model_copy(update={"fp8_weights": "none"})
        model = build_model(
            path, Architecture.read(path), settings.cut(trained=trained), settings.recompute, precision,
            self.grid(role, trained=trained), self.world.device, trained=trained,
        )
        if settings.cuda_graphs and use == "forward":
            replay_forward(freeze(model), settings.graph_tokens, self._recorder)
        if settings.decode_graphs and use != "copy":
            model.decode_recorder = self._recorder
        return model

    def load_teacher(self, role: str, source: str, kinds: tuple[Kind, ...], student: Grid) -> OnlineTeacher:
        """The model `source` as a frozen teacher in the layout of `role`, with its head cut for the student's."""
        settings: Role = self.recipe.role(role)
        model = freeze(self.load_model(role, source))
        head_VK = None
        if student.is_last_stage:
            head_VK = load_head(
                self.recipe.path_of_model(source),
                model.architecture,
                student.at.tensor,
                student.layout.tensor,
                model.dtype,
                self.world.device,
            )
        return OnlineTeacher(model, settings.micro_batch, kinds, head_VK)

    def batches(self, step: Step, role: str, model: Model, *, pad_id: int) -> list[Batch]:
        """This rank's micro-batches of a step for a model in the layout of `role`."""
        table = step.table(model.grid.layout.data, self.recipe.role(role).micro_batch)
        return step.batches(
            table[model.grid.at.data], pad_id=pad_id, padding=model.padding, device=self.world.device
        )

    def export(self, model: Model, parameters: list[dict[str, Tensor]], source: str, save_as: str, dtype: str) -> Path:
        """Writes a model, whose chunks have these parameters, as `models/<save_as>`, with the tokenizer and settings
        of the model `source`.

        Collective over the world.
        """
        directory = self.recipe.output / "models" / save_as
        export_model(
            ExportTarget(directory, self.recipe.path_of_model(source), EXPORT_DTYPES[dtype]),
            model.architecture,
            model.shards,
            parameters,
            layout=model.grid.layout,
            at=model.grid.at,
            tp_group=model.grid.groups.tp,
            barrier_group=dist.group.WORLD,
        )
        return directory
