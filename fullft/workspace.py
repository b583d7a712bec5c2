"""A view of a W&B project with the charts that show forgetting, made by code; needs the extra `workspace`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import yaml

from fullft.errors import BadInput

# Section -> its charts: title, and the regular expression of the metrics in it.
CHARTS = {
    "Skill against retention": {
        "skill": "skill/.*/(exact_match|acc|acc_norm)", "loss of the held-out rows": "eval/loss",
        "drop of retention tasks": "retention/.*/drop", "average forgetting": "retention/average_forgetting",
        "divergence from the base model": "divergence/.*", "score of checkpoints": "checkpoint/score",
    },
    "Training": {
        "loss": "train/loss.*", "gradient norm": "train/grad_norm", "learning rate": "train/learning_rate",
        "distance from the base weights": "train/l2_distance", "tokens of each set": "data/.*",
    },
    "Machine": {
        "tokens a second": "perf/tokens_per_second.*", "step time": "time/step_seconds",
        "where the time of a step goes": "time/(data|forward|backward|optimizer|communication|rest)_seconds",
        "share of the peak FLOP/s": "perf/[mh]fu", "TFLOP/s of a GPU": "perf/tflops_per_gpu",
        "memory": "(memory|system)/.*gib", "waiting for checkpoints": "time/checkpoint.*",
    },
}  # fmt: skip


def require() -> None:
    """Raises BadInput if the package is not installed."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise BadInput("--workspace: needs the package wandb-workspaces (pip install 'fullft[workspace]')")


def template(entity: str, project: str) -> Any:
    """The workspace (wandb_workspaces.workspaces.Workspace), not saved; opens no connection."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    step = "train/global_step"
    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[panels.LinePlot(title=title, x=step, metric_regex=f"^{keys}$") for title, keys in charts.items()],
        )
        for name, charts in CHARTS.items()
    ]
    tables = [panels.WeavePanelSummaryTable(table_name=name) for name in ("tables/retention", "tables/samples")]
    sections.insert(1, workspaces.Section(name="Tables of the last evaluation", is_open=True, panels=tables))
    return workspaces.Workspace(entity=entity, project=project, name="fullft", sections=sections)


def save(run_dir: Path) -> str:
    """Save the view to the project of a run; returns its address."""
    import wandb

    tracking = yaml.safe_load((run_dir / "recipe.yaml").read_text())["tracking"]
    entity = os.environ.get("WANDB_ENTITY", tracking["entity"]) or wandb.Api().default_entity
    workspace = template(entity, os.environ.get("WANDB_PROJECT", tracking["project"]))
    workspace.save()
    return f"workspace: {workspace.url}"
