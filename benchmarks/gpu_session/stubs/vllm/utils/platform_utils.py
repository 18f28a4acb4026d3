import os

import torch


def get_device_name_as_file_name() -> str:
    """Whose tuned tiles are looked for: the card's, unless $PEER_DEVICE_NAME says otherwise."""
    return os.environ.get("PEER_DEVICE_NAME") or torch.cuda.get_device_name().replace(" ", "_")
