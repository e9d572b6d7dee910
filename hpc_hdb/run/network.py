"""network.json: the constants of the network model, beside timing.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from dali_pipelines.files import write_whole
from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan.network import ASSUMED, Network

NETWORK_FILE = "network.json"


def write_network(path: Path, network: Network, about: dict[str, str | int]) -> None:
    """Write network.json; `about` says on what it was measured."""
    write_whole(path, (json.dumps(about | asdict(network), indent=2) + "\n").encode())


def find_network(settings: Settings) -> tuple[Network, str]:
    """The network model of a configuration, and where it is from, in a few words.

    Raises
    ------
    UserError
        If a file is named that is missing, or found that is damaged.
    """
    path = settings.plan.network
    if path is None:
        timing = settings.plan.timing
        path = (timing.parent if isinstance(timing, Path) else Path()) / NETWORK_FILE
        if not path.is_file():
            return ASSUMED, (
                "10 Gbit/s assumed; measure yours: mpirun -n RANKS hdb profile CONFIG --network"
            )
    try:
        values = json.loads(path.read_text())
        return Network.from_dict(values), f"measured with {int(values['ranks'])} ranks, {path}"
    except FileNotFoundError:
        raise UserError(
            f"no network file {path}: write it with 'mpirun -n RANKS hdb profile --network'"
        ) from None
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise UserError(
            f"network file {path} is damaged ({type(error).__name__}: {error}): "
            "write it again with 'hdb profile --network'"
        ) from None
