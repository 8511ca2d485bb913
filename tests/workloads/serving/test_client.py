"""How evaluations send requests."""

from __future__ import annotations

import asyncio

from fasa_sglang.workloads.serving.client import Client

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


def test_generate_uses_a_connection_only_once() -> None:
    """SGLang closes idle connections; a request on one of them used to end the evaluation."""

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = [line for line in head.lower().split(b"\r\n") if b"content-length" in line]
        await reader.readexactly(int(length.split(b":")[1]))
        writer.write(ANSWER)
        # A second request on the connection gets no answer.
        await reader.read(1)
        writer.close()

    async def send() -> list[dict[str, object]]:
        server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Client(f"http://127.0.0.1:{port}", 2) as client:
            return [await client.generate({"text": "a"}) for _ in range(3)]

    assert asyncio.run(send()) == [{}] * 3
