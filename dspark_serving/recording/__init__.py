"""The flight recorder: the newest rounds in memory, a compact file of them, and their replay without an engine."""

from dspark_serving.recording.file import Recording, read_recording, write_recording
from dspark_serving.recording.recorder import FlightRecorder, RecordedPolicy
from dspark_serving.recording.replay import replay, what_if

__all__ = [
    "FlightRecorder",
    "RecordedPolicy",
    "Recording",
    "read_recording",
    "replay",
    "what_if",
    "write_recording",
]
