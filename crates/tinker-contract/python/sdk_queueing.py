"""Waits in the server's queue through the official Python SDK and reads why.

    python sdk_queueing.py BASE_URL BASE_MODEL PORT    # the key in TINKER_API_KEY

The server does nothing until somebody connects to PORT, which this does once a reason is told. Prints one
line for each step that held, and the reasons as JSON at the end.
"""

import concurrent.futures
import json
import socket
import sys

import tinker
from tinker.lib.queue_state_logger import QueueStateLogger

BASE_URL, BASE_MODEL, PORT = sys.argv[1:4]
told = []


def open_the_gate(self, state, reason):
    """In place of the SDK's own, which logs what waits for a quarter of an hour."""
    if reason and not told:
        socket.create_connection(("127.0.0.1", int(PORT))).close()
    if reason:
        told.append([state.value, reason])


QueueStateLogger.on_queue_state_change = open_the_gate


def create(_):
    service = tinker.ServiceClient(base_url=BASE_URL)
    return service.create_lora_training_client(base_model=BASE_MODEL, rank=4)


with concurrent.futures.ThreadPoolExecutor() as pool:
    clients = list(pool.map(create, range(2)))
print("ok: both have a model in the end", flush=True)

assert len({client.model_id for client in clients}) == 2, clients
states = {state for state, _ in told}
assert states == {"paused_capacity"}, told
print("ok: the one that waited was told so", flush=True)
print(json.dumps({"reasons": sorted({reason for _, reason in told})}), flush=True)
