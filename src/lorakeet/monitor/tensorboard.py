"""Curves for TensorBoard, written without torch; silent where it is not installed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lorakeet.base.run_folder import to_disk_error

STEP_FIELDS = ("loss", "learning_rate", "gradient_norm", "tokens_per_s")
HEARD = frozenset("step evaluation sample_answers alarm run_finished run_interrupted".split())


class TensorboardSink:
    """A sink that writes steps, evaluations, sample answers and alarms as TensorBoard events.

    Args:
        folder: made at the first event, and only when the package is installed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._is_installed: bool | None = None

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Hears one event.

        Raises:
            MachineError: the curves cannot be written.
        """
        if kind not in HEARD:
            return
        try:
            if self._open():
                self._write(kind, fields)
        except OSError as error:
            raise to_disk_error(error, self._folder, 0) from error

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        """One event as TensorBoard has it."""
        if kind == "step":
            values = {f"train/{name}": fields[name] for name in STEP_FIELDS}
            self._write_scalars(values, fields["step"])
        elif kind == "evaluation":
            values = {f"validation/{name}": v for name, v in fields["values"].items()}
            self._write_scalars(values, fields["step"])
            self._writer.flush()
        elif kind == "sample_answers":
            text = "\n\n".join(f"**{prompt}**\n\n{answer}" for prompt, answer in fields["answers"])
            self._write_text("answers", text, fields["step"])
        elif kind == "alarm":
            text = f"**{fields['code']}** {fields['message']}"
            self._write_text("alarms", text, fields.get("step") or 0)
            self._writer.flush()
        else:
            self._writer.flush()

    def _open(self) -> bool:
        """Whether there is a writer, opened at the first call."""
        if self._is_installed is None:
            try:
                from tensorboard.summary.writer.event_file_writer import EventFileWriter
            except ImportError:
                self._is_installed = False
                return False
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventFileWriter(str(self._folder))
            self._is_installed = True
        return self._is_installed

    def _write_scalars(self, values: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        rows = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=rows))
        self._writer.add_event(event)

    def _write_text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=[value]))
        self._writer.add_event(event)
