"""A store of files for MLflow: `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri PLACE`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina.export.feed import Described, Layers, scalars
from lamina.export.sink import Sink


class _Store:
    def __init__(self, client: Any, run: str):
        self._client, self._run = client, run

    def round(self, row: Mapping[str, Any], layers: Layers) -> None:
        for key, value in scalars(row, layers).items():
            name = re.sub(r"[^\w\-. /]", "_", key)
            self._client.log_metric(self._run, name, value, round(1000 * time.time()), row["round"])

    def close(self) -> None:
        self._client.set_terminated(self._run)


def open_sink(place: Path, run: Described, done: int) -> Sink:
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}  # read on import and later
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=place.resolve().as_uri())
    known = client.get_experiment_by_name(run.experiment)
    experiment = client.create_experiment(run.experiment) if known is None else known.experiment_id
    if done and (begun := client.search_runs([experiment], f"tags.lamina = '{run.identity}'")):
        return _Store(client, begun[0].info.run_id)
    made = client.create_run(experiment, run_name=run.name, tags={"lamina": run.identity}).info.run_id
    for key, value in run.settings.items():
        client.log_param(made, key, str(value)[:6000])
    return _Store(client, made)
