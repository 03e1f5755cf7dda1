"""The numbers of a run for TensorBoard, written when they come: torch's SummaryWriter leaves it to a thread, which says
on a full disk what nobody can catch."""

import os
import socket
import time
from pathlib import Path


class Board:
    """Appends to a file of <run>/tensorboard. Raises OSError when that cannot be written."""

    def __init__(self, folder: Path, step: int) -> None:
        """step: where the run begins or goes on; what a killed run wrote after it is hidden."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        self.event = Event
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = RecordWriter((folder / name).open("wb"))
        self.add(file_version="brain.Event:2")
        self.add(step=step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: dict[str, float | int]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in record.items() if name != "step"]
        self.add(step=record["step"], summary=Summary(value=values))

    def add(self, **what: object) -> None:
        self.file.write(self.event(wall_time=time.time(), **what).SerializeToString())
        self.file.flush()

    def close(self) -> None:
        self.file.close()
