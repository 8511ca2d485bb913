"""What a server that calibrates itself is to do, as ``fasa calibrate`` tells it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fasa_sglang.calibration.corpus import Text, default_text
from fasa_sglang.calibration.settings import CalibrationSettings

ENV = "FASA_CALIBRATION_JOB"
"""Environment variable that carries a job from ``fasa calibrate`` into SGLang's processes."""


@dataclass(frozen=True)
class CalibrationJob:
    """A calibration that the engine makes when it starts.

    Args:
        text: The text that ranks the chunks.
        out: File to write; None keeps the calibration in the server's cache.
        settings: How to calibrate.
    """

    text: Text = field(default_factory=default_text)
    out: str | None = None
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)

    def environment(self, text_file: Path) -> dict[str, str]:
        """The environment variable that carries this job.

        Args:
            text_file: Where the text is written to, as it may be longer than a variable can be.
        """
        # As bytes, so that line ends stay as they are.
        text_file.write_bytes(self.text.content.encode())
        values = {
            "out": self.out,
            "settings": asdict(self.settings),
            "text": {"name": self.text.name, "file": str(text_file)},
        }
        return {ENV: json.dumps(values)}

    @staticmethod
    def is_given() -> bool:
        """Whether ``fasa calibrate`` gave this process a job."""
        return ENV in os.environ

    @classmethod
    def from_environment(cls) -> CalibrationJob | None:
        """The job that ``fasa calibrate`` gave to this process; None in an ordinary server."""
        if not cls.is_given():
            return None
        values = json.loads(os.environ[ENV])
        content = Path(values["text"]["file"]).read_bytes().decode()
        return cls(
            text=Text(values["text"]["name"], content),
            out=values["out"],
            settings=CalibrationSettings(**values["settings"]),
        )
