"""``hdb evaluate``: the accuracy of what a run has trained."""

from __future__ import annotations

from pathlib import Path

import torch

from hpc_hdb.config import read_settings
from hpc_hdb.errors import UserError
from hpc_hdb.run.build import choose_place, make_evaluator
from hpc_hdb.train.checkpoint import load_checkpoint
from hpc_hdb.train.data import prepare_data
from hpc_hdb.train.evaluate import Evaluation


def evaluate_run(run: Path) -> tuple[Path, Evaluation]:
    """Evaluate a run's final model, or the newest checkpoint where it has none yet.

    Returns
    -------
    source : Path
        What was evaluated.
    result : Evaluation

    Raises
    ------
    UserError
        If `run` is no run folder, has no model yet, or its model is damaged.
    """
    settings = read_settings(run / "config.toml")
    place = choose_place(settings)
    place.settle()
    prepare_data(settings.data)
    source = run / "model.pt"
    finished = source.exists()
    # A final model has its statistics already.
    evaluator = make_evaluator(settings, place.device, recalibrates=not finished)
    if not finished:
        source = run / "checkpoint"
        checkpoint = load_checkpoint(source, evaluator.parameters.signature)
        return source, evaluator.evaluate(checkpoint.result)
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
        evaluator.parameters.model.load_state_dict(state)
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        reason = str(error).split("\n")[0][:120]
        raise UserError(
            f"{source} is damaged or of another model ({reason}): go on from the run's "
            f"checkpoint with hdb train --resume {run}"
        ) from None
    return source, evaluator.evaluate(evaluator.parameters.flat.clone())
