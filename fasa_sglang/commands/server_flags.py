"""SGLang's flags as its own parser reads them, before anything expensive is done.

The parser runs in a process of its own: importing it takes seconds and a gigabyte, and the process
of ``fasa serve`` lives as long as the server.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

from fasa_sglang.config import OVERRIDES_FLAG, json_object
from fasa_sglang.errors import ConfigError

BACKEND_FLAGS = ("attention_backend", "decode_attention_backend")
FIELDS = (
    "model_path",
    "revision",
    "load_format",
    "host",
    "port",
    "api_key",
    "ssl_certfile",
    "json_model_override_args",
)


@dataclass(frozen=True)
class ServerFlags:
    """The values of SGLang's flags that our commands need themselves.

    Args:
        argv: All flags for SGLang, with the model as ``--model-path``.
        model_path: Hugging Face folder or hub name.
        json_model_override_args: The JSON text of the flag.
    """

    argv: list[str]
    model_path: str
    revision: str | None
    load_format: str
    host: str
    port: int
    api_key: str | None
    ssl_certfile: str | None
    json_model_override_args: str

    @property
    def overrides(self) -> dict[str, Any]:
        """The user's own ``--json-model-override-args``.

        Raises:
            ConfigError: They are not a JSON object.
        """
        return json_object(self.json_model_override_args, OVERRIDES_FLAG)

    @property
    def url(self) -> str:
        """The address at which this machine reaches the server."""
        scheme = "https" if self.ssl_certfile else "http"
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"


def pass_flags_on(parser: argparse.ArgumentParser, command: str, examples: str) -> None:
    """Set a parser up for a command that passes flags which are not its own on to SGLang.

    Args:
        parser: The command's parser.
        command: The command, for the usage line.
        examples: Some of SGLang's flags, for the help text.
    """
    parser.usage = f"{command} MODEL [options] [flags of sglang.launch_server]"
    # An abbreviation could also be a flag of SGLang.
    parser.allow_abbrev = False
    parser.epilog = (
        "MODEL is a Hugging Face folder or hub name, before or after the flags, or --model-path. "
        f"{examples} and all other flags are those of sglang.launch_server."
    )


def parse_server_flags(argv: Sequence[str], environment: Mapping[str, str]) -> ServerFlags:
    """Check SGLang's flags and find the model among them, with SGLang's own parser.

    Args:
        argv: The model and SGLang's flags in any order.
        environment: The environment that the server will have.

    Raises:
        ConfigError: A flag is unknown, has a bad value or is set by ``fasa serve`` itself, or there
            is not exactly one model.
    """
    command = [sys.executable, "-P", "-m", "fasa_sglang.commands.server_flags", *argv]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            f"SGLang's flags cannot be read ({reason}); expected an installed SGLang, pip install "
            "'fasa-sglang[serve]', and see fasa doctor"
        )
    answer = json.loads(process.stdout.splitlines()[-1])
    if "error" in answer:
        raise ConfigError(answer["error"])
    return ServerFlags(**answer)


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors instead of printing the usage of 400 flags."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument; SGLang requires ``--model-path``, which is optional here."""
        return super().add_argument(
            *names, **({**options, "required": False} if "--model-path" in names else options)
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            f"SGLang refuses its flags: {message}; see python -m sglang.launch_server --help"
        )


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """SGLang's namespace, and the arguments that belong to no flag."""
    from sglang.srt.server_args import ServerArgs

    parser = _Parser(prog="sglang")
    ServerArgs.add_cli_args(parser)
    if "--config" in argv:
        in_utils = find_spec(
            "sglang.srt.utils.server_args_config_parser"
        )  # SGLang 0.5.20 and later
        merger = import_module(
            in_utils.name if in_utils else "sglang.srt.server_args_config_parser"
        ).ConfigArgumentMerger
        argv = merger(parser).merge_config_with_args(argv)
    namespace, rest = parser.parse_known_args(argv)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return namespace, rest


def _server_flags(argv: list[str]) -> dict[str, Any]:
    try:
        namespace, rest = _parse(argv)
    except ConfigError:
        # Another plugin may define the flag or the value. Loading plugins takes seconds.
        from sglang.srt.plugins import load_plugins

        load_plugins()
        namespace, rest = _parse(argv)
    for name in BACKEND_FLAGS:
        value = getattr(namespace, name, None)
        if value is not None:
            raise ConfigError(
                f"this command sets the attention backend itself, got --{name.replace('_', '-')} "
                f"{value}; leave the flag out, or start sglang.launch_server instead"
            )
    models = [*rest, *filter(None, [namespace.model_path])]
    if len(models) != 1:
        names = ", ".join(models) or "none"
        raise ConfigError(
            f"this command needs one model, got {names}; pass it as MODEL or as --model-path MODEL"
        )
    if rest:
        argv = ["--model-path", rest[0], *_without(argv, rest[0])]
    namespace.model_path = models[0]
    return {"argv": argv, **{name: getattr(namespace, name) for name in FIELDS}}


def _without(argv: list[str], positional: str) -> list[str]:
    """The arguments without the positional one, which a flag's value may be equal to."""
    for i, argument in enumerate(argv):
        others = argv[:i] + argv[i + 1 :]
        with suppress(ConfigError):
            if argument == positional and not _parse(others)[1]:
                return others
    raise AssertionError(f"{positional} is not among {argv}")


if __name__ == "__main__":
    try:
        result = _server_flags(sys.argv[1:])
    except ValueError as error:  # ConfigError, or SGLang's about its --config file
        result = {"error": str(error)}
    print(json.dumps(result))
