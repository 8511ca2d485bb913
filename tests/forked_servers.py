"""Start many real SGLang servers from one process that has imported SGLang once.

Most of a server start is imports. This script imports SGLang, then forks a process per server that
runs SGLang's own ``launch_server``; see ``forked_processes`` for its scheduler and detokenizer.

Usage: ``python forked_servers.py STARTUPS.json OUTCOMES.json``, where STARTUPS is a list of
``{"name", "arguments", "environment"}`` and OUTCOMES maps each name to an ``Outcome``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fasa_sglang.workloads.serving.engine import import_sglang
from serving import free_port

PARALLEL = 2
TIMEOUT = 120.0
PROMPT = list(range(100, 200))
PARAMETERS = {"temperature": 0, "max_new_tokens": 4}


def known(name: str) -> bool:
    """Whether the installed SGLang has a flag or an environment variable of this name."""
    from sglang.srt.environ import Envs
    from sglang.srt.server_args import ServerArgs

    return name in ServerArgs.__annotations__ or hasattr(Envs, name)


@dataclass
class Outcome:
    """What happened to one server.

    Args:
        exit_code: Exit code of a server that ended by itself; None if it served.
        log: Everything that its processes wrote.
        plain: HTTP status and body of a request without FASA.
        sparse: HTTP status and body of a request with FASA.
        seconds: Time until it ended or had answered.
    """

    exit_code: int | None
    log: str
    plain: tuple[int, Any] | None = None
    sparse: tuple[int, Any] | None = None
    seconds: float = 0.0


class ForkedServer:
    """One server in a session of its own."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.port = free_port()
        self.log = log
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _serve([*arguments, "--port", str(self.port), "--skip-server-warmup"], environment, log)

    def poll(self) -> Outcome | None:
        """The outcome, or None while the server is starting."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            return self._end(Outcome(os.waitstatus_to_exitcode(status), ""))
        if time.monotonic() - self.started > TIMEOUT:
            return self._end(Outcome(None, ""))
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                pass
        except OSError:
            return None
        plain = self._generate(None)
        return self._end(Outcome(None, "", plain, self._generate({"fasa": {"budget": 48}})))

    def _generate(self, custom_params: dict[str, Any] | None) -> tuple[int, Any]:
        body = {"input_ids": PROMPT, "sampling_params": {**PARAMETERS}}
        if custom_params is not None:
            body["sampling_params"]["custom_params"] = custom_params  # type: ignore[call-overload]
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:  # the server died while it answered
            return 0, str(error)

    def _end(self, outcome: Outcome) -> Outcome:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if outcome.exit_code is None:
            os.waitpid(self.pid, 0)
        outcome.log = self.log.read_text(errors="replace")
        outcome.seconds = time.monotonic() - self.started
        return outcome


def _serve(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """Become the server; does not return."""
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(environment)
        from sglang.launch_server import run_server
        from sglang.srt.server_args import prepare_server_args

        run_server(prepare_server_args(arguments))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(startups: Path, outcomes: Path) -> None:
    """Run all start-ups, ``PARALLEL`` at a time."""
    import_sglang()
    for module in ("launch_server", "srt.entrypoints.http_server", "srt.managers.scheduler"):
        import_module(f"sglang.{module}")
    waiting = json.loads(startups.read_text())
    running: dict[str, ForkedServer] = {}
    ended: dict[str, Any] = {}
    while waiting or running:
        while waiting and len(running) < PARALLEL:
            startup = waiting.pop(0)
            log = outcomes.with_name(f"{startup['name'].replace('/', '_')}.log")
            running[startup["name"]] = ForkedServer(
                startup["arguments"], startup["environment"], log
            )
        for name, server in list(running.items()):
            outcome = server.poll()
            if outcome is not None:
                del running[name]
                ended[name] = asdict(outcome)
                print(f"{name}: {outcome.seconds:.1f} s", flush=True)
        time.sleep(0.1)
    outcomes.write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
