"""``hdb evaluate``: the accuracy of what a run has trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpc_hdb.config_files import read_settings
from hpc_hdb.errors import UserError
from hpc_hdb.report.progress import damage_line
from hpc_hdb.run.build import choose_place, make_evaluator
from hpc_hdb.train.checkpoint import BEST, load_best, load_checkpoint
from hpc_hdb.train.data import prepare_data
from hpc_hdb.train.evaluate import Evaluation
from hpc_hdb.train.sealed import DamagedFile, read_sealed


def evaluate_run(run: Path, best: bool, note: Callable[[str], None]) -> tuple[Path, Evaluation]:
    """Evaluate a run's final model, or the newest checkpoint where it has none yet.

    Parameters
    ----------
    run : Path
        The run folder.
    best : bool
        Evaluate the best checkpoint instead.
    note : callable
        Told of newer checkpoints that are damaged, and of files passed over, in a line each.

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
    finished = source.exists() and not best
    # A final model has its statistics already.
    evaluator = make_evaluator(settings, place.device, recalibrates=not finished, note=note)
    folder, signature = run / "checkpoint", evaluator.parameters.signature
    if best:
        return folder / BEST, evaluator.evaluate(load_best(folder, signature).result)
    if not finished:
        checkpoint = load_checkpoint(
            folder, signature, lambda *damage: note(damage_line(*map(str, damage)))
        )
        return folder / checkpoint.file, evaluator.evaluate(checkpoint.result)
    try:
        evaluator.parameters.model.load_state_dict(read_sealed(source))
    except (DamagedFile, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(
            f"{source} is damaged or of another model ({reason}): remove it, and the run writes it "
            f"again with hdb train --resume {run}"
        ) from None
    return source, evaluator.evaluate(evaluator.parameters.flat.clone())
