"""A port that Serve has lost comes back when the next replica of the node starts.

Serve 2.60 gives a starting replica its port, and forgets to take it back if it kills that replica before
counting it as running (an update, a scale-down, a crash at that moment): it only looks for ports of the dead
when the set of replicas differs from the last look. Without a port to spare, every later replica of the node
fails with NoAvailablePortError, and the rollout stops.
"""

import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import ray
from ray import serve
from ray._private import worker
from ray.exceptions import RayTaskError
from ray.serve._private import constants
from ray.serve._private.common import RequestProtocol

from cabochon.server.ingress import ports

logger = logging.getLogger(__name__)

FOLDER = "cabochon_replicas"  # in Ray's folder of the session, which is one node's


async def take_over_ports() -> BinaryIO:
    """In a replica that starts: give back what ended replicas of this node still hold, and sign in.

    Returns the open file that says that this replica lives, as long as its process does. Raises RayError if
    the controller cannot be asked: Serve then tries again, and the ended ones are still known.
    """
    folder = Path(worker._global_node.get_session_dir_path()) / FOLDER
    controller = ray.get_actor(constants.SERVE_CONTROLLER_NAME, namespace=constants.SERVE_NAMESPACE)
    node_id = ray.get_runtime_context().get_node_id()
    for replica_id in ended(folder):
        for port in range(*ports()):
            arguments = node_id, replica_id, port, RequestProtocol.HTTP
            try:
                await controller.release_replica_port.remote(*arguments)
                logger.info("port given back port=%d ended_replica=%s", port, replica_id)
            except RayTaskError:  # as it should be: the controller refuses, that replica does not hold it
                pass
        (folder / replica_id).unlink(missing_ok=True)
    return sign_in(folder, serve.get_replica_context().replica_id.unique_id)


def sign_in(folder: Path, replica_id: str) -> BinaryIO:
    """A file that is locked as long as it is open: children do not inherit it, and SIGKILL closes it too."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.{replica_id}")
    file = path.open("wb")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path.rename(folder / replica_id)  # nobody may see it unlocked
    return file


def ended(folder: Path) -> Iterator[str]:
    """The replicas that have signed in and have ended since."""
    for path in sorted(folder.glob("*")):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield path.name
