"""What a robot does that is integrated with openpi-client; runs in that client's environment, not in ours.

    python openpi_peer.py URL INPUT.npz OUTPUT.npz plain|broker

INPUT: observations by key, [n, …] each, sent one after another. OUTPUT: `actions` [n, …], and `metadata` and
`timing` as JSON. plain: each answer as it is; broker: through openpi's ActionChunkBroker, one action each.
"""

import json
import os
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main(url: str, given: str, out: str, how: str) -> None:
    client = WebsocketClientPolicy(url, api_key=os.environ.get("OPENPI_API_KEY"))
    metadata = client.get_server_metadata()
    policy = ActionChunkBroker(client, metadata["n_action_steps"]) if how == "broker" else client
    policy.reset()
    with np.load(given) as file:
        rows = [dict(zip(file, row, strict=True)) for row in zip(*file.values(), strict=True)]
    answers = [policy.infer({**row, "prompt": "push the T"}) for row in rows]
    np.savez(
        out,
        actions=np.stack([answer["actions"] for answer in answers]),
        metadata=json.dumps(metadata),
        timing=json.dumps([answer["server_timing"] for answer in answers]),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
