"""A server and a client of the library websockets. `serve DEFLATE` prints its port; `visit URL DEFLATE` plays the script of matrix.test.js."""

import asyncio
import hashlib
import json
import sys

import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve

LARGE = 1_000_000
last_close = None


def described(message):
    kind = "text" if isinstance(message, str) else "binary"
    data = message.encode() if isinstance(message, str) else message
    return [kind, len(data), hashlib.sha256(data).hexdigest()[:16]]


async def handle(socket):
    global last_close
    try:
        async for message in socket:
            if message == "fragments":
                await socket.send(iter(["one", "two", "three"]))
            elif message == "close":
                await socket.close(4001, "as asked")
            elif message == "last close":
                await socket.send(json.dumps(last_close))
            else:
                await socket.send(message)
    finally:
        last_close = [socket.close_code, socket.close_reason]


async def run_server(compression):
    async with serve(handle, "127.0.0.1", 0, compression=compression, max_size=4 * LARGE, subprotocols=["chat"]) as server:
        print("port", server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Future()


async def visit(url, compression):
    said = []
    async with connect(url, compression=compression, max_size=4 * LARGE, subprotocols=["chat", "other"], proxy=None) as socket:
        said.append([socket.subprotocol, [extension.name for extension in socket.protocol.extensions]])
        for message in ["hello", "", "x" * LARGE, bytes(range(256)) * 300, "größer"]:
            await socket.send(message)
            said.append(described(await socket.recv()))
        await socket.send(iter(["in ", "three ", "parts"]))
        said.append(described(await socket.recv()))
        await socket.send("fragments")
        said.append([fragment async for fragment in socket.recv_streaming()])
        await (await socket.ping(b"are you there"))
        said.append("pong")
        await socket.close(4321, "that was it")
        said.append([socket.close_code, socket.close_reason])
    async with connect(url, compression=compression, subprotocols=["chat"], proxy=None) as socket:
        await socket.send("last close")
        said.append(json.loads(await socket.recv()))
        await socket.send("close")
        try:
            await socket.recv()
        except websockets.ConnectionClosed:
            said.append([socket.close_code, socket.close_reason])
    print(json.dumps(said))


mode, *arguments = sys.argv[1:]
deflate = "deflate" if arguments[-1] == "deflate" else None
asyncio.run(run_server(deflate) if mode == "serve" else visit(arguments[0], deflate))
