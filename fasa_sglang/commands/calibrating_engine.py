"""Start an SGLang engine that calibrates its model, and end it; ``fasa calibrate`` runs this.

Usage: ``python -m fasa_sglang.commands.calibrating_engine FLAGS`` with SGLang's flags, and with the
job in the environment.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from sglang.srt.plugins import load_plugins

    # Before SGLang's flags are read: the attention backend is one of a plugin.
    load_plugins()
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import prepare_server_args

    Engine(server_args=prepare_server_args(sys.argv[1:])).shutdown()
